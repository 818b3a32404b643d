//! How fast training steps are on this machine, and where their time goes: random weights and tokens, real steps.

pub mod inference;

use crate::checkpoint::{Share, human_bytes};
use crate::config::{Precision, micro_batch};
use crate::optimizer::{Optimizer, Rule, Settings};
use crate::planner::{Flops, Memory, grouped};
use crate::telemetry::peak_resident_bytes;
use crate::trainer::open_device;
use anyhow::{Result, anyhow, ensure};
use ferropt_device::rng::{Purpose, Stream};
use ferropt_device::{Chip, Device, Element, Store, Timed, Which, bf16, f16};
use ferropt_model::{Backprop, Batch, Config, Model, Offload, Options, Part, Pass, Recompute};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

/// Seed of weights and tokens.
const SEED: u64 = 1;

/// What the operations of a device are called for people. What is not listed has its own name.
const PARTS: [(&str, &[&str]); 9] = [
    ("linear layers, forward", &["linear", "linear_residual"]),
    ("linear layers, backward", &["linear_backward_input", "linear_backward_weight"]),
    ("attention, forward", &["attention"]),
    ("attention, backward", &["attention_backward"]),
    ("LM head and loss", &["lm_loss_backward"]),
    ("layer norm", &["layer_norm", "layer_norm_backward"]),
    ("embedding", &["embed", "embed_backward"]),
    ("dropout, casts, copies", &["residual_backward", "cast", "fill", "upload", "download"]),
    ("gradient norm, AdamW", &["sums_of_squares", "adamw"]),
];

/// What to measure.
#[derive(Clone, Debug)]
pub struct Training {
    /// Name of the model.
    pub preset: String,
    /// T, tokens per sequence.
    pub seq: usize,
    /// Sequences per optimiser step.
    pub sequences: usize,
    /// Sequences per forward and backward pass; derived as in a run unless given.
    pub micro_batch: Option<usize>,
    /// Compute type.
    pub precision: Precision,
    /// Activations to compute again.
    pub recompute: Recompute,
    /// Dropout of both kinds.
    pub dropout: f64,
    /// What computes.
    pub device: Which,
    /// What a GPU keeps in its host's memory.
    pub offload: Offload,
    /// Threads; all available unless given.
    pub threads: Option<usize>,
    /// Steps to measure; one more goes before them, and one comes after them, for the parts.
    pub steps: usize,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Name of the model.
    pub preset: String,
    /// Its exact number of parameters.
    pub parameters: u64,
    /// Device, for people.
    pub device: String,
    /// Compute type.
    pub precision: Precision,
    /// T, tokens per sequence.
    pub seq: usize,
    /// Sequences per optimiser step.
    pub sequences: usize,
    /// Sequences per pass.
    pub micro_batch: usize,
    /// Dropout of both kinds.
    pub dropout: f64,
    /// Seconds of each step.
    pub step_s: Vec<f64>,
    /// Seconds of one step more, in which every operation is waited for. On a GPU it takes longer than others.
    pub timed_step_s: f64,
    /// Seconds of that step by part. Together they are the whole of it.
    pub parts: BTreeMap<String, f64>,
    /// Tokens per second of the median step.
    pub tokens_per_second: f64,
    /// Work of a token, in all conventions.
    pub flops_per_token: Flops,
    /// FLOP/s of the median step, counting `flops_per_token.model_causal`.
    pub model_causal_flops: f64,
    /// Peak of the matrix-product instruction, the higher of before and after the steps, FLOP/s.
    pub measured_peak_flops: f64,
    /// What the planner says that the process needs, bytes.
    pub planned_bytes: u64,
    /// Memory of the device's own that was taken for it, bytes; none where it has none of its own.
    pub device_bytes: Option<u64>,
    /// Most memory that the process had resident, bytes.
    pub peak_rss_bytes: Option<u64>,
    /// Mean loss of the last step, nats; a check that real work was done.
    pub loss: f64,
}

