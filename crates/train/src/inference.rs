//! Opening a model for use: the one place where a path becomes a running engine.

use crate::checkpoint::Store;
use crate::config::Precision;
use crate::models::{self, Named, Whole};
use crate::quantise::beside_weights;
use crate::trainer::open_device;
use anyhow::{Context, Error, Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_device::cpu::CpuDevice;
use ferropt_device::quantise::Codes;
use ferropt_device::{WeightFormat, bf16};
use ferropt_engine::{Handle, Options};
use ferropt_model::formats::Dtype;
use ferropt_model::{Config, Decoder, ReadCodes, ReadRows, initial_values};
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a model is opened.
#[derive(Clone, Debug, PartialEq)]
pub struct Opening {
    /// Step of a run's checkpoint; the newest whole one when absent.
    pub checkpoint: Option<u64>,
    /// Of metaseq files that do not say how many heads there are: the model that they are.
    pub preset: Option<String>,
    /// Where the tokenizer is; beside the weights when absent.
    pub tokenizer: Option<PathBuf>,
    /// How weights are stored in memory. When absent, as the run computed with them, or as they are on the disk (IEEE
    /// halves as bf16). Of a quantised model they are what they are.
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
        Opening {
            checkpoint: None,
            preset: None,
            tokenizer: None,
            weights: None,
            threads: None,
            sequences: 1,
            longest: None,
        }
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
    /// Bytes of all matrices, which every step reads.
    pub weight_bytes: u64,
    /// Optimiser steps that it has behind it.
    pub step: u64,
    /// Newer checkpoints that were passed over because they are damaged, each with what is wrong.
    pub damaged: Vec<Error>,
}

impl Model {
    /// Opens what `path` names: a run folder, one of its checkpoints, a Hugging Face or quantised folder, or metaseq's files.
    ///
    /// # Errors
    /// When there is no model, or it is damaged or of no OPT, or has no tokenizer; the message names the file.
    pub fn open(path: impl AsRef<Path>, opening: &Opening) -> Result<Model> {
        let path = path.as_ref();
        let named = models::open(path, opening.checkpoint, opening.preset.as_deref(), Whole::Checksums)?;
        let source = &named.source;
        let load = || -> Result<Model> {
            let tokenizer = match &opening.tokenizer {
                Some(path) => Tokenizer::load(path)?,
                None => beside_weights(source)?,
            };
            let weights = weights(&named, opening.weights)?;
            let table = source.config().parameters();
            let mut read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
                source.read_rows(&table[index], rows.start, out)
            };
            let mut codes = |index: usize, rows: Range<usize>, to: Codes<'_>| {
                source.read_codes(&table[index], rows.start, to)
            };
            let codes: Option<&mut ReadCodes<'_>> = match source.quantisation() {
                Some(_) => Some(&mut codes),
                None => None,
            };
            start(source.config(), tokenizer, opening, weights, &mut read, codes)
        };
        let model = load().with_context(|| format!("cannot use {}", source.path().display()))?;
        let step = named.checkpoint.map_or(0, |(_, step)| step);
        Ok(Model { step, damaged: named.damaged, ..model })
    }

    /// The model that a run with this seed begins with, before its first step.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn untrained(config: &Config, tokenizer: Tokenizer, opening: &Opening, seed: u64) -> Result<Model> {
        let table = config.parameters();
        let mut values: (usize, Vec<f32>) = (usize::MAX, Vec::new());
        let mut read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
            if values.0 != index {
                values = (index, initial_values(&table[index], index, seed));
            }
            let width = table[index].elements() / table[index].shape[0];
            out.copy_from_slice(&values.1[rows.start * width..rows.end * width]);
            Ok(())
        };
        let weights = opening.weights.unwrap_or(WeightFormat::F32);
        start(config, tokenizer, opening, weights, &mut read, None)
    }
}

/// Weights as asked for, or as the run computed with them, or else as they are stored; IEEE halves become bf16. Codes stay
/// as they are.
fn weights(named: &Named, asked: Option<WeightFormat>) -> Result<WeightFormat> {
    if let Some(quantisation) = named.source.quantisation() {
        let weights = quantisation.weights()?;
        ensure!(
            asked.is_none_or(|asked| asked == weights),
            "its weights are {quantisation}, and cannot be {} again; leave out --weights, or open the model that it was made \
             from",
            asked.unwrap_or(weights).name()
        );
        return Ok(weights);
    }
    if let Some(asked) = asked {
        return Ok(asked);
    }
    if let Some((path, _)) = &named.checkpoint {
        let precision = Precision::deserialize(&Store::survey(path)?.run.config["run"]["precision"]);
        return Ok(precision.context("its run configuration has no valid run.precision")?.into());
    }
    Ok(if named.source.dtype() == Some(Dtype::F32) { WeightFormat::F32 } else { WeightFormat::Bf16 })
}

impl From<Precision> for WeightFormat {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => WeightFormat::F32,
            Precision::Bf16 => WeightFormat::Bf16,
        }
    }
}

/// A model with the weights that `read` and `codes` give, of no step.
fn start<'r>(
    config: &Config,
    tokenizer: Tokenizer,
    opening: &Opening,
    weights: WeightFormat,
    read: &mut ReadRows<'r>,
    codes: Option<&mut ReadCodes<'r>>,
) -> Result<Model> {
    let device = open_device(opening.threads)?;
    let decoder = Decoder::new(&device, config, weights, read, codes)?;
    let weight_bytes = decoder.bytes(&device) as u64;
    let longest = opening.longest.unwrap_or(config.positions).clamp(1, config.positions);
    let (tokenizer, options) = (Arc::new(tokenizer), Options::new(opening.sequences.max(1), longest));
    let engine = match weights {
        WeightFormat::F32 => Handle::start::<CpuDevice, f32>(device, decoder, tokenizer, options),
        _ => Handle::start::<CpuDevice, bf16>(device, decoder, tokenizer, options),
    }?;
    Ok(Model { engine, config: config.clone(), weights, weight_bytes, step: 0, damaged: Vec::new() })
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
        assert!(refuse(folder.path()).contains("holds no model"));
        assert!(refuse(&folder.path().join("nowhere")).contains("nowhere"));
    }
}
