//! The run folder, opened by all ranks of a run.

use super::alike;
use crate::checkpoint::mirror::Mirror;
use crate::checkpoint::{Checkpoint, Share, Store, Team};
use anyhow::{Context, Result, ensure};
use ferropt_mesh::{Label, Mesh};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The checkpoints of a run, as one rank has them open.
pub(super) struct Folder {
    pub(super) store: Store,
    pub(super) team: Team,
    /// The newest whole one, here or in the mirror, the same on all ranks.
    pub(super) found: Option<Checkpoint>,
    /// What people should know of it.
    pub(super) notes: Vec<String>,
}

/// Opens the run folder, the first rank before the others, and finds the newest whole checkpoint. One that is only in the
/// mirror is fetched. `timeout` is how long ranks may not hear of each other.
pub(super) fn open(mesh: &Mesh, run: &Path, mirror: Option<&str>, timeout: Duration) -> Result<Folder> {
    let share = Share { rank: mesh.world.rank(), of: mesh.world.size() };
    let first = if share.rank == 0 {
        std::fs::create_dir_all(run)
            .with_context(|| format!("run.dir = \"{}\" cannot be made", run.display()))?;
        Some(Store::open_for_writing(run)?)
    } else {
        None
    };
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos() as u64;
    if let Some(store) = &first {
        store.sign(now)?;
    }
    let told = mesh.all.gather_bytes(Label::new("start"), &now.to_le_bytes())?;
    let attempt = told.first().and_then(|bytes| bytes.as_slice().try_into().ok());
    let attempt = u64::from_le_bytes(attempt.context("the first rank did not say when it started")?);
    let store = match first {
        Some(store) => store,
        None => {
            let store = Store::open(run).context("run.dir has to be a folder that all ranks share")?;
            ensure!(
                store.is_signed(attempt),
                "run.dir = \"{}\" is another folder on rank {} than on rank 0; it has to be one that all ranks share",
                run.display(),
                share.rank
            );
            store
        }
    };
    // Others may have to fetch, or to read, for longer than ranks wait for each other.
    let exchange = |bytes: &[u8]| mesh.all.gather_bytes_whenever(Label::new("resume"), bytes);
    let mut notes = Vec::new();
    let mut here = store.latest_whole_together(share, exchange);
    if let Some(url) = mirror {
        let mirror = Mirror::create(url)?;
        let newest = here.iter().flatten().map(|found| &found.checkpoint.manifest().run).next();
        let (step, than) = (newest.map(|run| run.step), newest.map(|run| (run.rollbacks, run.step)));
        match (mirror.fetch_newer(&store, share, than, exchange), step) {
            (Ok(Some(fetched)), _) => {
                if let Err(error) = &here {
                    notes.push(format!("{error:#}"));
                }
                notes.push(format!("fetched step {} from {url}", fetched.checkpoint.manifest().run.step));
                here = Ok(Some(fetched));
            }
            (Ok(None), _) => {}
            (Err(error), Some(step)) => {
                notes.push(format!(
                    "warning: whether the mirror has more than step {step} is unknown: {error:#}"
                ));
            }
            // Beginning anew may be to lose what is there.
            (Err(error), None) => {
                return Err(error).context(
                    "there is no checkpoint in the run folder, and whether the mirror has one is unknown; see to it, or \
                     remove checkpoint.mirror to begin without",
                );
            }
        }
    }
    let found = here?.map(|found| {
        notes.extend(
            found.damaged.iter().map(|damage| format!("passed over a damaged checkpoint: {damage:#}")),
        );
        found.checkpoint
    });
    let from = found.as_ref().map(|found| &found.manifest().run);
    alike::resumed(&mesh.all, from.map(|run| (run.rollbacks, run.step)))?;
    // Less than the timeout: a checkpoint that fails ends no run.
    Ok(Folder { store, team: Team { share, attempt, patience: timeout / 2 }, found, notes })
}
