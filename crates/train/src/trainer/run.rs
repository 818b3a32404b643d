//! The loop itself.

use super::data::Data;
use super::{Ending, Event, Hook, Outcome, compatible, state, write_whole};
use crate::checkpoint::{DEFAULT_SHARD_BYTES, Event as Saving, Retention, Store, Team, Writer, human_bytes};
use crate::config::Resolved;
use crate::optimizer::{Optimizer, gradient_norm};
use crate::planner::{Flops, Plan};
use crate::signals::Stop;
use crate::telemetry::{Energy, Meter, Record, Telemetry, Training, Validation};
use anyhow::{Context, Result, bail};
use ferropt_data::Batch;
use ferropt_device::{Device, Element, Store as Put};
use ferropt_model::{Backprop, Model, Pass};
use std::time::{Duration, Instant};

/// A run: model, optimiser, data and outputs.
pub(super) struct Trainer<'h, D: Device, E: Element> {
    device: D,
    resolved: Resolved,
    data: Data,
    model: Model<D, E>,
    backprop: Backprop<D, E>,
    optimizer: Optimizer<D>,
    telemetry: Telemetry,
    meter: Meter,
    writer: Writer,
    /// Work of one token, and the measured peak in FLOP/s to compare it with.
    flops: Flops,
    peak: f64,
    batch: Batch,
    /// Steps done.
    step: u64,
    /// Steps done when the last snapshot was taken.
    saved: Option<u64>,
    /// Set once: a full disk would repeat it at every step.
    metrics_lost: bool,
    hook: Hook<'h>,
}

impl<'h, D: Device, E: Element> Trainer<'h, D, E> {
    /// Opens the run folder, allocates, and loads the newest whole checkpoint or initialises.
    ///
    /// # Errors
    /// Names what is wrong with the run folder, or the keys that have changed since the run began.
    pub(super) fn new(
        device: D,
        resolved: Resolved,
        data: Data,
        plan: &Plan,
        hook: Hook<'h>,
    ) -> Result<Self> {
        let run = &resolved.config.run.dir;
        std::fs::create_dir_all(run)
            .with_context(|| format!("run.dir = \"{}\" cannot be made", run.display()))?;
        let store = Store::open_for_writing(run)?;
        let found = store.latest_whole()?;
        if let Some(found) = &found {
            compatible::check(
                &found.checkpoint.manifest().run.config,
                &serde_json::to_value(&resolved.config)?,
            )
            .with_context(|| format!("the run in {}", run.display()))?;
        }
        write_whole(&run.join("config.toml"), &resolved.config.to_toml()?)?;

        let mut model = Model::zeros(&device, &resolved.model)?;
        let mut optimizer = Optimizer::new(&device, &model, resolved.optimizer)?;
        let backprop = Backprop::new(&device, &resolved.model, resolved.options())?;
        let (mut step, mut energy) = (0, Energy::default());
        match &found {
            Some(found) => {
                energy = state::load(&found.checkpoint, &data.identity, &device, &mut model, &mut optimizer)
                    .with_context(|| format!("cannot resume from {}", found.checkpoint.path().display()))?;
                step = found.checkpoint.manifest().run.step;
            }
            None => optimizer.initialise(&device, &mut model, resolved.config.run.seed),
        }
        let resumed = found.is_some().then_some(step);
        let telemetry = Telemetry::open(run, resumed, resolved.steps)?;
        let meter = Meter::start(energy, resolved.config.energy.watts);
        let retention =
            Retention { keep_last: resolved.config.checkpoint.keep_last, keep_every: resolved.keep_every };
        let progress = telemetry.progress();
        for damage in found.iter().flat_map(|f| &f.damaged) {
            progress.line(&format!("passed over a damaged checkpoint: {damage:#}"));
        }
        progress.line(&format!("energy: {}", meter.describe()));
        if step > 0 {
            progress.line(&format!("continuing after step {step}"));
        }
        Ok(Trainer {
            writer: Writer::start(store, retention, DEFAULT_SHARD_BYTES, Team::alone())?,
            flops: plan.flops_per_token,
            peak: plan.time.peak_flops,
            batch: Batch::default(),
            saved: resumed,
            metrics_lost: false,
            device,
            resolved,
            data,
            model,
            backprop,
            optimizer,
            telemetry,
            meter,
            step,
            hook,
        })
    }

