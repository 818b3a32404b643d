//! A model in files, whatever their format.

use super::dtype::Dtype;
use super::hugging_face;
use super::metaseq::{self, Group};
use super::quantised::{self, Quantisation, RoundedTensor};
use super::stored::{Flat, StoredTensor};
use super::tensor::Tensor;
use super::torch_file::StateDict;
use crate::config::Config;
use crate::parameters::{HEAD, Parameter};
use anyhow::{Context, Result, bail, ensure};
use ferropt_device::WeightFormat;
use ferropt_device::quantise::{Codes, GROUP};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Files of a tokenizer and of generation that travel with weights: what Hugging Face calls them, and what metaseq does.
pub const TOKENIZER_FILES: [(&str, &str); 7] = [
    ("tokenizer.json", "gpt2-unified.json"),
    ("vocab.json", "gpt2-vocab.json"),
    ("merges.txt", "gpt2-merges.txt"),
    ("tokenizer_config.json", "tokenizer_config.json"),
    ("special_tokens_map.json", "special_tokens_map.json"),
    ("added_tokens.json", "added_tokens.json"),
    (GENERATION, GENERATION),
];

/// Says which ids end a text, among other things.
pub(super) const GENERATION: &str = "generation_config.json";

const EMBEDDING: &str = "model.decoder.embed_tokens.weight";

/// Format of a model's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Hugging Face, safetensors.
    Safetensors,
    /// Hugging Face, `pytorch_model*.bin`.
    TorchBin,
    /// metaseq: tensor-parallel parts, and shards of each.
    Metaseq {
        /// Tensor-parallel parts.
        parts: usize,
        /// Flattened shards of each part.
        shards: usize,
    },
    /// Ours, with matrices in codes of few bits.
    Quantised(WeightFormat),
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Format::Safetensors => f.write_str("Hugging Face, safetensors"),
            Format::TorchBin => f.write_str("Hugging Face, pytorch_model.bin"),
            Format::Metaseq { parts: 1, shards: 1 } => f.write_str("metaseq, one file"),
            Format::Metaseq { parts, shards: 1 } => write!(f, "metaseq, {parts} tensor-parallel parts"),
            Format::Metaseq { parts, shards } => {
                write!(f, "metaseq, {parts} tensor-parallel parts, each of {shards} flattened shards")
            }
            Format::Quantised(weights) => write!(f, "quantised, {}", weights.name()),
        }
    }
}

/// An open model: every tensor of its parameter table has been found with the right shape, and none has been read.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// let source = ferropt_model::formats::Source::open("opt-125m", None)?;
/// let parameter = &source.config().parameters()[0];
/// let mut row = vec![0.0; parameter.shape[1]];
/// source.read_rows(parameter, 2, &mut row)?; // the embedding of </s>
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Source {
    path: PathBuf,
    folder: PathBuf,
    format: Format,
    config: Config,
    config_from: String,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, StoredTensor>,
    /// Matrices that are stored as codes, and how they came about.
    rounded: BTreeMap<String, RoundedTensor>,
    quantisation: Option<Quantisation>,
    /// Copies of tensors in other tensor-parallel parts: name, part.
    pub(super) replicas: Vec<(String, usize, StoredTensor)>,
}

impl Source {
    /// Opens a Hugging Face folder, a metaseq folder, or one file of either. `preset` names the model whose number of
    /// heads a metaseq checkpoint has that does not say it.
    ///
    /// # Errors
    /// When there is no such model, a file is damaged or does not belong to an OPT, or its configuration asks for
    /// something that the decoder does not compute. The message names the file, and the tensor or key.
    pub fn open(path: impl AsRef<Path>, preset: Option<&str>) -> Result<Source> {
        let path = path.as_ref();
        if path.is_dir() {
            if let Some(first) = hugging_face::weights(path) {
                return Source::hugging_face(path, path, &first);
            }
            let group = metaseq::find(path)?.with_context(|| {
                format!(
                    "{} holds no model: neither model.safetensors nor pytorch_model.bin (or an index of them), nor a .pt \
                     file of metaseq",
                    path.display()
                )
            })?;
            return Source::metaseq(path, &group, preset);
        }
        if let Some(group) = metaseq::group_of(path)? {
            return Source::metaseq(path, &group, preset);
        }
        ensure!(path.exists(), "there is no file or folder {}", path.display());
        let name = path.to_string_lossy();
        ensure!(
            [".safetensors", ".bin", ".index.json"].iter().any(|end| name.ends_with(end)),
            "{} is no file of a model: expected .safetensors, .bin or .pt, or a folder",
            path.display()
        );
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Source::hugging_face(path, folder, path)
    }

