//! What the loop does when its guard does not accept a step: it skips, goes back or gives up, keeps the batch for a look,
//! and writes down what it did and why.

use super::run::{Trainer, described, view};
use super::state;
use crate::checkpoint::{Checkpoint, Event as Saving, Share, Store};
use crate::loss_scale::LossScale;
use crate::recovery::{Cause, Finding, GaveUp, Trouble, Verdict, find};
use crate::telemetry::{Record, Skipped};
use anyhow::{Context, Result};
use ferropt_data::Batch;
use ferropt_device::{Device, Element};
use ferropt_mesh::Label;
use ferropt_model::Pass;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

impl<D: Device, E: Element> Trainer<'_, D, E> {
    /// Acts on a verdict other than [`Verdict::Accept`]; the weights are still those before the step.
    ///
    /// # Errors
    /// [`GaveUp`] where that is the verdict; a checkpoint that cannot be read.
    pub(super) fn recover(&mut self, verdict: Verdict) -> Result<()> {
        match verdict {
            Verdict::Accept => Ok(()),
            Verdict::Skip(cause) => self.skipped(&cause),
            Verdict::RollBack(trouble) => {
                self.skipped(&trouble.cause)?;
                self.roll_back(&trouble)
            }
            Verdict::GiveUp(cause) => {
                self.skipped(&cause)?;
                self.settle()?;
                Err(self.give_up(&cause).into())
            }
        }
    }

    /// Tells of a step that was not taken, and keeps what shows why.
    fn skipped(&mut self, cause: &Cause) -> Result<()> {
        let finding = if cause.not_finite() { self.find(cause)? } else { None };
        self.loss_scale.left_out();
        if self.telemetry.is_none() {
            return Ok(());
        }
        let kept = self.keep(cause, finding.as_ref());
        let Cause { step, batch, loss, grad_norm, .. } = *cause;
        let mut text = format!("Step {step} was not taken, batch {batch} is left out: {cause}.");
        if let Some(finding) = &finding {
            let _ = write!(text, " First: {finding}.");
        }
        match kept {
            Ok(path) => drop(write!(text, " The batch is kept in {}.", path.display())),
            Err(error) => self.warn(&format!("the batch could not be kept: {error:#}")),
        }
        self.say(&text);
        self.enter_once("skipped", &text, json!({ "cause": cause, "finding": finding }));
        self.record(Record::Skipped(Skipped { step, batch, loss, grad_norm }));
        Ok(())
    }

    /// Looks for the first number that is not finite, on all ranks.
    fn find(&mut self, cause: &Cause) -> Result<Option<Finding>> {
        let r = &self.resolved;
        let number = |part: usize| part * r.data_ranks() + self.mesh.data.rank();
        let size = (r.accumulation(), r.seq, self.scale());
        let load = |part: usize, batch: &mut Batch| -> Result<Pass> {
            let first_sequence = (number(part) * r.micro_batch) as u64;
            let first = cause.batch * r.sequences as u64 + first_sequence;
            self.data.train.batch(first, r.micro_batch, batch)?;
            Ok(Pass { seed: r.config.run.seed, step: cause.step, first_sequence })
        };
        let stage = (self.mesh.pipeline.rank(), self.mesh.pipeline.size());
        let found = find(&self.device, &self.model, &mut self.backprop, size, stage, load)?;
        let rank = self.mesh.world.rank();
        let mine = found.map(|f| Finding { rank, micro_batch: f.micro_batch.map(number), ..f });
        let all = self.mesh.all.gather_bytes(Label::new("finding"), &serde_json::to_vec(&mine)?)?;
        let all = all.iter().map(|bytes| serde_json::from_slice::<Option<Finding>>(bytes));
        let all = all.collect::<Result<Vec<_>, _>>().context("a rank told something unknown")?;
        Ok(all.into_iter().flatten().min_by_key(|finding| (finding.order, finding.rank)))
    }

    /// Writes the batch of a step, a sequence a line, and the finding to `trouble/step-N`. Returns the file of the batch, as
    /// it lies in the run folder.
    fn keep(&mut self, cause: &Cause, finding: Option<&Finding>) -> Result<PathBuf> {
        let r = &self.resolved;
        let folder = Path::new("trouble").join(format!("step-{:08}", cause.step));
        let run = &r.config.run.dir;
        fs::create_dir_all(run.join(&folder)).with_context(|| format!("cannot make {}", folder.display()))?;
        let name = folder.join(format!("batch-{:08}.jsonl", cause.batch));
        let write = || -> Result<()> {
            let mut out = BufWriter::new(fs::File::create(run.join(&name))?);
            let mut batch = Batch::default();
            for sequence in 0..r.sequences as u64 {
                let sample = cause.batch * r.sequences as u64 + sequence;
                self.data.train.batch(sample, 1, &mut batch)?;
                let tokens = view(&batch).tokens;
                let text = self.data.tokenizer.decode(tokens);
                serde_json::to_writer(
                    &mut out,
                    &json!({ "sample": sample, "tokens": tokens, "text": text }),
                )?;
                out.write_all(b"\n")?;
            }
            Ok(out.flush()?)
        };
        write().with_context(|| format!("cannot write {}", name.display()))?;
        let report = json!({ "cause": cause, "text": cause.to_string(), "finding": finding });
        let place = run.join(folder.join(format!("batch-{:08}-report.json", cause.batch)));
        super::write_whole(&place, &format!("{}\n", serde_json::to_string_pretty(&report)?))?;
        Ok(name)
    }

    /// Goes back to a checkpoint from before the trouble, or to the beginning if there is none at all.
    fn roll_back(&mut self, trouble: &Trouble) -> Result<()> {
        self.settle()?;
        let from = self.step;
        let (to, then) = match self.healthy(trouble)? {
            Some(checkpoint) => {
                let (device, model) = (&self.device, &mut self.model);
                let then = state::load(&checkpoint, &self.data.identity, device, model, &mut self.optimizer)
                    .with_context(|| format!("cannot go back to {}", checkpoint.path().display()))?;
                (checkpoint.manifest().run.step, then)
            }
            None => {
                let run = &self.resolved.config.run;
                self.optimizer.initialise(&self.device, &mut self.model, run.seed, run.threads);
                (0, state::Remembered::at_first())
            }
        };
        self.guard.roll_back(trouble, to, then.guard);
        self.loss_scale = LossScale::new(self.resolved.loss_scale, then.loss_scale);
        self.step = to;
        let number = self.guard.rollbacks();
        let (lr, clip) = self.guard.factors(to + 1);
        let batches = &trouble.batches;
        let text = format!(
            "Roll-back {number}: from step {from} to step {to}, because more than recovery.max_skips = {} steps of {} were \
             not taken since step {}. Batches {} to {} are left out, the learning rate is multiplied by {lr:.4} and the clip \
             by {clip:.4}.",
            self.resolved.recovery.max_skips,
            self.resolved.recovery.window,
            trouble.first,
            batches.start,
            batches.end - 1
        );
        self.say(&text);
        let figures = json!({
            "rollback": number, "from": from, "to": to, "first": trouble.first, "left_out": batches, "lr_factor": lr,
            "clip_factor": clip, "cause": trouble.cause,
        });
        self.enter_once("rolled-back", &text, figures);
        self.saved = None;
        // The checkpoint gets what was learnt from the trouble, before anything of the old way is taken away: a run that is
        // killed in between meets the same trouble again, or goes on from here.
        self.save()?;
        self.settle()?;
        let Some(telemetry) = &mut self.telemetry else { return Ok(()) };
        let aside = self.resolved.config.run.dir.join(format!("trouble/roll-back-{number}-metrics.jsonl"));
        for failed in telemetry.rewind(to, self.resolved.steps, &aside)? {
            self.warn(&format!("{failed:#}"));
        }
        Ok(())
    }

    /// Waits for a checkpoint that is under way.
    pub(super) fn settle(&mut self) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        writer.settle()?;
        for event in writer.poll() {
            self.saving(&event);
        }
        Ok(())
    }

    /// The first of [`Trainer::ways_back`] that is whole, the same on all ranks, each of which verifies its share. None where no
    /// checkpoint was ever written.
    ///
    /// # Errors
    /// [`GaveUp`] where there are checkpoints and none will do: to begin again would be to lose the run.
    fn healthy(&self, trouble: &Trouble) -> Result<Option<Checkpoint>> {
        let store = Store::open(&self.resolved.config.run.dir)?;
        let steps = if self.telemetry.is_some() { self.ways_back(&store, trouble)? } else { Vec::new() };
        let share = Share { rank: self.mesh.world.rank(), of: self.mesh.world.size() };
        // Others may read their shares for longer than ranks wait for each other.
        let exchange = |bytes: &[u8]| self.mesh.all.gather_bytes_whenever(Label::new("way-back"), bytes);
        let (found, damaged) = store.first_whole_together(&steps, share, exchange)?;
        for damage in &damaged {
            self.warn(&format!("passed over a damaged checkpoint: {damage:#}"));
        }
        if found.is_none() && !damaged.is_empty() {
            return Err(no_way_back(&store, trouble).into());
        }
        Ok(found)
    }

    /// Steps of the checkpoints from which this run has come: those that the trouble leaves trusted, the newest first, then the
    /// others, the oldest first, which has least of it.
    fn ways_back(&self, store: &Store, trouble: &Trouble) -> Result<Vec<u64>> {
        let all = store.list()?;
        let mine = all.iter().filter(|entry| self.guard.went_through(entry.rollbacks, entry.step));
        let (trusted, others): (Vec<u64>, Vec<u64>) =
            mine.map(|entry| entry.step).partition(|step| *step <= trouble.trusted);
        let steps: Vec<u64> = trusted.into_iter().rev().chain(others).collect();
        if steps.is_empty() && !all.is_empty() {
            return Err(no_way_back(store, trouble).into());
        }
        Ok(steps)
    }

    fn give_up(&self, cause: &Cause) -> GaveUp {
        let back = match self.saved {
            Some(saved) => format!("The checkpoint of step {saved} is good"),
            None => "No checkpoint of it was written".into(),
        };
        let tried = match (self.resolved.recovery.enabled, self.guard.rollbacks()) {
            (false, _) => "recovery.enabled = false".into(),
            (true, 0) => "recovery.max_rollbacks = 0".into(),
            (true, n) => format!("{n} roll-backs did not help"),
        };
        let text = format!(
            "the run diverged in step {}: {cause}; {tried}. {back}. Lower optimizer.lr ({} at the peak), lengthen \
             schedule.warmup or lower optimizer.clip ({}), in another run.dir; logbook.md tells what happened, and trouble/ \
             holds the batches",
            cause.step, self.resolved.schedule.peak, self.resolved.config.optimizer.clip
        );
        GaveUp { text, cause: *cause }
    }

    /// Takes note of what happened to a checkpoint, and shows it; a failure goes into the logbook.
    pub(super) fn saving(&mut self, event: &Saving) {
        self.say(&described(event));
        match event {
            Saving::Saved { step, .. } => self.saved = Some(*step),
            Saving::Failed { step, error } => {
                self.not_saved = format!("{error:#}");
                let text = format!("The checkpoint of step {step} could not be saved: {error:#}.");
                self.enter_once("checkpoint-failed", &text, json!({ "checkpoint": step }));
            }
            _ => {}
        }
    }

    /// Writes into the logbook, unless a start before this one did; a full disk does not stop the training.
    pub(super) fn enter_once(&mut self, event: &str, text: &str, figures: Value) {
        let Some(book) = &mut self.book else { return };
        if let Err(error) = book.add_once(self.step, event, text, figures) {
            self.warn(&format!("{error:#}"));
        }
    }

    fn warn(&self, text: &str) {
        self.say(&format!("warning: {text}"));
    }
}

fn no_way_back(store: &Store, trouble: &Trouble) -> GaveUp {
    let text = format!(
        "the run is to go back to before step {}, because of {}, but of the checkpoints in {} none is whole that it has come \
         from. Restore one from a copy and give the same command again, or choose another run.dir to begin anew",
        trouble.first,
        trouble.cause,
        store.path().display()
    );
    GaveUp { text, cause: trouble.cause }
}
