//! Opening a model for use: the one place where a path becomes a running engine.

use crate::checkpoint::Store;
use crate::config::Precision;
use crate::models::{self, Named, Whole};
use crate::quantise::beside_weights;
use crate::trainer::open_device;
use crate::weight_cache::{Outcome, WeightCache};
use anyhow::{Context, Error, Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_device::quantise::Codes;
use ferropt_device::{Chip, WeightFormat, Which, bf16};
use ferropt_engine::{DRAFT_TOKENS, Ends, Handle, Options};
use ferropt_model::formats::{Dtype, Source};
use ferropt_model::{Config, Decoder, Matrices, initial_rows};
use serde::Deserialize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

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
    /// What computes.
    pub device: Which,
    /// Threads; all available when absent.
    pub threads: Option<usize>,
    /// Texts that are computed together, at least 1.
    pub sequences: usize,
    /// Tokens of the longest text, what is generated included, for which the cache has room; as many as the model has
    /// positions when absent.
    pub longest: Option<usize>,
    /// Tokens for which the cache has room, in all texts together; `sequences` of the longest texts when absent.
    pub cache_tokens: Option<usize>,
    /// Whether what was computed for the beginning of a text is kept for others that begin alike. Without it only the texts
    /// under way take memory.
    pub reuse: bool,
    /// Where weights are kept when they are ready, so that the model opens in a moment the next time.
    pub cache: Option<WeightCache>,
    /// A smaller model with the same tokenizer that guesses ahead, named like the model itself. It makes texts come faster
    /// and changes none. Its weights are stored in int8, which is enough for guesses.
    pub draft: Option<PathBuf>,
    /// Tokens that it guesses at most; see [`DRAFT_TOKENS`].
    pub draft_tokens: usize,
    /// How long texts that are being generated may wait for a piece of a prompt; as long as it takes when absent.
    pub pause: Option<Duration>,
    /// Whether the cache's memory is taken from the system at once, rather than page by page as texts need it.
    pub reserve: bool,
}

impl Default for Opening {
    /// One text at a time, and nothing is kept.
    fn default() -> Self {
        Opening {
            checkpoint: None,
            preset: None,
            tokenizer: None,
            weights: None,
            device: Which::Cpu,
            threads: None,
            sequences: 1,
            longest: None,
            cache_tokens: None,
            reuse: true,
            cache: None,
            draft: None,
            draft_tokens: DRAFT_TOKENS,
            pause: None,
            reserve: false,
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
    /// What came of the weights, if they were to be kept.
    pub kept: Option<Outcome>,
    /// Whether they are IEEE halves that became bf16, which nobody asked for.
    pub rounded: bool,
    /// Seconds that opening took.
    pub load_seconds: f64,
}

impl Model {
    /// What a user should know of how it was opened, a line for each.
    pub fn notes(&self) -> Vec<String> {
        let passed = |damage: &Error| {
            format!(
                "warning: passed over a damaged checkpoint, using the one of step {}: {damage:#}",
                self.step
            )
        };
        let rounded = "note: the weights are f16 and become bf16, which has 3 bits less of each; `--weights f16` keeps all, and \
                       computes in f32, and `--weights bf16` says that this is meant";
        self.damaged.iter().map(passed).chain(self.rounded.then(|| rounded.into())).collect()
    }

    /// Opens what `path` names: a run folder, one of its checkpoints, a Hugging Face or quantised folder, metaseq's files, or what Hugging
    /// Face's tools have downloaded under a name such as `facebook/opt-125m`.
    ///
    /// # Errors
    /// When there is no model, or it is damaged or of no OPT, or has no tokenizer; the message names the file.
    pub fn open(path: impl AsRef<Path>, opening: &Opening) -> Result<Model> {
        let (path, began) = (path.as_ref(), Instant::now());
        loop {
            let named = named(path, opening.checkpoint, opening)?;
            let checkpoint = named.checkpoint.clone();
            match Self::open_named(named, opening, began) {
                // The run goes on, and has removed this checkpoint meanwhile: there are newer ones.
                Err(_)
                    if opening.checkpoint.is_none() && checkpoint.is_some_and(|(path, _)| !path.exists()) => {
                }
                opened => return opened,
            }
        }
    }

    fn open_named(named: Named, opening: &Opening, began: Instant) -> Result<Model> {
        let source = &named.source;
        let load = || -> Result<Model> {
            let format = weights(&named, opening.weights)?;
            let ends = match source.ends()? {
                Some(ids) => Ends::new(&ids).context("its eos_token_id cannot be used")?,
                None => Ends::default(),
            };
            let device = open_device(opening.device, opening.threads)?;
            let (tokenizer, (decoder, kept)) = tokenizer_and(source, opening, |wanted| {
                decoder_of(&device, &named, format, opening.cache.as_ref(), wanted)
            })?;
            let draft = match &opening.draft {
                Some(path) => Some(draft(&device, path, opening, &tokenizer)?),
                None => None,
            };
            Ok(Model { kept, ..start(device, decoder, draft, tokenizer, (opening, ends), format)? })
        };
        let model = load().with_context(|| format!("cannot use {}", source.path().display()))?;
        let halves =
            source.weight_types().contains(&Dtype::F16) || precision(&named)? == Some(Precision::F16);
        let rounded = opening.weights.is_none() && model.weights == WeightFormat::Bf16 && halves;
        let step = named.checkpoint.map_or(0, |(_, step)| step);
        Ok(Model {
            step,
            rounded,
            damaged: named.damaged,
            load_seconds: began.elapsed().as_secs_f64(),
            ..model
        })
    }

    /// The model that a run with this seed begins with, before its first step.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn untrained(config: &Config, tokenizer: Tokenizer, opening: &Opening, seed: u64) -> Result<Model> {
        Self::made(config, tokenizer, opening, seed, Matrices::Rows)
    }

    /// A model of these sizes that only has to be there: its matrices are random numbers that the device makes, however many
    /// they are.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn random(config: &Config, tokenizer: Tokenizer, opening: &Opening, seed: u64) -> Result<Model> {
        Self::made(config, tokenizer, opening, seed, Matrices::Random(seed))
    }

