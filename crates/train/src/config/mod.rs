//! The typed configuration of `ferropt train`, in TOML.
//!
//! [`Config`] is what the user writes; everything has a default (OPT's own, where it has one) except the data and the
//! length of the run. [`Config::resolve`] refuses what is contradictory, fills every default in and works out what
//! follows from it. A resolved configuration, written out, resolves to itself.

mod keys;
mod resolve;
mod span;

pub(crate) use resolve::micro_batch;
pub use resolve::{Published, Resolved, published};
pub use span::{Count, Span};

use crate::hub;
use crate::schedule;
use crate::telemetry::DEFAULT_WATTS_PER_CORE;
use anyhow::{Context, ensure};
use ferropt_model::Offload;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A training configuration: the sections of the file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// `[model]`
    pub model: ModelSection,
    /// `[data]`
    pub data: DataSection,
    /// `[batch]`
    pub batch: BatchSection,
    /// `[optimizer]`
    pub optimizer: OptimizerSection,
    /// `[schedule]`
    pub schedule: ScheduleSection,
    /// `[run]`
    pub run: RunSection,
    /// `[parallel]`
    pub parallel: ParallelSection,
    /// `[checkpoint]`
    pub checkpoint: CheckpointSection,
    /// `[recovery]`
    pub recovery: RecoverySection,
    /// `[loss_scale]`
    #[serde(skip_serializing_if = "LossScaleSection::says_nothing")]
    pub loss_scale: LossScaleSection,
    /// `[validation]`
    pub validation: ValidationSection,
    /// `[log]`
    pub log: LogSection,
    /// `[energy]`
    pub energy: EnergySection,
}

/// Declares a section: every key with its type and, after `=`, its default.
macro_rules! section {
    ($(#[$doc:meta])* $name:ident { $($(#[$key_doc:meta])* $key:ident: $type:ty = $default:expr,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $($(#[$key_doc])* #[serde(skip_serializing_if = "Absent::absent")] pub $key: $type,)*
        }
        impl Default for $name {
            fn default() -> Self {
                $name { $($key: $default,)* }
            }
        }
    };
}

section! {
    /// Which model. Either `preset`, or the sizes.
    ModelSection {
        /// Name of a preset: "125m" to "175b", or one of the small ones (`ferropt presets`).
        preset: Option<String> = None,
        /// L, number of layers.
        layers: Option<usize> = None,
        /// H, attention heads; C must be a multiple of it.
        heads: Option<usize> = None,
        /// C, model width.
        width: Option<usize> = None,
        /// F, feed-forward width; 4C unless given.
        feed_forward: Option<usize> = None,
        /// Width of the embeddings if not C (350m: 512), joined by two projections.
        embedding_width: Option<usize> = None,
        /// Layer norm after each block instead of before it, and none at the end (350m).
        post_norm: Option<bool> = None,
        /// V, vocabulary; at least the tokenizer's. May accompany a preset.
        vocab: Option<usize> = None,
        /// Longest sequence the model knows positions for. May accompany a preset.
        positions: Option<usize> = None,
        /// Dropout after attention and feed-forward. OPT: 0.1.
        dropout: f64 = 0.1,
        /// Dropout on attention probabilities. OPT: 0.1.
        attention_dropout: f64 = 0.1,
    }
}

section! {
    /// What to read.
    DataSection {
        /// Files (.txt, .jsonl, and those in .zst, .gz, .xz) or folders of them.
        train: Paths = Paths::default(),
        /// Held-out sets by name, each a path or a list of paths.
        validation: BTreeMap<String, Paths> = BTreeMap::new(),
        /// Tokenizer: a tokenizer.json, a folder with it or with GPT-2's vocab.json and merges.txt, or the name of a downloaded model.
        tokenizer: Option<PathBuf> = None,
        /// Field of a JSON line that holds the text.
        text_field: String = "text".into(),
        /// Folder for tokenised data; `data-cache` beside the run folder unless given. May be shared by runs.
        cache: Option<PathBuf> = None,
        /// T, tokens per sequence; the model's positions unless given.
        seq: Option<usize> = None,
        /// Tokens do not see documents before their own in the same sequence.
        stop_attention_at_document_ends: bool = false,
    }
}

