//! Models as users name them: a run folder, one of its checkpoints, weights in any format of [`ferropt_model::formats`], or what a
//! model is called that Hugging Face's tools have downloaded.

use crate::checkpoint::{Checkpoint, Store, group_files, verify_group};
use crate::hub;
use anyhow::{Context, Error, Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_model::formats::{self, Source};
use std::path::{Path, PathBuf};

/// An open model.
#[derive(Debug)]
pub struct Named {
    /// Its tensors, where they lie.
    pub source: Source,
    /// Its directory and step, if it is a checkpoint of a run.
    pub checkpoint: Option<(PathBuf, u64)>,
    /// Newer checkpoints that were passed over because they are not whole, each with what is wrong.
    pub damaged: Vec<Error>,
}

/// What makes a run's checkpoint whole.
#[derive(Clone, Copy)]
pub enum Whole<'a> {
    /// Manifest and sizes of the files are right.
    Sizes,
    /// The model's files also have their checksums, for which they are read.
    Checksums,
    /// The same, unless the files are known: they were verified before, and are as they were.
    ChecksumsOnce(&'a dyn Fn(&[PathBuf]) -> bool),
}

/// Group of tensors that is the model.
const MODEL: &str = "model";

/// Opens what `path` names. Of a run folder that is the checkpoint of `step`, or the newest `whole` one. `preset` is for
/// metaseq checkpoints that do not say how many heads they have.
///
/// # Errors
/// When there is no model; the message names the file, and the tensor or key that is wrong.
pub fn open(
    path: impl AsRef<Path>,
    step: Option<u64>,
    preset: Option<&str>,
    whole: Whole<'_>,
) -> Result<Named> {
    let path = &hub::resolve(path.as_ref())?;
    let check = |checkpoint: &Path| match whole {
        Whole::Sizes => Ok(()),
        Whole::ChecksumsOnce(known) if known(&group_files(checkpoint, MODEL)?) => Ok(()),
        Whole::Checksums | Whole::ChecksumsOnce(_) => verify_group(checkpoint, MODEL),
    };
    if !path.join("checkpoints").is_dir() {
        ensure!(
            step.is_none(),
            "{} is no run folder, so there is no checkpoint to choose. Leave the step out; where another path is a run, \
             name its checkpoint directory instead",
            path.display()
        );
        let checkpoint = if path.join("manifest.json").is_file() {
            let step = Store::survey(path)?.run.step;
            check(path)?;
            Some((path.to_path_buf(), step))
        } else {
            None
        };
        return Ok(Named { source: Source::open(path, preset)?, checkpoint, damaged: Vec::new() });
    }
    let store = Store::open(path)?;
    let mut damaged = Vec::new();
    let mut entries = store.list()?;
    while let Some(entry) = entries.pop() {
        if step.is_some_and(|step| step != entry.step) {
            continue;
        }
        let open = || {
            check(&entry.path)?;
            Source::open(&entry.path, preset)
        };
        match entry.damage.map_or_else(open, Err) {
            Ok(source) => return Ok(Named { source, checkpoint: Some((entry.path, entry.step)), damaged }),
            // The run goes on, and has removed what was the newest checkpoint a moment ago: there are newer ones.
            Err(_) if step.is_none() && gone(&entry.path) => entries = store.list()?,
            Err(damage) => damaged.push(damage),
        }
    }
    let which = step.map_or("whole checkpoint".into(), |step| format!("whole checkpoint of step {step}"));
    Err(damaged.into_iter().next().unwrap_or_else(|| anyhow::anyhow!("nothing is there")))
        .with_context(|| format!("there is no {which} in {}", store.path().display()))
}

/// Whether there is nothing of that name. A link to nothing, or a folder that cannot be looked into, is something: it would be
/// listed again and again.
fn gone(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// The tokenizer that `path` names: a file, a folder, or a model that Hugging Face's tools have downloaded.
///
/// # Errors
/// As [`Tokenizer::load`], and when that model has not been downloaded.
pub fn tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::load(&hub::resolve(path)?)
}

impl Named {
    /// The files that decide what its weights are.
    ///
    /// # Errors
    /// When it is a checkpoint that is not whole any more.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        match &self.checkpoint {
            Some((path, _)) => group_files(path, MODEL),
            None => Ok(self.source.files().to_vec()),
        }
    }

    /// All that is wrong with it: see [`formats::verify`]; of a run's checkpoint every file is compared with its checksum,
    /// those of the optimiser too.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<String>> {
        let mut findings = formats::verify(&self.source, progress)?;
        if let Some((path, _)) = &self.checkpoint
            && let Err(damage) = Checkpoint::open(path)
        {
            findings.push(format!("{damage:#}"));
        }
        Ok(findings)
    }
}
