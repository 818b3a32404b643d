//! `ferropt checkpoint`: looks into, converts, quantises and verifies weights.

mod copies;
mod quantize;

use anyhow::{bail, ensure};
use clap::{Subcommand, ValueEnum};
use ferropt_model::PRESETS;
use ferropt_model::formats::{self, Difference, Dtype, Options, Source, Target};
use ferropt_train::checkpoint::{bytes_of, human_bytes};
use ferropt_train::models::{self, Named, Whole};
use ferropt_train::planner::grouped;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

/// Arguments of `ferropt checkpoint`.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

const EXAMPLES: &str = "\
What PATH may be, everywhere:
  a Hugging Face folder     with model*.safetensors or pytorch_model*.bin
  metaseq's .pt files       the folder, or one file: restored.pt, reshard-model_part-N.pt, ...
  a run of `ferropt train`  the run folder, for its newest whole checkpoint, or one checkpoint
  a quantised folder        which `ferropt checkpoint quantize` wrote (not to be converted)

Examples:
  ferropt checkpoint inspect opt-125m
  ferropt checkpoint convert runs/a my-model --to hf --dtype bf16
  ferropt checkpoint convert opt-1.3b parts --to metaseq --parts 2
  ferropt checkpoint quantize runs/a my-int4 --weights int4 --calibrate texts.jsonl
  ferropt checkpoint verify my-model runs/a
  ferropt checkpoint copies s3://bucket/runs/a --verify";

#[derive(Subcommand)]
enum Action {
    /// Show format, sizes, files and tensors
    Inspect(Inspect),
    /// Write the weights, with their tokenizer, in another format
    Convert(Convert),
    /// Write the weights in 8, 4 or 3 bits, with their tokenizer
    Quantize(quantize::Quantize),
    /// Read every value and checksum, or compare two models value by value
    Verify(Verify),
    /// List, verify or fetch the checkpoints that a run has in an object store
    Copies(copies::Copies),
    /// Show or remove weights that are kept, ready to be used, so that models open in a moment
    Cache(crate::cache::Args),
}

/// Arguments of `ferropt checkpoint inspect`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ferropt checkpoint inspect opt-125m
  ferropt checkpoint inspect opt-125m --tensors
  ferropt checkpoint inspect runs/a --json | jq .config
  ferropt checkpoint inspect 1.3b/reshard.pt --preset 1.3b")]