    /// A model of no files.
    fn made(
        config: &Config,
        tokenizer: Tokenizer,
        opening: &Opening,
        seed: u64,
        matrices: Matrices<'_>,
    ) -> Result<Model> {
        let (table, began) = (config.parameters(), Instant::now());
        let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
            initial_rows(&table[index], index, seed, rows.start, out);
            Ok(())
        };
        let weights = opening.weights.unwrap_or(WeightFormat::F32);
        let device = open_device(opening.device, opening.threads)?;
        let decoder = Decoder::new(&device, config, weights, &read, matrices)?;
        let model = start(device, decoder, None, tokenizer, (opening, Ends::default()), weights)?;
        Ok(Model { load_seconds: began.elapsed().as_secs_f64(), ..model })
    }
}

/// What `path` names, its checksums compared once: files that weights were kept of have been verified before.
fn named(path: &Path, step: Option<u64>, opening: &Opening) -> Result<Named> {
    let known = |files: &[PathBuf]| opening.cache.as_ref().is_some_and(|cache| cache.knows(files));
    models::open(path, step, opening.preset.as_deref(), Whole::ChecksumsOnce(&known))
}

/// The tokenizer that was asked for, or the one beside the weights.
fn tokenizer_of(source: &Source, opening: &Opening) -> Result<Tokenizer> {
    match &opening.tokenizer {
        Some(path) => models::tokenizer(path),
        None => beside_weights(source),
    }
}

/// The tokenizer, and on this thread meanwhile the weights, which are told when they are not wanted because there is no
/// tokenizer.
fn tokenizer_and<T>(
    source: &Source,
    opening: &Opening,
    weights: impl FnOnce(&AtomicBool) -> Result<T>,
) -> Result<(Tokenizer, T)> {
    let wanted = AtomicBool::new(true);
    let (tokenizer, weights) = std::thread::scope(|scope| {
        let tokenizer = scope.spawn(|| {
            let tokenizer = tokenizer_of(source, opening);
            wanted.store(tokenizer.is_ok(), Relaxed);
            tokenizer
        });
        let weights = weights(&wanted);
        (tokenizer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), weights)
    });
    Ok((tokenizer?, weights?))
}

/// The weights of a model, and what came of keeping them.
fn decoder_of(
    device: &Chip,
    named: &Named,
    format: WeightFormat,
    cache: Option<&WeightCache>,
    wanted: &AtomicBool,
) -> Result<(Decoder<Chip>, Option<Outcome>)> {
    let (source, config) = (&named.source, named.source.config());
    let table = config.parameters();
    let read = |index: usize, rows: Range<usize>, out: &mut [f32]| {
        ensure!(wanted.load(Relaxed), "the weights are not wanted any more");
        source.read_rows(&table[index], rows.start, out)
    };
    let codes = |index: usize, rows: Range<usize>, to: Codes<'_>| {
        ensure!(wanted.load(Relaxed), "the weights are not wanted any more");
        source.read_codes(&table[index], rows.start, to)
    };
    match cache {
        // Nothing is left to be kept of what was rounded before: packing takes no longer than reading.
        _ if source.quantisation().is_some() => {
            Ok((Decoder::new(device, config, format, &read, Matrices::Codes(&codes))?, None))
        }
        Some(cache) => {
            let (decoder, outcome) = cache.decoder(device, config, format, &named.files()?, &read)?;
            Ok((decoder, Some(outcome)))
        }
        None => Ok((Decoder::new(device, config, format, &read, Matrices::Rows)?, None)),
    }
}

