//! How large a model and how many steps: what two cores can do in minutes, and what this machine is measured to do.

use super::text::{Counts, SCORED};
use super::{Options, Sizes};
use crate::config::{Config, Precision, Resolved};
use crate::optimizer::Optimizer;
use crate::trainer::open_device;
use anyhow::Result;
use ferropt_device::{Chip, Device, Element, Store, Which, bf16};
use ferropt_model::{Backprop, Batch, Model, Pass, initial_values};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, Instant};

/// L, H, C and T. Tried on two cores in four minutes: see docs/log.md.
const LAYERS: usize = 4;
const HEADS: usize = 4;
const WIDTH: usize = 256;
const POSITIONS: usize = 256;
/// Tokens per step: many small steps bring a short run further than few large ones.
const BATCH_TOKENS: usize = 1024;
/// Peak learning rate.
const LR: f64 = 2e-3;

/// Longest time to measure speed, and share of the time that is left.
const MEASURE: (Duration, f64) = (Duration::from_secs(2), 0.04);
/// bf16 is taken, which needs half the memory, unless f32 is so much faster: processors without bf16 instructions have to
/// convert.
const F32_AHEAD: f64 = 1.25;
/// Share of the measured speed that a run keeps: validation, checkpoints and reports take the rest.
const KEPT: f64 = 0.78;
/// Fewest steps: even a glimpse should show a falling loss.
const FEWEST_STEPS: u64 = 12;
/// Most times through the text; a model this small learns little from it after that.
const MOST_EPOCHS: u64 = 10;
/// Validations of a run, and tokens that it trains on for each that they score, at least, if it is not too short for that.
const VALIDATIONS: RangeInclusive<u64> = 2..=8;
const TRAINED_PER_SCORED: u64 = 5;

/// A run that is sized but not begun.
pub(super) struct Planned {
    /// The run as the trainer sees it.
    pub(super) run: Resolved,
    /// The same as a file for the user.
    pub(super) toml: String,
    /// The machine.
    pub(super) device: String,
    /// Tokens per second that steps were measured at.
    pub(super) tokens_per_second: f64,
}

impl Planned {
    /// Measures this machine, and takes as many steps as fit before `deadline`.
    pub(super) fn measure(options: &Options, counts: &Counts, deadline: Instant) -> Result<Planned> {
        let device = open_device(Which::Cpu, options.threads)?;
        let most = MOST_EPOCHS * counts.train / BATCH_TOKENS as u64 + 1;
        let resolve = |precision, steps| -> Result<_> {
            let toml = toml(options, counts, precision, steps)?;
            Ok((Config::parse(&toml, &[])?.resolve()?, toml))
        };
        let (draft, _) = resolve(Precision::Bf16, most)?;
        let left = || deadline.saturating_duration_since(Instant::now());
        let time = MEASURE.0.min(left().mul_f64(MEASURE.1)) / 2;
        let (f32_speed, bf16_speed) =
            (speed::<f32>(&device, &draft, time)?, speed::<bf16>(&device, &draft, time)?);
        let (precision, tokens_per_second) = if f32_speed > F32_AHEAD * bf16_speed {
            (Precision::F32, f32_speed)
        } else {
            (Precision::Bf16, bf16_speed)
        };
        let seconds = left().saturating_sub(super::RESERVE).as_secs_f64();
        let fit = (KEPT * seconds * tokens_per_second / BATCH_TOKENS as f64) as u64;
        let (run, toml) = resolve(precision, fit.clamp(FEWEST_STEPS, most.max(FEWEST_STEPS)))?;
        Ok(Planned { run, toml, device: device.describe(), tokens_per_second })
    }

    /// Sizes for the report.
    pub(super) fn sizes(&self) -> Sizes {
        let (run, model) = (&self.run, &self.run.model);
        Sizes {
            parameters: model.parameter_count(),
            layers: model.layers,
            heads: model.heads,
            width: model.width,
            vocab: model.vocab,
            sequence: run.seq,
            precision: run.config.run.precision,
            steps: run.steps,
            batch_tokens: run.batch_tokens(),
            peak_lr: run.schedule.peak,
        }
    }
}

