//! The loop itself.

use super::data::{Data, HeldOut};
use super::folder::{self, Folder};
use super::used::Used;
use super::watch::Watch;
use super::{Ending, Event, Hook, Outcome, compatible, state, write_whole};
use crate::checkpoint::{DEFAULT_SHARD_BYTES, Event as Saving, Parting, Retention, Writer, human_bytes};
use crate::collect::Collector;
use crate::config::Resolved;
use crate::launch;
use crate::logbook::Logbook;
use crate::loss_scale::LossScale;
use crate::optimizer::Optimizer;
use crate::planner::{Flops, Plan};
use crate::recovery::{Guard, Verdict};
use crate::signals::Stop;
use crate::telemetry::{Energy, Record, Resumed, Telemetry, Training, Validation};
use anyhow::{Context, Result, bail};
use ferropt_data::Batch;
use ferropt_device::{Device, Element, Store as Put, failures};
use ferropt_mesh::{Label, Lost, Mesh};
use ferropt_model::{Backprop, Model, Part, Pass, Task, schedule};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How long other ranks' parts of a checkpoint are waited for when a run has failed. Half of what a launcher gives ranks to end,
/// so that there is time to say how the run ended.
const LAST_PARTS: Duration = Duration::from_secs(15);

/// What is still waited for: nothing where the first rank is gone, which makes checkpoints of the parts.
fn parting(lost: &Lost) -> Parting {
    let patience = if lost.rank() == Some(0) { Duration::ZERO } else { LAST_PARTS };
    Parting { patience, lost: lost.rank() }
}

/// A run: model, optimiser, data and outputs; of a run on many ranks, one of them.
pub(super) struct Trainer<'h, D: Device, E: Element> {
    pub(super) device: D,
    pub(super) mesh: Mesh,
    pub(super) resolved: Resolved,
    pub(super) data: Data,
    pub(super) model: Model<D, E>,
    pub(super) backprop: Backprop<D, E>,
    pub(super) optimizer: Optimizer<D>,
    /// Says which batch comes next, and whether its gradient is taken. All ranks see the same figures and have the same.
    pub(super) guard: Guard,
    pub(super) loss_scale: LossScale,
    collector: Collector,
    watch: Watch,
    /// The first rank tells.
    pub(super) telemetry: Option<Telemetry>,
    pub(super) book: Option<Logbook>,
    /// There until the run ends.
    pub(super) writer: Option<Writer>,
    used: Used,
    /// Work of one token, and the measured peak in FLOP/s to compare it with.
    flops: Flops,
    peak: f64,
    batch: Batch,
    /// Steps done.
    pub(super) step: u64,
    /// Steps done at the newest checkpoint that is known to be on the disk.
    pub(super) saved: Option<u64>,
    /// Why the last save that failed did.
    pub(super) not_saved: String,
    /// Held-out sets that are still to be scored at this step, by their places in the data.
    unscored: Vec<usize>,
    /// Set once: a full disk would repeat it at every step.
    metrics_lost: bool,
    hook: Hook<'h>,
}

/// What may end a run before its last step.
#[derive(Clone, Copy)]
struct Limits<'a> {
    stop: &'a Stop,
    /// Where `run.max_minutes` are over.
    until: Option<Instant>,
}