    fn hugging_face(path: &Path, folder: &Path, first: &Path) -> Result<Source> {
        let config_from = folder.join(hugging_face::CONFIG).display().to_string();
        if let Some(opened) = quantised::open(folder, first)? {
            let source = Source {
                path: path.into(),
                folder: folder.into(),
                format: Format::Quantised(opened.weights),
                config: opened.config,
                config_from,
                files: opened.files,
                tensors: opened.tensors,
                rounded: opened.rounded,
                quantisation: Some(opened.quantisation),
                replicas: Vec::new(),
            };
            return source.check();
        }
        let mut opened = hugging_face::open(folder, first)?;
        let name = first.file_name().unwrap_or_default().to_string_lossy();
        let format = if name.contains(".safetensors") { Format::Safetensors } else { Format::TorchBin };
        // What the head is made of is seen below.
        let config = Config { own_head: false, ..opened.config.clone() };
        // Of two names for one tensor, `safetensors.torch.save_model` keeps the first.
        if !opened.tensors.contains_key(EMBEDDING)
            && let Some(head) = opened.tensors.remove(HEAD)
        {
            opened.tensors.insert(EMBEDDING.into(), head);
        }
        let mut tensors = BTreeMap::new();
        for full in config.parameters().iter().flat_map(|p| &p.names) {
            let flat = opened.tensors.remove(full);
            let flat = flat.with_context(|| format!("{} has no tensor {full}", first.display()))?;
            tensors.insert(full.clone(), whole(&flat, full, folder)?);
        }
        let head = opened.tensors.remove(HEAD).map(|flat| whole(&flat, HEAD, folder)).transpose()?;
        refuse_others(&opened.tensors, folder, &config)?;
        let mut source = Source {
            path: path.into(),
            folder: folder.into(),
            format,
            config,
            config_from,
            files: opened.files,
            tensors,
            rounded: BTreeMap::new(),
            quantisation: None,
            replicas: Vec::new(),
        };
        if let Some(head) = head
            && !source.is_embedding(&head)?
        {
            ensure!(
                opened.config.own_head,
                "{}: tensor {HEAD} differs from {EMBEDDING}, but {} says that they are one (tie_word_embeddings is true, or not \
                 there): set it to false if the head is the model's own, or remove the tensor if the embeddings are the head",
                head.file(),
                source.config_from
            );
            source.config.own_head = true;
            source.tensors.insert(HEAD.into(), head);
        }
        source.check()
    }

    fn metaseq(path: &Path, group: &Group, preset: Option<&str>) -> Result<Source> {
        let opened = metaseq::open(group, preset)?;
        let source = Source {
            path: path.into(),
            folder: group.folder.clone(),
            format: Format::Metaseq { parts: opened.parts, shards: opened.shards },
            config: opened.config,
            config_from: opened.config_from,
            files: opened.files,
            tensors: opened.tensors,
            rounded: BTreeMap::new(),
            quantisation: None,
            replicas: opened.replicas,
        };
        let source = source.check()?;
        if let Some((head, parts)) = opened.head {
            // metaseq's reshard_mp takes the head for a tensor that every part has whole, so that its files have the first
            // rows of the table there.
            let mut stale = true;
            for part in &parts {
                stale = stale && begins(source.tensor(EMBEDDING)?, part)?;
            }
            ensure!(
                stale || source.is_embedding(&head)?,
                "{}: tensor {} differs from {EMBEDDING}, but only Hugging Face's folders may have an LM head that is not the \
                 embedding table",
                head.file(),
                metaseq::HEAD
            );
        }
        Ok(source)
    }

    /// Whether an LM head is the embedding table, to the bit.
    fn is_embedding(&self, head: &StoredTensor) -> Result<bool> {
        let embedding = self.tensor(EMBEDDING)?;
        Ok(head.shape() == embedding.shape() && begins(embedding, head)?)
    }