impl DataSection {
    /// Files and folders that are named and not there, with their keys.
    pub fn missing(&self) -> Vec<(String, &Path)> {
        let sets = self.validation.iter().map(|(name, paths)| (format!("data.validation.{name}"), paths));
        let texts = [("data.train".to_string(), &self.train)].into_iter().chain(sets);
        let texts = texts.flat_map(|(key, paths)| paths.0.iter().map(move |path| (key.clone(), path)));
        let texts = texts.filter(|(_, path)| !path.exists());
        let tokenizer = self.tokenizer.iter().map(|path| ("data.tokenizer".to_string(), path));
        let tokenizer = tokenizer.filter(|(_, path)| !hub::resolve(path).is_ok_and(|path| path.exists()));
        texts.chain(tokenizer).map(|(key, path)| (key, path.as_path())).collect()
    }
}

section! {
    /// How much per step.
    BatchSection {
        /// Tokens per optimiser step; OPT's batch for the preset unless given.
        tokens: Option<Count> = None,
        /// Sequences per forward and backward pass; derived unless given.
        micro_batch: Option<usize> = None,
    }
}

section! {
    /// How to descend.
    OptimizerSection {
        /// "adamw" or "sgd".
        kind: OptimizerKind = OptimizerKind::Adamw,
        /// Peak learning rate; OPT's for the preset unless given.
        lr: Option<f64> = None,
        /// Decays of the two moments (adamw).
        betas: Option<[f64; 2]> = None,
        /// Added to the root of the second moment (adamw).
        eps: Option<f64> = None,
        /// Weight decay: decoupled for adamw, L2 for sgd.
        weight_decay: f64 = 0.1,
        /// Whether biases and layer norms decay too, as in metaseq.
        decay_vectors: bool = true,
        /// Momentum (sgd).
        momentum: Option<f64> = None,
        /// Largest gradient norm; 0 for no clipping.
        clip: f64 = 1.0,
    }
}

section! {
    /// How the learning rate moves. Lengths are steps (2000) or tokens ("375M tokens").
    ScheduleSection {
        /// "linear", "cosine", "inverse-sqrt", "constant" or "wsd".
        kind: schedule::Kind = schedule::Kind::Linear,
        /// Linear warm-up; OPT's (2000 steps, at most 375M tokens) but at most a tenth of the total unless given.
        warmup: Option<Span> = None,
        /// Decay at the end (wsd); a tenth of the total unless given.
        decay: Option<Span> = None,
        /// Where the minimum is reached; the end of the run unless given.
        total: Option<Span> = None,
        /// Minimum as a share of the peak (linear, cosine, wsd); 0.1 unless given.
        min_lr: Option<f64> = None,
    }
}

section! {
    /// One run: where, how long, how.
    RunSection {
        /// Folder of checkpoints, metrics and the resolved configuration.
        dir: PathBuf = PathBuf::new(),
        /// Length in optimiser steps; or give `tokens`.
        steps: Option<Count> = None,
        /// Length in tokens, rounded up to whole steps.
        tokens: Option<Count> = None,
        /// Stop (with a checkpoint) after this much time in one go.
        max_minutes: Option<f64> = None,
        /// Seed of everything random.
        seed: u64 = 1,
        /// Compute type: "f32", "bf16" or "f16".
        precision: Precision = Precision::Bf16,
        /// Master weights of bf16 and f16: "split" (f32 masters) or "bf16-stochastic" (no masters, stochastic rounding).
        weights: Option<Weights> = None,
        /// Activations to compute again in the backward pass: "none", "selective" or "full". Same bits, less memory.
        recompute: Recompute = Recompute::None,
        /// Threads; all available unless given. Same bits for any number.
        threads: Option<usize> = None,
        /// Whether a run that takes more memory than there is now is refused.
        check_memory: bool = true,
        /// What computes: "cpu", "cuda" or "cuda:N".
        device: String = "cpu".into(),
        /// What a GPU keeps in the host's memory: "none", "optimizer" (moments and low halves) or "all" (weights and gradients
        /// too). Same bits, less memory of the GPU.
        offload: Offload = Offload::None,
    }
}

