//! `ferropt checkpoint quantize`: writes a model with weights of few bits.

use super::{Bar, Which, open, size};
use anyhow::ensure;
use clap::ValueEnum;
use ferropt_device::WeightFormat;
use ferropt_model::RoundingError;
use ferropt_train::checkpoint::human_bytes;
use ferropt_train::models::Whole;
use ferropt_train::quantise::{Options, Quantised, TOKENS, quantise};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `ferropt checkpoint quantize`.
#[derive(clap::Args)]
#[command(after_help = "\
Numbers are rounded to nearest, or, with text to calibrate by, so that their errors make up
for each other (GPTQ). That is closer to the original, and takes about as long as scoring four
times the text. Text should be like what the model will read. The new folder is used like any
other model; it has no way back to the original numbers.

Examples:
  ferropt checkpoint quantize runs/a my-int8 --weights int8
  ferropt checkpoint quantize runs/a my-int4 --weights int4 --calibrate texts.jsonl
  ferropt checkpoint quantize opt-1.3b opt-1.3b-int4 --weights int4 --calibrate books/ --tokens 131072")]
pub(super) struct Quantize {
    /// Model: a folder or file of any format, or a run folder
    source: PathBuf,
    /// Folder to write, which must not exist
    destination: PathBuf,
    /// Bits of a weight
    #[arg(long, value_enum)]
    weights: Weights,
    /// Text for GPTQ: a file or folder (.txt, .jsonl, also .gz, .xz, .zst); may be repeated
    #[arg(long, value_name = "PATH", num_args = 1..)]
    calibrate: Vec<PathBuf>,
    /// Field of its JSON lines that holds the text
    #[arg(long, value_name = "NAME", default_value = "text", requires = "calibrate")]
    text_field: String,
    /// Tokens of that text that are used, from its beginning on [default: 65536]
    #[arg(long, value_name = "N", requires = "calibrate")]
    tokens: Option<usize>,
    /// How codes are chosen; gptq with --calibrate, nearest without, unless given
    #[arg(long, value_enum)]
    method: Option<Method>,
    /// Tokenizer: a folder, a tokenizer.json, or the name of a downloaded model; what lies beside the weights unless given
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,
    /// Start another file before one is larger; bytes, or with KB, MB, GB, KiB, MiB, GiB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    max_shard_size: u64,
    /// Threads; all available unless given. Results do not depend on it
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    which: Which,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Weights {
    /// 8.25 bits with the groups' scales
    Int8,
    /// 4.5 bits with the groups' scales and minima
    Int4,
    /// 3.5 bits with the groups' scales and minima
    Int3,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Method {
    /// The nearest to each number
    Nearest,
    /// So that errors make up for each other on calibration text
    Gptq,
}

pub(super) fn run(args: Quantize) -> anyhow::Result<()> {
    match args.method {
        Some(Method::Gptq) => ensure!(
            !args.calibrate.is_empty(),
            "--method gptq rounds by what text does in the model; name some with --calibrate"
        ),
        Some(Method::Nearest) => ensure!(
            args.calibrate.is_empty(),
            "--method nearest looks at no text; leave out --calibrate, or use --method gptq"
        ),
        None => {}
    }
    let named = open(&args.source, &args.which, Whole::Checksums)?;
    let options = Options {
        weights: match args.weights {
            Weights::Int8 => WeightFormat::Int8,
            Weights::Int4 => WeightFormat::Int4,
            Weights::Int3 => WeightFormat::Int3,
        },
        calibrate: args.calibrate.clone(),
        text_field: args.text_field.clone(),
        tokens: args.tokens.unwrap_or(TOKENS),
        tokenizer: args.tokenizer.clone(),
        threads: args.threads,
        max_shard_bytes: args.max_shard_size,
    };
    let bar = Bar::new("{bar:40} {percent} %, {eta} to go");
    let quantised = quantise(&named, &args.destination, &options, &mut |n, of| bar.show(n, of));
    bar.0.finish_and_clear();
    let quantised = quantised?;
    let source = &named.source;
    if let Some(text) = &quantised.quantisation.calibration
        && text.tokens < source.config().feed_forward as u64
    {
        tell!(
            "warning: {} tokens of text are few for a model with feed_forward = {}; more text makes a better model",
            text.tokens,
            source.config().feed_forward
        );
    }
    if options.tokenizer.is_none() && source.tokenizer_files().is_empty() {
        tell!(
            "warning: there is no tokenizer beside {}, so there is none in {}",
            source.path().display(),
            args.destination.display()
        );
    }
    let mut out = std::io::stdout().lock();
    if args.json {
        let object = as_json(&args, source.bytes(), &quantised);
        writeln!(out, "{}", serde_json::to_string_pretty(&object)?)?;
        return Ok(());
    }
    writeln!(out, "{}: {}", args.destination.display(), quantised.quantisation)?;
    writeln!(
        out,
        "{} of weights instead of {}, in {} files",
        human_bytes(quantised.written.weights),
        human_bytes(source.bytes()),
        quantised.written.files.len()
    )?;
    writeln!(out, "\n{:<26} {:>16} {:>16}", "error of", "numbers", "outputs")?;
    for (kind, error) in &quantised.errors {
        let percent =
            |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.2} %", 100.0 * share));
        let (numbers, outputs) = (relative(error.weights), error.outputs.and_then(relative));
        writeln!(out, "{kind:<26} {:>16} {:>16}", percent(numbers), percent(outputs))?;
    }
    Ok(())
}

/// Root of the mean square of the changes, as a share of what was changed.
fn relative((changed, all): (f64, f64)) -> Option<f64> {
    (all > 0.0).then(|| (changed / all).sqrt())
}

fn as_json(args: &Quantize, source_bytes: u64, quantised: &Quantised) -> serde_json::Value {
    let error = |error: &RoundingError| json!({ "numbers": relative(error.weights), "outputs": error.outputs.and_then(relative) });
    let errors: serde_json::Map<_, _> =
        quantised.errors.iter().map(|(kind, sums)| (kind.clone(), error(sums))).collect();
    json!({
        "path": args.destination,
        "source": args.source,
        "source_bytes": source_bytes,
        "bytes": quantised.written.weights,
        "files": quantised.written.files,
        "quantization_config": quantised.quantisation,
        "errors": errors,
    })
}
