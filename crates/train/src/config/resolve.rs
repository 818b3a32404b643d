//! From what the user wrote to what will be done: contradictions are refused, defaults filled in, lengths counted.

use super::*;
use crate::checkpoint::Retention;
use crate::checkpoint::mirror::{self, Copies};
use crate::loss_scale;
use crate::optimizer::{Rule, Settings};
use crate::recovery::Policy;
use crate::schedule::{Kind, Schedule};
use anyhow::{anyhow, bail, ensure};
use ferropt_device::Which;
use ferropt_device::cpu::MOST_THREADS;
use ferropt_mesh::Axes;
use ferropt_model::{Config as Model, Options, Part};

/// Tokens that one forward and backward pass takes at a time unless the user says otherwise: enough rows for the
/// matrix kernels to run at their peak, few enough for the activations of the small models to stay modest.
const MICRO_BATCH_TOKENS: usize = 2048;

/// Batch, in tokens, of models without a published one.
const SMALL_BATCH: u64 = 32_768;

/// Peak learning rate of models without a published one.
const SMALL_LR: f64 = 1e-3;

/// What the OPT paper trained a model with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Published {
    /// Name of the preset.
    pub preset: &'static str,
    /// Tokens per optimiser step.
    pub batch_tokens: u64,
    /// Peak learning rate.
    pub lr: f64,
}

const fn paper(preset: &'static str, batch_tokens: u64, lr: f64) -> Published {
    Published { preset, batch_tokens, lr }
}

/// Zhang et al., 2022, table 1.
const PUBLISHED: [Published; 9] = [
    paper("125m", 1 << 19, 6e-4),
    paper("350m", 1 << 19, 3e-4),
    paper("1.3b", 1 << 20, 2e-4),
    paper("2.7b", 1 << 20, 1.6e-4),
    paper("6.7b", 1 << 21, 1.2e-4),
    paper("13b", 1 << 22, 1e-4),
    paper("30b", 1 << 22, 1e-4),
    paper("66b", 1 << 21, 0.8e-4),
    paper("175b", 1 << 21, 1.2e-4),
];

/// What the OPT paper trained the preset of that name with; nothing for the small ones, which are not in it.
pub fn published(preset: &str) -> Option<Published> {
    PUBLISHED.into_iter().find(|p| p.preset == preset)
}

/// OPT's longest sequence, for models without a preset that do not say.
const POSITIONS: usize = 2048;

/// OPT's warm-up: 2000 steps, or 375M tokens for the small models.
const WARMUP: (u64, Span) = (2000, Span::Tokens(375_000_000));

/// How often held-out sets are scored where the user does not say.
const VALIDATION: Span = Span::Steps(250);

/// Whether a value is above 0 and finite as kernels have it, in single precision.
fn positive(value: f64) -> bool {
    let value = value as f32;
    value > 0.0 && value.is_finite()
}

/// Whether a value is in [0, 1), as kernels have it.
fn share(value: f64) -> bool {
    value >= 0.0 && (value as f32) < 1.0
}

/// Sequences per pass where the user does not say.
pub(crate) fn micro_batch(sequences: usize, seq: usize) -> usize {
    let fits = |b: &usize| sequences.is_multiple_of(*b) && b * seq <= MICRO_BATCH_TOKENS;
    (1..=sequences.min(MICRO_BATCH_TOKENS)).rev().find(fits).unwrap_or(1)
}