section! {
    /// How the ranks of a run share out its work. What is computed does not depend on it, but for rounding.
    ParallelSection {
        /// Ranks that divide the matrices of every layer, and the rows between them: tensor and sequence parallelism.
        tensor: usize = 1,
        /// Ranks that share out weights, gradients and the optimiser's state (FSDP); all that are left unless given. With
        /// fewer, there are several replicas; with 1, every rank has all of it.
        shard: Option<usize> = None,
        /// Stages that divide the layers.
        pipeline: usize = 1,
        /// Seconds without a word from another rank after which the run ends, to be started again.
        timeout: f64 = 120.0,
        /// Seconds that a rank which lives may be waited for, until it is taken to be stuck, and the run ends likewise.
        patience: f64 = 1800.0,
    }
}

section! {
    /// What to save.
    CheckpointSection {
        /// How often.
        every: Span = Span::Steps(500),
        /// How many of the latest to keep.
        keep_last: usize = 3,
        /// Keep those at multiples of this for ever.
        keep_every: Option<Span> = None,
        /// Object store to copy every checkpoint to: "s3://BUCKET/PATH", "gs://...", "az://..." or "file:///FOLDER".
        mirror: Option<String> = None,
        /// As `keep_last`, of the copies; as many unless given.
        mirror_keep_last: Option<usize> = None,
        /// As `keep_every`, of the copies; the same unless given.
        mirror_keep_every: Option<Span> = None,
    }
}

section! {
    /// What to do when training goes wrong.
    RecoverySection {
        /// Whether anything is done. If not, the first loss or gradient that is not finite ends the run.
        enabled: bool = true,
        /// Steps that make up the recent level of loss and gradient norm.
        window: u64 = 128,
        /// Robust standard deviations above the recent loss at which a step is skipped; 0 for never.
        loss_threshold: f64 = 10.0,
        /// The same for the gradient norm.
        norm_threshold: f64 = 10.0,
        /// Steps that may be skipped within `window` steps; one more rolls the run back.
        max_skips: usize = 3,
        /// Roll-backs before the run gives up; 0 for giving up instead.
        max_rollbacks: usize = 3,
        /// Steps before the first one that was skipped which a roll-back mistrusts too.
        margin: u64 = 10,
        /// Factor on the learning rate for each roll-back.
        lr_factor: f64 = 0.8,
        /// Factor on `optimizer.clip` for each roll-back.
        clip_factor: f64 = 1.0,
        /// How long the factors last, from the trouble on; for the rest of the run unless given.
        cooldown: Option<Span> = None,
    }
}

section! {
    /// What the loss is multiplied by in f16, so that gradients are neither too small nor too large for it.
    LossScaleSection {
        /// Factor of the first step, a power of two; 65536 with f16 unless given.
        initial: Option<f64> = None,
        /// Steps without an overflow after which the factor doubles; 1000 with f16 unless given.
        window: Option<u64> = None,
        /// Smallest factor, a power of two; a gradient that is not finite there is one for `[recovery]`. 1 with f16 unless given.
        floor: Option<f64> = None,
    }
}

impl LossScaleSection {
    /// As for runs that are not in f16, whose written configurations have no such section.
    fn says_nothing(&self) -> bool {
        *self == LossScaleSection::default()
    }
}

section! {
    /// Validation on the sets of `data.validation`.
    ValidationSection {
        /// How often; also at the end of the run. 250 steps with held-out sets unless given.
        every: Option<Span> = None,
        /// Tokens per set at most; all unless given.
        max_tokens: Option<Count> = None,
    }
}

section! {
    /// What to report.
    LogSection {
        /// Steps between lines of metrics.jsonl and TensorBoard points.
        every: u64 = 1,
        /// Steps of each start in which every rank's computing and communication are traced, to trace.json.
        trace: u64 = 0,
    }
}

section! {
    /// Energy accounting.
    EnergySection {
        /// Power of a busy core in watts, for an estimate where no counter can be read.
        watts: f64 = DEFAULT_WATTS_PER_CORE,
    }
}

/// One path or a list of paths.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrMany")]
pub struct Paths(pub Vec<PathBuf>);

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
enum OneOrMany {
    One(PathBuf),
    Many(Vec<PathBuf>),
}