    /// Runs until the last step, the time limit, or a request to stop, then saves.
    ///
    /// # Errors
    /// A loss or gradient that is not finite (before it touches the weights), or a last checkpoint that cannot be
    /// written.
    pub(super) fn run(mut self, stop: &Stop) -> Result<Outcome> {
        let ending = self.work(stop);
        // Whatever happened, a checkpoint that is under way is finished.
        let mut last_save = Ok(());
        for event in self.writer.finish() {
            match event {
                Saving::Failed { step, error } => {
                    last_save =
                        Err(error.context(format!("the checkpoint of step {step} could not be saved")));
                }
                event => tell(&self.telemetry, &event),
            }
        }
        self.telemetry.progress().finish();
        let ending = ending?;
        last_save?;
        Ok(Outcome {
            ending,
            step: self.step,
            tokens: self.step * self.resolved.batch_tokens(),
            curves: Some(self.telemetry.draw(&self.resolved.model_name())?),
            run: self.resolved.config.run.dir,
        })
    }

    fn work(&mut self, stop: &Stop) -> Result<Ending> {
        let limit = self.resolved.config.run.max_minutes.map(|m| Duration::from_secs_f64(m * 60.0));
        let (started, first) = (Instant::now(), self.step);
        let ending = loop {
            if self.step >= self.resolved.steps {
                break if self.step == first { Ending::AlreadyComplete } else { Ending::Complete };
            }
            if stop.requested() {
                break Ending::Stopped;
            }
            if limit.is_some_and(|limit| started.elapsed() >= limit) {
                break Ending::OutOfTime;
            }
            self.advance()?;
            if self.step.is_multiple_of(self.resolved.validation_every) || self.step == self.resolved.steps {
                self.validate()?;
            }
            if self.step.is_multiple_of(self.resolved.checkpoint_every) || self.step == self.resolved.steps {
                self.save()?;
            }
            for event in self.writer.poll() {
                tell(&self.telemetry, &event);
            }
        };
        if self.saved != Some(self.step) {
            self.save()?;
        }
        Ok(ending)
    }

    /// One optimiser step.
    fn advance(&mut self) -> Result<()> {
        let started = Instant::now();
        let (r, step) = (&self.resolved, self.step + 1);
        let first = self.step * r.sequences as u64;
        // Every position of a training sample is a target, so the mean is over all tokens of the step.
        let scale = 1.0 / r.batch_tokens() as f32;
        let mut sum = 0.0;
        for part in 0..r.accumulation() {
            let first_sequence = (part * r.micro_batch) as u64;
            self.data.train.batch(first + first_sequence, r.micro_batch, &mut self.batch)?;
            let pass = Pass { seed: r.config.run.seed, step, first_sequence };
            let store = if part == 0 { Put::Overwrite } else { Put::Accumulate };
            sum += self.backprop.train(&self.device, &self.model, view(&self.batch), pass, scale, store)?;
        }
        let loss = sum / r.batch_tokens() as f64;
        let gradients = &self.backprop.gradients;
        let grad_norm = gradient_norm(&self.device, gradients);
        if !loss.is_finite() || !grad_norm.is_finite() {
            self.refuse(step, loss, grad_norm)?;
        }
        let lr = r.schedule.lr(step);
        self.optimizer.step(&self.device, &mut self.model, gradients, step, lr, grad_norm);
        self.step = step;
        let tokens_per_second = r.batch_tokens() as f64 / started.elapsed().as_secs_f64();
        let training = Training {
            step,
            tokens: step * r.batch_tokens(),
            loss,
            lr,
            grad_norm,
            tokens_per_second,
            model_tflops: tokens_per_second * self.flops.model * 1e-12,
            hardware_tflops: tokens_per_second * self.flops.hardware * 1e-12,
            peak_share: Some(tokens_per_second * self.flops.hardware_causal / self.peak),
            energy: Some(self.meter.read()),
        };
        (self.hook)(Event::Training(&training));
        if step.is_multiple_of(r.config.log.every) || step == r.steps {
            self.record(Record::Training(training));
        } else {
            self.telemetry.progress().step(step);
        }
        Ok(())
    }

