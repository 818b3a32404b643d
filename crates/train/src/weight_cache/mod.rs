//! Weights that are ready to be used, kept on the disk.
//!
//! To open a model is to read it, to round it where its format asks for that, and to lay it out for the device. What
//! comes of it is kept: the next time the file is mapped, nothing is computed, and all processes that use the model have
//! its pages in common. A kept file is used only if it says that it was made of these very files for this very layout;
//! whatever is wrong with it, the model is opened as if it were not there.

mod file;
mod key;
#[cfg(test)]
mod tests;

use crate::checkpoint::human_bytes;
use anyhow::{Context, Error, Result, bail, ensure};
use ferropt_device::{Device, WeightFormat};
use ferropt_model::{Config, Decoder, Matrices, Places, ReadRows, Ready};
use key::Key;
pub use key::SourceFile;
use std::ffi::OsString;
use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// Weights of which there are fewer bytes are made in a moment, and not kept.
const LEAST: u64 = 32 << 20;
/// Bytes that are kept at most beside the largest model, and the share of the disk's free bytes.
const MOST: u64 = 20_000_000_000;
const SHARE: u64 = 10;
/// Share of the disk's free bytes that is taken at most with the largest one.
const SHARE_OF_ALL: u64 = 2;
/// A file that nobody has written to for so long is not being written.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Variable that names the folder, or is `off`.
pub const FOLDER_VARIABLE: &str = "FERROPT_CACHE";
/// Variable with the most bytes that are kept.
pub const SIZE_VARIABLE: &str = "FERROPT_CACHE_SIZE";

/// A folder of weights that are ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightCache {
    folder: PathBuf,
    limit: Option<u64>,
    least: u64,
}

/// What came of a model's weights.
#[derive(Debug)]
pub enum Outcome {
    /// They were there.
    Found,
    /// They are there now: so many bytes.
    Kept(u64),
    /// They are made in a moment, and not kept.
    Small,
    /// They could not be kept. They are in memory, and the model can be used.
    Failed(Error),
}

/// Weights that are kept.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The file.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// When it was used last.
    pub used: SystemTime,
    /// Name of the weights' format.
    pub format: String,
    /// The files that they were made of.
    pub sources: Vec<SourceFile>,
}

impl WeightCache {
    /// Weights in a folder, which is made when it is needed.
    pub fn new(folder: impl Into<PathBuf>) -> WeightCache {
        WeightCache { folder: folder.into(), limit: None, least: LEAST }
    }

    /// The same, but with so many bytes at most. Without it, the largest model takes what it needs, and the others 20 GB or a
    /// tenth of what the disk has free, whichever is less; all together take no more than half of that.
    pub fn with_limit(self, bytes: u64) -> WeightCache {
        WeightCache { limit: Some(bytes), ..self }
    }

    /// The same, but keeps weights of so many bytes on.
    pub fn with_least(self, bytes: u64) -> WeightCache {
        WeightCache { least: bytes, ..self }
    }

    /// What the variables `FERROPT_CACHE` and `FERROPT_CACHE_SIZE` say; else `ferropt/weights` in the user's folder of
    /// caches. Nothing if it is off, or there is no such folder.
    ///
    /// # Errors
    /// When a variable is no folder or no size.
    pub fn from_environment() -> Result<Option<WeightCache>> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let limit = match variable(SIZE_VARIABLE).map(OsString::into_string) {
            None => None,
            Some(Ok(text)) => Some(crate::checkpoint::bytes_of(&text).with_context(|| {
                format!("{SIZE_VARIABLE} is {text:?}; expected a size such as 40GB, 500MiB or 1000000")
            })?),
            Some(Err(other)) => bail!("{SIZE_VARIABLE} is {other:?}, which is no size"),
        };
        let folder = match variable(FOLDER_VARIABLE) {
            Some(off) if off == "off" => None,
            Some(folder) => Some(PathBuf::from(folder)),
            None => {
                let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
                let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
                caches.map(|caches| caches.join("ferropt"))
            }
        };
        if let Some(folder) = folder.as_ref().filter(|folder| folder.exists() && !folder.is_dir()) {
            bail!(
                "{} is no folder, so that no weights can be kept there; set {FOLDER_VARIABLE} to a folder, or to off",
                folder.display()
            );
        }
        Ok(folder.map(|folder| WeightCache { limit, ..WeightCache::new(folder.join("weights")) }))
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The weights of a model whose parameters `read` gives, made of the files `sources`.
    ///
    /// # Errors
    /// As [`Decoder::new`]; that something is wrong with the cache is no error.
    pub fn decoder<D: Device>(
        &self,
        device: &D,
        config: &Config,
        format: WeightFormat,
        sources: &[PathBuf],
        read: &ReadRows<'_>,
    ) -> Result<(Decoder<D>, Outcome)> {
        config.check()?;
        let places = Places::new(device, config, format);
        let outcome = if (places.bytes() as u64) < self.least {
            Outcome::Small
        } else {
            match self.ready(device, config, format, places, sources, read) {
                Ok((ready, outcome)) => {
                    let matrices = Matrices::Ready(&ready);
                    return Ok((Decoder::new(device, config, format, read, matrices)?, outcome));
                }
                Err(error) => Outcome::Failed(error),
            }
        };
        Ok((Decoder::new(device, config, format, read, Matrices::Rows)?, outcome))
    }