    /// Compares shapes with the parameter table.
    fn check(self) -> Result<Source> {
        for parameter in self.config.parameters() {
            let shape = parameter.part_shape();
            // Of codes, shapes were compared when they were found.
            for name in parameter.names.iter().filter(|name| !self.rounded.contains_key(*name)) {
                let tensor = self.tensor(name)?;
                ensure!(
                    tensor.shape() == shape,
                    "{}: tensor {name} has shape {:?}, but {shape:?} follows from {}",
                    tensor.file(),
                    tensor.shape(),
                    self.config_from
                );
            }
        }
        for (name, part, copy) in &self.replicas {
            ensure!(
                copy.shape() == self.tensor(name)?.shape(),
                "{}: tensor {name} of part {part} has shape {:?}, that of part 0 has {:?}",
                copy.file(),
                copy.shape(),
                self.tensor(name)?.shape()
            );
        }
        Ok(self)
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Ids that end its texts: `eos_token_id` of generation_config.json, or else of config.json; none if neither says it.
    ///
    /// # Errors
    /// When one of the files is damaged, or the value is no id or list of ids.
    pub fn ends(&self) -> Result<Option<Vec<u32>>> {
        for name in [GENERATION, hugging_face::CONFIG] {
            let path = self.folder.join(name);
            if path.is_file()
                && let Some(ends) = hugging_face::ends(&path)?
            {
                return Ok(Some(ends));
            }
        }
        Ok(None)
    }

    /// Its `config.json` in a Hugging Face folder.
    pub(super) fn hugging_face_config(&self) -> Result<Value> {
        let mut config = self.config.hugging_face();
        match self.ends()?.as_deref() {
            Some([one]) => config["eos_token_id"] = (*one).into(),
            Some(several) => config["eos_token_id"] = several.into(),
            None => {}
        }
        Ok(config)
    }

    /// The folder of its files.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Sizes of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the sizes were found, for people.
    pub fn config_from(&self) -> &str {
        &self.config_from
    }

    /// The files with weights.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Tokenizer and generation files beside the weights, each with its name among Hugging Face's.
    pub fn tokenizer_files(&self) -> Vec<(&'static str, PathBuf)> {
        let find = |(ours, theirs): &(&'static str, &'static str)| {
            let found = [*ours, *theirs].into_iter().map(|name| self.folder.join(name)).find(|f| f.is_file());
            found.map(|file| (*ours, file))
        };
        TOKENIZER_FILES.iter().filter_map(find).collect()
    }

    /// How it was quantised, if it was.
    pub fn quantisation(&self) -> Option<&Quantisation> {
        self.quantisation.as_ref()
    }

    /// A tensor of numbers by its Hugging Face name.
    ///
    /// # Errors
    /// When the model has none of that name.
    pub fn tensor(&self, name: &str) -> Result<&StoredTensor> {
        self.tensors.get(name).with_context(|| format!("{} has no tensor {name}", self.path.display()))
    }

    /// All tensors, in the order of the parameter table.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Tensor<'_>)> {
        let names = self.config.parameters().into_iter().flat_map(|p| p.names);
        names.filter_map(|name| self.find(&name).map(|tensor| (name, tensor)))
    }