/// A configuration without gaps, and everything that follows from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Resolved {
    /// The configuration with every default filled in; resolves to the same again.
    pub config: Config,
    /// The model's sizes.
    pub model: Model,
    /// T, tokens per sequence.
    pub seq: usize,
    /// Sequences per step.
    pub sequences: usize,
    /// Sequences per forward and backward pass of a rank.
    pub micro_batch: usize,
    /// How the ranks are arranged.
    pub axes: Axes,
    /// What computes.
    pub device: Which,
    /// Last step of the run.
    pub steps: u64,
    /// Learning rate by step.
    pub schedule: Schedule,
    /// Update rule and its constants.
    pub optimizer: Settings,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints at multiples of this many steps stay for ever.
    pub keep_every: Option<u64>,
    /// Where checkpoints are copied to, and which copies stay.
    pub copies: Option<Copies>,
    /// Steps between validations; none without held-out sets.
    pub validation_every: Option<u64>,
    /// What is done when training goes wrong.
    pub recovery: Policy,
    /// How the loss is scaled, if it is.
    pub loss_scale: Option<loss_scale::Policy>,
}

impl Resolved {
    /// Ranks, or groups of them, that have sequences of their own.
    pub fn data_ranks(&self) -> usize {
        self.axes.shard * self.axes.replicate
    }

    /// Forward and backward passes per step, of each rank.
    pub fn accumulation(&self) -> usize {
        self.sequences / (self.micro_batch * self.data_ranks())
    }

    /// What the first rank holds of the model, which is as much as any.
    pub fn part(&self) -> Part {
        Part::of_rank(self.axes, self.model.layers, 0)
    }

    /// One pass, as the model is told.
    pub fn options(&self) -> Options {
        Options {
            batch: self.micro_batch,
            seq: self.seq,
            recompute: self.config.run.recompute.into(),
            stop_at_documents: self.config.data.stop_attention_at_document_ends,
            offload: self.config.run.offload,
        }
    }

    /// Tokens per optimiser step.
    pub fn batch_tokens(&self) -> u64 {
        (self.sequences * self.seq) as u64
    }

    /// The preset, or the sizes that make the model.
    pub fn model_name(&self) -> String {
        match &self.config.model.preset {
            Some(name) => format!("OPT {name}"),
            None => {
                let m = &self.model;
                format!("OPT of {} layers, {} heads, width {}", m.layers, m.heads, m.width)
            }
        }
    }
}

impl Config {
    /// Refuses contradictions, fills defaults in and works out what follows, for a run of one rank.
    ///
    /// # Errors
    /// Names the keys, their values, and what to change.
    pub fn resolve(self) -> anyhow::Result<Resolved> {
        self.resolve_for(1)
    }

    /// [`Config::resolve`], for a run of so many ranks.
    ///
    /// # Errors
    /// As there.
    pub fn resolve_for(mut self, ranks: usize) -> anyhow::Result<Resolved> {
        let model = self.resolve_model()?;
        self.check_data()?;
        let seq = *self.data.seq.get_or_insert(model.positions);
        ensure!(seq > 0, "data.seq = 0, but a sequence has at least one token");
        ensure!(
            seq <= model.positions,
            "data.seq = {seq} is longer than the {} positions of the model; lower data.seq or raise model.positions",
            model.positions
        );
        let axes = self.resolve_parallel(ranks, &model)?;
        let (sequences, micro_batch) = self.resolve_batch(seq, axes.shard * axes.replicate)?;
        ensure!(
            (micro_batch * seq).is_multiple_of(axes.tensor),
            "parallel.tensor = {} does not divide the {micro_batch} x {seq} tokens of a micro-batch; change batch.micro_batch or \
             data.seq",
            axes.tensor
        );
        let batch_tokens = (sequences * seq) as u64;
        let steps = self.resolve_length(batch_tokens)?;
        let schedule = self.resolve_schedule(steps, batch_tokens)?;
        let optimizer = self.resolve_optimizer()?;
        self.resolve_run()?;
        let device = self.resolve_device()?;
        let keep_every = self.check_reports(batch_tokens)?;
        let validation_every = self.resolve_validation(batch_tokens)?;
        let recovery = self.resolve_recovery(schedule.warmup, batch_tokens)?;
        let loss_scale = self.resolve_loss_scale()?;
        let copies = self.resolve_copies(batch_tokens)?;
        Ok(Resolved {
            model,
            device,
            seq,
            sequences,
            micro_batch,
            axes,
            steps,
            schedule,
            optimizer,
            checkpoint_every: self.checkpoint.every.steps(batch_tokens),
            keep_every,
            copies,
            validation_every,
            recovery,
            loss_scale,
            config: self,
        })
    }