impl From<OneOrMany> for Paths {
    fn from(paths: OneOrMany) -> Self {
        match paths {
            OneOrMany::One(path) => Paths(vec![path]),
            OneOrMany::Many(paths) => Paths(paths),
        }
    }
}

/// `optimizer.kind`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (Loshchilov and Hutter, 2019).
    Adamw,
    /// Gradient descent, with momentum if wanted.
    Sgd,
}

/// `run.precision`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// IEEE single.
    F32,
    /// bfloat16 matrices and activations, everything else f32.
    Bf16,
    /// The same with IEEE's halves, whose gradients need a factor on the loss: [`LossScaleSection`].
    F16,
}

impl Precision {
    /// Name, as it is written in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
        }
    }
}

/// `run.weights`, for bf16 and f16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weights {
    /// Weights of 16 bits and the low half of an f32 master.
    Split,
    /// bf16 weights alone, updated with stochastic rounding.
    Bf16Stochastic,
}

/// `run.recompute`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Keep every activation.
    None,
    /// Compute what is cheap again: layer norms and attention.
    Selective,
    /// Keep one row per layer and token.
    Full,
}

impl From<Recompute> for ferropt_model::Recompute {
    fn from(recompute: Recompute) -> Self {
        match recompute {
            Recompute::None => ferropt_model::Recompute::None,
            Recompute::Selective => ferropt_model::Recompute::Selective,
            Recompute::Full => ferropt_model::Recompute::Full,
        }
    }
}

/// Values that are left out when a configuration is written.
trait Absent {
    fn absent(&self) -> bool {
        false
    }
}
impl<T> Absent for Option<T> {
    fn absent(&self) -> bool {
        self.is_none()
    }
}
impl Absent for BTreeMap<String, Paths> {
    fn absent(&self) -> bool {
        self.is_empty()
    }
}
macro_rules! always_written {
    ($($type:ty)*) => { $(impl Absent for $type {})* };
}
always_written!(bool u64 usize f64 String PathBuf Paths Span OptimizerKind schedule::Kind Precision Recompute Offload);

impl Config {
    /// Reads a configuration file and applies `--set` overrides, each `section.key=value`. The value is TOML; what is
    /// not TOML, or is to be text, is a string; nothing at all removes the key.
    ///
    /// # Errors
    /// Names the file or the override, every unknown key and the nearest valid one, or the key whose type is wrong.
    pub fn load(file: &Path, overrides: &[String]) -> anyhow::Result<Config> {
        let text = std::fs::read_to_string(file)
            .with_context(|| format!("cannot read the configuration {}", file.display()))?;
        Config::parse(&text, overrides)
            .with_context(|| format!("the configuration {} is wrong", file.display()))
    }

    /// [`Config::load`] from text.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn parse(text: &str, overrides: &[String]) -> anyhow::Result<Config> {
        let mut table: toml::Table = toml::from_str(text).context("not valid TOML")?;
        for item in overrides {
            apply(&mut table, item).with_context(|| format!("--set {item}"))?;
        }
        keys::check(&table)?;
        Ok(table.try_into()?)
    }

    /// The configuration as TOML.
    ///
    /// # Errors
    /// When a path is not Unicode.
    pub fn to_toml(&self) -> anyhow::Result<String> {
        toml::to_string(self).context("cannot write the configuration as TOML")
    }
}

/// Applies one `section.key=value`.
fn apply(table: &mut toml::Table, item: &str) -> anyhow::Result<()> {
    let (name, value) = item.split_once('=').context("expected key=value, for example optimizer.lr=3e-4")?;
    let (name, value) = (name.trim(), value.trim());
    let (path, key) = name.rsplit_once('.').with_context(|| {
        format!("`{name}` names no section; expected section.key=value, for example optimizer.lr=3e-4")
    })?;
    let mut inner = table;
    for section in path.split('.') {
        inner = inner
            .entry(section)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .with_context(|| format!("`{section}` in `{name}` is a value, not a section"))?;
    }
    if value.is_empty() {
        inner.remove(key);
        return Ok(());
    }
    inner.insert(key.into(), typed(path, key, value)?);
    Ok(())
}

