//! Uploads checkpoints in the background, the newest first, all ranks the same one.

use super::super::attempt::Hurry;
use super::super::manifest::{self, Manifest};
use super::super::retention::Kept;
use super::super::team::Team;
use super::super::writer::Event;
use super::Copies;
use super::lead::Lead;
use super::remote::{Mirror, Name, local};
use anyhow::{Context, Result, anyhow, bail, ensure};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

/// Between two looks for what other ranks upload.
const PAUSE: Duration = Duration::from_millis(500);
/// The first rank has as much to upload as any. Others are given up once none has finished a file for so many times as long
/// as that took.
const SLOWER: u32 = 4;

/// A checkpoint that is durable here.
#[derive(Clone, Debug)]
struct Job {
    step: u64,
    path: PathBuf,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Oldest first.
    jobs: Vec<Job>,
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
    /// Starts the thread, for a run whose checkpoints are in folder `root`. Once `hurry` has passed, nothing is uploaded any more.
    pub(in super::super) fn start(
        copies: &Copies,
        root: &Path,
        team: Team,
        hurry: Hurry,
        report: impl Fn(Event) + Send + 'static,
    ) -> Result<Uploads> {
        let uploader = Uploader::new(copies, root, team, hurry)?;
        let slot = uploader.slot.clone();
        let thread = Builder::new()
            .name("mirror".into())
            .spawn(move || uploader.work(report))
            .context("cannot start the thread that uploads checkpoints")?;
        Ok(Uploads { slot, thread })
    }