impl<'h, D: Device, E: Element> Trainer<'h, D, E> {
    /// Opens the run folder, allocates, and loads the newest whole checkpoint or initialises. `links` is told to people.
    ///
    /// # Errors
    /// Names what is wrong with the run folder, or the keys that have changed since the run began.
    pub(super) fn new(
        device: D,
        mesh: Mesh,
        links: Option<String>,
        resolved: Resolved,
        mut data: Data,
        plan: &Plan,
        hook: Hook<'h>,
    ) -> Result<Self> {
        let run = &resolved.config.run.dir;
        let first = mesh.world.rank() == 0;
        let timeout = Duration::from_secs_f64(resolved.config.parallel.timeout);
        let mirror = resolved.copies.as_ref().map(|copies| copies.url.as_str());
        let Folder { store, team, found, mut notes } = folder::open(&mesh, run, mirror, timeout)?;
        notes.append(&mut data.notes);
        if let Some(found) = &found {
            let (then, now) = (&found.manifest().run, serde_json::to_value(&resolved.config)?);
            compatible::check(&then.config, &now, then.step)
                .with_context(|| format!("the run in {}", run.display()))?;
        }

        let part = Part::of_rank(mesh.axes, resolved.model.layers, mesh.world.rank());
        let options = resolved.options();
        let mut model = Model::part(&device, &resolved.model, part, options.offload)?;
        let mut optimizer = Optimizer::new(&device, &model, resolved.optimizer)?;
        let backprop = Backprop::on(&device, &resolved.model, options, mesh.clone())?;
        let (mut step, mut remembered) = (0, state::Remembered::at_first());
        match &found {
            Some(found) => {
                remembered = state::load(found, &data.identity, &device, &mut model, &mut optimizer)
                    .with_context(|| format!("cannot resume from {}", found.path().display()))?;
                step = found.manifest().run.step;
            }
            None => {
                let run = &resolved.config.run;
                optimizer.initialise(&device, &mut model, run.seed, run.threads);
            }
        }
        let resumed = found.is_some().then_some(step);
        let used = Used::start(&mesh.all, remembered.energy, resolved.config.energy.watts)?;
        let retention =
            Retention { keep_last: resolved.config.checkpoint.keep_last, keep_every: resolved.keep_every };
        let going_on = resumed.map(|step| Resumed { step, skipped: remembered.guard.skipped(step + 1) });
        let telemetry =
            if first { Some(Telemetry::open(run, going_on.as_ref(), resolved.steps)?) } else { None };
        let mut writer = Writer::start(store, retention, DEFAULT_SHARD_BYTES, team.clone())?;
        let lost = mesh.world.lost();
        writer.hurry_when(move || lost().as_ref().map(parting));
        if let Some(copies) = &resolved.copies {
            writer.copy_to(copies, team, found.as_ref())?;
        }
        if first {
            // Behind everything that refuses a start, which is to leave a run as it was.
            write_whole(&run.join("config.toml"), &resolved.config.to_toml()?)?;
        }
        let book =
            if first { Some(super::history::open(&resolved, &mesh.world, resumed, &notes)?) } else { None };
        let trainer = Trainer {
            guard: Guard::new(resolved.recovery, remembered.guard),
            loss_scale: LossScale::new(resolved.loss_scale, remembered.loss_scale),
            book,
            collector: Collector::new(mesh.clone(), model.held()),
            watch: Watch::new(&mesh, plan, resolved.config.log.trace),
            writer: Some(writer),
            flops: plan.flops_per_token,
            peak: plan.time.peak_flops * mesh.world.size() as f64,
            batch: Batch::default(),
            saved: resumed,
            not_saved: String::new(),
            unscored: Vec::new(),
            metrics_lost: false,
            device,
            mesh,
            resolved,
            data,
            model,
            backprop,
            optimizer,
            telemetry,
            used,
            step,
            hook,
        };
        for note in links.into_iter().chain(notes) {
            trainer.say(&note);
        }
        trainer.say(&format!("energy: {}", trainer.used.describe()));
        if step > 0 {
            trainer.say(&format!("continuing after step {step}"));
        }
        Ok(trainer)
    }

    /// A line for people.
    pub(super) fn say(&self, line: &str) {
        if let Some(telemetry) = &self.telemetry {
            telemetry.progress().line(line);
        }
    }