/// The model that guesses ahead. It must know the same tokens by the same ids; whether it does can only be seen where no
/// tokenizer was named for both.
fn draft(device: &Chip, path: &Path, opening: &Opening, tokenizer: &Tokenizer) -> Result<Decoder<Chip>> {
    let load = || {
        // The preset is the model's.
        let named = named(path, None, &Opening { preset: None, ..opening.clone() })?;
        if opening.tokenizer.is_none() {
            let own = beside_weights(&named.source)?;
            ensure!(
                own.agrees_with(tokenizer),
                "its tokenizer, of {} tokens, is not that of the model, of {}, so its ids mean something else; use a draft \
                 that was trained with the same tokenizer",
                own.vocab_size(),
                tokenizer.vocab_size()
            );
        }
        let asked = named.source.quantisation().is_none().then_some(WeightFormat::Int8);
        let format = weights(&named, asked)?;
        let (cache, wanted) = (opening.cache.as_ref(), AtomicBool::new(true));
        let (decoder, _) = decoder_of(device, &named, format, cache, &wanted)?;
        Ok(decoder)
    };
    load().with_context(|| format!("cannot use the draft {}", path.display()))
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
    if let Some(precision) = precision(named)? {
        return Ok(precision.into());
    }
    // Vectors and positions are f32 in any case.
    let wide = named.source.weight_types().contains(&Dtype::F32);
    Ok(if wide { WeightFormat::F32 } else { WeightFormat::Bf16 })
}

/// What a run computes in, if it is one.
fn precision(named: &Named) -> Result<Option<Precision>> {
    let Some((path, _)) = &named.checkpoint else { return Ok(None) };
    let precision = Precision::deserialize(&Store::survey(path)?.run.config["run"]["precision"]);
    precision.map(Some).context("its run configuration has no valid run.precision")
}

impl From<Precision> for WeightFormat {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => WeightFormat::F32,
            // IEEE halves become bf16, as those of files do.
            Precision::Bf16 | Precision::F16 => WeightFormat::Bf16,
        }
    }
}

/// A model of no step at work.
fn start(
    device: Chip,
    decoder: Decoder<Chip>,
    draft: Option<Decoder<Chip>>,
    tokenizer: Tokenizer,
    (opening, ends): (&Opening, Ends),
    weights: WeightFormat,
) -> Result<Model> {
    let (config, weight_bytes) = (decoder.config().clone(), decoder.bytes(&device) as u64);
    let longest = opening.longest.unwrap_or(config.positions).clamp(1, config.positions);
    let Opening { draft_tokens, pause, reserve, .. } = *opening;
    let mut options =
        Options { draft_tokens, pause, reserve, ends, ..Options::new(opening.sequences.max(1), longest) };
    options.limits.reuse = opening.reuse;
    options.cache_tokens = opening.cache_tokens.unwrap_or(options.cache_tokens);
    let tokenizer = Arc::new(tokenizer);
    let engine = if weights.computes_in_f32() {
        Handle::start::<Chip, f32>(device, decoder, draft, tokenizer, options)
    } else {
        Handle::start::<Chip, bf16>(device, decoder, draft, tokenizer, options)
    }?;
    let (step, damaged, kept, rounded) = (0, Vec::new(), None, false);
    Ok(Model { engine, config, weights, weight_bytes, step, damaged, kept, rounded, load_seconds: 0.0 })
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
    fn a_model_of_random_matrices_has_probabilities() {
        let tokenizer = || Tokenizer::train([Ok("some words and some more words".repeat(9))], 270).unwrap();
        let config = Config { vocab: 300, ..Config::preset("tiny").unwrap() };
        let scored = |weights, seed| {
            let opening = Opening { threads: Some(1), weights: Some(weights), ..Opening::default() };
            let model = Model::random(&config, tokenizer(), &opening, seed).unwrap();
            let prompt = model.engine.tokenizer().encode_prompt("some words").unwrap();
            let parameters = Parameters {
                max_tokens: Some(5),
                log_probs: Some(1),
                ignore_end: true,
                ..Parameters::default()
            };
            let text = model.engine.complete(Request { prompt, parameters }).unwrap().choices.remove(0);
            text.tokens.iter().map(|token| token.log_prob.unwrap()).collect::<Vec<f32>>()
        };
        for weights in WeightFormat::ALL {
            let log_probs = scored(weights, 1);
            assert!(log_probs.len() == 5 && log_probs.iter().all(|p| p.is_finite()), "{log_probs:?}");
            assert_eq!(log_probs, scored(weights, 1));
            assert_ne!(log_probs, scored(weights, 2));
        }
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