    /// Asks for a checkpoint to be uploaded; of those that wait, the newest goes first, and the others are passed over.
    pub(in super::super) fn submit(&self, step: u64, path: PathBuf) {
        self.slot.change(|waiting| waiting.jobs.push(Job { step, path }));
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

    /// Waits until something waits to be uploaded, or there will be no more.
    fn wait(&self) -> MutexGuard<'_, Waiting> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        self.changed
            .wait_while(waiting, |waiting| waiting.jobs.is_empty() && !waiting.closed)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

struct Uploader {
    mirror: Mirror,
    copies: Copies,
    team: Team,
    lead: Lead,
    hurry: Hurry,
    slot: Arc<Slot>,
}

impl Uploader {
    fn new(copies: &Copies, root: &Path, team: Team, hurry: Hurry) -> Result<Uploader> {
        let mirror = Mirror::create(&copies.url)?;
        let lead = Lead::open(root, team.clone())?;
        Ok(Uploader { mirror, copies: copies.clone(), team, lead, hurry, slot: Arc::default() })
    }

    /// Uploads what is submitted until there will be no more.
    fn work(&self, report: impl Fn(Event)) {
        let mut named = String::new();
        while let Some((job, passed_over)) = self.next(&mut named) {
            for step in passed_over {
                let error = anyhow!("the mirror lags behind: step {} goes first", job.step);
                report(Event::NotMirrored { step, error });
            }
            let started = Instant::now();
            let step = job.step;
            match self.upload(&job) {
                Ok(Some(bytes)) => report(Event::Mirrored { step, bytes, took: started.elapsed() }),
                Ok(None) => {}
                Err(error) => report(Event::NotMirrored { step, error }),
            }
        }
        self.lead.close();
    }

    /// Waits for the checkpoint to upload next, and for the steps that are passed over for it; nothing once there will be no
    /// more. `last` is what the first rank has named before.
    fn next(&self, last: &mut String) -> Option<(Job, Vec<u64>)> {
        loop {
            drop(self.slot.wait());
            let named = if self.lead.is_first() { None } else { self.lead.named() };
            let mut waiting = self.slot.wait();
            let place = match &named {
                _ if self.lead.is_first() => waiting.jobs.len().checked_sub(1),
                Some(name) if name != last => {
                    let step = Name::parse(name).map(|name| name.step);
                    waiting.jobs.iter().rposition(|job| Some(job.step) == step)
                }
                _ => None,
            };
            if let Some(place) = place {
                let mut taken: Vec<Job> = waiting.jobs.drain(..=place).collect();
                *last = named.unwrap_or_default();
                let job = taken.pop()?;
                return Some((job, taken.into_iter().map(|job| job.step).collect()));
            }
            if waiting.closed && (waiting.jobs.is_empty() || named.is_none() || self.is_over()) {
                return None;
            }
            drop(waiting);
            std::thread::sleep(PAUSE);
        }
    }

    /// Whether the run ends without what is not uploaded by now.
    fn is_over(&self) -> bool {
        self.hurry.get().is_some_and(|until| Instant::now() >= until)
    }

    /// Whether it is still worth going on.
    ///
    /// # Errors
    /// When it is not; says why.
    fn check(&self, name: &Name) -> Result<()> {
        ensure!(!self.is_over(), "a rank is lost, and the run ends before it is uploaded");
        let wanted = self.lead.is_first() || self.lead.named().as_ref() == Some(&name.text);
        ensure!(wanted, "rank 0 has given it up");
        Ok(())
    }

    /// Uploads this rank's share of a checkpoint, as far as it is not there yet; rank 0 also sees that all is there. Returns
    /// the size of the whole checkpoint, or nothing if all was there before.
    fn upload(&self, job: &Job) -> Result<Option<u64>> {
        let started = Instant::now();
        let went = || format!("{} went before it was uploaded", job.path.display());
        let (name, manifest) = local(&job.path).with_context(went)?;
        let sizes: Vec<u64> = manifest.files.values().map(|file| file.bytes).collect();
        let files = manifest.files.iter().zip(self.team.share.pick(&sizes)).filter(|(_, mine)| *mine);
        // Open, they stay even if the checkpoint is deleted here meanwhile.
        let files = files.map(|((file, entry), _)| Ok((file, entry, File::open(job.path.join(file))?)));
        let files: io::Result<Vec<_>> = files.collect();
        let files = files.with_context(went)?;
        if self.lead.is_first() {
            self.lead.name(&name)?;
        }
        let check = || self.check(&name);
        check()?;
        let there = self.mirror.files(&name)?;
        if there.contains_key(manifest::FILE) {
            return Ok(None);
        }
        for (file, entry, source) in files {
            if there.get(file) != Some(&entry.bytes) {
                self.mirror.upload(&name, file, entry, source, &check)?;
            }
        }
        if self.lead.is_first() {
            self.await_others(&name, &manifest, started.elapsed())?;
            self.mirror.seal(&name, &manifest)?;
            self.prune(&name, &manifest).context("it was uploaded, but old ones stay")?;
        }
        Ok(Some(manifest.bytes()))
    }

    /// Waits until all files are there, as long as there come more. This rank's own `took` so long.
    fn await_others(&self, name: &Name, manifest: &Manifest, took: Duration) -> Result<()> {
        let patience = self.team.patience.max(took * SLOWER);
        let (mut fewest, mut since) = (usize::MAX, Instant::now());
        loop {
            let there = self.mirror.files(name)?;
            let missing =
                manifest.files.iter().filter(|(file, entry)| there.get(*file) != Some(&entry.bytes));
            let missing: Vec<&String> = missing.map(|(file, _)| file).collect();
            let Some(first) = missing.first() else { return Ok(()) };
            if missing.len() < fewest {
                (fewest, since) = (missing.len(), Instant::now());
            }
            self.check(name)?;
            if since.elapsed() > patience {
                bail!(
                    "for {patience:.0?} no file of it came from other ranks; {fewest} are missing, such as {first}"
                );
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Removes what is not kept there, and what was never finished, now that `newest` is there.
    fn prune(&self, newest: &Name, manifest: &Manifest) -> Result<()> {
        let kept = |step: u64, manifest: &Manifest| Kept {
            step,
            rollbacks: manifest.run.rollbacks,
            early: manifest.run.early,
        };
        let (mut whole, mut gone, mut copies) = (Vec::new(), Vec::new(), vec![kept(newest.step, manifest)]);
        for name in self.mirror.names()? {
            // Later ones are of a run that went on from further back, or lost what came after.
            if name == *newest || name.step > newest.step {
                continue;
            }
            if name.step == newest.step || !self.mirror.is_whole(&name)? {
                gone.push(name);
            } else if let Ok(manifest) = self.mirror.manifest(&name) {
                // One that cannot be read may still be of use to somebody.
                copies.push(kept(name.step, &manifest));
                whole.push(name);
            }
        }
        // Nothing rolls back to a copy.
        let surplus = self.copies.retention.surplus(&copies, newest.step, None);
        let old = whole.iter().filter(|name| surplus.contains(&name.step));
        old.chain(&gone).try_for_each(|name| self.mirror.remove(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Data, Group, Parting, Retention, RunState, Share, Snapshot, Store, Tensor};
    use std::fs;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::{Scope, sleep};

    /// A run of two ranks whose checkpoints are there already, and its mirror.
    struct Lab {
        folder: tempfile::TempDir,
        store: Store,
    }

    fn state(step: u64, rollbacks: u64, early: bool) -> RunState {
        let none = || serde_json::Value::Null;
        let (model, config, loop_state) = (none(), none(), none());
        RunState { step, tokens: step, rollbacks, early, seed: 1, model, config, loop_state }
    }

    impl Lab {
        fn new() -> Lab {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open_for_writing(folder.path().join("run")).unwrap();
            Lab { folder, store }
        }

        fn save(&self, run: RunState) -> Job {
            let tensor =
                Tensor { name: "w".into(), shape: vec![100], data: Data::F32(vec![run.step as f32; 100]) };
            let group = |name: &str| Group { name: name.into(), tensors: vec![tensor.clone()] };
            let groups = ["model", "adam_m", "adam_v"].map(group).into();
            let (step, snapshot) = (run.step, Snapshot { run, groups, files: Vec::new() });
            let saved = self.store.save(snapshot, 1 << 20, &Team::alone(), &Hurry::default(), step).unwrap();
            Job { step, path: saved.path }
        }

        fn uploader(&self, rank: usize, of: usize, keep_last: usize, hurry: Hurry) -> Uploader {
            let url = format!("file://{}/mirror", self.folder.path().display());
            let copies = Copies { url, retention: Retention { keep_last, keep_every: None } };
            let team = Team { share: Share { rank, of }, attempt: 7, patience: Duration::from_secs(60) };
            Uploader::new(&copies, self.store.path(), team, hurry).unwrap()
        }

        /// Steps in the mirror, those that are whole.
        fn copied(&self) -> Vec<u64> {
            let folders =
                fs::read_dir(self.folder.path().join("mirror")).unwrap().map(|folder| folder.unwrap());
            let whole = folders.filter(|folder| folder.path().join(manifest::FILE).exists());
            let step = |folder: fs::DirEntry| Name::parse(folder.file_name().to_str().unwrap()).unwrap().step;
            let mut steps: Vec<u64> = whole.map(step).collect();
            steps.sort();
            steps
        }
    }

    /// Closed when it is dropped, so that a test that fails ends.
    struct Inbox(Arc<Slot>);

    impl Drop for Inbox {
        fn drop(&mut self) {
            close(&self.0);
        }
    }

    /// Lets a rank upload; what it tells.
    fn work<'s>(scope: &'s Scope<'s, '_>, uploader: Uploader) -> (Inbox, Receiver<Event>) {
        let (slot, (outbox, told)) = (uploader.slot.clone(), channel());
        scope.spawn(move || uploader.work(|event| drop(outbox.send(event))));
        (Inbox(slot), told)
    }

    fn submit(slot: &Slot, job: &Job) {
        slot.change(|waiting| waiting.jobs.push(job.clone()));
    }

    fn close(slot: &Slot) {
        slot.change(|waiting| waiting.closed = true);
    }

    /// "3" for a copy of step 3, "-3" for none.
    fn steps(told: &Receiver<Event>) -> Vec<i64> {
        let step = |event| match event {
            Event::Mirrored { step, .. } => step as i64,
            Event::NotMirrored { step, .. } => -(step as i64),
            other => panic!("{other:?}"),
        };
        told.iter().map(step).collect()
    }

    #[test]
    fn a_rank_that_is_slower_than_checkpoints_come_is_waited_for() {
        let lab = Lab::new();
        let jobs = [1, 2].map(|step| lab.save(state(step, 0, false)));
        let [first, second] = [0, 1].map(|rank| lab.uploader(rank, 2, 9, Hurry::default()));
        std::thread::scope(|scope| {
            let (inbox, told) = work(scope, first);
            submit(&inbox.0, &jobs[0]);
            while second.lead.named().unwrap().is_empty() {
                sleep(Duration::from_millis(1));
            }
            submit(&inbox.0, &jobs[1]);
            close(&inbox.0);
            // The first one looks for what the other has, and there is a newer one by now.
            sleep(PAUSE * 2);
            jobs.iter().for_each(|job| submit(&second.slot, job));
            close(&second.slot);
            let (_, told_second) = work(scope, second);
            assert_eq!(steps(&told), [1, 2]);
            assert_eq!(steps(&told_second), [1, 2]);
        });
        assert_eq!(lab.copied(), [1, 2]);
    }

    #[test]
    fn all_ranks_upload_the_one_that_the_first_one_names() {
        let lab = Lab::new();
        let jobs = [1, 2, 3].map(|step| lab.save(state(step, 0, false)));
        let [first, second] = [0, 1].map(|rank| lab.uploader(rank, 2, 9, Hurry::default()));
        // The other one hears of step 3 before it begins, and the first one afterwards.
        jobs[..2].iter().for_each(|job| submit(&first.slot, job));
        jobs.iter().for_each(|job| submit(&second.slot, job));
        close(&second.slot);
        std::thread::scope(|scope| {
            let (inbox, told) = work(scope, first);
            let (_, told_second) = work(scope, second);
            let mut told_second = told_second.iter();
            let passed_over = told_second.next().unwrap();
            assert!(matches!(passed_over, Event::NotMirrored { step: 1, .. }), "{passed_over:?}");
            let copied = told_second.next().unwrap();
            assert!(matches!(copied, Event::Mirrored { step: 2, .. }), "{copied:?}");
            submit(&inbox.0, &jobs[2]);
            close(&inbox.0);
            assert_eq!(steps(&told), [-1, 2, 3]);
            assert!(matches!(told_second.next(), Some(Event::Mirrored { step: 3, .. })));
            assert!(told_second.next().is_none());
        });
        assert_eq!(lab.copied(), [2, 3]);
    }

    #[test]
    fn a_run_that_ends_for_a_lost_rank_uploads_nothing_more() {
        let lab = Lab::new();
        let jobs = [1, 2].map(|step| lab.save(state(step, 0, false)));
        let hurry = Hurry::default();
        let [first, _lost, third] = [0, 1, 2].map(|rank| lab.uploader(rank, 3, 9, hurry.clone()));
        std::thread::scope(|scope| {
            let (inbox, told) = work(scope, first);
            submit(&inbox.0, &jobs[0]);
            while third.lead.named().unwrap().is_empty() {
                sleep(Duration::from_millis(1));
            }
            // It waits for the share of the lost one, by its patience a minute.
            let started = Instant::now();
            hurry.when(|| Some(Parting { patience: Duration::ZERO, lost: Some(1) }));
            submit(&inbox.0, &jobs[1]);
            jobs.iter().for_each(|job| submit(&third.slot, job));
            close(&inbox.0);
            close(&third.slot);
            let (_, told_third) = work(scope, third);
            assert_eq!(steps(&told), [-1, -2]);
            assert!(steps(&told_third).iter().all(|step| *step < 0));
            assert!(started.elapsed() < Duration::from_secs(20));
        });
        assert!(lab.copied().is_empty());
    }

    #[test]
    fn copies_of_a_way_that_was_left_count_for_nothing_and_unreadable_ones_stay() {
        let lab = Lab::new();
        let uploader = lab.uploader(0, 1, 2, Hurry::default());
        let copy = |run| uploader.upload(&lab.save(run)).unwrap();
        for step in [10, 20, 30] {
            copy(state(step, 0, false));
        }
        // Went back to 10. What was saved at 30 is left behind, as what was saved at 20 and 25 is not.
        copy(state(20, 1, false));
        copy(state(25, 1, true));
        copy(state(40, 1, false));
        assert_eq!(lab.copied(), [20, 25, 40]);
        let damaged = uploader.mirror.names().unwrap().into_iter().find(|name| name.step == 20).unwrap();
        let file = lab.folder.path().join("mirror").join(damaged.text).join(manifest::FILE);
        fs::write(file, "{}").unwrap();
        for step in [50, 60] {
            copy(state(step, 1, false));
        }
        assert_eq!(lab.copied(), [20, 50, 60]);
    }
}