/// What an override's value is: TOML if it is that and the key takes it, else text.
fn typed(path: &str, key: &str, value: &str) -> anyhow::Result<toml::Value> {
    let text = toml::Value::String(value.into());
    // More than one key is no value, but lines behind one.
    let parsed =
        toml::from_str::<toml::Table>(&format!("value = {value}")).ok().filter(|table| table.len() == 1);
    let Some(parsed) = parsed.and_then(|mut table| table.remove("value")) else {
        // Those that TOML has are parsed.
        ensure!(
            value.parse::<i128>().is_err() || takes(path, key, text.clone()),
            "{value} is beyond the integers of TOML, which are from {} to {}",
            i64::MIN,
            i64::MAX
        );
        return Ok(text);
    };
    // Such as a folder that is named by a number.
    let wants_text = !takes(path, key, parsed.clone()) && takes(path, key, text.clone());
    Ok(if wants_text { text } else { parsed })
}

/// Whether `path.key` may be `value`.
fn takes(path: &str, key: &str, value: toml::Value) -> bool {
    let leaf = toml::Table::from_iter([(key.to_string(), value)]);
    let nest =
        |inner, section: &str| toml::Table::from_iter([(section.to_string(), toml::Value::Table(inner))]);
    path.rsplit('.').fold(leaf, nest).try_into::<Config>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_are_toml_then_text_and_nothing_removes() {
        let set = |items: &[&str]| {
            let items: Vec<String> = items.iter().map(|s| s.to_string()).collect();
            Config::parse("[run]\nsteps = 5\n[data]\ntrain = 'a.txt'", &items)
        };
        let c =
            set(&["optimizer.lr=3e-4", "run.dir=runs/x", "data.validation.b=[\"p\", \"q\"]", "run.steps="])
                .unwrap();
        assert_eq!(c.optimizer.lr, Some(3e-4));
        assert_eq!(c.run.dir, PathBuf::from("runs/x"));
        assert_eq!(c.data.validation["b"], Paths(vec!["p".into(), "q".into()]));
        assert_eq!(c.run.steps, None);
        let c =
            set(&["run.dir=2024", "data.train=1e3", "data.text_field=2024-01-01", "run.steps=1e3"]).unwrap();
        assert_eq!((c.run.dir, c.data.train), (PathBuf::from("2024"), Paths(vec!["1e3".into()])));
        assert_eq!((&*c.data.text_field, c.run.steps), ("2024-01-01", Some(Count(1000))));
        let c =
            set(&["data.validation.b=7", "run.seed=9223372036854775807", "data.text_field='\\n'"]).unwrap();
        assert_eq!(c.data.validation["b"], Paths(vec!["7".into()]));
        assert_eq!((c.run.seed, &*c.data.text_field), (i64::MAX as u64, "\\n"));
        let c = set(&["schedule.warmup=375M tokens", "batch.tokens=0.5M", "data.train=b.txt"]).unwrap();
        assert_eq!(c.schedule.warmup, Some(Span::Tokens(375_000_000)));
        assert_eq!(c.batch.tokens, Some(Count(500_000)));
        assert_eq!(c.data.train, Paths(vec!["b.txt".into()]));
        for (wrong, name) in [
            ("lr=1", "section"),
            ("run.stps=1", "run.steps"),
            ("run.steps.x=1", "not a section"),
            ("x", "key=value"),
            ("run.seed=18446744073709551615", "9223372036854775807"),
            ("run.steps=3\nseed=4", "seed=4"),
            ("run.steps=1e-1", "0.1"),
        ] {
            let e = format!("{:#}", set(&[wrong]).unwrap_err());
            assert!(e.contains(name), "{wrong}: {e}");
        }
    }

    #[test]
    fn types_are_checked_with_the_name_of_the_key() {
        for (text, name) in [
            ("[optimizer]\nlr = 'fast'", "lr"),
            ("[optimizer]\nkind = 'adam'", "adamw"),
            ("[run]\nsteps = -1", "steps"),
            ("[schedule]\nwarmup = 'soon'", "375M tokens"),
        ] {
            let e = format!("{:#}", Config::parse(text, &[]).unwrap_err());
            assert!(e.contains(name), "{text}: {e}");
        }
    }

    #[test]
    fn the_default_configuration_survives_writing() {
        let text = Config::default().to_toml().unwrap();
        assert_eq!(Config::parse(&text, &[]).unwrap(), Config::default());
    }
}
