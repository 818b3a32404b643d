//! Folders of quantised models: like Hugging Face's, but each matrix of a product is stored as codes of few bits.
//!
//! A matrix `NAME` `[n, k]` is two or three tensors, row-major, whatever processor wrote them:
//!
//! | tensor | type, shape | what |
//! |---|---|---|
//! | `NAME.codes` | U8 `[n, ceil(k b / 8)]` with b bits | a row's codes one behind the other, lower bits first |
//! | `NAME.scales` | BF16 `[n, ceil(k / 64)]` | scale of each group of 64 codes |
//! | `NAME.minima` | BF16, the same, with 4 and 3 bits only | what code 0 stands for; with 8 bits code 128 stands for 0 |
//!
//! `quantization_config` in `config.json` says what was done, and has the size and the CRC-32 of each file.

use super::hugging_face::{self, CONFIG};
use super::safetensors::{Raw, list};
use super::stored::{Flat, StoredTensor};
use super::strand::{Mapped, Strand};
use crate::config::Config;
use anyhow::{Context, Result, bail, ensure};
use ferropt_device::quantise::{Codes, GROUP, Group, code_bits, has_minima};
use ferropt_device::{WeightFormat, bf16};
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Key of `config.json`, the one that Hugging Face has for such things.
pub(super) const KEY: &str = "quantization_config";
/// Our name among Hugging Face's methods.
const METHOD: &str = "ferropt";
/// Version of the format.
const VERSION: u32 = 1;
/// Values that are read at a time.
const CHUNK: usize = 1 << 20;

/// How a model was quantised: `quantization_config` in its `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantisation {
    quant_method: String,
    version: u32,
    weights: String,
    group_size: usize,
    /// How codes were chosen.
    pub rounding: Rounding,
    /// The text by which they were chosen, with GPTQ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<CalibrationText>,
    /// The files with weights.
    files: BTreeMap<String, Sum>,
}

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    /// The nearest to each number.
    Nearest,
    /// By GPTQ: errors make up for each other on calibration text.
    Gptq,
}

/// What a model was calibrated with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationText {
    /// Files and folders, as they were named.
    pub text: Vec<String>,
    /// Tokens of them that were used.
    pub tokens: u64,
}

/// What a file must be like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Sum {
    pub(super) bytes: u64,
    /// Hexadecimal.
    pub(super) crc32: String,
}

impl Quantisation {
    /// Of files that are to be written.
    pub fn new(weights: WeightFormat, calibration: Option<CalibrationText>) -> Quantisation {
        Quantisation {
            quant_method: METHOD.into(),
            version: VERSION,
            weights: weights.name().into(),
            group_size: GROUP,
            rounding: if calibration.is_some() { Rounding::Gptq } else { Rounding::Nearest },
            calibration,
            files: BTreeMap::new(),
        }
    }

    pub(super) fn with_files(&self, files: BTreeMap<String, Sum>) -> Quantisation {
        Quantisation { files, ..self.clone() }
    }

    /// Int8, Int4 or Int3.
    ///
    /// # Errors
    /// When it is none of them.
    pub fn weights(&self) -> Result<WeightFormat> {
        let found = WeightFormat::CODES.into_iter().find(|f| f.name() == self.weights);
        found.with_context(|| format!("weights = {:?}, but int8, int4 and int3 are known", self.weights))
    }

    fn check(&self) -> Result<()> {
        ensure!(
            self.version == VERSION,
            "version = {}, but this program reads {VERSION}; use the program that wrote it, or quantise the model again",
            self.version
        );
        self.weights()?;
        ensure!(self.group_size == GROUP, "group_size = {}, but groups of {GROUP} are read", self.group_size);
        Ok(())
    }

    /// One sentence for each file that is not as it was written.
    pub(super) fn damage(&self, files: &[PathBuf]) -> Result<Vec<String>> {
        let mut findings = Vec::new();
        for file in files {
            let found = format!("{:08x}", crc32fast::hash(Mapped::open(file)?.bytes()));
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let wanted = self.files.get(name).map_or("none", |sum| &sum.crc32);
            if found != wanted {
                findings.push(format!("{}: CRC-32 is {found}, {CONFIG} has {wanted}", file.display()));
            }
        }
        Ok(findings)
    }
}

impl std::fmt::Display for Quantisation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in groups of {}, ", self.weights, self.group_size)?;
        match &self.calibration {
            None => f.write_str("rounded to nearest"),
            Some(text) => write!(f, "by GPTQ on {} tokens of {}", text.tokens, text.text.join(", ")),
        }
    }
}

/// A matrix in codes, as it lies in a file.
#[derive(Clone, Debug)]
pub struct RoundedTensor {
    format: WeightFormat,
    shape: [usize; 2],
    codes: Strand,
    scales: Strand,
    /// Empty with 8 bits.
    minima: Strand,
}

