//! Brings a checkpoint back from a mirror.

use super::super::load::Checkpoint;
use super::super::manifest::{self, Manifest};
use super::super::output::{Output, check_room, discard, explain, publish, sync_directory, write_file};
use super::super::store::{self, Found, Store};
use super::super::team::{Share, agree};
use super::Unreachable;
use super::remote::{Mirror, Name, tellable};
use anyhow::{Context, Result, anyhow};
use std::fs;
use std::path::Path;

impl Mirror {
    /// Fetches the newest whole checkpoint that is newer than `than` (roll-backs, step) into the run folder, each rank its share of the
    /// files, and opens it. `exchange` is that of [`Store::latest_whole_together`]; all ranks get the same. Checkpoints that
    /// are damaged there are passed over, and told if an older one can be used.
    ///
    /// # Errors
    /// When the mirror cannot be reached ([`Unreachable`]) or does not let this program in, or has newer checkpoints and none can be
    /// fetched; on all ranks.
    pub fn fetch_newer(
        &self,
        store: &Store,
        share: Share,
        than: Option<(u64, u64)>,
        mut exchange: impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Option<Found>> {
        let listed = if share.rank == 0 { self.newer(than).map_err(tellable) } else { Ok(Vec::new()) };
        let listed = agree(listed, &mut exchange)??;
        let told = exchange(&serde_json::to_vec(&listed)?)?;
        let first = told.first().context("rank 0 said nothing of the mirror")?;
        let names: Vec<String> =
            serde_json::from_slice(first).context("what rank 0 said of the mirror is garbled")?;
        let mut damaged = Vec::new();
        for name in names.iter().filter_map(|name| Name::parse(name)) {
            match self.fetch_one(store, share, &name, &mut exchange, &mut |_, _| ())? {
                Ok(checkpoint) => return Ok(Some(Found { checkpoint, damaged })),
                // It may well be whole.
                Err(error) if error.is::<Unreachable>() => return Err(error),
                Err(error) => damaged.push(error),
            }
        }
        if damaged.is_empty() {
            return Ok(None);
        }
        let reasons: Vec<String> = damaged.iter().map(|error| format!("\n  {error:#}")).collect();
        Err(anyhow!("no newer checkpoint of {} can be fetched:{}", self.url(), reasons.concat()))
    }

    /// Fetches one checkpoint; `progress` gets the bytes of this rank's share. What goes wrong with it on one rank goes wrong on all, and is the inner error.
    pub(super) fn fetch_one(
        &self,
        store: &Store,
        share: Share,
        name: &Name,
        exchange: &mut impl FnMut(&[u8]) -> Result<Vec<Vec<u8>>>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Result<Checkpoint>> {
        let place = store.path().join(store::directory(name.step));
        let temporary = store.path().join(format!(".{}.tmp-fetched", store::directory(name.step)));
        let first = share.rank == 0;
        let begun = self.manifest(name).and_then(|manifest| {
            if first {
                begin(store.path(), &temporary, &manifest)?;
            }
            Ok(manifest)
        });
        let begun = begun.map_err(tellable);
        // All ranks have done a step before any does the next.
        let fetched = match agree(begun, exchange)? {
            Ok(manifest) => {
                let fetched = self.fetch_share(name, &manifest, &temporary, share, progress);
                agree(fetched.map(|()| manifest).map_err(tellable), exchange)?
            }
            Err(error) => Err(error),
        };
        let finished = match fetched {
            Ok(manifest) if first => agree(finish(store.path(), &temporary, &place, &manifest), exchange)?,
            Ok(_) => agree(Ok(()), exchange)?,
            Err(error) => Err(error),
        };
        if first && finished.is_err() {
            discard(&temporary)?;
        }
        match finished {
            Ok(()) => agree(Checkpoint::open_share(&place, share), exchange),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Newer whole checkpoints, newest first. What a roll-back left behind is older than what was saved afterwards, whatever
    /// the steps.
    fn newer(&self, than: Option<(u64, u64)>) -> Result<Vec<String>> {
        let mut newer = Vec::new();
        for name in self.names()? {
            if self.is_whole(&name)? {
                let rollbacks = match self.manifest(&name).map_err(tellable) {
                    Ok(manifest) => manifest.run.rollbacks,
                    Err(error) if error.is::<Unreachable>() => return Err(error),
                    // One whose manifest is damaged is told of when it is fetched.
                    Err(_) => 0,
                };
                newer.push(((rollbacks, name.step), name.text));
            }
        }
        newer.retain(|(age, _)| than.is_none_or(|than| *age > than));
        newer.sort();
        Ok(newer.into_iter().rev().map(|(_, name)| name).collect())
    }

    fn fetch_share(
        &self,
        name: &Name,
        manifest: &Manifest,
        to: &Path,
        share: Share,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let sizes: Vec<u64> = manifest.files.values().map(|file| file.bytes).collect();
        let mine = share.pick(&sizes);
        let all = sizes.iter().zip(&mine).filter(|(_, mine)| **mine).map(|(bytes, _)| bytes).sum();
        let mut done = 0;
        for ((file, entry), _) in manifest.files.iter().zip(mine).filter(|(_, mine)| *mine) {
            let mut out = Output::create(&to.join(file))?;
            self.read(name, file, entry, &mut |piece| {
                done += piece.len() as u64;
                progress(done, all);
                out.write(piece)
            })?;
            out.finish()?;
        }
        Ok(())
    }
}

/// Makes the directory to fetch into, if there is room.
fn begin(root: &Path, temporary: &Path, manifest: &Manifest) -> Result<()> {
    check_room(root, manifest.bytes()).map_err(|error| anyhow!(explain(&error, root, manifest.bytes())))?;
    discard(temporary)?;
    fs::create_dir(temporary).with_context(|| format!("cannot create {}", temporary.display()))
}

/// Makes a checkpoint of what was fetched.
fn finish(root: &Path, temporary: &Path, place: &Path, manifest: &Manifest) -> Result<()> {
    write_file(&temporary.join(manifest::FILE), &manifest.to_bytes()?)?;
    sync_directory(temporary)?;
    publish(root, temporary, place)
}