/// Tokens per second of optimiser steps on made-up tokens, measured for about so long.
fn speed<E: Element>(device: &Chip, run: &Resolved, time: Duration) -> Result<f64> {
    let mut model = Model::<_, E>::zeros(device, &run.model)?;
    for (index, parameter) in run.model.parameters().iter().enumerate() {
        model.set(device, index, &initial_values(parameter, index, 1))?;
    }
    let mut backprop = Backprop::<_, E>::new(device, &run.model, run.options())?;
    let mut optimizer = Optimizer::new(device, &model, run.optimizer)?;
    let tokens: Vec<u32> =
        (0..run.micro_batch * run.seq).map(|i| (i * 7919 % run.model.vocab) as u32).collect();
    let doc_start = vec![0; tokens.len()];
    let mut step = || -> Result<()> {
        let batch = Batch { tokens: &tokens, targets: &tokens, doc_start: &doc_start };
        let pass = Pass { seed: 1, step: 1, first_sequence: 0 };
        backprop.train(device, &model, batch, pass, 1.0 / tokens.len() as f32, Store::Overwrite)?;
        let norm = backprop.sum(device)?;
        optimizer.step(device, &mut model, &backprop.gradients, 1, LR, norm, 1.0);
        Ok(())
    };
    step()?; // touches all memory for the first time
    let (started, mut count) = (Instant::now(), 0);
    while count == 0 || started.elapsed() < time {
        step()?;
        count += 1;
    }
    Ok((count * tokens.len()) as f64 / started.elapsed().as_secs_f64())
}

/// The configuration, for people to read and edit.
fn toml(options: &Options, counts: &Counts, precision: Precision, steps: u64) -> Result<String> {
    let data = options.dir.join("data");
    let path = |path: &Path| toml::Value::from(path.display().to_string()).to_string();
    let file = |name: &str| path(&data.join(name));
    let affordable = steps * BATCH_TOKENS as u64 / (TRAINED_PER_SCORED * counts.scored.max(1));
    let validations = affordable.clamp(*VALIDATIONS.start(), *VALIDATIONS.end());
    Ok(format!(
        "\
# A run of `ferropt quickstart`. Change what you like and train it anew, in another run.dir, with
#     ferropt train THIS_FILE
# Paths start from the folder that ferropt is started in. docs/configuration.md explains every key.

[model]
layers = {LAYERS}
heads = {HEADS}
width = {WIDTH}
vocab = {vocab}
positions = {POSITIONS}
# The text is seen only a few times, so there is little danger of learning it by heart.
dropout = 0.0
attention_dropout = 0.0

[data]
train = {train}
validation.held-out = {held_out}
tokenizer = {tokenizer}
cache = {cache}

[batch]
tokens = {BATCH_TOKENS}

[optimizer]
lr = {LR}

[schedule]
kind = \"linear\"
warmup = {warmup}
# Where the rate reaches its minimum. A run with more run.steps goes on at that.
total = {steps}

[run]
dir = {dir}
steps = {steps}
seed = {seed}
precision = {precision}

[checkpoint]
every = {checkpoint}
keep_last = 2

[validation]
every = {validation}
max_tokens = {SCORED}

[log]
every = {log}
",
        vocab = counts.vocab,
        train = file("train.jsonl"),
        held_out = file("held-out.jsonl"),
        tokenizer = file("tokenizer.json"),
        cache = file("tokens"),
        warmup = steps / 20,
        dir = path(&options.dir),
        seed = options.seed,
        precision = toml::Value::try_from(precision)?,
        checkpoint = steps.div_ceil(4),
        validation = steps.div_ceil(validations),
        log = (steps / 50).max(1),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Count;
    use crate::quickstart::Baseline;

    #[test]
    fn runs_of_any_length_score_the_same_text_and_never_mostly_that() {
        let options = Options {
            dir: "runs/quick".into(),
            texts: Vec::new(),
            text_field: "text".into(),
            lock: String::new(),
            minutes: 1.0,
            threads: None,
            seed: 1,
        };
        let counts = Counts {
            vocab: 8192,
            train: 1 << 22,
            held_out: 1 << 18,
            scored: SCORED as u64,
            unigram: Baseline { loss: 7.0, bits_per_byte: 3.0 },
        };
        for (steps, validations) in [(12, 2), (320, 4), (3219, 8)] {
            let toml = toml(&options, &counts, Precision::F32, steps).unwrap();
            let run = Config::parse(&toml, &[]).unwrap().resolve().unwrap();
            assert_eq!(run.config.validation.max_tokens, Some(Count(counts.scored)));
            assert_eq!(
                run.validation_every.map(|every| steps.div_ceil(every)),
                Some(validations),
                "{steps} steps"
            );
        }
    }
}