    /// A tensor of either kind.
    pub(super) fn find(&self, name: &str) -> Option<Tensor<'_>> {
        let rounded = || self.rounded.get(name).map(Tensor::Rounded);
        self.tensors.get(name).map(Tensor::Plain).or_else(rounded)
    }

    /// The element type of all tensors that are numbers, if it is one.
    pub fn dtype(&self) -> Option<Dtype> {
        let mut types = self.tensors.values().map(StoredTensor::dtype);
        let first = types.next()?;
        types.all(|t| t == first).then_some(first)
    }

    /// The element types of the matrices that products read, where they are numbers.
    pub fn weight_types(&self) -> BTreeSet<Dtype> {
        let weights = self.config.parameters().into_iter().filter(Parameter::is_weight);
        weights
            .flat_map(|p| p.names)
            .filter_map(|name| self.tensors.get(&name))
            .map(StoredTensor::dtype)
            .collect()
    }

    /// Size of all weights.
    pub fn bytes(&self) -> u64 {
        self.tensors.values().map(StoredTensor::bytes).sum::<u64>()
            + self.rounded.values().map(RoundedTensor::bytes).sum::<u64>()
    }

    /// Rows of a parameter from `first` on as f32, which is exact: as many as `out` has room for. Where q, k and v are
    /// stacked, rows count through all three. Of codes, the numbers that they stand for.
    ///
    /// # Errors
    /// When the model has no such rows, or `out` is no whole number of them.
    pub fn read_rows(&self, parameter: &Parameter, first: usize, out: &mut [f32]) -> Result<()> {
        let columns = parameter.shape.get(1).copied().unwrap_or(1);
        ensure!(
            out.len().is_multiple_of(columns.max(1)),
            "{} values are no whole number of rows of {columns}",
            out.len()
        );
        let mut out = out;
        self.each_part(parameter, first, out.len() / columns, &mut |name, tensor, first, rows| {
            let (now, later) = std::mem::take(&mut out).split_at_mut(rows * columns);
            out = later;
            tensor.read_rows(first, now).with_context(|| format!("tensor {name}"))
        })
    }

    /// Rows of a matrix from `first` on as codes: as many as `to` has room for. Rows count as in [`Source::read_rows`].
    ///
    /// # Errors
    /// When the model has no such rows, or stores the matrix as numbers.
    pub fn read_codes(&self, parameter: &Parameter, first: usize, to: Codes<'_>) -> Result<()> {
        let count = parameter.shape.get(1).copied().unwrap_or(1).div_ceil(GROUP);
        let Codes { mut codes, mut groups } = to;
        self.each_part(parameter, first, groups.len() / count, &mut |name, tensor, first, rows| {
            let Tensor::Rounded(tensor) = tensor else { bail!("tensor {name} is not stored as codes") };
            let (now, later) = std::mem::take(&mut codes).split_at_mut(rows * count * GROUP);
            codes = later;
            let (now_groups, later) = std::mem::take(&mut groups).split_at_mut(rows * count);
            groups = later;
            let to = Codes { codes: now, groups: now_groups };
            tensor.read_codes(first, to).with_context(|| format!("tensor {name}"))
        })
    }

    /// Hands over the tensors that hold `rows` rows of a parameter from `first` on, each with its own first row and their
    /// number.
    fn each_part(
        &self,
        parameter: &Parameter,
        first: usize,
        rows: usize,
        take: &mut dyn FnMut(&str, Tensor<'_>, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let (mut first, mut rows) = (first, rows);
        for name in &parameter.names {
            let tensor = self.find(name);
            let tensor = tensor.with_context(|| format!("{} has no tensor {name}", self.path.display()))?;
            if first >= tensor.rows() {
                first -= tensor.rows();
                continue;
            }
            let now = rows.min(tensor.rows() - first);
            take(name, tensor, first, now)?;
            (first, rows) = (0, rows - now);
        }
        if rows > 0 {
            bail!("{} has {} rows, and more were to be read", parameter.names.join(", "), parameter.shape[0]);
        }
        Ok(())
    }
}

fn whole(flat: &Flat, name: &str, folder: &Path) -> Result<StoredTensor> {
    StoredTensor::stack_rows(&[flat]).with_context(|| format!("{}: tensor {name}", folder.display()))
}

/// Refuses tensors that the parameter table does not have.
fn refuse_others(others: &StateDict, folder: &Path, config: &Config) -> Result<()> {
    match others.keys().next() {
        None => Ok(()),
        Some(name) => bail!(
            "{} has the tensor {name} ({} such tensors), which the OPT of its config.json ({} layers) has not",
            folder.display(),
            others.len(),
            config.layers
        ),
    }
}

/// Whether `tensor` begins with the rows of `head`, of the same type, to the bit.
fn begins(tensor: &StoredTensor, head: &StoredTensor) -> Result<bool> {
    if tensor.dtype() != head.dtype() || tensor.columns() != head.columns() || head.rows() > tensor.rows() {
        return Ok(false);
    }
    if head.is_same_place(tensor) {
        return Ok(true);
    }
    let (step, row) = (head.chunk_rows().min(head.rows()).max(1), head.columns() * head.dtype().size());
    let mut buffers = [vec![0; step * row], vec![0; step * row]];
    for start in (0..head.rows()).step_by(step) {
        let end = (start + step).min(head.rows());
        let [x, y] = &mut buffers;
        let (x, y) = (&mut x[..(end - start) * row], &mut y[..(end - start) * row]);
        tensor.read_block(start..end, 0..head.columns(), x)?;
        head.read_block(start..end, 0..head.columns(), y)?;
        if x != y {
            return Ok(false);
        }
    }
    Ok(true)
}