/// Measures training steps: all of forward, backward, gradient norm, clipping and AdamW.
///
/// # Errors
/// When the sizes make no sense or memory is short; the message names the option.
pub fn training(wanted: &Training) -> Result<Report> {
    let mut model = Config::preset(&wanted.preset)?;
    model.dropout = wanted.dropout;
    model.attention_dropout = wanted.dropout;
    model.check().map_err(|e| anyhow!("--{e}"))?;
    let Training { seq, sequences, steps, .. } = *wanted;
    ensure!(steps > 0, "--steps 0 measures nothing; use 1 or more");
    ensure!(sequences > 0, "--batch 0 is no batch; use 1 sequence or more");
    ensure!(
        (1..=model.positions).contains(&seq),
        "--seq {seq} is out of range: the model has {} positions",
        model.positions
    );
    let batch = wanted.micro_batch.unwrap_or_else(|| micro_batch(sequences, seq));
    ensure!(
        batch > 0 && sequences.is_multiple_of(batch),
        "--micro-batch {batch} does not divide --batch {sequences}; use for example {}",
        micro_batch(sequences, seq)
    );
    let (recompute, offload) = (wanted.recompute, wanted.offload);
    ensure!(
        wanted.device != Which::Cpu || offload == Offload::None,
        "--offload and --device cpu contradict each other: a processor's memory is the host's; use --device cuda"
    );
    let options = Options { batch, seq, recompute, stop_at_documents: false, offload };
    let device = Timed::new(open_device(wanted.device, wanted.threads)?);
    match wanted.precision {
        Precision::F32 => measure::<f32>(wanted, model, options, &device),
        Precision::Bf16 => measure::<bf16>(wanted, model, options, &device),
        Precision::F16 => measure::<f16>(wanted, model, options, &device),
    }
}

fn measure<E: Element>(
    wanted: &Training,
    config: Config,
    options: Options,
    device: &Timed<Chip>,
) -> Result<Report> {
    let settings = Settings {
        rule: Rule::AdamW { betas: [0.9, 0.95], eps: 1e-8 },
        weight_decay: 0.1,
        decay_vectors: true,
        clip: 1.0,
        stochastic: false,
        seed: SEED,
    };
    let mut peak = device.measured_peak::<E>();
    let mut model = Model::<_, E>::part(device, &config, Part::WHOLE, options.offload)?;
    let mut optimizer = Optimizer::new(device, &model, settings)?;
    optimizer.initialise(device, &mut model, SEED, wanted.threads);
    let mut backprop = Backprop::new(device, &config, options)?;

    let rows = options.batch * options.seq;
    let tokens = (wanted.sequences * options.seq) as f64;
    let mut one_step = |step: u64| -> Result<f64> {
        let mut sum = 0.0;
        for part in 0..wanted.sequences / options.batch {
            let random = Stream::new(SEED, Purpose::Sampling, part, step);
            let ids: Vec<u32> = (0..=rows).map(|i| random.word(0, i) % config.vocab as u32).collect();
            let batch = Batch { tokens: &ids[..rows], targets: &ids[1..], doc_start: &vec![0; rows] };
            let pass = Pass { seed: SEED, step, first_sequence: (part * options.batch) as u64 };
            let store = if part == 0 { Store::Overwrite } else { Store::Accumulate };
            sum += backprop.train(device, &model, batch, pass, (1.0 / tokens) as f32, store)?;
        }
        let norm = backprop.sum(device)?;
        optimizer.step(device, &mut model, &backprop.gradients, step, 1e-4, norm, 1.0);
        Ok(sum / tokens)
    };
    one_step(1)?;
    let (mut step_s, mut loss) = (Vec::new(), 0.0);
    for step in 0..wanted.steps {
        let started = Instant::now();
        loss = one_step(step as u64 + 2)?;
        step_s.push(started.elapsed().as_secs_f64());
    }
    device.measure(true);
    let started = Instant::now();
    one_step(wanted.steps as u64 + 2)?;
    let timed_step_s = started.elapsed().as_secs_f64();
    device.measure(false);
    let parts = parts(&device.take(), timed_step_s);
    let (peak_rss_bytes, device_bytes) = (peak_resident_bytes(), device.memory_taken());
    peak = peak.max(device.measured_peak::<E>());

    let flops = Flops::per_token(&config, &options);
    let memory = Memory::of::<_, E>(&config, Part::WHOLE, Share::alone(), &options, &settings, device);
    let tokens_per_second = tokens / median(&step_s);
    Ok(Report {
        preset: wanted.preset.clone(),
        parameters: config.parameter_count(),
        device: device.describe(),
        precision: wanted.precision,
        seq: options.seq,
        sequences: wanted.sequences,
        micro_batch: options.batch,
        dropout: wanted.dropout,
        step_s,
        timed_step_s,
        parts,
        tokens_per_second,
        flops_per_token: flops,
        model_causal_flops: tokens_per_second * flops.model_causal,
        measured_peak_flops: peak,
        planned_bytes: memory.total - memory.checkpoint,
        device_bytes,
        peak_rss_bytes,
        loss,
    })
}

