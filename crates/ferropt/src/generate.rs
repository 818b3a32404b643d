//! `ferropt generate`: continues texts with a trained model.

use crate::model::{
    DraftArgs, MarksArgs, ModelArgs, SamplingArgs, each_line, is_jsonl, refused, tokens_at_most, unescaped,
};
use anyhow::{Context, Result, ensure};
use ferropt_data::text_in;
use ferropt_engine::{Completion, Event, Handle, Parameters, Request, Text, Token};
use ferropt_train::inference::Model;
use serde_json::{Value, json};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Arguments of `ferropt generate`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    draft: DraftArgs,
    #[command(flatten)]
    marks: MarksArgs,
    /// Tokens to generate at most; ends earlier at the end of a document
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_tokens: usize,
    /// Tokens to generate at least
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    min_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// End the text before this string (\n is a line end); may be repeated
    #[arg(long, value_name = "TEXT", action = clap::ArgAction::Append)]
    stop: Vec<String>,
    /// Go on at the end of a document
    #[arg(long)]
    ignore_end: bool,
    /// Texts for each prompt
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true)]
    n: usize,
    /// Compute so many texts, and print the N likeliest
    #[arg(long, value_name = "N")]
    best_of: Option<usize>,
    /// Search for the likeliest text, with so many candidates at a time
    #[arg(long, value_name = "N", conflicts_with_all = ["greedy", "temperature", "seed"])]
    beams: Option<usize>,
    /// With --beams: above 0 favours longer texts [default: 1]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    length_penalty: Option<f32>,
    /// With --json: log-probability of each token, and of the K likeliest at its place
    #[arg(long, value_name = "K", requires = "json")]
    log_probs: Option<usize>,
    /// With --log-probs: those of the prompt's tokens too
    #[arg(long, requires = "log_probs")]
    echo: bool,
    /// Continue each line of a file, or the "prompt" of each object of a .jsonl file
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// With --file: field of a .jsonl file's objects that holds the text to continue [default: prompt]
    #[arg(long, value_name = "NAME")]
    text_field: Option<String>,
    /// With --file: texts that are computed together. They do not depend on it [default: 16]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Print a JSON object for each text: prompt, text, tokens, finish_reason, seconds, tokens_per_second, load_seconds,
    /// drafted, accepted
    #[arg(long)]
    json: bool,
    /// Text to continue; standard input without its last line end when it is absent
    prompt: Option<String>,
}

/// Texts of a file that are computed together.
const BATCH: usize = 16;

const EXAMPLES: &str = "\
Examples:
  ferropt generate --model runs/a \"Once upon a time\"
  ferropt generate --model runs/a --greedy --max-tokens 50 \"fn main() {\"
  ferropt generate --model runs/a --checkpoint 2000 --temperature 0.8 --top-k 40 --seed 7 \"The sea\"
  ferropt generate --model runs/a --json \"The sea\" | jq -r .text
  ferropt generate --model runs/a --weights int8 --stop '\\n' --n 3 \"The sea\"
  ferropt generate --model runs/a --beams 4 \"The sea\"
  ferropt generate --model runs/a --draft runs/small \"The sea\"
  ferropt generate --model runs/a --file prompts.jsonl --json > texts.jsonl
  cat prompt.txt | ferropt generate --model runs/a";

pub(crate) fn run(args: Args) -> Result<()> {
    // A requirement is nothing to clap where there is what excludes the one that is required.
    ensure!(
        args.length_penalty.is_none() || args.beams.is_some(),
        "--length-penalty compares the texts of a search; search with --beams N, without --greedy and --temperature"
    );
    let parameters = args.parameters();
    parameters.check().map_err(refused)?;
    match &args.file {
        Some(file) => run_file(&args, file, &parameters),
        None => {
            ensure!(
                args.text_field.is_none(),
                "--text-field names a field of a .jsonl file; name the file with --file"
            );
            ensure!(args.batch.is_none(), "--batch is for the texts of a file; name it with --file");
            run_prompt(&args, parameters)
        }
    }
}

