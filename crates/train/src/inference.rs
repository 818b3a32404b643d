//! Opening a model for use: the one place where a path becomes a running engine.

use crate::checkpoint::{Checkpoint, Store};
use crate::config::Precision;
use crate::stacked;
use crate::trainer::open_device;
use anyhow::{Context, Error, Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_device::cpu::CpuDevice;
use ferropt_device::{WeightFormat, bf16};
use ferropt_engine::{Handle, Options};
use ferropt_model::{Config, Decoder, ReadRows, initial_values};
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// How a model is opened.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Opening {
    /// Step of a run's checkpoint; the newest whole one when absent.
    pub checkpoint: Option<u64>,
    /// How weights are stored in memory; as the run computed with them when absent.
    pub weights: Option<WeightFormat>,
    /// Threads; all available when absent.
    pub threads: Option<usize>,
    /// Texts that are computed together, at least 1.
    pub sequences: usize,
    /// Tokens of the longest text, what is generated included, for which the cache has room; as many as the model has
    /// positions when absent.
    pub longest: Option<usize>,
}

impl Default for Opening {
    /// One text at a time.
    fn default() -> Self {
        Opening { checkpoint: None, weights: None, threads: None, sequences: 1, longest: None }
    }
}

/// A model that is ready for requests.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use ferropt_engine::{Parameters, Request};
/// use ferropt_train::inference::{Model, Opening};
/// let model = Model::open("runs/first", &Opening::default())?;
/// let prompt = model.engine.tokenizer().encode_prompt("Once upon")?;
/// let parameters = Parameters { max_tokens: Some(50), ..Parameters::default() };
/// let completion = model.engine.complete(Request { prompt, parameters })?;
/// println!("{}", completion.choices[0].text);
/// # Ok(()) }
/// ```
pub struct Model {
    /// Takes requests.
    pub engine: Handle,
    /// Sizes.
    pub config: Config,
    /// How weights are stored in memory.
    pub weights: WeightFormat,
    /// Optimiser steps that it has behind it.
    pub step: u64,
    /// Newer checkpoints that were passed over because they are damaged, each with what is wrong.
    pub damaged: Vec<Error>,
}

impl Model {
    /// Opens a checkpoint of a run folder, or the one checkpoint that `path` is itself.
    ///
    /// # Errors
    /// When there is no checkpoint, or it is damaged or of no OPT; the message names the file.
    pub fn open(path: impl AsRef<Path>, opening: &Opening) -> Result<Model> {
        let (checkpoint, damaged) = find(path.as_ref(), opening.checkpoint)?;
        let load = || -> Result<Model> {
            let run = &checkpoint.manifest().run;
            let config: Config =
                serde_json::from_value(run.model.clone()).context("its model is not an OPT")?;
            config.check()?;
            let precision = Precision::deserialize(&run.config["run"]["precision"])
                .context("its run configuration has no valid run.precision")?;
            checkpoint.file("tokenizer.json")?;
            let tokenizer = Tokenizer::load(&checkpoint.path().join("tokenizer.json"))?;
            let table = config.parameters();
            let mut read = |index: usize, rows, out: &mut [f32]| {
                stacked::read_rows(&checkpoint, "model", &table[index], rows, out)
            };
            let opening = Opening { weights: opening.weights.or(Some(precision.into())), ..*opening };
            let engine = start(&config, tokenizer, &opening, &mut read)?;
            Ok(Model { engine, config, step: run.step, damaged })
        };
        load().with_context(|| format!("cannot use the checkpoint {}", checkpoint.path().display()))
    }

    /// The model that a run with this seed begins with, before its first step.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn untrained(config: &Config, tokenizer: Tokenizer, opening: &Opening, seed: u64) -> Result<Model> {
        let table = config.parameters();
        let mut values: (usize, Vec<f32>) = (usize::MAX, Vec::new());
        let mut read = |index: usize, rows: std::ops::Range<usize>, out: &mut [f32]| {
            if values.0 != index {
                values = (index, initial_values(&table[index], index, seed));
            }
            let width = table[index].elements() / table[index].shape[0];
            out.copy_from_slice(&values.1[rows.start * width..rows.end * width]);
            Ok(())
        };
        let engine = start(config, tokenizer, opening, &mut read)?;
        Ok(Model { engine, config: config.clone(), step: 0, damaged: Vec::new() })
    }
}