/// Seconds of a step by part, out of those of each operation in it.
fn parts(operations: &[(&'static str, f64)], step_s: f64) -> BTreeMap<String, f64> {
    let mut parts = BTreeMap::new();
    let mut known = 0.0;
    for &(name, seconds) in operations.iter().filter(|(_, seconds)| *seconds > 0.0) {
        let part = PARTS.iter().find(|(_, names)| names.contains(&name)).map_or(name, |part| part.0);
        *parts.entry(part.to_string()).or_insert(0.0) += seconds;
        known += seconds;
    }
    parts.insert("between operations".into(), (step_s - known).max(0.0));
    parts
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { (sorted[middle - 1] + sorted[middle]) / 2.0 } else { sorted[middle] }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model           OPT {} with {} parameters", self.preset, grouped(self.parameters))?;
        writeln!(f, "device          {}", self.device)?;
        writeln!(
            f,
            "step            {} sequences of {} tokens in passes of {}, dropout {}",
            self.sequences, self.seq, self.micro_batch, self.dropout
        )?;
        let best = self.step_s.iter().copied().fold(f64::INFINITY, f64::min);
        let seconds = median(&self.step_s);
        writeln!(
            f,
            "time            {seconds:.3} s a step (median of {}, best {best:.3})",
            self.step_s.len()
        )?;
        writeln!(f, "speed           {:.1} tokens/s", self.tokens_per_second)?;
        let share = 100.0 * self.model_causal_flops / self.measured_peak_flops;
        writeln!(
            f,
            "                {:.1} GFLOP/s, {share:.1} % of the measured peak of {:.1} GFLOP/s",
            self.model_causal_flops * 1e-9,
            self.measured_peak_flops * 1e-9
        )?;
        writeln!(f, "                (work: 3 x forward, causal half of attention, no recomputation)")?;
        let peak = self.peak_rss_bytes.map_or("unknown".into(), human_bytes);
        let taken = self
            .device_bytes
            .map_or(String::new(), |taken| format!("{} of the device, ", human_bytes(taken)));
        writeln!(f, "peak memory     {taken}{peak} resident, {} planned\n", human_bytes(self.planned_bytes))?;
        let mut parts: Vec<_> = self.parts.iter().collect();
        parts.sort_by(|a, b| b.1.total_cmp(a.1));
        let whole: f64 = self.parts.values().sum();
        writeln!(f, "{:<26} {:>9}  {:>6}", "part of one step more", "seconds", "share")?;
        for (name, seconds) in parts {
            writeln!(f, "{name:<26} {seconds:>9.4}  {:>5.1} %", 100.0 * seconds / whole)?;
        }
        writeln!(f, "{:<26} {whole:>9.4}  100.0 %", "whole step")?;
        write!(f, "(one step more, in which every operation is waited for)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Training {
        Training {
            preset: "tiny".into(),
            seq: 32,
            sequences: 4,
            micro_batch: Some(2),
            precision: Precision::Bf16,
            recompute: Recompute::Full,
            dropout: 0.1,
            device: Which::Cpu,
            offload: Offload::None,
            threads: Some(1),
            steps: 2,
        }
    }

    #[test]
    fn parts_are_the_whole_step_and_all_have_names_for_people() {
        let report = training(&wanted()).unwrap();
        assert_eq!(report.step_s.len(), 2);
        let whole = report.parts.values().sum::<f64>();
        assert!((whole / report.timed_step_s - 1.0).abs() < 1e-6, "{report:?}");
        let known = |name: &String| name == "between operations" || PARTS.iter().any(|part| part.0 == name);
        assert!(report.parts.keys().all(known), "{:?}", report.parts);
        assert!(report.parts.len() == PARTS.len() + 1, "{:?}", report.parts);
        // Random targets cannot be guessed.
        assert!((report.loss - 50272f64.ln()).abs() < 0.1, "{}", report.loss);
        assert!(report.to_string().contains("causal half"), "{report}");
    }

    #[test]
    fn wrong_sizes_are_refused_by_the_option() {
        for (wrong, parts) in [
            (Training { steps: 0, ..wanted() }, &["--steps 0"][..]),
            (Training { micro_batch: Some(3), ..wanted() }, &["--micro-batch 3", "--batch 4"]),
            (Training { seq: 5000, ..wanted() }, &["--seq 5000", "2048"]),
            (Training { dropout: 1.0, ..wanted() }, &["--dropout", "1"]),
            (Training { offload: Offload::All, ..wanted() }, &["--offload", "--device cpu", "--device cuda"]),
            (Training { preset: "125".into(), ..wanted() }, &["125m"]),
        ] {
            let message = training(&wrong).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}
