//! What weights were made of, and for what.

use anyhow::{Context, Result};
use ferropt_device::WeightFormat;
use ferropt_model::Config;
use serde::{Deserialize, Serialize};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Raised when the same numbers are rounded in another way, or matrices get another order.
const VERSION: u32 = 1;

/// Everything that decides what the weights are.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Key {
    /// Program and version.
    program: String,
    /// The device's layout.
    layout: String,
    pub format: String,
    /// The model's sizes.
    model: serde_json::Value,
    pub sources: Vec<SourceFile>,
}

/// A file as it was: one that has been written to, or replaced, differs in something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Whole path, links followed.
    pub path: String,
    bytes: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    /// Seconds and nanoseconds; unlike the other time no program can set it.
    changed: (i64, i64),
    number: u64,
}

impl SourceFile {
    /// Files as they are now.
    pub(super) fn all(paths: &[PathBuf]) -> Result<Vec<SourceFile>> {
        let now = |path: &PathBuf| {
            let read = || -> std::io::Result<SourceFile> {
                let (path, file) = (path.canonicalize()?, path.metadata()?);
                Ok(SourceFile {
                    path: path.to_string_lossy().into_owned(),
                    bytes: file.len(),
                    modified: (file.mtime(), file.mtime_nsec()),
                    changed: (file.ctime(), file.ctime_nsec()),
                    number: file.ino(),
                })
            };
            read().with_context(|| format!("cannot read {}", path.display()))
        };
        paths.iter().map(now).collect()
    }
}

impl Key {
    pub fn new(layout: &str, config: &Config, format: WeightFormat, sources: &[PathBuf]) -> Result<Key> {
        Ok(Key {
            program: format!("ferropt {}, weights {VERSION}", env!("CARGO_PKG_VERSION")),
            layout: layout.into(),
            format: format.name().into(),
            model: serde_json::to_value(config)?,
            sources: SourceFile::all(sources)?,
        })
    }

    pub fn to_text(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    pub fn from_text(text: &str) -> Result<Key> {
        Ok(serde_json::from_str(text)?)
    }

    /// Follows from what is used and how, not from the state that it is in: what has changed takes the place of what it
    /// was.
    pub fn file_name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        let paths: Vec<&String> = self.sources.iter().map(|source| &source.path).collect();
        (&self.layout, &self.format, paths).hash(&mut hasher);
        format!("{:016x}-{}{}", hasher.finish(), self.format, super::file::ENDING)
    }
}