impl From<Precision> for WeightFormat {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => WeightFormat::F32,
            Precision::Bf16 => WeightFormat::Bf16,
        }
    }
}

/// An engine with the weights that `read` gives, in f32 unless told otherwise.
fn start(
    config: &Config,
    tokenizer: Tokenizer,
    opening: &Opening,
    read: &mut ReadRows<'_>,
) -> Result<Handle> {
    let device = open_device(opening.threads)?;
    let format = opening.weights.unwrap_or(WeightFormat::F32);
    let decoder = Decoder::new(&device, config, format, read)?;
    let (tokenizer, options) =
        (Arc::new(tokenizer), Options::new(opening.sequences.max(1), config.positions));
    match format {
        WeightFormat::F32 => Handle::start::<CpuDevice, f32>(device, decoder, tokenizer, options),
        _ => Handle::start::<CpuDevice, bf16>(device, decoder, tokenizer, options),
    }
}

/// The checkpoint, and newer ones that are damaged.
fn find(path: &Path, step: Option<u64>) -> Result<(Checkpoint, Vec<Error>)> {
    if path.join("manifest.json").is_file() {
        let checkpoint = Checkpoint::open(path)?;
        let found = checkpoint.manifest().run.step;
        ensure!(
            step.is_none_or(|step| step == found),
            "step {} was asked for, but {} is the checkpoint of step {found}; name the run folder to choose a step",
            step.unwrap_or_default(),
            path.display()
        );
        return Ok((checkpoint, Vec::new()));
    }
    let store = Store::open(path)?;
    if let Some(step) = step {
        return Ok((store.load(step)?, Vec::new()));
    }
    let found = store.latest_whole()?.with_context(|| {
        format!(
            "{} has no checkpoint yet; the first one is written while `ferropt train` runs",
            path.display()
        )
    })?;
    Ok((found.checkpoint, found.damaged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_engine::{Finish, Parameters, Request, Text};

    fn untrained(positions: usize) -> Model {
        let tokenizer = Tokenizer::train([Ok("some words and some more words".repeat(9))], 270).unwrap();
        let config = Config { vocab: 300, positions, ..Config::preset("tiny").unwrap() };
        let opening = Opening { threads: Some(1), ..Opening::default() };
        Model::untrained(&config, tokenizer, &opening, 1).unwrap()
    }

    #[test]
    fn texts_end_where_they_must() {
        let model = untrained(16);
        let prompt = model.engine.tokenizer().encode_prompt("some words").unwrap();
        // Nearly even probabilities, so that </s> is unlikely; rows beyond the vocabulary must never be chosen.
        let generate = |max_tokens| -> Text {
            let max_tokens = Some(max_tokens);
            let parameters = Parameters { temperature: 100.0, seed: 5, max_tokens, ..Parameters::default() };
            let mut made = model.engine.complete(Request { prompt: prompt.clone(), parameters }).unwrap();
            assert!(made.choices[0].tokens.iter().all(|token| token.id < 270));
            made.choices.remove(0)
        };
        assert_eq!(generate(0), Text { finish: Some(Finish::MaxTokens), ..Text::default() });
        let short = generate(5);
        assert_eq!((short.tokens.len(), short.finish), (5, Some(Finish::MaxTokens)));
        let long = generate(1000);
        assert_eq!(long.finish, Some(Finish::Positions));
        assert_eq!(prompt.len() + long.tokens.len(), 17, "the last token needs no position");
        assert_eq!(long.tokens[..5], short.tokens);
        assert_eq!(generate(long.tokens.len()).finish, Some(Finish::MaxTokens));
    }

    #[test]
    fn prompts_that_are_too_long_are_refused() {
        let model = untrained(8);
        let prompt = model.engine.tokenizer().encode_prompt("0123456789").unwrap();
        let long = model.engine.complete(Request { prompt, parameters: Parameters::default() });
        let long = long.unwrap_err().to_string();
        assert!(long.contains("11 tokens") && long.contains("8 positions"), "{long}");
    }

    #[test]
    fn folders_without_a_checkpoint_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |path: &Path| format!("{:#}", Model::open(path, &Opening::default()).err().unwrap());
        assert!(refuse(folder.path()).contains("no checkpoint yet"));
        assert!(refuse(&folder.path().join("nowhere")).contains("nowhere"));
    }
}