    /// Runs until the last step, the time limit, or a request to stop, then saves.
    ///
    /// # Errors
    /// Training that goes wrong again and again, a last checkpoint that cannot be written, or a rank that is lost.
    pub(super) fn run(mut self, stop: &Stop) -> Result<Outcome> {
        let ending = failures(|| self.work(stop));
        if let Err(error) = &ending {
            // The others are not to wait for this rank.
            self.mesh.world.abandon(&format!("{error:#}"), launch::status(error));
        }
        // Whatever happened, a checkpoint that is under way is finished, if what others have to write of it comes.
        for event in self.writer.take().into_iter().flat_map(Writer::finish) {
            self.saving(&event);
        }
        if let Some(telemetry) = &self.telemetry {
            telemetry.progress().finish();
        }
        if let Some(book) = &mut self.book {
            super::history::close(book, self.step, ending.as_ref().copied());
        }
        let ending = ending?;
        let curves = self.telemetry.as_ref().map(|telemetry| telemetry.draw(&self.resolved.model_name()));
        // Everything is saved, and the picture follows from it.
        let curves = match curves.transpose() {
            Ok(curves) => curves,
            Err(error) => {
                self.say(&format!("warning: the loss curves are not drawn: {error:#}"));
                None
            }
        };
        Ok(Outcome {
            ending,
            went_on: true,
            step: self.step,
            tokens: self.step * self.resolved.batch_tokens(),
            curves,
            rank: self.mesh.world.rank(),
            run: self.resolved.config.run.dir,
        })
    }