    fn resolve_model(&mut self) -> anyhow::Result<Model> {
        let m = &mut self.model;
        let mut model = match &m.preset {
            Some(name) => {
                let sizes = [
                    ("layers", m.layers),
                    ("heads", m.heads),
                    ("width", m.width),
                    ("feed_forward", m.feed_forward),
                    ("embedding_width", m.embedding_width),
                ];
                let sizes = sizes.into_iter().map(|(key, size)| (key, size.map(|s| s.to_string())));
                let given = sizes.chain([("post_norm", m.post_norm.map(|p| p.to_string()))]);
                if let Some((key, value)) = given.into_iter().find_map(|(key, value)| Some((key, value?))) {
                    bail!(
                        "model.preset = \"{name}\" and model.{key} = {value} contradict each other: a preset fixes the \
                         sizes; remove one of the two"
                    );
                }
                Model::preset(name).map_err(|e| anyhow!("model.preset = \"{name}\": {e}"))?
            }
            None => {
                let size = |key: &str, size: Option<usize>| {
                    size.ok_or_else(|| {
                        anyhow!(
                            "model.{key} is missing; give model.preset (such as \"125m\"), or model.layers, \
                             model.heads, model.width and model.vocab"
                        )
                    })
                };
                let width = size("width", m.width)?;
                Model {
                    layers: size("layers", m.layers)?,
                    heads: size("heads", m.heads)?,
                    width,
                    feed_forward: *m.feed_forward.get_or_insert(width.saturating_mul(4)),
                    embedding_width: *m.embedding_width.get_or_insert(width),
                    post_norm: *m.post_norm.get_or_insert(false),
                    own_head: false,
                    vocab: size("vocab", m.vocab)?,
                    positions: POSITIONS,
                    dropout: m.dropout,
                    attention_dropout: m.attention_dropout,
                }
            }
        };
        model.vocab = *m.vocab.get_or_insert(model.vocab);
        model.positions = *m.positions.get_or_insert(model.positions);
        (model.dropout, model.attention_dropout) = (m.dropout, m.attention_dropout);
        // Its messages begin with the name of the size.
        model.check().map_err(|e| anyhow!("model.{e}"))?;
        for (key, p) in [("dropout", model.dropout), ("attention_dropout", model.attention_dropout)] {
            ensure!(
                (p as f32) < 1.0,
                "model.{key} = {p} is 1 in single precision, and nothing would be left; OPT uses 0.1"
            );
        }
        Ok(model)
    }