    /// Stops a run that has diverged; the weights are still those of the last good step, and nothing is saved.
    fn refuse(&self, step: u64, loss: f64, grad_norm: f64) -> Result<()> {
        let back = match self.saved {
            Some(saved) => {
                format!("The checkpoint of step {saved} is good, and the same command continues from it")
            }
            None => "No checkpoint was written yet; the same command starts anew".into(),
        };
        bail!(
            "the run diverged in step {step}: loss {loss}, gradient norm {grad_norm}. {back}, to the same end: lower \
             optimizer.lr ({} at the peak), lengthen schedule.warmup or lower optimizer.clip ({}), in another run.dir",
            self.resolved.schedule.peak,
            self.resolved.config.optimizer.clip
        )
    }

    /// Scores the held-out sets.
    fn validate(&mut self) -> Result<()> {
        let r = &self.resolved;
        let mut scores = Vec::new();
        for (name, loader) in &self.data.validation {
            let limit = r.config.validation.max_tokens.map_or(u64::MAX, |n| n.0.div_ceil(r.seq as u64));
            let samples = loader.samples_per_epoch().min(limit.max(1));
            let (mut nats, mut targets, mut bytes) = (0.0, 0, 0);
            let mut sample = 0;
            while sample < samples {
                // Samples past the end are padding, so that every pass has the size that memory is planned for.
                loader.batch(sample, r.micro_batch, &mut self.batch)?;
                nats += self.backprop.score(&self.device, &self.model, view(&self.batch))?;
                targets += self.batch.target_count;
                bytes += self.batch.text_bytes;
                sample += r.micro_batch as u64;
            }
            let loss = nats / targets as f64;
            scores.push(Validation {
                step: self.step,
                tokens: self.step * r.batch_tokens(),
                set: name.clone(),
                loss,
                perplexity: loss.exp(),
                bits_per_byte: (bytes > 0).then(|| nats / std::f64::consts::LN_2 / bytes as f64),
            });
        }
        for score in scores {
            (self.hook)(Event::Validation(&score));
            self.record(Record::Validation(score));
        }
        Ok(())
    }

    /// Hands a snapshot to the background, once what was recorded up to here is on disk.
    fn save(&mut self) -> Result<()> {
        if let Err(error) = self.telemetry.sync() {
            self.telemetry.progress().line(&format!("warning: {error:#}"));
        }
        let place = state::Place {
            step: self.step,
            resolved: &self.resolved,
            data: &self.data,
            energy: self.meter.read(),
        };
        self.writer.save(|| state::snapshot(place, &self.device, &self.model, &self.optimizer))?;
        self.saved = Some(self.step);
        Ok(())
    }

    /// Keeps a record; a full disk does not stop the training.
    fn record(&mut self, record: Record) {
        if let Err(error) = self.telemetry.record(&record)
            && !std::mem::replace(&mut self.metrics_lost, true)
        {
            self.telemetry.progress().line(&format!("warning: metrics are being lost: {error:#}"));
        }
    }
}

/// A loader's batch, as the model takes it.
fn view(batch: &Batch) -> ferropt_model::Batch<'_> {
    ferropt_model::Batch { tokens: &batch.tokens, targets: &batch.targets, doc_start: &batch.doc_start }
}

/// Shows what happened to a checkpoint.
fn tell(telemetry: &Telemetry, event: &Saving) {
    let line = match event {
        Saving::Saved { step, bytes, took, .. } => {
            format!(
                "saved step {step} ({}, {:.1} s in the background)",
                human_bytes(*bytes),
                took.as_secs_f64()
            )
        }
        Saving::Failed { step, error } => {
            format!("warning: step {step} was not saved, training goes on: {error:#}")
        }
        Saving::NotPruned { step, error } => {
            format!("warning: step {step} was saved, but old checkpoints stay: {error:#}")
        }
    };
    telemetry.progress().line(&line);
}
