//! Quantised models: rounds the weights of any model, by text if there is some, and writes them.

use crate::models::{self, Named};
use crate::trainer::open_device;
use anyhow::{Context, Result, ensure};
use ferropt_data::{Corpus, EOS, Tokenizer};
use ferropt_device::{WeightFormat, Which};
use ferropt_model::formats::{self, CalibrationText, Converted, Quantisation, Source};
use ferropt_model::{Parameter, Rounded, RoundingError, Walk};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Tokens of calibration text that a run of GPTQ uses unless it is told otherwise.
pub const TOKENS: usize = 65_536;

/// How a model is quantised.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Int8, Int4 or Int3.
    pub weights: WeightFormat,
    /// Text for GPTQ: files and folders, see [`Corpus::find`]. Without any, numbers are rounded to nearest.
    pub calibrate: Vec<PathBuf>,
    /// Field of its JSON lines that holds the text.
    pub text_field: String,
    /// Tokens of the text that are used, from its beginning on.
    pub tokens: usize,
    /// Where the tokenizer is; beside the weights when absent.
    pub tokenizer: Option<PathBuf>,
    /// Threads; all available when absent.
    pub threads: Option<usize>,
    /// Files are not larger than this many bytes, but for a matrix that alone is.
    pub max_shard_bytes: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Quantised {
    /// What was written.
    pub written: Converted,
    /// How, as the folder's `config.json` says it.
    pub quantisation: Quantisation,
    /// What rounding changed, by kinds of matrices in the order of the model.
    pub errors: Vec<(String, RoundingError)>,
}

/// Writes a model into the new folder `destination` with matrices in codes of few bits. `progress` is told what is done so
/// far, and all.
///
/// # Errors
/// When the options contradict the model or each other, text or tokenizer cannot be used, or the folder exists or
/// cannot be written; nothing is left behind then.
pub fn quantise(
    named: &Named,
    destination: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Quantised> {
    let source = &named.source;
    let tokenizer = options.tokenizer.as_deref().map(models::tokenizer).transpose()?;
    let device = open_device(Which::Cpu, options.threads)?;
    let threads = device.threads();
    let table = source.config().parameters();
    let mut errors = Errors(Vec::new());
    let read =
        |index: usize, rows: Range<usize>, out: &mut [f32]| source.read_rows(&table[index], rows.start, out);
    let mut write = |quantisation: &Quantisation,
                     round: &mut dyn FnMut(usize) -> Result<(Rounded, RoundingError)>,
                     progress: &mut dyn FnMut(u64, u64)| {
        let mut round = |index: usize| {
            let (rounded, error) = round(index)?;
            errors.add(&table[index], error);
            Ok(rounded)
        };
        let json = tokenizer.as_ref().map(Tokenizer::to_json).transpose()?;
        let json = json.as_deref();
        formats::quantise(
            source,
            destination,
            quantisation,
            json,
            options.max_shard_bytes,
            &mut round,
            progress,
        )
    };
    let (written, quantisation) = if options.calibrate.is_empty() {
        let quantisation = Quantisation::new(options.weights, None);
        let mut round = |index: usize| {
            let [n, k] = table[index].shape[..] else {
                anyhow::bail!("{:?} is no matrix", table[index].names)
            };
            let mut w = vec![0.0; n * k];
            read(index, 0..n, &mut w)?;
            let rounded = Rounded::nearest(options.weights, &w, k, threads);
            let rounded = rounded.with_context(|| table[index].names.join(", "))?;
            let error = rounded.error(&w);
            Ok((rounded, error))
        };
        (write(&quantisation, &mut round, progress)?, quantisation)
    } else {
        let beside;
        let tokenizer = match &tokenizer {
            Some(tokenizer) => tokenizer,
            None => {
                beside = beside_weights(source)?;
                &beside
            }
        };
        let texts = texts(options, tokenizer, source.config().positions)?;
        let text = CalibrationText {
            text: options.calibrate.iter().map(|path| path.display().to_string()).collect(),
            tokens: texts.iter().map(|text| text.len() as u64).sum(),
        };
        let quantisation = Quantisation::new(options.weights, Some(text));
        let (weights, config) = (options.weights, source.config());
        let mut walk = Walk::new(&device, config, weights, &texts, threads, &read, progress)?;
        (write(&quantisation, &mut |index| walk.round(index), &mut |_, _| {})?, quantisation)
    };
    Ok(Quantised { written, quantisation, errors: errors.0 })
}

/// The tokenizer that lies with a model.
pub(crate) fn beside_weights(source: &Source) -> Result<Tokenizer> {
    let folder = source.folder();
    Tokenizer::load(folder).with_context(|| {
        let there = ["tokenizer.json", "gpt2-unified.json", "vocab.json", "merges.txt"]
            .iter()
            .any(|name| folder.join(name).exists());
        let folder = folder.display();
        match there {
            true => format!(
                "the tokenizer beside the weights in {folder} cannot be used; name another with --tokenizer"
            ),
            false => {
                format!("there is no tokenizer beside the weights in {folder}; name one with --tokenizer")
            }
        }
    })
}

/// The calibration text in pieces of at most as many tokens as the model has positions. As in training, documents are
/// packed end to end, each behind the `</s>` of the one before.
fn texts(options: &Options, tokenizer: &Tokenizer, positions: usize) -> Result<Vec<Vec<u32>>> {
    // The first is the `</s>` before all text.
    ensure!(
        options.tokens > 1,
        "calibration with {} tokens: it takes 2 at least; {TOKENS} are usual",
        options.tokens
    );
    let unusable = "the calibration text cannot be used";
    let corpus = Corpus::find(&options.calibrate, &options.text_field).context(unusable)?;
    let mut ids = vec![EOS];
    for piece in corpus.pieces() {
        let piece = piece.context(unusable)?;
        ids.extend(tokenizer.encode(&piece.text)?);
        if piece.ends_document {
            ids.push(EOS);
        }
        if ids.len() >= options.tokens {
            break;
        }
    }
    ids.truncate(options.tokens);
    ensure!(
        ids.iter().any(|id| *id != EOS),
        "the calibration text has no words: name files with text in them"
    );
    Ok(ids.chunks(positions).map(<[u32]>::to_vec).collect())
}

/// Errors by kinds of matrices.
struct Errors(Vec<(String, RoundingError)>);

impl Errors {
    fn add(&mut self, parameter: &Parameter, error: RoundingError) {
        let kind = kind(parameter);
        match self.0.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, sum)) => *sum = sum.and(error),
            None => self.0.push((kind, error)),
        }
    }
}

/// What a matrix is called in every layer: `fc1`, or `q_proj, k_proj, v_proj`.
fn kind(parameter: &Parameter) -> String {
    let kinds = parameter.names.iter().map(|name| name.rsplit('.').nth(1).unwrap_or(name));
    kinds.collect::<Vec<_>>().join(", ")
}