impl Args {
    fn parameters(&self) -> Parameters {
        Parameters {
            max_tokens: Some(self.max_tokens),
            min_tokens: self.min_tokens,
            stop: self.stop.iter().map(|stop| unescaped(stop)).collect(),
            ignore_end: self.ignore_end,
            n: self.n,
            best_of: self.best_of,
            length_penalty: self.length_penalty.unwrap_or(Parameters::default().length_penalty),
            log_probs: self.log_probs,
            echo: self.echo.then_some(0),
            ..self.sampling.parameters(self.beams)
        }
    }
}

fn run_prompt(args: &Args, parameters: Parameters) -> Result<()> {
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => read_prompt()?,
    };
    let together = parameters.computed().max(parameters.beams.unwrap_or(1));
    let longest = tokens_at_most(&prompt).saturating_add(args.max_tokens);
    let model = args.model.open_with(&args.draft, together, Some(longest))?;
    let engine = &model.engine;
    let started = Instant::now();
    let request = Request { prompt: args.marks.tokens(engine.tokenizer(), &prompt)?, parameters };
    if args.json || args.n > 1 {
        let completion = engine.submit(request).map_err(refused)?.complete()?;
        let time = started.elapsed();
        return print(args, &model, (None, &prompt), &completion, time);
    }
    stream(engine, &prompt, request, started)
}

fn run_file(args: &Args, file: &Path, parameters: &Parameters) -> Result<()> {
    let batch = args.batch.unwrap_or(BATCH);
    ensure!(batch > 0, "--batch: 0 texts at a time would never end; use 1 or more");
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let named = args.text_field.as_deref();
    let field = is_jsonl(file, named)?.then(|| named.unwrap_or("prompt"));
    let prompts = prompts(&text, field).with_context(|| format!("cannot use {}", file.display()))?;
    let longest = prompts.iter().map(|(_, prompt)| tokens_at_most(prompt)).max().unwrap_or(0);
    let together = batch.max(parameters.beams.unwrap_or(1));
    let longest = Some(longest.saturating_add(args.max_tokens));
    let model = args.model.open_with(&args.draft, together, longest)?;
    let engine = &model.engine;
    let request = |(line, prompt): &(usize, String)| -> Result<Request> {
        let named = || format!("line {line} of {}", file.display());
        let prompt = args.marks.tokens(engine.tokenizer(), prompt).with_context(named)?;
        let request = Request { prompt, parameters: parameters.clone() };
        request.check(&engine.capacity()).map_err(refused).with_context(named)?;
        Ok(request)
    };
    // Everything is looked at before anything is computed.
    let requests: Vec<Request> = prompts.iter().map(request).collect::<Result<_>>()?;
    let (mut done, started) = (prompts.iter(), Instant::now());
    engine.complete_all(requests.into_iter().map(Ok), 2 * batch, |completion| {
        let Some((line, prompt)) = done.next() else { return Ok(()) };
        print(args, &model, (Some(*line), prompt), &completion, started.elapsed())
    })
}

/// The prompts of a file, with the numbers of their lines: the lines, or what a field of the object on each holds.
fn prompts(text: &str, field: Option<&str>) -> Result<Vec<(usize, String)>> {
    let object = |object| text_in(&object, field.unwrap_or_default());
    let prompts = each_line(text, field.is_some(), |line| line.into(), object)?;
    ensure!(!prompts.is_empty(), "it has no lines");
    Ok(prompts)
}

