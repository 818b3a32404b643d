//! Writes checkpoints in the background.

use super::attempt::{Hurry, Parting};
use super::load::Checkpoint;
use super::mirror::{Copies, Uploads};
use super::retention::Retention;
use super::snapshot::Snapshot;
use super::store::Store;
use super::team::Team;
use anyhow::{Context, Error, Result, anyhow};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Something that happened in the background.
#[derive(Debug)]
pub enum Event {
    /// A checkpoint is durable, the parts of all ranks.
    Saved {
        /// Its step.
        step: u64,
        /// Its directory.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// From the snapshot to the last fsync.
        took: Duration,
    },
    /// A checkpoint could not be saved. Earlier ones are untouched and the next save tries again, so training may go
    /// on; the error says what to do.
    Failed {
        /// Its step.
        step: u64,
        /// What went wrong.
        error: Error,
    },
    /// The checkpoint was saved, but old ones could not be deleted.
    NotPruned {
        /// Step that was saved.
        step: u64,
        /// What went wrong.
        error: Error,
    },
    /// A checkpoint is in the mirror: on rank 0 all of it, on others their share.
    Mirrored {
        /// Its step.
        step: u64,
        /// Its size.
        bytes: u64,
        /// How long it took.
        took: Duration,
    },
    /// A checkpoint could not be copied to the mirror. It is safe in the run folder, and the next one is tried again.
    NotMirrored {
        /// Its step.
        step: u64,
        /// What went wrong.
        error: Error,
    },
}

/// A thread that writes one rank's part of a run's checkpoints. That of rank 0 owns the folder: it makes checkpoints of the
/// parts, and deletes old ones.
///
/// At most one snapshot exists at a time: [`Writer::save`] makes it only once the previous one is on disk.
#[derive(Debug)]
pub struct Writer {
    /// Each with the step that a roll-back may have to go back to.
    snapshots: Sender<(Snapshot, Option<u64>)>,
    /// Folder of the checkpoints.
    root: PathBuf,
    hurry: Hurry,
    events: Receiver<Event>,
    thread: JoinHandle<()>,
    /// Copies what is saved, and tells of it.
    uploads: Option<(Uploads, Receiver<Event>)>,
    /// Step that is being written.
    writing: Option<u64>,
    way_back: Option<u64>,
    /// Events that came while waiting, for the next poll.
    seen: Vec<Event>,
}

impl Writer {
    /// Starts the thread. `store` must be open for writing on rank 0 of the team, and may be open for reading on others;
    /// shards are split at `shard_bytes` ([`DEFAULT_SHARD_BYTES`](super::DEFAULT_SHARD_BYTES)).
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(store: Store, retention: Retention, shard_bytes: u64, team: Team) -> Result<Writer> {
        let (snapshots, inbox) = channel::<(Snapshot, Option<u64>)>();
        let (outbox, events) = channel();
        let hurry = Hurry::default();
        let (told, root) = (hurry.clone(), store.path().into());
        let thread = Builder::new()
            .name("checkpoints".into())
            .spawn(move || {
                for (number, (snapshot, way_back)) in (0..).zip(inbox) {
                    let (started, step) = (Instant::now(), snapshot.run.step);
                    let saved = store.save(snapshot, shard_bytes, &team, &told, number);
                    // Nobody listens any more only if the trainer is gone; the checkpoint is finished regardless.
                    let report = |event| drop(outbox.send(event));
                    match saved {
                        Err(error) => report(Event::Failed { step, error }),
                        Ok(written) => {
                            if team.share.rank == 0
                                && let Err(error) = store.prune(retention, step, way_back)
                            {
                                report(Event::NotPruned { step, error });
                            }
                            let took = started.elapsed();
                            report(Event::Saved { step, path: written.path, bytes: written.bytes, took });
                        }
                    }
                }
            })
            .context("cannot start the thread that writes checkpoints")?;
        let (uploads, writing, way_back, seen) = (None, None, None, Vec::new());
        Ok(Writer { snapshots, root, hurry, events, thread, uploads, writing, way_back, seen })
    }

