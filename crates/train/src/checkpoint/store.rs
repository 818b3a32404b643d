//! The checkpoints of a run.

use super::attempt::{Attempt, Hurry};
use super::load::{self, Checkpoint};
use super::manifest::Manifest;
use super::output::{discard, remove, rename, sync_directory};
use super::retention::{Kept, Retention};
use super::snapshot::Snapshot;
use super::team::{Share, Team, agree};
use super::write::{self, Written};
use anyhow::{Context, Error, Result, bail, ensure};
use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const LOCK: &str = ".lock";

/// Directory name of a step's checkpoint.
pub(super) fn directory(step: u64) -> String {
    format!("step-{step:08}")
}

fn is_temporary(name: &str) -> bool {
    name.strip_prefix(".step-").is_some_and(|rest| rest.contains(".tmp-"))
}

/// Inverse of [`directory`].
pub(super) fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (directory(step) == name).then_some(step)
}

/// A checkpoint directory, as listed.
#[derive(Debug)]
pub struct Entry {
    /// Step that its name says.
    pub step: u64,
    /// Times that the run was rolled back before; of a damaged one, as often as of any.
    pub rollbacks: u64,
    /// Whether it was saved before one was due, as at a stop.
    pub early: bool,
    /// The directory.
    pub path: PathBuf,
    /// Why it is not whole: an unreadable manifest, a file that is missing or has another size.
    pub damage: Option<Error>,
}

/// The newest checkpoint that can be used.
#[derive(Debug)]
pub struct Found {
    /// It, verified.
    pub checkpoint: Checkpoint,
    /// Newer ones that were passed over, each error naming the damaged file and the damage. Show them.
    pub damaged: Vec<Error>,
}

/// The folder `RUN/checkpoints`.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use ferropt_train::checkpoint::Store;
/// if let Some(found) = Store::open("runs/first")?.latest_whole()? {
///     let embedding = found.checkpoint.tensor("model", "model.decoder.embed_tokens.weight")?;
///     println!("step {}, {:?}", found.checkpoint.manifest().run.step, embedding.shape);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    /// Held while the store may be written to; the system releases it however the process ends.
    lock: Option<File>,
}

impl Store {
    /// Opens the checkpoints of a run for reading. A folder without any is an empty store.
    ///
    /// # Errors
    /// When `run` is not a directory.
    pub fn open(run: impl AsRef<Path>) -> Result<Store> {
        let run = run.as_ref();
        ensure!(
            run.is_dir(),
            "there is no run folder {}: give the folder that `ferropt train` wrote",
            run.display()
        );
        Ok(Store { root: run.join("checkpoints"), lock: None })
    }