/// Prints the prompt, then text as it is made.
fn stream(engine: &Handle, prompt: &str, request: Request, started: Instant) -> Result<()> {
    let prompt_tokens = request.prompt.len();
    let mut out = std::io::stdout().lock();
    let (mut ends_line, mut begun) = (prompt.ends_with('\n'), None);
    let mut usage = None;
    for event in engine.submit(request).map_err(refused)? {
        // Not before there is something behind the prompt: an error message should stand alone.
        if begun.is_none() && !matches!(event, Event::Read | Event::Failed(_)) {
            begun = Some(started.elapsed());
            out.write_all(prompt.as_bytes())?;
        }
        match event {
            Event::Text { piece, .. } => {
                ends_line = piece.text.ends_with('\n') || (piece.text.is_empty() && ends_line);
                out.write_all(piece.text.as_bytes())?;
                out.flush()?;
            }
            Event::Failed(message) => anyhow::bail!(message),
            Event::Done(all) => usage = Some(all),
            Event::Prompt(_) | Event::Read | Event::End { .. } | Event::Embedding(_) => {}
        }
    }
    if !ends_line {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    if let (true, Some(usage), Some(begun)) = (std::io::stderr().is_terminal(), usage, begun) {
        let time = started.elapsed() - begun;
        tell!(
            "{prompt_tokens} tokens of prompt in {:.2} s, {} generated in {:.2} s: {:.1} tokens/s",
            begun.as_secs_f64(),
            usage.generated,
            time.as_secs_f64(),
            rate(usage.generated, time)
        );
        if usage.drafted > 0 {
            tell!(
                "the draft guessed {} tokens, of which {} were right ({:.0} %)",
                usage.drafted,
                usage.accepted,
                100.0 * usage.accepted as f64 / usage.drafted as f64
            );
        }
    }
    Ok(())
}

/// Prints complete texts that follow a prompt, of some line of a file.
fn print(
    args: &Args,
    model: &Model,
    (line, prompt): (Option<usize>, &str),
    completion: &Completion,
    time: Duration,
) -> Result<()> {
    let mut out = std::io::stdout().lock();
    for (number, text) in completion.choices.iter().enumerate() {
        if args.json {
            let mut object = object(model, prompt, completion, number, text, time);
            if let Some(line) = line {
                object["line"] = line.into();
            }
            let listed = |tokens: &[Token]| tokens.iter().map(|t| token_object(&model.engine, t)).collect();
            if args.log_probs.is_some() {
                object["log_probs"] = listed(&text.tokens);
            }
            if args.echo {
                object["prompt_log_probs"] = listed(&completion.prompt);
            }
            writeln!(out, "{object}")?;
        } else {
            let end = if text.text.ends_with('\n') { "" } else { "\n" };
            write!(out, "{prompt}{}{end}", text.text)?;
        }
    }
    Ok(out.flush()?)
}

fn object(
    model: &Model,
    prompt: &str,
    completion: &Completion,
    number: usize,
    text: &Text,
    time: Duration,
) -> Value {
    json!({
        "prompt": prompt,
        "choice": number,
        "text": text.text,
        "tokens": text.tokens.len(),
        "finish_reason": text.finish.map(|finish| finish.name()),
        "seconds": time.as_secs_f64(),
        "tokens_per_second": rate(completion.usage.generated, time),
        "load_seconds": model.load_seconds,
        "drafted": completion.usage.drafted,
        "accepted": completion.usage.accepted,
    })
}

fn token_object(engine: &Handle, token: &Token) -> Value {
    let text = |id: u32| String::from_utf8_lossy(engine.tokenizer().token_bytes(id)).into_owned();
    let top: Vec<Value> = token
        .top
        .iter()
        .map(|(id, log_prob)| json!({ "id": id, "text": text(*id), "log_prob": log_prob }))
        .collect();
    json!({ "id": token.id, "text": text(token.id), "log_prob": token.log_prob, "top": top })
}

/// Tokens per second; 0 for none.
fn rate(tokens: usize, time: Duration) -> f64 {
    tokens as f64 / time.as_secs_f64().max(1e-9)
}

fn read_prompt() -> Result<String> {
    let mut input = std::io::stdin();
    ensure!(
        !input.is_terminal(),
        "there is no prompt: give it as the last argument, or through a pipe, for example\n  \
         ferropt generate --model RUN \"Once upon a time\""
    );
    let mut prompt = String::new();
    input.read_to_string(&mut prompt).context("the prompt on standard input cannot be read as UTF-8 text")?;
    // Files and `echo` end with a line end that no one means to be continued behind.
    if prompt.ends_with('\n') {
        prompt.pop();
        if prompt.ends_with('\r') {
            prompt.pop();
        }
    }
    Ok(prompt)
}