    fn work(&mut self, stop: &Stop) -> Result<Ending> {
        let minutes = self.resolved.config.run.max_minutes;
        let until = minutes.map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0));
        let (limits, first) = (Limits { stop, until }, self.step);
        self.unscored = self.left_unscored()?;
        // What an earlier start had no time for: if time could cut it off again, no start might ever come further.
        let made_up_for = Limits { stop, until: None };
        let ending = loop {
            if let Some(ending) = self.validate(if self.step == first { made_up_for } else { limits })? {
                break ending;
            }
            if self.step >= self.resolved.steps {
                break if self.step == first { Ending::AlreadyComplete } else { Ending::Complete };
            }
            if let Some(ending) = agree(&self.mesh, &mut self.used, limits)? {
                break ending;
            }
            if !self.advance()? {
                continue;
            }
            // Before the validation, which may take longer than whoever wants to end the run gives it.
            if self.step.is_multiple_of(self.resolved.checkpoint_every) || self.step == self.resolved.steps {
                self.save()?;
            }
            let events: Vec<Saving> = self.writer.as_mut().map(Writer::poll).unwrap_or_default();
            for event in events {
                self.saving(&event);
            }
            if self.validation_due() {
                self.unscored = (0..self.data.validation.len()).collect();
            }
        };
        self.secure()?;
        if let Some(trace) = self.watch.close(&self.mesh, &self.resolved.config.run.dir)? {
            self.say(&trace);
        }
        // A rank that left now could take away with it what the first one has not yet read of the last checkpoint.
        self.mesh.all.barrier(Label::new("farewell"))?;
        Ok(ending)
    }

    /// One optimiser step; false if it was not taken, whereupon the next one is to be tried.
    fn advance(&mut self) -> Result<bool> {
        let started = Instant::now();
        let (r, step) = (&self.resolved, self.step + 1);
        let first = self.guard.batch() * r.sequences as u64;
        let scale = self.scale();
        let mut sum = 0.0;
        self.mesh.world.beat(Label::of("step", step as usize));
        self.watch.begin(&self.mesh);
        self.backprop.begin();
        let part = Part::of_rank(self.mesh.axes, r.model.layers, self.mesh.world.rank());
        for task in schedule(part.stage.place, r.accumulation()) {
            let (device, model) = (&self.device, &self.model);
            match task {
                Task::Forward(part) => {
                    // Micro-batches are dealt to the ranks in turn.
                    let number = part * r.data_ranks() + self.mesh.data.rank();
                    let first_sequence = (number * r.micro_batch) as u64;
                    self.data.train.batch(first + first_sequence, r.micro_batch, &mut self.batch)?;
                    let pass = Pass { seed: r.config.run.seed, step, first_sequence };
                    self.backprop.forward_pass(device, model, part, view(&self.batch), pass)?;
                }
                Task::Backward(part) => {
                    let store = if part == 0 { Put::Overwrite } else { Put::Accumulate };
                    let last = part + 1 == r.accumulation();
                    sum += self.backprop.backward_pass(device, model, part, scale, store, last)?;
                }
            }
            self.used.tick();
        }
        let (loss_scale, told_scale) = (self.loss_scale.factor(), self.loss_scale.told());
        let grad_norm = self.backprop.sum(&self.device)? / loss_scale;
        if let Some(sent) = self.watch.summed(&self.mesh) {
            self.say(&sent);
        }
        let [sum] = total(&self.mesh, [sum])?;
        let loss = sum / r.batch_tokens() as f64;
        // An overflow on the way forward is not the factor's.
        if loss.is_finite() && !grad_norm.is_finite() && self.loss_scale.lower() {
            self.say(&format!(
                "step {step}: the gradient is not finite at the loss scale {loss_scale}; it is tried again with {}",
                self.loss_scale.factor()
            ));
            return Ok(false);
        }
        match self.guard.judge(step, loss, grad_norm) {
            Verdict::Accept => {}
            verdict => return self.recover(verdict).map(|()| false),
        }
        let (lr_factor, clip_factor) = self.guard.factors(step);
        let lr = r.schedule.lr(step) * lr_factor;
        self.optimizer.set_clip(r.optimizer.clip * clip_factor);
        let gradients = &self.backprop.gradients;
        let span = self.mesh.world.trace().span(Label::new("optimiser"));
        self.optimizer.step(&self.device, &mut self.model, gradients, step, lr, grad_norm, loss_scale);
        self.loss_scale.taken();
        drop(span);
        if let Some(taken) = self.watch.updated(&self.device) {
            self.say(&taken);
        }
        if let Some(trace) = self.watch.done(&self.mesh, &r.config.run.dir)? {
            self.say(&trace);
        }
        self.step = step;
        let tokens_per_second = r.batch_tokens() as f64 / started.elapsed().as_secs_f64();
        let training = Training {
            step,
            tokens: step * r.batch_tokens(),
            loss,
            lr,
            grad_norm,
            loss_scale: told_scale,
            tokens_per_second,
            model_tflops: tokens_per_second * self.flops.model * 1e-12,
            hardware_tflops: tokens_per_second * self.flops.hardware * 1e-12,
            peak_share: Some(tokens_per_second * self.flops.hardware_causal / self.peak),
            energy: Some(self.used.read()),
        };
        let recorded = step.is_multiple_of(r.config.log.every) || step == 1 || step == r.steps;
        if let Some(telemetry) = &self.telemetry {
            (self.hook)(Event::Training(&training));
            if recorded {
                self.record(Record::Training(training));
            } else {
                telemetry.progress().step(step);
            }
        }
        Ok(true)
    }

    /// What the sum of a step's losses is multiplied by. Every position of a training sample is a target, so the mean is over
    /// all tokens of the step.
    pub(super) fn scale(&self) -> f32 {
        self.loss_scale.factor() as f32 / self.resolved.batch_tokens() as f32
    }

    fn validation_due(&self) -> bool {
        let every = self.resolved.validation_every;
        every.is_some_and(|every| self.step.is_multiple_of(every) || self.step == self.resolved.steps)
    }

    /// Held-out sets that the start before this one did not come to score at the step that this one goes on from. The first
    /// rank knows.
    fn left_unscored(&self) -> Result<Vec<usize>> {
        if self.step == 0 || !self.validation_due() {
            return Ok(Vec::new());
        }
        let scored = match &self.telemetry {
            Some(telemetry) => telemetry.scored(self.step)?,
            None => Vec::new(),
        };
        let sets = self.data.validation.iter().enumerate();
        let left: Vec<usize> =
            sets.filter(|(_, held_out)| !scored.contains(&held_out.name)).map(|(set, _)| set).collect();
        let told = self.mesh.all.gather_bytes(Label::new("unscored"), &serde_json::to_vec(&left)?)?;
        let first = told.first().context("the first rank did not say what is to be scored")?;
        serde_json::from_slice(first).context("the first rank told something unknown")
    }

    /// Scores the held-out sets that are to be scored now, and tells of each. If the run is to end meanwhile, says why; what is
    /// left is scored when it is resumed.
    fn validate(&mut self, limits: Limits<'_>) -> Result<Option<Ending>> {
        while let Some(&set) = self.unscored.first() {
            let score = match self.score(set, limits)? {
                ControlFlow::Break(ending) => return Ok(Some(ending)),
                ControlFlow::Continue(score) => score,
            };
            self.unscored.remove(0);
            if self.telemetry.is_some() {
                (self.hook)(Event::Validation(&score));
                self.record(Record::Validation(score));
            }
        }
        Ok(None)
    }

    /// The score of a held-out set, or why the run is to end without.
    fn score(&mut self, set: usize, limits: Limits<'_>) -> Result<ControlFlow<Ending, Validation>> {
        let (r, HeldOut { name, loader, .. }) = (&self.resolved, &self.data.validation[set]);
        let (mut nats, mut targets, mut bytes) = (0.0, 0, 0);
        // Dealt to the ranks in turn, so that all make as many passes. Samples past the end are padding, so that every
        // pass has the size that memory is planned for.
        let deal = (r.micro_batch * r.data_ranks()) as u64;
        for first in (0..loader.samples_per_epoch()).step_by(deal as usize) {
            if let Some(ending) = agree(&self.mesh, &mut self.used, limits)? {
                return Ok(ControlFlow::Break(ending));
            }
            let first = first + (self.mesh.data.rank() * r.micro_batch) as u64;
            loader.batch(first, r.micro_batch, &mut self.batch)?;
            nats += self.backprop.score(&self.device, &self.model, view(&self.batch))?;
            self.used.tick();
            // The last stage has the losses.
            if self.mesh.pipeline.rank() + 1 == self.mesh.pipeline.size() {
                targets += self.batch.target_count;
                bytes += self.batch.text_bytes;
            }
        }
        let [nats, targets, bytes] = total(&self.mesh, [nats, targets as f64, bytes as f64])?;
        let loss = nats / targets;
        Ok(ControlFlow::Continue(Validation {
            step: self.step,
            tokens: self.step * r.batch_tokens(),
            set: name.clone(),
            loss,
            perplexity: loss.exp(),
            bits_per_byte: (bytes > 0.0).then(|| nats / std::f64::consts::LN_2 / bytes),
        }))
    }

    /// Hands a snapshot to the background, once what was recorded up to here is on disk.
    pub(super) fn save(&mut self) -> Result<()> {
        if let Some(Err(error)) = self.telemetry.as_ref().map(Telemetry::sync) {
            self.say(&format!("warning: {error:#}"));
        }
        let place = state::Place {
            step: self.step,
            resolved: &self.resolved,
            data: &self.data,
            energy: self.used.read(),
            guard: &self.guard,
            loss_scale: &self.loss_scale,
        };
        let snapshot = || state::snapshot(place, &self.device, &self.model, &self.optimizer, &self.collector);
        match &mut self.writer {
            Some(writer) => {
                writer.keep_way_back(self.guard.way_back(self.step));
                writer.save(snapshot)?;
            }
            None => drop(snapshot()?),
        }
        Ok(())
    }

    /// Sees to it that the state is on the disk before the run ends. A save of it that fails is tried again: there will be no
    /// next one.
    fn secure(&mut self) -> Result<()> {
        self.settle()?;
        for _ in 0..2 {
            if self.unsaved()?.is_none() {
                return Ok(());
            }
            self.save()?;
            self.settle()?;
        }
        if let Some(why) = self.unsaved()? {
            bail!(
                "the checkpoint of step {} could not be saved: {why}. See to that and give the same command again, which goes \
                 on from the last one that was saved",
                self.step
            );
        }
        Ok(())
    }

    /// Why the state is not on the disk, if it is not, by the word of the first rank: it makes a checkpoint of all ranks' parts.
    fn unsaved(&self) -> Result<Option<String>> {
        let mine = (self.saved != Some(self.step)).then_some(&self.not_saved);
        let told = self.mesh.all.gather_bytes(Label::new("saved"), &serde_json::to_vec(&mine)?)?;
        let first = told.first().context("the first rank did not say what is saved")?;
        serde_json::from_slice(first).context("the first rank told something unknown")
    }

    /// Keeps a record; a full disk does not stop the training.
    pub(super) fn record(&mut self, record: Record) {
        if let Some(Err(error)) = self.telemetry.as_mut().map(|telemetry| telemetry.record(&record))
            && !std::mem::replace(&mut self.metrics_lost, true)
        {
            self.say(&format!("warning: metrics are being lost: {error:#}"));
        }
    }
}

