//! One save by all ranks of a team, who see each other's files and nothing else.
//!
//! ```text
//! .step-00000100.tmp-ATTEMPT-0/               made by rank 0
//!     model-part-00003-00001.safetensors      of rank 3, as all of its files
//!     .part-00003.json                        rank 3 has all of its files on disk, and this is what they are
//!     .part-00003.failed                      or it will not, and why
//! .step-00000100.tmp-ATTEMPT-0.failed         rank 0 has given the checkpoint up, and why
//! ```
//!
//! From its `.part-*.json` on, a rank leaves its files alone: rank 0 may be about to publish them. Only rank 0 decides, and
//! its decision is the renamed directory itself, which the others know by its inode and by their files in its manifest.

use super::load;
use super::manifest::Manifest;
use super::output::{beside, discard, remove, sync_directory, write_at_once};
use super::store;
use super::team::{Team, Wait};
use anyhow::{Context, Error, Result, bail};
use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How long a rank looks for a reason once it sees that rank 0 has given up; it may be on a slow file server.
const REASON: Duration = Duration::from_secs(5);

/// What a run that ends too early still waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parting {
    /// How long ranks may take to do their part.
    pub patience: Duration,
    /// The rank that will not do its part any more, where it is known.
    pub lost: Option<usize>,
}

/// Says so once the run ends.
type Asked = Box<dyn Fn() -> Option<Parting> + Send + Sync>;

/// The moment from which nobody is waited for any longer, and who is waited for in vain before.
type Known = (Option<Instant>, Option<usize>);

/// How a run that ends too early learns of both. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Hurry(Arc<(OnceLock<Asked>, OnceLock<Known>)>);

impl Hurry {
    /// It follows from what `parting` says first.
    pub(super) fn when(&self, parting: impl Fn() -> Option<Parting> + Send + Sync + 'static) {
        let (asked, _) = &*self.0;
        asked.get_or_init(|| Box::new(parting));
    }

    /// The moment, if it is known by now.
    pub(super) fn get(&self) -> Option<Instant> {
        self.known().0
    }

    /// The rank that is waited for in vain, if it is known by now.
    fn lost(&self) -> Option<usize> {
        self.known().1
    }

    fn known(&self) -> Known {
        let (asked, known) = &*self.0;
        match (known.get(), asked.get().and_then(|parting| parting())) {
            (None, Some(Parting { patience, lost })) => {
                *known.get_or_init(|| (Instant::now().checked_add(patience), lost))
            }
            (known, _) => known.copied().unwrap_or_default(),
        }
    }
}

impl fmt::Debug for Hurry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hurry").field(&self.0.1).finish()
    }
}

/// A failure of another rank, or of waiting for it. It says all there is to say.
#[derive(Debug)]
pub(super) struct Elsewhere(String);

impl fmt::Display for Elsewhere {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Elsewhere {}

fn elsewhere(what: impl Into<String>) -> Error {
    Elsewhere(what.into()).into()
}

/// One save, as one rank sees it.
pub(super) struct Attempt<'a> {
    pub(super) root: &'a Path,
    pub(super) team: &'a Team,
    hurry: &'a Hurry,
    step: u64,
    /// Where it is written.
    pub(super) temporary: PathBuf,
    /// Where it will be.
    pub(super) place: PathBuf,
}

/// A directory, whatever it is called. It is held open: otherwise the next one could be given its inode.
pub(super) struct Joined {
    _open: File,
    identity: (u64, u64),
}

impl Joined {
    fn open(path: &Path) -> io::Result<Joined> {
        let open = File::open(path)?;
        let found = open.metadata()?;
        Ok(Joined { _open: open, identity: (found.dev(), found.ino()) })
    }

    fn is_at(&self, path: &Path) -> bool {
        fs::metadata(path).is_ok_and(|found| (found.dev(), found.ino()) == self.identity)
    }
}