/// Names, types and shapes of the tensors that hold a matrix of this name.
pub(super) fn parts(
    name: &str,
    format: WeightFormat,
    [n, k]: [usize; 2],
) -> Vec<(String, Dtype, Vec<usize>)> {
    let groups = vec![n, k.div_ceil(GROUP)];
    let mut parts = vec![
        (format!("{name}.codes"), Dtype::U8, vec![n, row_bytes(format, k)]),
        (format!("{name}.scales"), Dtype::BF16, groups.clone()),
    ];
    if has_minima(format) {
        parts.push((format!("{name}.minima"), Dtype::BF16, groups));
    }
    parts
}

/// Bytes of a row of codes.
fn row_bytes(format: WeightFormat, k: usize) -> usize {
    (k * code_bits(format).unwrap_or(8)).div_ceil(8)
}

/// Puts codes one behind the other, lower bits first. Eight codes are as many bytes as a code has bits.
pub(super) fn encode(format: WeightFormat, codes: &[u8], out: &mut Vec<u8>) {
    let bits = code_bits(format).unwrap_or(8);
    let end = out.len() + row_bytes(format, codes.len());
    for codes in codes.chunks(8) {
        let word = codes.iter().rev().fold(0, |word: u64, code| word << bits | *code as u64);
        out.extend_from_slice(&word.to_le_bytes()[..bits]);
    }
    out.truncate(end);
}

/// The way back, of `BITS` bits.
fn decode<const BITS: usize>(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.as_chunks::<BITS>().0.iter().zip(codes.as_chunks_mut::<8>().0) {
        let mut word = [0; 8];
        word[..BITS].copy_from_slice(bytes);
        let word = u64::from_le_bytes(word);
        *codes = std::array::from_fn(|i| (word >> (BITS * i)) as u8 & (255 >> (8 - BITS)));
    }
}

impl RoundedTensor {
    fn take(
        tensors: &mut BTreeMap<String, Raw>,
        name: &str,
        format: WeightFormat,
        shape: [usize; 2],
    ) -> Result<RoundedTensor> {
        let mut strands = Vec::new();
        for (name, dtype, shape) in parts(name, format, shape) {
            let raw = tensors.remove(&name).with_context(|| format!("there is no tensor {name}"))?;
            ensure!(
                raw.dtype == dtype && raw.shape == shape,
                "tensor {name} is {:?} {:?}, but {} weights of this model have {dtype:?} {shape:?} there",
                raw.dtype,
                raw.shape,
                format.name()
            );
            strands.push(raw.data);
        }
        let mut next = strands.into_iter();
        let mut next = || next.next().unwrap_or_default();
        Ok(RoundedTensor { format, shape, codes: next(), scales: next(), minima: next() })
    }

    /// Int8, Int4 or Int3.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Size in the files.
    pub fn bytes(&self) -> u64 {
        self.strands().map(|s| s.len() as u64).sum()
    }

    /// Pieces that it is put together from: codes, scales and minima.
    pub fn pieces(&self) -> usize {
        self.strands().filter(|s| s.len() > 0).count()
    }

    fn strands(&self) -> impl Iterator<Item = &Strand> {
        [&self.codes, &self.scales, &self.minima].into_iter()
    }

    pub(super) fn file(&self) -> String {
        self.codes.files().next().map_or_else(|| "no file".into(), |path| path.display().to_string())
    }

    pub(super) fn chunk_rows(&self) -> usize {
        (CHUNK / self.shape[1].max(1)).max(1)
    }

    /// Rows from `first` on as codes: as many as `to` has room for.
    ///
    /// # Errors
    /// When the matrix has not so many, or `to` is no whole number of rows.
    pub fn read_codes(&self, first: usize, to: Codes<'_>) -> Result<()> {
        let [n, k] = self.shape;
        let count = k.div_ceil(GROUP);
        let rows = to.groups.len() / count;
        ensure!(
            to.groups.len() == rows * count && to.codes.len() == rows * count * GROUP,
            "room for {} codes and {} groups is no whole number of rows of {k}",
            to.codes.len(),
            to.groups.len()
        );
        ensure!(first + rows <= n, "rows {first}..{} of a matrix with {n}", first + rows);
        let width = row_bytes(self.format, k);
        let mut bytes = vec![0; row_bytes(self.format, count * GROUP)];
        for (i, codes) in to.codes.chunks_exact_mut(count * GROUP).enumerate() {
            self.codes.read((first + i) * width, &mut bytes[..width])?;
            match self.format {
                WeightFormat::Int3 => decode::<3>(&bytes, codes),
                WeightFormat::Int4 => decode::<4>(&bytes, codes),
                _ => codes.copy_from_slice(&bytes),
            }
        }
        let mut numbers = |from: &Strand, set: &dyn Fn(&mut Group, bf16)| -> Result<()> {
            let mut bytes = vec![0; 2 * to.groups.len()];
            from.read(2 * first * count, &mut bytes)?;
            for (group, bytes) in to.groups.iter_mut().zip(bytes.as_chunks().0) {
                set(group, bf16::from_le_bytes(*bytes));
            }
            Ok(())
        };
        numbers(&self.scales, &|group, x| group.scale = x)?;
        numbers(&self.minima, &|group, x| group.min = x)
    }