struct Inspect {
    /// Model: a folder or file of any format, or a run folder
    path: PathBuf,
    #[command(flatten)]
    which: Which,
    /// List every tensor
    #[arg(long)]
    tensors: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Arguments of `ferropt checkpoint convert`.
#[derive(clap::Args)]
#[command(after_help = "\
Tensors keep their bits unless --dtype is given. The new folder is filled beside its place
and renamed when it is complete; memory holds a few megabytes, whatever the model's size.

Examples:
  ferropt checkpoint convert runs/a my-model --to hf
  ferropt checkpoint convert 350m/reshard.pt opt-350m --to hf --preset 350m
  ferropt checkpoint convert opt-1.3b opt-1.3b-bf16 --to hf --dtype bf16 --max-shard-size 1GB
  ferropt checkpoint convert my-model out --to metaseq --parts 2")]
struct Convert {
    /// Model: a folder or file of any format, or a run folder
    source: PathBuf,
    /// Folder to write, which must not exist
    destination: PathBuf,
    /// Format
    #[arg(long, value_enum)]
    to: To,
    /// Type of the elements
    #[arg(long, value_enum, default_value = "keep")]
    dtype: Type,
    /// metaseq: tensor-parallel parts, with q, k and v fused. Without it one restored.pt is written, with q, k and v apart
    #[arg(long, value_name = "N")]
    parts: Option<usize>,
    /// Hugging Face: start another file before one is larger; bytes, or with KB, MB, GB, KiB, MiB, GiB [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_shard_size: Option<u64>,
    #[command(flatten)]
    which: Which,
}

/// Arguments of `ferropt checkpoint verify`.
#[derive(clap::Args)]
#[command(after_help = "\
With one model: every tensor is there, has its shape and holds finite values; checksums are
right where the format has them; copies in tensor-parallel parts agree. With two: a table of
the tensors that differ; formats may be different. Exit status 0 means that nothing was found.

Examples:
  ferropt checkpoint verify opt-125m
  ferropt checkpoint verify opt-125m 125m/reshard.pt")]
struct Verify {
    /// Model: a folder or file of any format, or a run folder
    path: PathBuf,
    /// Another model, to compare with
    other: Option<PathBuf>,
    #[command(flatten)]
    which: Which,
}

/// What a path alone may leave open.
#[derive(clap::Args)]
struct Which {
    /// Of a run folder: step of the checkpoint; the newest whole one unless given
    #[arg(long, value_name = "STEP")]
    checkpoint: Option<u64>,
    /// Of metaseq files that do not say how many heads there are: the model that they are
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    /// Hugging Face folder with safetensors
    Hf,
    /// Hugging Face folder with pytorch_model.bin
    HfBin,
    /// metaseq's .pt
    Metaseq,
}

#[derive(Clone, Copy, ValueEnum)]
enum Type {
    /// As they are
    Keep,
    /// IEEE single
    F32,
    /// IEEE half
    F16,
    /// bfloat16
    Bf16,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.action {
        Action::Inspect(args) => inspect(args),
        Action::Convert(args) => convert(args),
        Action::Quantize(args) => quantize::run(args),
        Action::Verify(args) => verify(args),
        Action::Copies(args) => copies::run(args),
        Action::Cache(args) => crate::cache::run(args),
    }
}

fn open(path: &PathBuf, which: &Which, whole: Whole<'_>) -> anyhow::Result<Named> {
    let named = models::open(path, which.checkpoint, which.preset.as_deref(), whole)?;
    for damage in &named.damaged {
        let used = named.checkpoint.as_ref().map_or(0, |(_, step)| *step);
        tell!("warning: passed over a damaged checkpoint, using the one of step {used}: {damage:#}");
    }
    Ok(named)
}

fn inspect(args: Inspect) -> anyhow::Result<()> {
    let named = open(&args.path, &args.which, Whole::Sizes)?;
    let source = &named.source;
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&as_json(&named))?)?;
        return Ok(());
    }
    let c = source.config();
    let preset = PRESETS.iter().find(|p| {
        let p = p.config();
        (p.layers, p.heads, p.width, p.post_norm) == (c.layers, c.heads, c.width, c.post_norm)
    });
    writeln!(out, "path        {}", source.path().display())?;
    if let Some((_, step)) = named.checkpoint {
        writeln!(out, "step        {step}")?;
    }
    writeln!(out, "format      {}", source.format())?;
    if let Some(quantisation) = source.quantisation() {
        writeln!(out, "weights     {quantisation}")?;
    }
    writeln!(
        out,
        "model       {}{} parameters",
        preset.map_or(String::new(), |p| format!("{}, ", p.name)),
        grouped(c.parameter_count())
    )?;
    writeln!(
        out,
        "sizes       {} layers, {} heads, width {}, feed-forward {}, vocabulary {}, {} positions",
        c.layers, c.heads, c.width, c.feed_forward, c.vocab, c.positions
    )?;
    if c.has_projections() || c.post_norm {
        let norms = if c.post_norm { "behind the sums" } else { "before the blocks" };
        writeln!(out, "            embedding width {}, layer norms {norms}", c.embedding_width)?;
    }
    if c.own_head {
        writeln!(out, "            LM head of its own")?;
    }
    writeln!(out, "sizes from  {}", source.config_from())?;
    let types: Vec<String> = types(source).iter().map(|(dtype, n)| format!("{n} of {dtype}")).collect();
    writeln!(out, "tensors     {}, {}", types.join(", "), human_bytes(source.bytes()))?;
    for file in source.files() {
        writeln!(out, "file        {} ({})", file.display(), human_bytes(std::fs::metadata(file)?.len()))?;
    }
    for (_, file) in source.tokenizer_files() {
        writeln!(out, "beside      {}", file.display())?;
    }
    if args.tensors {
        writeln!(out, "\n{:<58} {:<5} {:<16} {:>14}", "tensor", "type", "shape", "bytes")?;
        for (name, tensor) in source.tensors() {
            let shape = format!("{:?}", tensor.shape());
            writeln!(
                out,
                "{name:<58} {:<5} {shape:<16} {:>14}",
                tensor.type_name(),
                grouped(tensor.bytes())
            )?;
        }
    }
    Ok(())
}

/// Number of tensors of each type.
fn types(source: &Source) -> BTreeMap<&'static str, usize> {
    let mut types = BTreeMap::new();
    for (_, tensor) in source.tensors() {
        *types.entry(tensor.type_name()).or_default() += 1;
    }
    types
}

