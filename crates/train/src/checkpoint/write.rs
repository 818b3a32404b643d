//! Puts a snapshot on disk, all of it or nothing.

use super::attempt::{Attempt, Elsewhere, Joined};
use super::load;
use super::manifest::{self, Manifest};
use super::output::{Output, check_room, explain, publish, sync_directory, write_file};
use super::shards::{self, Shard, SmallFile};
use super::snapshot::Snapshot;
use anyhow::{Error, Result, anyhow};
use std::path::PathBuf;

/// Size at which a group starts another shard: 2 GiB, which every file system and object store takes in one piece.
pub const DEFAULT_SHARD_BYTES: u64 = 2 << 30;

/// A checkpoint that is durable on disk.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

/// What a rank has to write.
struct Work {
    /// Filled as files get on the disk.
    manifest: Manifest,
    files: Vec<SmallFile>,
    shards: Vec<Shard>,
}

/// Writes the ranks' snapshots of a step to `root/step-N`, so that it is there entirely or not at all, whatever happens in
/// between. An existing checkpoint of that step is replaced. Called on every rank, with the tensors that it owns.
pub(super) fn write(attempt: &Attempt<'_>, snapshot: Snapshot, shard_bytes: u64) -> Result<Written> {
    let result = match attempt.team.share.rank {
        0 => lead(attempt, snapshot, shard_bytes),
        _ => follow(attempt, snapshot, shard_bytes),
    };
    let bytes = result.map_err(|reason| {
        reason.context(format!(
            "checkpoint {} was not saved (earlier ones are untouched)",
            attempt.place.display()
        ))
    })?;
    Ok(Written { path: attempt.place.clone(), bytes })
}

/// Rank 0: writes its part, waits for the others, and publishes.
fn lead(attempt: &Attempt<'_>, snapshot: Snapshot, shard_bytes: u64) -> Result<u64> {
    let mut needed = 0;
    let result = (|| {
        let mut work = Work::plan(attempt, snapshot, shard_bytes)?;
        needed = work.bytes();
        check_room(attempt.root, needed)?;
        attempt.begin()?;
        work.write(attempt)?;
        let parts = attempt.gather(work.manifest)?;
        let (mut manifest, indices) = shards::assemble(&attempt.temporary, parts)?;
        for (name, content) in indices {
            let entry = write_file(&attempt.temporary.join(&name), &content)?;
            manifest.files.insert(name, entry);
        }
        write_file(&attempt.temporary.join(manifest::FILE), &manifest.to_bytes()?)?;
        if attempt.team.share.of > 1 {
            load::survey(&attempt.temporary)?; // what others have written is all there
        }
        sync_directory(&attempt.temporary)?;
        publish(attempt.root, &attempt.temporary, &attempt.place)?;
        Ok(manifest.bytes())
    })();
    result.map_err(|error: Error| {
        let (reason, told) = match error.downcast_ref::<Elsewhere>() {
            Some(elsewhere) => (elsewhere.to_string(), elsewhere.to_string()),
            None => {
                let reason = explain(&error, attempt.root, needed);
                let told = format!("rank 0 could not finish it: {reason}");
                (reason, told)
            }
        };
        or_left(reason, attempt.abandon(&told))
    })
}

/// Other ranks: writes its part, and waits for what becomes of the checkpoint.
fn follow(attempt: &Attempt<'_>, snapshot: Snapshot, shard_bytes: u64) -> Result<u64> {
    let (mut needed, mut files) = (0, Vec::new());
    let delivered = (|| -> Result<(Joined, Manifest)> {
        let planned = Work::plan(attempt, snapshot, shard_bytes);
        // Even a rank that cannot go on has to wait, to be able to say so.
        let joined = attempt.join()?;
        let mut work = planned?;
        needed = work.bytes();
        files = work.shards.iter().map(|shard| shard.file.clone()).collect();
        check_room(attempt.root, needed)?;
        work.write(attempt)?;
        attempt.deliver(&work.manifest)?;
        Ok((joined, work.manifest))
    })();
    let (joined, part) = delivered.map_err(|error| {
        // Where rank 0 has given up, everything else that goes wrong is because of that.
        let error = attempt.check().err().unwrap_or(error);
        let reason = match error.downcast_ref::<Elsewhere>() {
            Some(elsewhere) => elsewhere.to_string(),
            None => explain(&error, attempt.root, needed),
        };
        let withdrawn = attempt.withdraw(&files, &reason);
        or_left(reason, withdrawn)
    })?;
    Ok(attempt.outcome(&joined, &part)?.bytes())
}

/// Why a save failed, and what is left of it where it could not be removed.
fn or_left(reason: String, removed: Result<()>) -> Error {
    match removed {
        Ok(()) => anyhow!(reason),
        Err(left) => anyhow!("{reason}; and its remains could not be removed: {left:#}"),
    }
}

impl Work {
    fn plan(attempt: &Attempt<'_>, snapshot: Snapshot, shard_bytes: u64) -> Result<Work> {
        snapshot.check()?;
        let share = attempt.team.share;
        let Snapshot { run, groups, files } = snapshot;
        let mut manifest = Manifest::new(run);
        let mut shards = Vec::new();
        for group in groups {
            shards.extend(shards::plan(group, shard_bytes, share, &mut manifest)?);
        }
        // All ranks have the same small files.
        let files = if share.rank == 0 { files } else { Vec::new() };
        Ok(Work { manifest, files, shards })
    }

    fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, content)| content.len() as u64).sum::<u64>()
            + self.shards.iter().map(Shard::bytes).sum::<u64>()
    }

    /// Writes everything, and frees each tensor once it is written.
    fn write(&mut self, attempt: &Attempt<'_>) -> Result<()> {
        for (name, content) in std::mem::take(&mut self.files) {
            let entry = write_file(&attempt.temporary.join(&name), &content)?;
            self.manifest.files.insert(name, entry);
        }
        for Shard { file, header, tensors } in std::mem::take(&mut self.shards) {
            attempt.check()?;
            let mut out = Output::create(&attempt.temporary.join(&file))?;
            out.write(&header)?;
            for tensor in tensors {
                out.write(tensor.data.bytes())?; // and free it before the next
            }
            self.manifest.files.insert(file, out.finish()?);
        }
        Ok(())
    }
}