    /// Other ranks are waited for, and copies uploaded, no longer than `parting` says from the first moment on at which it says
    /// anything, and it is asked meanwhile. For a run that ends because a rank is lost: what has to come from that one will not.
    pub fn hurry_when(&mut self, parting: impl Fn() -> Option<Parting> + Send + Sync + 'static) {
        self.hurry.when(parting);
    }

    /// From the next save on, the newest checkpoint that is no newer than step `way_back` stays, whatever the retention says:
    /// training may have to go back to it. None for no such one.
    pub fn keep_way_back(&mut self, way_back: Option<u64>) {
        self.way_back = way_back;
    }

    /// From now on, what is saved is also copied to a mirror, in the background; and first the checkpoint that was `found`
    /// at the start, if it is not there yet.
    ///
    /// # Errors
    /// When the mirror's address is wrong, or what the environment says of it.
    pub fn copy_to(&mut self, copies: &Copies, team: Team, found: Option<&Checkpoint>) -> Result<()> {
        let (outbox, events) = channel();
        let report = move |event| drop(outbox.send(event));
        let uploads = Uploads::start(copies, &self.root, team, self.hurry.clone(), report)?;
        if let Some(found) = found {
            uploads.submit(found.manifest().run.step, found.path().into());
        }
        self.uploads = Some((uploads, events));
        Ok(())
    }

    /// Hands over a snapshot to be written, on all ranks the same steps in the same order. Waits while the previous one is
    /// under way, and only then calls `snapshot`, so that memory never holds two.
    ///
    /// # Errors
    /// Only those of `snapshot`, or when the thread has died. What happens to the save itself is told by
    /// [`Writer::poll`] and [`Writer::finish`].
    pub fn save(&mut self, snapshot: impl FnOnce() -> Result<Snapshot>) -> Result<()> {
        self.settle()?;
        let snapshot = snapshot()?;
        self.writing = Some(snapshot.run.step);
        self.snapshots
            .send((snapshot, self.way_back))
            .map_err(|_| anyhow!("the thread that writes checkpoints has died"))
    }

    /// Waits until what was handed over is on disk, or has failed.
    ///
    /// # Errors
    /// When the thread has died.
    pub fn settle(&mut self) -> Result<()> {
        while self.writing.is_some() {
            let event =
                self.events.recv().map_err(|_| anyhow!("the thread that writes checkpoints has died"))?;
            self.note(event);
        }
        Ok(())
    }

    /// What happened since the last call; never waits.
    pub fn poll(&mut self) -> Vec<Event> {
        while let Ok(event) = self.events.try_recv() {
            self.note(event);
        }
        self.seen.extend(self.uploads.iter().flat_map(|(_, events)| events.try_iter()));
        std::mem::take(&mut self.seen)
    }

    /// Waits until everything is on disk, and copied to the mirror if it can be, and ends the threads. Returns what happened
    /// since the last poll.
    pub fn finish(mut self) -> Vec<Event> {
        if let (Err(error), Some(step)) = (self.settle(), self.writing) {
            self.seen.push(Event::Failed { step, error });
        }
        let mut seen = self.poll();
        drop(self.snapshots);
        let _ = self.thread.join(); // if it has died, that was told
        if let Some((uploads, events)) = self.uploads {
            uploads.finish();
            seen.extend(events);
        }
        seen
    }

    fn note(&mut self, event: Event) {
        // A save ends with one of these two; NotPruned comes before Saved.
        if matches!(event, Event::Saved { .. } | Event::Failed { .. }) {
            self.writing = None;
        }
        if let (Event::Saved { step, path, .. }, Some((uploads, _))) = (&event, &self.uploads) {
            uploads.submit(*step, path.clone());
        }
        self.seen.push(event);
    }
}
