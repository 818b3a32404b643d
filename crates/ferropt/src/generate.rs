//! `ferropt generate`: continues a text with a trained model.

use anyhow::{Context, ensure};
use ferropt_model::{Choice, Sampler};
use ferropt_train::inference::{Completion, Inference};
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::PathBuf;

/// Arguments of `ferropt generate`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES, args_override_self = true)]
pub(crate) struct Args {
    /// Run folder of `ferropt train`, or one checkpoint directory
    #[arg(long, value_name = "RUN")]
    model: PathBuf,
    /// Step of the checkpoint; the latest whole one unless given
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<u64>,
    /// Tokens to generate at most; ends earlier at the end of a document
    #[arg(long, value_name = "N", default_value_t = 100)]
    max_tokens: usize,
    /// Always take the likeliest token
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "seed"])]
    greedy: bool,
    /// Divides the logits; below 1 is more careful, above 1 wilder
    #[arg(long, value_name = "X", default_value_t = 1.0, allow_negative_numbers = true, value_parser = temperature)]
    temperature: f32,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K", value_parser = top_k)]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that together have probability P
    #[arg(long, value_name = "P", default_value_t = 0.95, allow_negative_numbers = true, value_parser = top_p)]
    top_p: f32,
    /// Seed of the choices; the same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Threads; all available unless given. The text does not depend on it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object when done: prompt, text, tokens, finish_reason, seconds, tokens_per_second
    #[arg(long)]
    json: bool,
    /// Text to continue; standard input is read when it is absent
    prompt: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  ferropt generate --model runs/a \"Once upon a time\"
  ferropt generate --model runs/a --greedy --max-tokens 50 \"fn main() {\"
  ferropt generate --model runs/a --checkpoint 2000 --temperature 0.8 --top-k 40 --seed 7 \"The sea\"
  ferropt generate --model runs/a --json \"The sea\" | jq -r .text
  cat prompt.txt | ferropt generate --model runs/a";

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let prompt = match args.prompt {
        Some(prompt) => prompt,
        None => read_prompt()?,
    };
    let choice = if args.greedy {
        Choice::Greedy
    } else {
        Choice::Sample { temperature: args.temperature, top_k: args.top_k, top_p: args.top_p }
    };
    let sampler = Sampler::new(choice, args.seed)?;
    let model = Inference::open(&args.model, args.checkpoint, args.threads)?;
    for damage in model.damaged() {
        eprintln!(
            "warning: passed over a damaged checkpoint, using the one of step {}: {damage:#}",
            model.step()
        );
    }
    let printed = if args.json {
        print_json(&model, &prompt, args.max_tokens, &sampler)
    } else {
        stream(&model, &prompt, args.max_tokens, &sampler)
    };
    match printed {
        // Whoever reads has seen enough, as `head` does.
        Err(error)
            if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) =>
        {
            Ok(())
        }
        printed => printed,
    }
}

/// Prints the prompt, then text as it is made.
fn stream(model: &Inference, prompt: &str, max_tokens: usize, sampler: &Sampler) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let mut ends_line = prompt.ends_with('\n');
    let mut begun = false;
    let completion = model.generate(prompt, max_tokens, sampler, &mut |text| {
        // Not before the model took the prompt: an error message should stand alone.
        if !std::mem::replace(&mut begun, true) {
            out.write_all(prompt.as_bytes())?;
        }
        ends_line = text.ends_with('\n');
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    })?;
    if !begun {
        out.write_all(prompt.as_bytes())?;
    }
    if !ends_line {
        out.write_all(b"\n")?;
    }
    out.flush()?;
    if std::io::stderr().is_terminal() {
        eprintln!("{}", speed(&completion));
    }
    Ok(())
}

fn print_json(model: &Inference, prompt: &str, max_tokens: usize, sampler: &Sampler) -> anyhow::Result<()> {
    let completion = model.generate(prompt, max_tokens, sampler, &mut |_| Ok(()))?;
    let object = serde_json::json!({
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens.len(),
        "finish_reason": completion.finish.name(),
        "seconds": (completion.prompt_time + completion.time).as_secs_f64(),
        "tokens_per_second": completion.tokens_per_second(),
    });
    Ok(writeln!(std::io::stdout(), "{object}")?)
}

fn speed(completion: &Completion) -> String {
    format!(
        "{} tokens of prompt in {:.2} s, {} generated in {:.2} s: {:.1} tokens/s",
        completion.prompt_tokens,
        completion.prompt_time.as_secs_f64(),
        completion.tokens.len(),
        completion.time.as_secs_f64(),
        completion.tokens_per_second()
    )
}

fn read_prompt() -> anyhow::Result<String> {
    let mut input = std::io::stdin();
    ensure!(
        !input.is_terminal(),
        "there is no prompt: give it as the last argument, or through a pipe, for example\n  \
         ferropt generate --model RUN \"Once upon a time\""
    );
    let mut prompt = String::new();
    input.read_to_string(&mut prompt).context("the prompt on standard input cannot be read as UTF-8 text")?;
    Ok(prompt)
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text).filter(|x| *x > 0.0).ok_or_else(|| "expected a number above 0, or --greedy".into())
}

fn top_p(text: &str) -> Result<f32, String> {
    number(text)
        .filter(|p| *p > 0.0 && *p <= 1.0)
        .ok_or_else(|| "expected a probability above 0, up to 1".into())
}

fn top_k(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|k| *k > 0).ok_or_else(|| "expected a whole number, 1 or more".into())
}

fn number(text: &str) -> Option<f32> {
    text.parse().ok().filter(|x: &f32| x.is_finite())
}