impl<'a> Attempt<'a> {
    /// The save of a step. `number` counts the saves of a run: ranks save the same steps in the same order.
    pub(super) fn new(
        root: &'a Path,
        team: &'a Team,
        hurry: &'a Hurry,
        step: u64,
        number: u64,
    ) -> Attempt<'a> {
        let place = root.join(store::directory(step));
        let temporary = root.join(format!(".{}.tmp-{:x}-{number}", store::directory(step), team.attempt));
        Attempt { root, team, hurry, step, temporary, place }
    }

    fn part(&self, rank: usize) -> PathBuf {
        self.temporary.join(format!(".part-{rank:05}.json"))
    }

    fn failed_part(&self, rank: usize) -> PathBuf {
        self.temporary.join(format!(".part-{rank:05}.failed"))
    }

    /// Where rank 0 says that it has given up.
    fn failed(&self) -> PathBuf {
        beside(&self.temporary, ".failed")
    }

    /// Rank 0: makes the directory.
    pub(super) fn begin(&self) -> Result<()> {
        fs::create_dir(&self.temporary).with_context(|| format!("cannot create {}", self.temporary.display()))
    }

    /// Other ranks: waits until rank 0 has made the directory.
    pub(super) fn join(&self) -> Result<Joined> {
        let mut wait = Wait::new(self.team.patience);
        loop {
            self.check()?;
            match Joined::open(&self.temporary) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                opened => {
                    return opened.with_context(|| format!("cannot open {}", self.temporary.display()));
                }
            }
            if !wait.pause(self.hurry.get()) {
                bail!(elsewhere(format!(
                    "rank 0 did not begin it within {:?}, or before the run ended. It may be busy or gone; or run.dir is \
                     another folder there, and it has to be one that all ranks share",
                    self.team.patience
                )));
            }
        }
    }

    /// Whether it is still worth going on: fails when another rank has given up.
    pub(super) fn check(&self) -> Result<()> {
        if self.team.share.of == 1 {
            return Ok(());
        }
        if self.team.share.rank == 0 {
            return self.team.share.others().try_for_each(|rank| self.check_part(rank));
        }
        match read_if_there(&self.failed())? {
            Some(reason) => bail!(elsewhere(reason)),
            None => Ok(()),
        }
    }

    fn check_part(&self, rank: usize) -> Result<()> {
        match read_if_there(&self.failed_part(rank))? {
            Some(reason) => bail!(elsewhere(format!("rank {rank} could not write its part: {reason}"))),
            None => Ok(()),
        }
    }

    /// Rank 0: the manifests of all ranks' parts, in order, once all are there.
    pub(super) fn gather(&self, own: Manifest) -> Result<Vec<Manifest>> {
        let mut parts = vec![own];
        let mut missing: BTreeSet<usize> = self.team.share.others().collect();
        let mut wait = Wait::new(self.team.patience);
        while !missing.is_empty() {
            // What a rank has done before it was lost is seen after that is known.
            let lost = self.hurry.lost();
            // Listing a directory asks a file server anew where looking for one file may not.
            let names: BTreeSet<_> = fs::read_dir(&self.temporary)
                .and_then(|listing| {
                    listing.map(|entry| Ok(self.temporary.join(entry?.file_name()))).collect()
                })
                .with_context(|| format!("cannot list {}", self.temporary.display()))?;
            for &rank in missing.iter().filter(|rank| names.contains(&self.failed_part(**rank))) {
                self.check_part(rank)?;
            }
            missing.retain(|&rank| !names.contains(&self.part(rank)));
            let in_vain = lost.is_some_and(|lost| missing.contains(&lost));
            if in_vain || !missing.is_empty() && !wait.pause(self.hurry.get()) {
                let missing: Vec<String> = missing.iter().map(usize::to_string).collect();
                bail!(elsewhere(format!(
                    "within {:?}, or before the run ended, no part came from these ranks: {}. See whether they are alive, \
                     and whether run.dir is the same folder for all ranks",
                    self.team.patience,
                    missing.join(", ")
                )));
            }
        }
        for rank in self.team.share.others() {
            let path = self.part(rank);
            let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            let part =
                Manifest::from_bytes(&text).with_context(|| format!("what rank {rank} wrote is damaged"))?;
            if part.run.step != self.step {
                bail!(elsewhere(format!(
                    "rank {rank} saved step {} when rank 0 saved step {}",
                    part.run.step, self.step
                )));
            }
            remove(&path)?;
            parts.push(part);
        }
        Ok(parts)
    }

    /// Other ranks: tells rank 0 that this rank's files are on disk.
    pub(super) fn deliver(&self, part: &Manifest) -> Result<()> {
        write_at_once(&self.part(self.team.share.rank), &part.to_bytes()?)?;
        sync_directory(&self.temporary)
    }

    /// Other ranks: waits for what rank 0 makes of it, which is a checkpoint with the files of this rank's `part`.
    pub(super) fn outcome(&self, joined: &Joined, part: &Manifest) -> Result<Manifest> {
        // Rank 0 may have begun to wait when this rank was done.
        let patience = self.team.patience.saturating_mul(2);
        let mut wait = Wait::new(patience);
        let mut gone: Option<Instant> = None;
        loop {
            if joined.is_at(&self.place) {
                let whole = load::survey(&self.place)?;
                if part.files.values().all(|file| whole.files.values().any(|other| other == file)) {
                    return Ok(whole);
                }
            }
            self.check()?;
            if joined.is_at(&self.temporary) {
                gone = None;
            } else if gone.get_or_insert_with(Instant::now).elapsed() > REASON {
                bail!(elsewhere("rank 0 has given it up and could not say why"));
            }
            if !wait.pause(self.hurry.get()) {
                bail!(elsewhere(format!(
                    "this rank's part is on disk, but rank 0 did not finish the checkpoint within {patience:?}, or before \
                     the run ended. See what became of it; if it finishes after all, the checkpoint is good"
                )));
            }
        }
    }

    /// Rank 0: tells the others why there will be no checkpoint, and removes what is there of it.
    pub(super) fn abandon(&self, reason: &str) -> Result<()> {
        let told = self.team.share.of == 1 || write_at_once(&self.failed(), reason.as_bytes()).is_ok();
        discard(&self.temporary)?;
        if !told {
            // There is room now, if there was none. The others see in any case that the directory is gone.
            let _ = write_at_once(&self.failed(), reason.as_bytes());
        }
        Ok(())
    }

    /// Other ranks: removes this rank's files, which makes room, and tells rank 0 why.
    pub(super) fn withdraw(&self, files: &[String], reason: &str) -> Result<()> {
        let rank = self.team.share.rank;
        // As long as rank 0 may count on the files they stay.
        remove(&self.part(rank))?;
        let left = files.iter().try_for_each(|file| remove(&self.temporary.join(file)));
        if self.temporary.exists() {
            let _ = write_at_once(&self.failed_part(rank), reason.as_bytes());
        }
        left
    }
}

/// The reason that another rank left, if it did.
fn read_if_there(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(reason) => Ok(Some(String::from_utf8_lossy(&reason).into_owned())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}
