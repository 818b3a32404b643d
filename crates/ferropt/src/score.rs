//! `ferropt score`: how likely a model finds texts.

use crate::model::{MarksArgs, ModelArgs, each_line, is_jsonl, refused, tokens_at_most};
use anyhow::{Context, Result, ensure};
use ferropt_data::text_in;
use ferropt_engine::{Handle, Request, Score, scoring};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::{IsTerminal, Read, Write};
use std::path::PathBuf;

/// Arguments of `ferropt score`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    marks: MarksArgs,
    /// Texts that are computed together. Results do not depend on it
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// Leave out the tokens' own log-probabilities
    #[arg(long)]
    summary: bool,
    /// Field of a .jsonl file's objects that holds the text [default: text, or context and continuation]
    #[arg(long, value_name = "NAME", requires = "file")]
    text_field: Option<String>,
    /// A text on each line; or, if it ends in .jsonl, objects with "text", or with "context" and "continuation". Standard
    /// input is read as lines of text when it is absent
    file: Option<PathBuf>,
}

const EXAMPLES: &str = "\
Examples:
  ferropt score --model runs/a texts.txt > scores.jsonl
  ferropt score --model runs/a --weights int8 pairs.jsonl
  ferropt score --model runs/a --text-field body articles.jsonl
  echo \"The sea is blue.\" | ferropt score --model runs/a

For each text one JSON object: log_prob (sum, in nats), tokens, greedy (whether each token is the likeliest at its place),
and log_probs of the tokens. A text is scored behind </s>, a continuation behind </s> and its context; with
--no-end-in-front the first token of all follows nothing, and is not scored. The last line, on
standard error, has the perplexity of all tokens: exp(-mean log-probability), and bits per byte of text.";

/// What an object of a .jsonl file has, unless --text-field says otherwise.
const EITHER: &str = "an object has a \"text\", or a \"context\" and a \"continuation\"";

/// What to score: a line's number; what comes before, and the text.
type Item = (usize, (String, String));

pub(crate) fn run(args: Args) -> Result<()> {
    ensure!(args.batch > 0, "--batch: 0 texts at a time would never end; use 1 or more");
    let field = args.text_field.as_deref();
    let (name, text, jsonl) = match &args.file {
        Some(file) => {
            let text =
                std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
            (file.display().to_string(), text, is_jsonl(file, field)?)
        }
        None => ("standard input".into(), read_input()?, false),
    };
    let items = items(&text, jsonl, field).with_context(|| format!("cannot use {name}"))?;
    let longest =
        items.iter().map(|(_, (context, text))| tokens_at_most(context) + tokens_at_most(text)).max();
    let engine = &args.model.open(args.batch, longest)?.engine;
    let request = |(line, (context, text)): &Item| -> Result<Request> {
        let named = || format!("line {line} of {name}");
        for part in [context, text] {
            args.marks.tell(engine.tokenizer(), part);
        }
        let request = scoring(engine.tokenizer(), context, text, args.marks.marks()).with_context(named)?;
        request.check(&engine.capacity()).map_err(refused).with_context(named)?;
        Ok(request)
    };
    // Everything is looked at before anything is computed.
    let requests: Vec<Request> = items.iter().map(request).collect::<Result<_>>()?;
    let bar = bar(items.len());
    let mut out = std::io::stdout().lock();
    let (mut log_prob, mut tokens, mut bytes) = (0.0, 0, 0);
    let mut scored = items.iter();
    engine.complete_all(requests.into_iter().map(Ok), 2 * args.batch, |completion| {
        let score = Score::from(completion);
        let Some((line, _)) = scored.next() else { return Ok(()) };
        log_prob += score.log_prob;
        tokens += score.tokens.len();
        bytes += score.tokens.iter().map(|token| engine.tokenizer().byte_len(token.id)).sum::<usize>();
        writeln!(out, "{}", object(engine, *line, &score, args.summary))?;
        bar.inc(1);
        Ok(())
    })?;
    bar.finish_and_clear();
    out.flush()?;
    tell!(
        "{} texts, {tokens} tokens: perplexity {:.4}, {:.4} bits per byte",
        items.len(),
        (-log_prob / tokens.max(1) as f64).exp(),
        -log_prob / std::f64::consts::LN_2 / bytes.max(1) as f64
    );
    Ok(())
}

fn object(engine: &Handle, line: usize, score: &Score, summary: bool) -> Value {
    let mut object = json!({
        "line": line,
        "log_prob": score.log_prob,
        "tokens": score.tokens.len(),
        "greedy": score.greedy,
    });
    if !summary {
        let text = |id: u32| String::from_utf8_lossy(engine.tokenizer().token_bytes(id)).into_owned();
        let token =
            |t: &ferropt_engine::Token| json!({ "id": t.id, "text": text(t.id), "log_prob": t.log_prob });
        object["log_probs"] = score.tokens.iter().map(token).collect();
    }
    object
}

fn items(text: &str, jsonl: bool, text_field: Option<&str>) -> Result<Vec<Item>> {
    let items = each_line(
        text,
        jsonl,
        |line| (String::new(), line.into()),
        |object| {
            let has = |name: &str| object.get(name).is_some();
            let pair = text_field.is_none() && !has("text") && (has("context") || has("continuation"));
            let text = |field: &str| text_in(&object, field);
            match (text_field, pair) {
                (Some(field), _) => Ok((String::new(), text(field)?)),
                (None, true) => Ok((text("context")?, text("continuation")?)),
                (None, false) => Ok((String::new(), text("text").context(EITHER)?)),
            }
        },
    )?;
    ensure!(!items.is_empty(), "it has no texts");
    Ok(items)
}

fn bar(count: usize) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} texts, {per_sec}, {eta} left");
    ProgressBar::new(count as u64).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn read_input() -> Result<String> {
    let mut input = std::io::stdin();
    ensure!(
        !input.is_terminal(),
        "there is nothing to score: name a file, or pipe text in, for example\n  ferropt score --model RUN texts.txt"
    );
    let mut text = String::new();
    input.read_to_string(&mut text).context("standard input cannot be read as UTF-8 text")?;
    Ok(text)
}
