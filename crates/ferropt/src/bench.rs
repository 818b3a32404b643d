//! `ferropt bench`: how fast this machine is.

use crate::model::{weight_cache, weights};
use ferropt_device::{WeightFormat, Which};
use ferropt_model::Offload;
use ferropt_train::bench::inference::{Inference, WeightsOf, inference};
use ferropt_train::bench::{Training, training};
use ferropt_train::config::{Precision, Recompute};
use std::io::Write;
use std::path::PathBuf;

/// Arguments of `ferropt bench`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Time training steps with random weights and tokens, and show where the time goes.
    #[command(after_help = EXAMPLES)]
    Train(TrainArgs),
    /// Time generation of one text and of batches, a long prompt, and scoring, as shares of what limits them.
    #[command(after_help = INFERENCE_EXAMPLES)]
    Inference(InferenceArgs),
}

#[derive(clap::Args)]
struct InferenceArgs {
    /// Model with random weights (see `ferropt presets`)
    #[arg(long, value_name = "NAME", default_value = "125m")]
    preset: String,
    /// A model on the disk instead, as for `ferropt generate`
    #[arg(long, value_name = "PATH", conflicts_with = "preset")]
    model: Option<PathBuf>,
    /// How weights are stored in memory: f32, f16, bf16, int8, int4 or int3; bf16, or the model's own, unless given
    #[arg(long, value_name = "FORMAT", value_parser = weights)]
    weights: Option<WeightFormat>,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    tokens: usize,
    /// Tokens of the long prompt
    #[arg(long, value_name = "N", default_value_t = 1024)]
    prompt: usize,
    /// Texts to generate together; several numbers with commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [8, 32])]
    batch: Vec<usize>,
    /// Texts of 512 tokens to score together; 0 scores none
    #[arg(long, value_name = "N", default_value_t = 8)]
    score: usize,
    /// What computes: cpu, cuda or cuda:N (the N-th GPU)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Which,
    /// Threads; all available unless given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Runs to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 3)]
    runs: usize,
    /// Of a model on the disk: neither use weights that are kept, ready to be used, nor keep them
    #[arg(long)]
    no_cache: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const INFERENCE_EXAMPLES: &str = "\
Examples:
  ferropt bench inference
  ferropt bench inference --weights int4 --batch 1,4,16
  ferropt bench inference --preset tiny --prompt 64 --tokens 8 --runs 1
  ferropt bench inference --model runs/quickstart --prompt 100 --json";

#[derive(clap::Args)]
struct TrainArgs {
    /// Model (see `ferropt presets`)
    #[arg(long, value_name = "NAME", default_value = "125m")]
    preset: String,
    /// Tokens per sequence
    #[arg(long, value_name = "T", default_value_t = 1024)]
    seq: usize,
    /// Sequences per optimiser step
    #[arg(long, value_name = "SEQUENCES", default_value_t = 4)]
    batch: usize,
    /// Sequences per forward and backward pass; derived as in a run unless given
    #[arg(long, value_name = "B")]
    micro_batch: Option<usize>,
    /// Compute type: bf16, f32 or f16
    #[arg(long, value_name = "TYPE", default_value = "bf16", value_parser = precision)]
    precision: Precision,
    /// Activations to compute again in the backward pass: none, selective or full
    #[arg(long, value_name = "WHAT", default_value = "none", value_parser = recompute)]
    recompute: Recompute,
    /// Dropout of both kinds. None unless given, as in the benchmarks of others; OPT trains with 0.1
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    dropout: f64,
    /// What computes: cpu, cuda or cuda:N (the N-th GPU)
    #[arg(long, value_name = "DEVICE", default_value_t)]
    device: Which,
    /// What a GPU keeps in its host's memory: none, optimizer or all
    #[arg(long, value_name = "WHAT", default_value = "none", value_parser = offload)]
    offload: Offload,
    /// Threads; all available unless given
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Steps to measure, after one to warm up and before one that times its operations
    #[arg(long, value_name = "N", default_value_t = 3)]
    steps: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

const EXAMPLES: &str = "\
Examples:
  ferropt bench train
  ferropt bench train --preset tiny --seq 128 --steps 10
  ferropt bench train --precision f32 --dropout 0.1 --json
  ferropt bench train --preset 13b --device cuda --offload all";

fn precision(text: &str) -> Result<Precision, String> {
    one_of(text, &[Precision::Bf16, Precision::F32, Precision::F16].map(|p| (p.name(), p)))
}

fn recompute(text: &str) -> Result<Recompute, String> {
    let all = [("none", Recompute::None), ("selective", Recompute::Selective), ("full", Recompute::Full)];
    one_of(text, &all)
}

fn offload(text: &str) -> Result<Offload, String> {
    one_of(text, &[("none", Offload::None), ("optimizer", Offload::Optimizer), ("all", Offload::All)])
}

/// What a name stands for.
fn one_of<T: Copy>(text: &str, all: &[(&str, T)]) -> Result<T, String> {
    let found = all.iter().find(|(name, _)| *name == text);
    found.map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = all.iter().map(|(name, _)| *name).collect();
        let (last, others) = names.split_last().unwrap_or((&"nothing", &[]));
        format!("expected {} or {last}", others.join(", "))
    })
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Train(args) => train(args),
        What::Inference(args) => infer(args),
    }
}

fn infer(args: InferenceArgs) -> anyhow::Result<()> {
    let weights_of = args.model.map_or(WeightsOf::Preset(args.preset), WeightsOf::Path);
    let report = inference(&Inference {
        weights_of,
        weights: args.weights,
        tokens: args.tokens,
        prompt: args.prompt,
        batches: args.batch,
        scored: args.score,
        device: args.device,
        threads: args.threads,
        runs: args.runs,
        cache: weight_cache(args.no_cache)?,
    })?;
    for note in &report.notes {
        tell!("{note}");
    }
    print(&report, args.json)
}

fn train(args: TrainArgs) -> anyhow::Result<()> {
    let report = training(&Training {
        preset: args.preset,
        seq: args.seq,
        sequences: args.batch,
        micro_batch: args.micro_batch,
        precision: args.precision,
        recompute: args.recompute.into(),
        dropout: args.dropout,
        device: args.device,
        offload: args.offload,
        threads: args.threads,
        steps: args.steps,
    })?;
    print(&report, args.json)
}

fn print(report: &(impl serde::Serialize + std::fmt::Display), json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
    } else {
        writeln!(out, "{report}")?;
    }
    Ok(())
}