    /// Rows from `first` on as the numbers that the codes stand for: as many as `out` has room for.
    ///
    /// # Errors
    /// When `out` is no whole number of rows, or the matrix has not so many.
    pub fn read_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let k = self.shape[1];
        ensure!(out.len().is_multiple_of(k), "{} values are no whole number of rows of {k}", out.len());
        let count = k.div_ceil(GROUP);
        let mut codes = vec![0; count * GROUP];
        let mut groups = vec![Group { scale: bf16::ZERO, min: bf16::ZERO }; count];
        for (i, out) in out.chunks_exact_mut(k).enumerate() {
            self.read_codes(first + i, Codes { codes: &mut codes, groups: &mut groups })?;
            for ((out, codes), group) in out.chunks_mut(GROUP).zip(codes.chunks_exact(GROUP)).zip(&groups) {
                out.iter_mut().zip(codes).for_each(|(out, code)| *out = group.value(self.format, *code));
            }
        }
        Ok(())
    }
}

/// What has been read of a folder.
pub(super) struct Opened {
    pub(super) config: Config,
    pub(super) quantisation: Quantisation,
    pub(super) weights: WeightFormat,
    pub(super) files: Vec<PathBuf>,
    pub(super) tensors: BTreeMap<String, StoredTensor>,
    pub(super) rounded: BTreeMap<String, RoundedTensor>,
}

/// Opens a folder whose weights begin with `first`, if its configuration says that they are quantised.
pub(super) fn open(folder: &Path, first: &Path) -> Result<Option<Opened>> {
    let path = folder.join(CONFIG);
    let Some(value) = hugging_face::read_json(&path)?.remove(KEY).filter(|value| !value.is_null()) else {
        return Ok(None);
    };
    let method = value.get("quant_method").and_then(|m| m.as_str());
    ensure!(
        method == Some(METHOD),
        "{}: {KEY} is that of {}, whose weights are not read here; take the model that it was made from, and see \
         `ferropt checkpoint quantize`",
        path.display(),
        method.map_or("an unknown method".into(), |method| format!("{method:?}"))
    );
    let quantisation: Quantisation =
        serde_json::from_value(value).with_context(|| format!("{}: {KEY} is wrong", path.display()))?;
    quantisation.check().with_context(|| format!("{}: {KEY} is wrong", path.display()))?;
    let config = hugging_face::read_config(&path)?;
    let files = hugging_face::files(folder, first)?;
    let tensors = read(&files, &quantisation)?;
    ensure!(
        config.layers <= tensors.len(),
        "{} says num_hidden_layers = {}, but there are only {} tensors",
        path.display(),
        config.layers,
        tensors.len()
    );
    let weights = quantisation.weights()?;
    let mut opened =
        Opened { config, quantisation, weights, files, tensors: BTreeMap::new(), rounded: BTreeMap::new() };
    opened.sort(tensors).with_context(|| folder.display().to_string())?;
    Ok(Some(opened))
}

/// Lists the tensors of all files, which must be those of the configuration.
fn read(files: &[PathBuf], quantisation: &Quantisation) -> Result<BTreeMap<String, Raw>> {
    let mut tensors = BTreeMap::new();
    for file in files {
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let sum = quantisation.files.get(name);
        let sum =
            sum.with_context(|| format!("{} is not among the files that {CONFIG} lists", file.display()))?;
        let bytes = Mapped::open(file)?.bytes().len() as u64;
        ensure!(
            bytes == sum.bytes,
            "{} has {bytes} bytes, but {CONFIG} says {}: it is cut short, or of another model",
            file.display(),
            sum.bytes
        );
        for (name, raw) in list(file)? {
            ensure!(
                !tensors.contains_key(&name),
                "tensor {name} is twice; the second time in {}",
                file.display()
            );
            tensors.insert(name, raw);
        }
    }
    if let Some(name) = quantisation.files.keys().find(|name| !files.iter().any(|f| f.ends_with(name))) {
        bail!("{CONFIG} lists the file {name}, which is missing");
    }
    Ok(tensors)
}

impl Opened {
    /// Finds every tensor of the parameter table among what the files have, which must be all of it.
    fn sort(&mut self, mut tensors: BTreeMap<String, Raw>) -> Result<()> {
        for parameter in self.config.parameters() {
            let shape = parameter.part_shape();
            for name in &parameter.names {
                match shape[..] {
                    [n, k] if parameter.is_weight() => {
                        let tensor = RoundedTensor::take(&mut tensors, name, self.weights, [n, k])?;
                        self.rounded.insert(name.clone(), tensor);
                    }
                    _ => {
                        let raw =
                            tensors.remove(name).with_context(|| format!("there is no tensor {name}"))?;
                        let flat = Flat::try_from(raw).with_context(|| format!("tensor {name}"))?;
                        let tensor =
                            StoredTensor::stack_rows(&[&flat]).with_context(|| format!("tensor {name}"))?;
                        self.tensors.insert(name.clone(), tensor);
                    }
                }
            }
        }
        match tensors.keys().next() {
            None => Ok(()),
            Some(name) => bail!("there is the tensor {name}, which a quantised OPT of these sizes has not"),
        }
    }
}