/// A loader's batch, as the model takes it.
pub(crate) fn view(batch: &Batch) -> ferropt_model::Batch<'_> {
    ferropt_model::Batch { tokens: &batch.tokens, targets: &batch.targets, doc_start: &batch.doc_start }
}

/// Whether any rank wants to end, so that all end at the same place. Ranks tell each other as well what they have used.
fn agree(mesh: &Mesh, used: &mut Used, limits: Limits<'_>) -> Result<Option<Ending>> {
    let late = limits.until.is_some_and(|until| Instant::now() >= until);
    let Energy { joules, estimated } = used.own();
    let told = [f64::from(limits.stop.requested()), f64::from(late), joules, f64::from(estimated)];
    let all = mesh.all.gather_f64(Label::new("end"), &told)?;
    used.hear(
        mesh.all.rank(),
        all.iter().map(|told| match told[..] {
            [_, _, joules, estimated] => Energy { joules, estimated: estimated == 1.0 },
            _ => Energy::default(),
        }),
    );
    let any = |which: usize| all.iter().any(|told| told.get(which) == Some(&1.0));
    Ok(if any(0) { Some(Ending::Stopped) } else { any(1).then_some(Ending::OutOfTime) })
}

/// Sums over all ranks that have sequences of their own, and over the stages, of which the last has them, in the order of the
/// ranks.
fn total<const N: usize>(mesh: &Mesh, values: [f64; N]) -> Result<[f64; N]> {
    let mut sums = values;
    for group in [&mesh.data, &mesh.pipeline] {
        let all = group.gather_f64(Label::new("total"), &sums)?;
        sums = std::array::from_fn(|which| all.iter().filter_map(|values| values.get(which)).sum());
    }
    Ok(sums)
}

/// What happened to a checkpoint, for people.
pub(super) fn described(event: &Saving) -> String {
    match event {
        Saving::Saved { step, bytes, took, .. } => {
            format!(
                "saved step {step} ({}, {:.1} s in the background)",
                human_bytes(*bytes),
                took.as_secs_f64()
            )
        }
        Saving::Failed { step, error } => {
            format!("warning: step {step} was not saved: {error:#}")
        }
        Saving::NotPruned { step, error } => {
            format!("warning: step {step} was saved, but old checkpoints stay: {error:#}")
        }
        Saving::Mirrored { step, bytes, took } => {
            format!("copied step {step} to the mirror ({}, {:.1} s)", human_bytes(*bytes), took.as_secs_f64())
        }
        Saving::NotMirrored { step, error } => {
            format!("warning: step {step} is not in the mirror, training goes on: {error:#}")
        }
    }
}