    fn ready<D: Device>(
        &self,
        device: &D,
        config: &Config,
        format: WeightFormat,
        places: Places,
        sources: &[PathBuf],
        read: &ReadRows<'_>,
    ) -> Result<(Ready, Outcome)> {
        let layout = device.packed_layout();
        let key = || Key::new(&layout, config, format, sources);
        let wanted = key()?.to_text()?;
        let path = self.folder.join(key()?.file_name());
        let bytes = places.bytes();
        if let Some(body) = file::open(&path, &wanted, bytes) {
            return Ok((places.ready(body)?, Outcome::Found));
        }
        let room = || -> Result<()> {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            self.make_room(&path, file::size(&wanted, bytes))
        };
        let written = room().and_then(|()| {
            file::write(&path, &wanted, bytes, |write| {
                places.write(device, config, format, read, write)?;
                ensure!(key()?.to_text()? == wanted, "the model's files changed while they were read");
                Ok(())
            })
        });
        let body = written
            .with_context(|| format!("weights that are ready cannot be kept in {}", self.folder.display()))?;
        Ok((places.ready(body)?, Outcome::Kept(bytes as u64)))
    }

    /// Whether weights are kept that were made of these files, as they are now.
    pub fn knows(&self, sources: &[PathBuf]) -> bool {
        let Ok(now) = SourceFile::all(sources) else { return false };
        self.entries().is_ok_and(|entries| entries.iter().any(|entry| entry.sources == now))
    }

    /// What is kept, what was used last first.
    ///
    /// # Errors
    /// When the folder cannot be read. One that does not exist has no entries.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for path in self.files()?.into_iter().filter(|path| file::is_weights(path)) {
            let Some(text) = file::key_of(&path) else { continue };
            let (Ok(key), Ok(metadata)) = (Key::from_text(&text), path.metadata()) else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            let bytes = metadata.len();
            entries.push(Entry { path, bytes, used, format: key.format, sources: key.sources });
        }
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.used));
        Ok(entries)
    }

    /// Removes everything; returns the number of bytes.
    ///
    /// # Errors
    /// When a file cannot be removed.
    pub fn clear(&self) -> Result<u64> {
        let ours =
            self.files()?.into_iter().filter(|path| file::is_weights(path) || file::is_temporary(path));
        ours.map(|path| {
            let bytes = path.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            Ok(bytes)
        })
        .sum()
    }

    fn files(&self) -> Result<Vec<PathBuf>> {
        let listed = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            listed => listed.and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect()),
        };
        listed.with_context(|| format!("cannot read {}", self.folder.display()))
    }

    /// Makes room for a file of `needed` bytes: removes what was abandoned, and weights that were used longest ago.
    fn make_room(&self, path: &Path, needed: u64) -> Result<()> {
        let mut others: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for other in self.files()? {
            let Ok(metadata) = other.metadata() else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if file::is_temporary(&other) && used.elapsed().is_ok_and(|time| time > ABANDONED) {
                // If it cannot be removed it takes room, and nothing worse.
                let _ = fs::remove_file(&other);
            } else if file::is_weights(&other) {
                // What has this very name is not what is wanted, and nobody will want it again.
                let used = if other == path { SystemTime::UNIX_EPOCH } else { used };
                others.push((used, metadata.len(), other));
            }
        }
        others.sort();
        let free = rustix::fs::statvfs(&self.folder)
            .map(|disk| disk.f_bavail.saturating_mul(disk.f_frsize))
            .context("the disk does not tell its free bytes")?;
        let sizes: Vec<u64> = others.iter().map(|(_, bytes, _)| *bytes).collect();
        for (_, _, other) in others.iter().take(must_go(self.limit, free, &sizes, needed)?) {
            fs::remove_file(other).with_context(|| format!("cannot remove {}", other.display()))?;
        }
        Ok(())
    }
}

/// How many files must go so that one of `needed` bytes can be kept, out of those with the sizes `others`, where the one that was
/// used longest ago is the first. `free` is what the disk has beside them.
///
/// # Errors
/// When there is no room for it even if all go.
fn must_go(limit: Option<u64>, free: u64, others: &[u64], needed: u64) -> Result<usize> {
    let room = free + others.iter().sum::<u64>();
    let most = limit.unwrap_or(room / SHARE_OF_ALL);
    ensure!(
        needed <= most,
        "they have {} and the limit is {}; {SIZE_VARIABLE} raises it, {FOLDER_VARIABLE}=off keeps nothing",
        human_bytes(needed),
        human_bytes(most)
    );
    ensure!(
        needed <= room,
        "they have {} and the disk has only {} free",
        human_bytes(needed),
        human_bytes(room)
    );
    let fit = |left: &[u64]| {
        let all = needed + left.iter().sum::<u64>();
        let largest = left.iter().copied().fold(needed, u64::max);
        let beside = all - largest;
        all <= most.min(room) && (limit.is_some() || beside <= (room / SHARE).min(MOST))
    };
    Ok((0..others.len()).find(|gone| fit(&others[*gone..])).unwrap_or(others.len()))
}

/// Makes a new name in a folder durable.
fn sync_folder(folder: &Path) -> std::io::Result<()> {
    File::open(folder)?.sync_all()
}