    fn check_data(&self) -> anyhow::Result<()> {
        let d = &self.data;
        ensure!(!d.train.0.is_empty(), "data.train is missing; give the files or folders to train on");
        ensure!(
            d.tokenizer.is_some(),
            "data.tokenizer is missing; give a tokenizer.json or a folder that holds one"
        );
        for (name, paths) in &d.validation {
            ensure!(
                !paths.0.is_empty(),
                "data.validation.{name} is empty; give a file or a folder, or remove it"
            );
            ensure!(
                name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)),
                "data.validation.\"{name}\" is not a plain name; use letters, digits, '-', '_' and '.'"
            );
        }
        Ok(())
    }

    /// How the ranks are arranged.
    fn resolve_parallel(&self, ranks: usize, model: &Model) -> anyhow::Result<Axes> {
        let p = &self.parallel;
        ensure!(
            p.tensor > 0 && ranks.is_multiple_of(p.tensor),
            "parallel.tensor = {} does not divide the {ranks} ranks of the run; set it to one of their divisors, or start \
             another number of ranks",
            p.tensor
        );
        ensure!(
            p.pipeline > 0 && (ranks / p.tensor).is_multiple_of(p.pipeline),
            "parallel.pipeline = {} does not divide the {} ranks that parallel.tensor = {} leaves of {ranks}; set it to one of \
             their divisors, or start another number of ranks",
            p.pipeline,
            ranks / p.tensor,
            p.tensor
        );
        let left = ranks / p.tensor / p.pipeline;
        let shard = p.shard.unwrap_or(left);
        ensure!(
            shard > 0 && left.is_multiple_of(shard),
            "parallel.shard = {shard} does not divide the {left} ranks that parallel.tensor = {} and parallel.pipeline = {} \
             leave of {ranks}; remove it to share out everything among them",
            p.tensor,
            p.pipeline
        );
        // A day, far below what durations can hold.
        for (key, seconds) in [("timeout", p.timeout), ("patience", p.patience)] {
            ensure!(
                seconds > 0.0 && seconds <= 86_400.0,
                "parallel.{key} = {seconds}, but it is above 0 and at most 86400 seconds, a day"
            );
        }
        let axes = Axes { tensor: p.tensor, shard, replicate: left / shard, pipeline: p.pipeline };
        let part = Part::of_rank(axes, model.layers, 0);
        part.check(model).map_err(|error| anyhow!("[parallel] does not fit the model: {error}"))?;
        Ok(axes)
    }

    /// Sequences per step, and per pass of each of the `data_ranks`.
    fn resolve_batch(&mut self, seq: usize, data_ranks: usize) -> anyhow::Result<(usize, usize)> {
        let published = self.published().map(|p| p.batch_tokens);
        let default = published.unwrap_or(SMALL_BATCH).next_multiple_of(seq as u64);
        let tokens = self.batch.tokens.get_or_insert(Count(default)).0;
        let t = seq as u64;
        ensure!(
            tokens >= t,
            "batch.tokens = {tokens} is less than one sequence of data.seq = {seq} tokens; the least is {t}"
        );
        ensure!(
            tokens.is_multiple_of(t),
            "batch.tokens = {tokens} is not a multiple of data.seq = {seq}; the nearest are {} and {}",
            tokens / t * t,
            (tokens / t + 1).saturating_mul(t)
        );
        let sequences = usize::try_from(tokens / t)?;
        ensure!(
            sequences.is_multiple_of(data_ranks),
            "the {sequences} sequences of a step (batch.tokens = {tokens}, data.seq = {seq}) cannot be dealt to {data_ranks} \
             ranks; set batch.tokens to a multiple of {} or start another number of ranks",
            data_ranks * seq
        );
        let derived = micro_batch(sequences / data_ranks, seq);
        let micro_batch = *self.batch.micro_batch.get_or_insert(derived);
        ensure!(
            micro_batch > 0 && (sequences / data_ranks).is_multiple_of(micro_batch),
            "batch.micro_batch = {micro_batch} does not divide the {} sequences of a step (batch.tokens = \
             {tokens}, data.seq = {seq}){}; remove it, or use for example {derived}",
            sequences / data_ranks,
            if data_ranks > 1 { format!(" that each of {data_ranks} ranks has") } else { String::new() }
        );
        Ok((sequences, micro_batch))
    }

    /// Last step of the run.
    fn resolve_length(&self, batch_tokens: u64) -> anyhow::Result<u64> {
        let run = &self.run;
        if let Some(minutes) = run.max_minutes {
            // A year, far below what durations can hold.
            ensure!(
                minutes > 0.0 && minutes <= 525_600.0,
                "run.max_minutes = {minutes}, but it is above 0 and at most 525600, a year; remove it for no limit"
            );
        }
        let steps = match (run.steps, run.tokens) {
            (Some(steps), None) => steps.0,
            (None, Some(tokens)) => Span::Tokens(tokens.0).steps(batch_tokens),
            (Some(steps), Some(tokens)) => bail!(
                "run.steps = {} and run.tokens = {} both say how long to train; remove one of the two",
                steps.0,
                tokens.0
            ),
            (None, None) => bail!(
                "the length of the run is missing; give run.steps or run.tokens (run.max_minutes only limits one go)"
            ),
        };
        ensure!(steps > 0, "a run of 0 steps trains nothing; give run.steps or run.tokens above 0");
        // TOML's integers, which a configuration is written with, end there too.
        ensure!(
            i64::try_from(u128::from(steps) * u128::from(batch_tokens)).is_ok(),
            "{steps} steps of batch.tokens = {batch_tokens} are more tokens than the {} that can be counted; lower run.steps or \
             run.tokens",
            i64::MAX
        );
        Ok(steps)
    }

    /// The learning rate of a configuration without gaps, wherever it was to run.
    ///
    /// # Errors
    /// When it has gaps.
    pub(crate) fn schedule(mut self) -> anyhow::Result<Schedule> {
        let batch_tokens = self.batch.tokens.context("batch.tokens is missing")?.0;
        let steps = self.resolve_length(batch_tokens)?;
        self.resolve_schedule(steps, batch_tokens)
    }

    fn resolve_schedule(&mut self, steps: u64, batch_tokens: u64) -> anyhow::Result<Schedule> {
        let published = self.published().map(|p| p.lr);
        let peak = *self.optimizer.lr.get_or_insert(published.unwrap_or(SMALL_LR));
        ensure!(
            positive(peak),
            "optimizer.lr = {peak} is not a number above 0 in single precision, which ends at 3e38 and begins at 1e-45"
        );
        let s = &mut self.schedule;
        let name =
            format!("schedule.kind = \"{}\"", toml::Value::try_from(s.kind)?.as_str().unwrap_or_default());
        let useless = |key: &str, value: String| {
            anyhow::anyhow!(
                "{name} makes no use of schedule.{key} = {value}; remove it or choose another kind"
            )
        };
        if let (Some(decay), true) = (s.decay, s.kind != Kind::Wsd) {
            return Err(useless("decay", decay.to_string()));
        }
        if !s.kind.needs_total() {
            if let Some(total) = s.total {
                return Err(useless("total", total.to_string()));
            }
            if let Some(min_lr) = s.min_lr {
                return Err(useless("min_lr", min_lr.to_string()));
            }
        }
        let total = s.total.map_or(steps, |t| t.steps(batch_tokens));
        if s.kind.needs_total() {
            s.total = Some(Span::Steps(total));
        }
        let tenth = total / 10;
        let default = WARMUP.0.min(WARMUP.1.steps(batch_tokens)).min(tenth);
        let warmup = s.warmup.get_or_insert(Span::Steps(default)).steps(batch_tokens);
        let decay = match s.kind {
            Kind::Wsd => s.decay.get_or_insert(Span::Steps(tenth)).steps(batch_tokens),
            _ => 0,
        };
        let min_ratio = if s.kind.needs_total() { *s.min_lr.get_or_insert(0.1) } else { 0.0 };
        ensure!(
            (0.0..=1.0).contains(&min_ratio),
            "schedule.min_lr = {min_ratio} is not a share of the peak (0 to 1)"
        );
        if s.kind.needs_total() {
            ensure!(
                warmup.saturating_add(decay) <= total,
                "schedule.warmup ({warmup} steps){} is longer than the whole schedule ({total} steps); shorten it or \
                 raise schedule.total",
                if decay > 0 { format!(" with schedule.decay ({decay} steps)") } else { String::new() }
            );
        }
        Ok(Schedule { kind: s.kind, peak, warmup, decay, total, min_ratio })
    }

    fn resolve_optimizer(&mut self) -> anyhow::Result<Settings> {
        Ok(Settings {
            rule: self.resolve_rule()?,
            weight_decay: self.optimizer.weight_decay,
            decay_vectors: self.optimizer.decay_vectors,
            clip: self.optimizer.clip,
            stochastic: self.run.weights == Some(Weights::Bf16Stochastic),
            seed: self.run.seed,
        })
    }

    fn resolve_rule(&mut self) -> anyhow::Result<Rule> {
        let o = &mut self.optimizer;
        let (decay, clip) = (o.weight_decay, o.clip);
        ensure!(
            decay >= 0.0 && (decay as f32).is_finite(),
            "optimizer.weight_decay = {decay}, but it is 0 or more, and finite in single precision; OPT uses 0.1"
        );
        ensure!(
            clip == 0.0 || positive(clip),
            "optimizer.clip = {clip}, but it is 0 (no clipping), or above 0 and finite in single precision; OPT uses 1"
        );
        match o.kind {
            OptimizerKind::Adamw => {
                if let Some(momentum) = o.momentum {
                    bail!(
                        "optimizer.kind = \"adamw\" and optimizer.momentum = {momentum} contradict each other; use \
                         optimizer.betas, or kind = \"sgd\""
                    );
                }
                let betas = *o.betas.get_or_insert([0.9, 0.95]);
                let eps = *o.eps.get_or_insert(1e-8);
                for beta in betas {
                    ensure!(
                        share(beta),
                        "optimizer.betas = {betas:?}, but each is in [0, 1), also in single precision; OPT uses [0.9, 0.95]"
                    );
                }
                ensure!(
                    positive(eps),
                    "optimizer.eps = {eps}, but it is above 0 and finite in single precision; OPT uses 1e-8"
                );
                Ok(Rule::AdamW { betas, eps })
            }
            OptimizerKind::Sgd => {
                let adamw_only =
                    [("betas", o.betas.map(|b| format!("{b:?}"))), ("eps", o.eps.map(|e| e.to_string()))];
                if let Some((key, value)) = adamw_only.into_iter().find_map(|(k, v)| Some((k, v?))) {
                    bail!(
                        "optimizer.kind = \"sgd\" and optimizer.{key} = {value} contradict each other; remove \
                         optimizer.{key}, or use kind = \"adamw\""
                    );
                }
                let momentum = *o.momentum.get_or_insert(0.0);
                ensure!(
                    share(momentum),
                    "optimizer.momentum = {momentum}, but it is in [0, 1), also in single precision"
                );
                Ok(Rule::Sgd { momentum })
            }
        }
    }

    fn resolve_device(&self) -> anyhow::Result<Which> {
        let device = self.run.device.parse().map_err(|e| anyhow!("run.device = {e}"))?;
        let offload = self.run.offload;
        ensure!(
            device != Which::Cpu || offload == Offload::None,
            "run.offload = {} and run.device = \"cpu\" contradict each other: a processor's memory is the host's, so there is \
             nothing to move; remove run.offload, or use run.device = \"cuda\"",
            toml::Value::try_from(offload)?
        );
        Ok(device)
    }

    fn resolve_run(&mut self) -> anyhow::Result<()> {
        let run = &mut self.run;
        ensure!(
            !run.dir.as_os_str().is_empty(),
            "run.dir is missing; give the folder for checkpoints and metrics"
        );
        if let Some(threads) = run.threads {
            ensure!(
                (1..=MOST_THREADS).contains(&threads),
                "run.threads = {threads}, but it is from 1 to {MOST_THREADS}; remove it for all that are available"
            );
        }
        match (run.precision, run.weights) {
            (Precision::F32, Some(weights)) => bail!(
                "run.precision = \"f32\" and run.weights = {} contradict each other: f32 weights are their own masters; \
                 remove run.weights, or use precision = \"bf16\"",
                toml::Value::try_from(weights)?
            ),
            (Precision::F32, None) => {}
            (Precision::F16, Some(Weights::Bf16Stochastic)) => bail!(
                "run.precision = \"f16\" and run.weights = \"bf16-stochastic\" contradict each other: f16 weights have masters; \
                 remove run.weights, or use precision = \"bf16\""
            ),
            (_, weights) => run.weights = Some(weights.unwrap_or(Weights::Split)),
        }
        if self.data.cache.is_none() {
            let parent = run.dir.parent().unwrap_or(Path::new(""));
            self.data.cache = Some(parent.join("data-cache"));
        }
        Ok(())
    }

    /// Intervals; returns that of the checkpoints that stay.
    fn check_reports(&self, batch_tokens: u64) -> anyhow::Result<Option<u64>> {
        let c = &self.checkpoint;
        let every = c.every.steps(batch_tokens);
        let keep_every = c.keep_every.map(|k| k.steps(batch_tokens));
        ensure!(c.keep_last > 0, "checkpoint.keep_last = 0 would keep none to resume from; use 1 or more");
        let mirror_keep_every = c.mirror_keep_every.map(|k| k.steps(batch_tokens));
        for (name, steps) in [
            ("checkpoint.every", Some(every)),
            ("checkpoint.keep_every", keep_every),
            ("checkpoint.mirror_keep_every", mirror_keep_every),
            ("log.every", Some(self.log.every)),
        ] {
            ensure!(steps != Some(0), "{name} is 0 steps; use 1 or more");
        }
        for (name, keep) in [("keep_every", keep_every), ("mirror_keep_every", mirror_keep_every)] {
            let keep = keep.unwrap_or(every);
            ensure!(
                keep.is_multiple_of(every),
                "checkpoint.{name} = {keep} steps is not a multiple of checkpoint.every = {every} steps, so most of \
                 those would never be written; use for example {}",
                keep.next_multiple_of(every)
            );
        }
        let watts = self.energy.watts;
        ensure!(
            watts > 0.0 && watts.is_finite(),
            "energy.watts = {watts}, but it is above 0; remove it for {DEFAULT_WATTS_PER_CORE} W"
        );
        Ok(keep_every)
    }

    /// Steps between validations, if there is something to score.
    fn resolve_validation(&mut self, batch_tokens: u64) -> anyhow::Result<Option<u64>> {
        let v = &mut self.validation;
        if self.data.validation.is_empty() {
            let given = [
                ("every", v.every.map(|every| every.to_string())),
                ("max_tokens", v.max_tokens.map(|most| most.to_string())),
            ];
            if let Some((key, value)) = given.into_iter().find_map(|(key, value)| Some((key, value?))) {
                bail!(
                    "validation.{key} = {value}, but without data.validation there is nothing to score; name a held-out set, \
                     for example data.validation.held-out = \"valid.txt\", or remove validation.{key}"
                );
            }
            return Ok(None);
        }
        let every = v.every.get_or_insert(VALIDATION).steps(batch_tokens);
        ensure!(every > 0, "validation.every is 0 steps; use 1 or more");
        ensure!(
            v.max_tokens != Some(Count(0)),
            "validation.max_tokens = 0 scores nothing; remove it for all tokens, or remove data.validation"
        );
        Ok(Some(every))
    }

    fn resolve_recovery(&self, warmup: u64, batch_tokens: u64) -> anyhow::Result<Policy> {
        let r = &self.recovery;
        ensure!(
            (16..=65_536).contains(&r.window),
            "recovery.window = {}, but a recent level takes 16 to 65536 steps; use for example 128",
            r.window
        );
        for (key, value) in [("loss_threshold", r.loss_threshold), ("norm_threshold", r.norm_threshold)] {
            ensure!(
                value == 0.0 || (value >= 3.0 && value.is_finite()),
                "recovery.{key} = {value}, but it is 3 standard deviations or more, or 0 for no such check; below 3, \
                 ordinary steps would be skipped"
            );
        }
        for (key, value) in [("lr_factor", r.lr_factor), ("clip_factor", r.clip_factor)] {
            ensure!(
                value > 0.0 && value <= 1.0,
                "recovery.{key} = {value}, but it is above 0 and at most 1, which changes nothing"
            );
        }
        ensure!(
            r.clip_factor == 1.0 || self.optimizer.clip > 0.0,
            "recovery.clip_factor = {} and optimizer.clip = 0 contradict each other: there is no clip to be multiplied; remove \
             recovery.clip_factor, or use optimizer.clip = 1",
            r.clip_factor
        );
        let cooldown = r.cooldown.map(|span| span.steps(batch_tokens));
        ensure!(cooldown != Some(0), "recovery.cooldown is 0 steps; remove it for the rest of the run");
        if let Some(cooldown) = r.cooldown {
            ensure!(
                (r.lr_factor, r.clip_factor) != (1.0, 1.0),
                "recovery.cooldown = {cooldown}, but recovery.lr_factor = 1 and recovery.clip_factor = 1 change nothing that \
                 could end then; remove recovery.cooldown, or lower a factor"
            );
        }
        Ok(Policy {
            enabled: r.enabled,
            window: r.window as usize,
            loss_threshold: r.loss_threshold,
            norm_threshold: r.norm_threshold,
            max_skips: r.max_skips,
            max_rollbacks: r.max_rollbacks,
            margin: r.margin,
            lr_factor: r.lr_factor,
            clip_factor: r.clip_factor,
            cooldown,
            warmup,
            clip: self.optimizer.clip,
        })
    }

    fn resolve_loss_scale(&mut self) -> anyhow::Result<Option<loss_scale::Policy>> {
        let (precision, s) = (self.run.precision, &mut self.loss_scale);
        if precision != Precision::F16 {
            let given = [
                ("initial", s.initial.map(|x| x.to_string())),
                ("window", s.window.map(|x| x.to_string())),
                ("floor", s.floor.map(|x| x.to_string())),
            ];
            if let Some((key, value)) = given.into_iter().find_map(|(key, value)| Some((key, value?))) {
                bail!(
                    "loss_scale.{key} = {value} and run.precision = \"{}\" contradict each other: only f16 needs a factor on \
                     the loss; remove loss_scale.{key}, or use precision = \"f16\"",
                    precision.name()
                );
            }
            return Ok(None);
        }
        let policy = loss_scale::Policy {
            initial: *s.initial.get_or_insert(65536.0),
            window: *s.window.get_or_insert(1000),
            floor: *s.floor.get_or_insert(1.0),
        };
        for (key, value) in [("initial", policy.initial), ("floor", policy.floor)] {
            let exponent = value.log2();
            ensure!(
                exponent.fract() == 0.0 && (-24.0..=24.0).contains(&exponent),
                "loss_scale.{key} = {value}, but it is a power of two from 2^-24 to 2^24, for example 65536"
            );
        }
        ensure!(
            policy.floor <= policy.initial,
            "loss_scale.floor = {} is above loss_scale.initial = {}; lower it",
            policy.floor,
            policy.initial
        );
        ensure!(policy.window > 0, "loss_scale.window = 0, but it is 1 step or more; 1000 unless given");
        Ok(Some(policy))
    }

    /// The mirror of the checkpoints.
    fn resolve_copies(&self, batch_tokens: u64) -> anyhow::Result<Option<Copies>> {
        let c = &self.checkpoint;
        let Some(url) = &c.mirror else {
            for (name, given) in
                [("last", c.mirror_keep_last.is_some()), ("every", c.mirror_keep_every.is_some())]
            {
                ensure!(
                    !given,
                    "checkpoint.mirror_keep_{name} is set, but checkpoint.mirror is not; set that too, or remove this"
                );
            }
            return Ok(None);
        };
        mirror::check(url).context("checkpoint.mirror")?;
        let keep_last = c.mirror_keep_last.unwrap_or(c.keep_last);
        ensure!(
            keep_last > 0,
            "checkpoint.mirror_keep_last = 0 would keep none to resume from; use 1 or more"
        );
        let keep_every = c.mirror_keep_every.or(c.keep_every).map(|keep| keep.steps(batch_tokens));
        Ok(Some(Copies { url: url.clone(), retention: Retention { keep_last, keep_every } }))
    }

    fn published(&self) -> Option<Published> {
        published(self.model.preset.as_deref()?)
    }
}

#[cfg(test)]
mod tests;
