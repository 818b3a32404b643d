//! Uploads checkpoints in the background, the newest first.

use super::super::manifest;
use super::super::retention::Kept;
use super::super::team::Team;
use super::super::writer::Event;
use super::Copies;
use super::remote::{Mirror, Name, local};
use anyhow::{Context, Result, anyhow, bail};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Between two looks for what other ranks upload.
const PAUSE: Duration = Duration::from_millis(500);

/// A checkpoint that is durable here.
#[derive(Clone, Debug)]
struct Job {
    step: u64,
    path: PathBuf,
}

/// At most one checkpoint waits: a newer one takes its place.
#[derive(Debug, Default)]
struct Waiting {
    job: Option<Job>,
    /// Steps whose place was taken since the last look.
    passed_over: Vec<u64>,
    closed: bool,
}

#[derive(Debug, Default)]
struct Slot {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

/// A thread that uploads one rank's share of the checkpoints of a run.
#[derive(Debug)]
pub(in super::super) struct Uploads {
    slot: Arc<Slot>,
    thread: JoinHandle<()>,
}

impl Uploads {
    pub(in super::super) fn start(
        copies: &Copies,
        team: Team,
        report: impl Fn(Event) + Send + 'static,
    ) -> Result<Uploads> {
        let slot = Arc::new(Slot::default());
        let uploader = Uploader {
            mirror: Mirror::create(&copies.url)?,
            copies: copies.clone(),
            team,
            slot: slot.clone(),
        };
        let thread = Builder::new()
            .name("mirror".into())
            .spawn(move || {
                while let Some((job, passed_over)) = uploader.slot.next() {
                    for step in passed_over {
                        let error = anyhow!("the mirror lags behind: step {} goes first", job.step);
                        report(Event::NotMirrored { step, error });
                    }
                    let started = Instant::now();
                    let step = job.step;
                    match uploader.upload(&job) {
                        Ok(Some(bytes)) => report(Event::Mirrored { step, bytes, took: started.elapsed() }),
                        Ok(None) => {}
                        Err(error) => report(Event::NotMirrored { step, error }),
                    }
                }
            })
            .context("cannot start the thread that uploads checkpoints")?;
        Ok(Uploads { slot, thread })
    }

    /// Asks for a checkpoint to be uploaded; one that still waits is not.
    pub(in super::super) fn submit(&self, step: u64, path: PathBuf) {
        self.slot.change(|waiting| {
            waiting.passed_over.extend(waiting.job.replace(Job { step, path }).map(|job| job.step));
        });
    }

    /// Waits until what was submitted is uploaded, or could not be.
    pub(in super::super) fn finish(self) {
        self.slot.change(|waiting| waiting.closed = true);
        let _ = self.thread.join();
    }
}

impl Slot {
    fn change(&self, how: impl FnOnce(&mut Waiting)) {
        how(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits for something to upload; nothing once there will be no more.
    fn next(&self) -> Option<(Job, Vec<u64>)> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        while waiting.job.is_none() && !waiting.closed {
            waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        let job = waiting.job.take()?;
        Some((job, std::mem::take(&mut waiting.passed_over)))
    }

    fn has_newer(&self) -> bool {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).job.is_some()
    }
}

struct Uploader {
    mirror: Mirror,
    copies: Copies,
    team: Team,
    slot: Arc<Slot>,
}

impl Uploader {
    /// Uploads this rank's share of a checkpoint, as far as it is not there yet; rank 0 also sees that all is there. Returns
    /// the size of the whole checkpoint, or nothing if all was there before.
    fn upload(&self, job: &Job) -> Result<Option<u64>> {
        let went = || format!("{} went before it was uploaded", job.path.display());
        let (name, manifest) = local(&job.path).with_context(went)?;
        let sizes: Vec<u64> = manifest.files.values().map(|file| file.bytes).collect();
        let files = manifest.files.iter().zip(self.team.share.pick(&sizes)).filter(|(_, mine)| *mine);
        // Open, they stay even if the checkpoint is deleted here meanwhile.
        let files = files.map(|((file, entry), _)| Ok((file, entry, File::open(job.path.join(file))?)));
        let files: io::Result<Vec<_>> = files.collect();
        let there = self.mirror.files(&name)?;
        if there.contains_key(manifest::FILE) {
            return Ok(None);
        }
        for (file, entry, source) in files.with_context(went)? {
            if there.get(file) != Some(&entry.bytes) {
                self.mirror.upload(&name, file, entry, source)?;
            }
        }
        if self.team.share.rank == 0 {
            self.await_others(
                &name,
                &manifest.files.iter().map(|(f, e)| (f.as_str(), e.bytes)).collect::<Vec<_>>(),
            )?;
            self.mirror.seal(&name, &manifest)?;
            self.prune(&name).context("it was uploaded, but old ones stay")?;
        }
        Ok(Some(manifest.bytes()))
    }

    /// Waits until all files are there.
    fn await_others(&self, name: &Name, files: &[(&str, u64)]) -> Result<()> {
        let started = Instant::now();
        loop {
            let there = self.mirror.files(name)?;
            let Some((missing, _)) = files.iter().find(|(file, bytes)| there.get(*file) != Some(bytes))
            else {
                return Ok(());
            };
            if self.slot.has_newer() {
                bail!("the mirror lags behind: other ranks went on to a newer checkpoint");
            }
            if started.elapsed() > self.team.patience {
                bail!("other ranks have not uploaded all of it, such as {missing}");
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Removes what is not kept there, and what was never finished, now that `newest` is there.
    fn prune(&self, newest: &Name) -> Result<()> {
        let (mut whole, mut torn) = (Vec::new(), Vec::new());
        for name in self.mirror.names()? {
            // Later ones are of a run that went on from further back, or lost what came after.
            if name != *newest && name.step <= newest.step {
                let list = if self.mirror.is_whole(&name)? { &mut whole } else { &mut torn };
                list.push(name);
            }
        }
        // Nothing rolls back to a copy, so all count alike.
        let steps =
            whole.iter().map(|name| name.step).filter(|step| *step < newest.step).chain([newest.step]);
        let copies: Vec<Kept> = steps.map(|step| Kept { step, rollbacks: 0, early: false }).collect();
        let surplus = self.copies.retention.surplus(&copies, newest.step, None);
        let old = whole.iter().filter(|name| name.step == newest.step || surplus.contains(&name.step));
        old.chain(&torn).try_for_each(|name| self.mirror.remove(name))
    }
}
