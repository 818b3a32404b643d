//! Writes a model in another format.

mod hugging_face;
mod metaseq;
mod outgoing;
mod quantised;
mod tokenizer;

use super::dtype::Dtype;
use super::pickle::write::Item;
use super::source::{GENERATION, Source, TOKENIZER_FILES};
use super::stored::Sink;
use super::torch_file;
use anyhow::{Context, Result, bail, ensure};
use outgoing::Outgoing;
pub use quantised::quantise;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// What to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Hugging Face folder with safetensors.
    Safetensors,
    /// Hugging Face folder with `pytorch_model.bin`.
    TorchBin,
    /// metaseq: `restored.pt`, where q, k and v are apart, or that many tensor-parallel parts, where they are fused.
    Metaseq {
        /// Tensor-parallel parts.
        parts: Option<usize>,
    },
}

/// How to write it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Format.
    pub target: Target,
    /// Type of all elements; as they are unless given.
    pub dtype: Option<Dtype>,
    /// Files of Hugging Face folders are not larger than this many bytes, but for a tensor that alone is.
    pub max_shard_bytes: u64,
}

/// What was written.
#[derive(Debug)]
pub struct Converted {
    /// All files.
    pub files: Vec<PathBuf>,
    /// Their size.
    pub bytes: u64,
    /// Size of the tensors in them.
    pub weights: u64,
}

/// Writes `source` into the new folder `destination`, with its tokenizer files. `progress` is told the bytes of tensors
/// written so far, and of all. The folder is filled beside its place and renamed when it is complete and on the disk.
///
/// # Errors
/// When the folder exists, cannot be written, or a value does not fit the type; the message names the tensor. Nothing
/// is left behind then.
pub fn convert(
    source: &Source,
    destination: &Path,
    options: &Options,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Converted> {
    ensure!(options.max_shard_bytes > 0, "files of at most 0 bytes cannot hold a model");
    if let Some(quantisation) = source.quantisation() {
        bail!(
            "{} is quantised ({quantisation}), and no other format has such codes; convert the model that it was made from",
            source.path().display()
        );
    }
    // Looked for before the weights: a run that goes on may remove a checkpoint meanwhile, and that must not go unnoticed.
    let files = source.tokenizer_files();
    publish(destination, progress, |folder| {
        match options.target {
            Target::Safetensors | Target::TorchBin => hugging_face::write(source, options, folder)?,
            Target::Metaseq { parts } => metaseq::write(source, options, parts, folder)?,
        }
        let metaseq = matches!(options.target, Target::Metaseq { .. });
        let generation = if metaseq { metaseq::generation_config(source, &files)? } else { None };
        let has = |file: &str| files.iter().any(|(name, _)| *name == file);
        let (configured, unified) = (has(tokenizer::CONFIG), has(tokenizer::FILE));
        for (ours, file) in files {
            let theirs =
                TOKENIZER_FILES.iter().find(|(name, _)| *name == ours).map_or(ours, |(_, name)| name);
            let content = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            if ours == GENERATION && generation.is_some() {
                continue;
            }
            if metaseq || configured {
                folder.small(if metaseq { theirs } else { ours }, &content)?;
                continue;
            }
            let (content, config) = match ours {
                tokenizer::FILE => match tokenizer::for_transformers(&content) {
                    Some(files) => (files.tokenizer, Some(files.config)),
                    None => (content, None),
                },
                tokenizer::VOCABULARY if !unified => {
                    let config = tokenizer::of_vocabulary(&content);
                    (content, config)
                }
                _ => (content, None),
            };
            folder.small(ours, &content)?;
            if let Some(config) = config {
                folder.small(tokenizer::CONFIG, &config)?;
            }
        }
        if let Some(content) = generation {
            folder.small(GENERATION, &content)?;
        }
        Ok(())
    })
}

/// Makes a new folder: `fill` fills it beside its place, then it is flushed to the disk and renamed. When anything fails,
/// nothing is left behind.
fn publish(
    destination: &Path,
    progress: &mut dyn FnMut(u64, u64),
    fill: impl FnOnce(&mut Folder) -> Result<()>,
) -> Result<Converted> {
    if fs::symlink_metadata(destination).is_ok() {
        bail!("{} exists already; name a new folder, or remove it first", destination.display());
    }
    let name = destination.file_name().and_then(|name| name.to_str());
    let name = name.with_context(|| format!("{} is no name for a folder", destination.display()))?;
    let parent = destination.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    let temporary = parent.join(format!(".{name}.tmp-{}", std::process::id()));
    fs::create_dir(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
    let fill = || -> Result<Converted> {
        let mut folder =
            Folder { path: &temporary, files: Vec::new(), bytes: 0, progress, done: 0, total: 0 };
        fill(&mut folder)?;
        sync(&temporary)?;
        let (files, bytes, weights) = (folder.files, folder.bytes, folder.total);
        fs::rename(&temporary, destination)
            .with_context(|| format!("cannot rename {} to {}", temporary.display(), destination.display()))?;
        sync(parent)?;
        Ok(Converted { files: files.iter().map(|file| destination.join(file)).collect(), bytes, weights })
    };
    fill().map_err(|error| {
        let error = error.context(format!("{} was not written", destination.display()));
        match fs::remove_dir_all(&temporary) {
            Err(left) if left.kind() != std::io::ErrorKind::NotFound => {
                error.context(format!("{} was left behind ({left})", temporary.display()))
            }
            _ => error,
        }
    })
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|f| f.sync_all())
        .with_context(|| format!("cannot flush the folder {} to disk", folder.display()))
}

/// The folder that is being filled.
struct Folder<'a> {
    path: &'a Path,
    files: Vec<String>,
    bytes: u64,
    progress: &'a mut dyn FnMut(u64, u64),
    done: u64,
    total: u64,
}