    /// Opens the checkpoints of a run for training: creates what is missing, makes sure that no other process
    /// writes there, and removes what an interrupted save or deletion left behind.
    ///
    /// # Errors
    /// When another process trains into the folder, or it cannot be written to.
    pub fn open_for_writing(run: impl AsRef<Path>) -> Result<Store> {
        let run = run.as_ref();
        let root = run.join("checkpoints");
        fs::create_dir_all(&root).with_context(|| format!("cannot create {}", root.display()))?;
        sync_directory(run)?;
        let path = root.join(LOCK);
        // What is in it stays: another process may hold it, and others may know the folder by its number.
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.with_context(|| format!("cannot write to {}", path.display()))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "another process is training into {}: wait for it, stop it, or choose another run folder",
                run.display()
            ),
            // Some network file systems have no locks; one process per run folder is then the user's care.
            Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let store = Store { root, lock: Some(lock) };
        store.sweep(|_| true)?;
        Ok(store)
    }

    /// Rank 0: leaves a number by which others know the folder, whatever path they have it at.
    ///
    /// # Errors
    /// When it cannot be written, or the store was opened for reading.
    pub fn sign(&self, number: u64) -> Result<()> {
        let lock = self.lock.as_ref().context("the store was opened for reading")?;
        let text = format!("{number:x}");
        let written = lock.write_all_at(text.as_bytes(), 0).and_then(|()| lock.set_len(text.len() as u64));
        written
            .and_then(|()| lock.sync_all())
            .with_context(|| format!("cannot write to {}", self.root.join(LOCK).display()))
    }

    /// Whether this is the folder that rank 0 left the number in.
    pub fn is_signed(&self, number: u64) -> bool {
        fs::read_to_string(self.root.join(LOCK)).is_ok_and(|text| text == format!("{number:x}"))
    }

    /// Removes what interrupted saves and deletions left behind, as far as it is `wanted` gone. Only while nothing is
    /// written here.
    fn sweep(&self, wanted: impl Fn(&Path) -> bool) -> Result<()> {
        let left =
            self.names()?.into_iter().filter(|name| is_temporary(name)).map(|name| self.root.join(name));
        left.filter(|path| wanted(path))
            .try_for_each(|path| if path.is_dir() { discard(&path) } else { remove(&path) })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn names(&self) -> Result<Vec<String>> {
        let listing = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            listing => listing.with_context(|| format!("cannot list {}", self.root.display()))?,
        };
        let names: Result<Vec<_>, _> = listing.map(|entry| entry.map(|entry| entry.file_name())).collect();
        let names = names.with_context(|| format!("cannot list {}", self.root.display()))?;
        Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Steps of all checkpoint directories, oldest first.
    fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = self.names()?.iter().filter_map(|name| step_of(name)).collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// All checkpoint directories, oldest first, without reading their tensors. What a roll-back left behind is older than
    /// what was saved afterwards, whatever the steps.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn list(&self) -> Result<Vec<Entry>> {
        let entry = |step| {
            let path = self.root.join(directory(step));
            let (rollbacks, early, damage) = match load::survey(&path) {
                Ok(manifest) => (manifest.run.rollbacks, manifest.run.early, None),
                Err(error) => (0, false, Some(error)),
            };
            Entry { step, path, rollbacks, early, damage }
        };
        let mut entries: Vec<Entry> = self.steps()?.into_iter().map(entry).collect();
        let most = entries.iter().map(|entry| entry.rollbacks).max().unwrap_or(0);
        for damaged in entries.iter_mut().filter(|entry| entry.damage.is_some()) {
            damaged.rollbacks = most;
        }
        entries.sort_by_key(|entry| (entry.rollbacks, entry.step));
        Ok(entries)
    }

    /// The manifest of one checkpoint directory, after comparing the sizes of the files with it.
    ///
    /// # Errors
    /// When it is torn; the error names the file.
    pub fn survey(checkpoint: &Path) -> Result<Manifest> {
        load::survey(checkpoint)
    }

    /// Opens the checkpoint of one step after verifying every byte of it.
    ///
    /// # Errors
    /// When there is none, or it is damaged; the error names the file and the damage.
    pub fn load(&self, step: u64) -> Result<Checkpoint> {
        let path = self.root.join(directory(step));
        if !path.is_dir() {
            let steps: Vec<String> = self.list()?.iter().map(|entry| entry.step.to_string()).collect();
            bail!(
                "there is no checkpoint of step {step} in {}: {}",
                self.root.display(),
                if steps.is_empty() { "it is empty".into() } else { format!("it has {}", steps.join(", ")) }
            );
        }
        Checkpoint::open(&path)
    }

    /// Opens the newest checkpoint that is whole, trying older ones when newer ones are damaged. `None` when the
    /// run has no checkpoint yet.
    ///
    /// # Errors
    /// When there are checkpoints and all are damaged: to begin again silently would be to lose the run.
    pub fn latest_whole(&self) -> Result<Option<Found>> {
        let mut damaged = Vec::new();
        for entry in self.list()?.into_iter().rev() {
            match entry.damage.map_or_else(|| Checkpoint::open(&entry.path), Err) {
                Ok(checkpoint) => return Ok(Some(Found { checkpoint, damaged })),
                Err(error) => damaged.push(error),
            }
        }
        self.none_whole(&damaged)
    }

    /// [`Store::latest_whole`] for several ranks of which each verifies its share of the files. All find the same: the
    /// newest checkpoint with which none has found anything wrong. `exchange` gives this rank's bytes to all ranks and
    /// returns those of all, in order of rank; it is called equally often on every rank.
    ///
    /// # Errors
    /// When there are checkpoints and all are damaged, on all ranks; or when `exchange` fails.
    pub fn latest_whole_together(
        &self,
        share: Share,
        exchange: impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Option<Found>> {
        let steps = match share.rank {
            0 => self.list()?.into_iter().rev().map(|entry| entry.step).collect(),
            _ => Vec::new(),
        };
        let (found, damaged) = self.first_whole_together(&steps, share, exchange)?;
        match found {
            Some(checkpoint) => Ok(Some(Found { checkpoint, damaged })),
            None => self.none_whole(&damaged),
        }
    }

    /// Opens the first checkpoint that is whole of those of `steps`, for several ranks as [`Store::latest_whole_together`].
    /// Returns also what is wrong with those before it, or with all. Rank 0 says which steps; what others give is not looked at.
    ///
    /// # Errors
    /// When `exchange` fails.
    pub fn first_whole_together(
        &self,
        steps: &[u64],
        share: Share,
        mut exchange: impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<(Option<Checkpoint>, Vec<Error>)> {
        // Another rank may see the folder as it was a moment ago.
        let told = exchange(&serde_json::to_vec(steps)?)?;
        let first = told.first().context("rank 0 said nothing of its checkpoints")?;
        let steps: Vec<u64> =
            serde_json::from_slice(first).context("what rank 0 said of its checkpoints is garbled")?;
        let mut damaged = Vec::new();
        for step in steps {
            let opened = Checkpoint::open_share(&self.root.join(directory(step)), share);
            match agree(opened, &mut exchange)? {
                Ok(checkpoint) => return Ok((Some(checkpoint), damaged)),
                Err(error) => damaged.push(error),
            }
        }
        Ok((None, damaged))
    }

    /// The end of a search that found only these.
    fn none_whole(&self, damaged: &[Error]) -> Result<Option<Found>> {
        if damaged.is_empty() {
            return Ok(None);
        }
        let reasons: Vec<String> = damaged.iter().map(|error| format!("\n  {error:#}")).collect();
        bail!(
            "no checkpoint in {} is whole:{}\nRestore one from a copy, or choose another run folder to begin again",
            self.root.display(),
            reasons.concat()
        )
    }

    /// Writes a rank's part of a checkpoint; see [`write::write`].
    pub(super) fn save(
        &self,
        snapshot: Snapshot,
        shard_bytes: u64,
        team: &Team,
        hurry: &Hurry,
        number: u64,
    ) -> Result<Written> {
        let first = team.share.rank == 0;
        ensure!(self.lock.is_some() || !first, "{} was opened for reading", self.root.display());
        let attempt = Attempt::new(&self.root, team, hurry, snapshot.run.step, number);
        if first {
            // Another rank may have yet to read why the last one failed.
            let _ = self.sweep(Path::is_dir);
        }
        let written = write::write(&attempt, snapshot, shard_bytes)?;
        if first {
            // It has, if it took part in this one.
            let _ = self.sweep(|_| true);
        }
        Ok(written)
    }

    /// Deletes what `retention` does not keep, now that the checkpoint of step `newest` is durable, but for the way back of
    /// [`Retention::surplus`]. Each directory is renamed to a temporary first, so that a kill leaves no half checkpoint under a
    /// real name.
    pub(super) fn prune(&self, retention: Retention, newest: u64, way_back: Option<u64>) -> Result<()> {
        let whole = self.list()?.into_iter().filter(|entry| entry.damage.is_none());
        let whole: Vec<Kept> =
            whole.map(|Entry { step, rollbacks, early, .. }| Kept { step, rollbacks, early }).collect();
        for step in retention.surplus(&whole, newest, way_back) {
            let temporary = self.root.join(format!(".{}.tmp-old", directory(step)));
            remove(&temporary)?;
            rename(&self.root.join(directory(step)), &temporary)?;
            sync_directory(&self.root)?;
            remove(&temporary)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(step_of("step-00000100"), Some(100));
        assert_eq!(step_of("step-123456789012"), Some(123456789012));
        for other in ["step-100", "step-", "step-0000010x", "step-+0000100", "model", ".step-00000100.tmp-7"]
        {
            assert_eq!(step_of(other), None, "{other}");
        }
        assert!(is_temporary(".step-00000100.tmp-7") && is_temporary(".step-00000100.tmp-7-old"));
        assert!(!is_temporary("step-00000100") && !is_temporary(".lock") && !is_temporary(".step-notes"));
    }
}