fn as_json(named: &Named) -> serde_json::Value {
    let source = &named.source;
    let tensors: serde_json::Map<_, _> = source
        .tensors()
        .map(|(name, t)| {
            let of = json!({ "dtype": t.type_name(), "shape": t.shape(), "bytes": t.bytes(), "pieces": t.pieces() });
            (name, of)
        })
        .collect();
    json!({
        "path": source.path(),
        "checkpoint": named.checkpoint.as_ref().map(|(path, _)| path),
        "step": named.checkpoint.as_ref().map(|(_, step)| step),
        "format": source.format().to_string(),
        "quantization_config": source.quantisation(),
        "parameters": source.config().parameter_count(),
        "bytes": source.bytes(),
        "config": source.config(),
        "config_from": source.config_from(),
        "files": source.files(),
        "tokenizer_files": source.tokenizer_files().into_iter().map(|(_, file)| file).collect::<Vec<_>>(),
        "tensors": tensors,
    })
}

/// Bytes of Hugging Face's files at most, unless somebody says otherwise.
const SHARD_BYTES: u64 = 5_000_000_000;

fn convert(args: Convert) -> anyhow::Result<()> {
    let target = match args.to {
        To::Hf => Target::Safetensors,
        To::HfBin => Target::TorchBin,
        To::Metaseq => Target::Metaseq { parts: args.parts },
    };
    ensure!(
        args.parts.is_none() || matches!(args.to, To::Metaseq),
        "--parts divides metaseq's files; Hugging Face's are divided by --max-shard-size"
    );
    ensure!(
        args.max_shard_size.is_none() || !matches!(args.to, To::Metaseq),
        "--max-shard-size divides Hugging Face's files; metaseq's are divided by --parts"
    );
    let dtype = match args.dtype {
        Type::Keep => None,
        Type::F32 => Some(Dtype::F32),
        Type::F16 => Some(Dtype::F16),
        Type::Bf16 => Some(Dtype::BF16),
    };
    let named = open(&args.source, &args.which, Whole::Checksums)?;
    let options = Options { target, dtype, max_shard_bytes: args.max_shard_size.unwrap_or(SHARD_BYTES) };
    let bar = Bar::of_bytes();
    let converted =
        formats::convert(&named.source, &args.destination, &options, &mut |n, of| bar.show(n, of));
    bar.0.finish_and_clear();
    let converted = converted?;
    writeln!(
        std::io::stdout(),
        "{}: {} files, {}",
        args.destination.display(),
        converted.files.len(),
        human_bytes(converted.bytes)
    )?;
    if named.source.tokenizer_files().is_empty() {
        tell!(
            "warning: there is no tokenizer beside {}, so there is none in {}",
            named.source.path().display(),
            args.destination.display()
        );
    }
    Ok(())
}

fn verify(args: Verify) -> anyhow::Result<()> {
    let named = open(&args.path, &args.which, Whole::Sizes)?;
    let bar = Bar::of_bytes();
    let Some(other) = args.other else {
        let findings = named.verify(&mut |n, of| bar.show(n, of));
        bar.0.finish_and_clear();
        let mut findings = findings?;
        // Newer checkpoints of a run, which were passed over.
        findings.extend(named.damaged.iter().map(|damage| format!("{damage:#}")));
        let told = findings.iter().try_for_each(|finding| writeln!(std::io::stdout(), "{finding}"));
        if !findings.is_empty() {
            bail!("{} is not sound: {} findings", args.path.display(), findings.len());
        }
        told?;
        writeln!(
            std::io::stdout(),
            "{} is sound: {} tensors, {}",
            args.path.display(),
            named.source.tensors().count(),
            human_bytes(named.source.bytes())
        )?;
        return Ok(());
    };
    let second = open(&other, &args.which, Whole::Sizes)?;
    let differences = formats::compare(&named.source, &second.source, &mut |n, of| bar.show(n, of));
    bar.0.finish_and_clear();
    let differences = differences?;
    if differences.is_empty() {
        writeln!(std::io::stdout(), "the same values in all {} tensors", named.source.tensors().count())?;
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:<58} {:>14} {:>14} {:>12}", "tensor", "differing", "of", "largest")?;
    for Difference { tensor, elements, of, largest } in &differences {
        writeln!(out, "{tensor:<58} {:>14} {:>14} {largest:>12.3e}", grouped(*elements), grouped(*of))?;
    }
    bail!(
        "{} of {} tensors differ between {} and {}",
        differences.len(),
        named.source.tensors().count(),
        args.path.display(),
        other.display()
    )
}

/// What is done, on standard error if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn of_bytes() -> Bar {
        Bar::new("{bar:40} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} to go")
    }

    fn new(template: &str) -> Bar {
        let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::hidden());
        if std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        Bar(bar)
    }

    fn show(&self, done: u64, all: u64) {
        self.0.set_length(all);
        self.0.set_position(done);
    }
}

/// A size, as an argument.
fn size(text: &str) -> Result<u64, String> {
    bytes_of(text).ok_or_else(|| "expected a size such as 5GB, 500MiB or 1000000".into())
}