impl Folder<'_> {
    /// Writes a file by `fill`, which is to return it, and waits until it is on the disk.
    fn file(&mut self, name: &str, fill: impl FnOnce(&mut Self, File) -> Result<File>) -> Result<()> {
        let path = self.path.join(name);
        let file = File::create_new(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let file = fill(self, file).with_context(|| format!("cannot write {}", path.display()))?;
        file.sync_all().with_context(|| format!("cannot flush {} to disk", path.display()))?;
        self.bytes += file.metadata().with_context(|| format!("cannot read {}", path.display()))?.len();
        self.files.push(name.into());
        Ok(())
    }

    fn small(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.file(name, |_, mut file| {
            std::io::Write::write_all(&mut file, content)?;
            Ok(file)
        })
    }

    /// Copies a file of the source.
    fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.small(name, &content)
    }

    /// Writes a file of `torch.save`; `root` makes its content out of the dictionary of tensors.
    fn torch(
        &mut self,
        name: &str,
        tensors: &[Outgoing],
        root: impl FnOnce(Vec<(String, Item)>) -> Item,
    ) -> Result<()> {
        let item = |(storage, t): (usize, &Outgoing)| {
            (t.name.clone(), Item::Tensor { dtype: t.dtype, shape: t.shape.clone(), storage })
        };
        let root = root(tensors.iter().enumerate().map(item).collect());
        let lengths: Vec<u64> = tensors.iter().map(Outgoing::bytes).collect();
        self.file(name, |folder, file| {
            torch_file::write(file, &root, &lengths, &mut |i, sink| folder.tensor(&tensors[i], sink))
        })
    }

    /// Streams a tensor into `sink`.
    fn tensor(&mut self, tensor: &Outgoing, sink: &mut Sink) -> Result<()> {
        tensor.stream(&mut |bytes| {
            sink(bytes)?;
            self.wrote(bytes.len());
            Ok(())
        })
    }

    /// Tells of so many more bytes of tensors.
    fn wrote(&mut self, bytes: usize) {
        self.done += bytes as u64;
        (self.progress)(self.done, self.total);
    }
}
