//! Texts from a trained model: opens a run or a checkpoint and continues prompts.

use crate::checkpoint::{Checkpoint, Store};
use crate::config::Precision;
use crate::stacked;
use crate::trainer::open_device;
use anyhow::{Context, Error, Result, ensure};
use ferropt_data::{EOS, Tokenizer};
use ferropt_device::cpu::CpuDevice;
use ferropt_device::{Element, bf16};
use ferropt_model::{Config, Model, Parameter, Sampler, Session, initial_values};
use serde::Deserialize;
use std::borrow::Cow;
use std::path::Path;
use std::time::{Duration, Instant};

/// A model that is ready to generate.
///
/// ```no_run
/// # fn main() -> anyhow::Result<()> {
/// use ferropt_model::{Choice, Sampler};
/// use ferropt_train::inference::Inference;
/// let model = Inference::open("runs/first", None, None)?;
/// let sampler = Sampler::new(Choice::Greedy, 1)?;
/// let completion = model.generate("Once upon", 50, &sampler, &mut |text| Ok(print!("{text}")))?;
/// println!("\n{} tokens", completion.tokens.len());
/// # Ok(()) }
/// ```
pub struct Inference {
    device: CpuDevice,
    tokenizer: Tokenizer,
    model: Weights,
    step: u64,
    damaged: Vec<Error>,
}

/// The compute type is known only when a checkpoint is opened.
enum Weights {
    F32(Model<CpuDevice, f32>),
    Bf16(Model<CpuDevice, bf16>),
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The model closed the document with `</s>`.
    EndOfText,
    /// As many tokens as were asked for.
    MaxTokens,
    /// The model knows no position for another token.
    Positions,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// The text, without the prompt.
    pub text: String,
    /// Its tokens, without the `</s>` that may have ended it.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt, its leading `</s>` included.
    pub prompt_tokens: usize,
    /// Why it ended.
    pub finish: Finish,
    /// Time for the prompt.
    pub prompt_time: Duration,
    /// Time for what follows it.
    pub time: Duration,
}

impl Finish {
    /// Name for programs.
    pub fn name(self) -> &'static str {
        match self {
            Finish::EndOfText => "end-of-text",
            Finish::MaxTokens => "max-tokens",
            Finish::Positions => "positions",
        }
    }
}

impl Completion {
    /// Tokens per second behind the prompt; 0 if there are none.
    pub fn tokens_per_second(&self) -> f64 {
        if self.tokens.is_empty() {
            0.0
        } else {
            self.tokens.len() as f64 / self.time.as_secs_f64().max(1e-9)
        }
    }
}

impl Inference {
    /// Opens the checkpoint of step `checkpoint` of a run folder, or its newest whole one; or the one checkpoint
    /// that `path` is itself.
    ///
    /// # Errors
    /// When there is no checkpoint, or it is damaged or of no OPT; the message names the file.
    pub fn open(
        path: impl AsRef<Path>,
        checkpoint: Option<u64>,
        threads: Option<usize>,
    ) -> Result<Inference> {
        let (checkpoint, damaged) = find(path.as_ref(), checkpoint)?;
        let load = || -> Result<Inference> {
            let run = &checkpoint.manifest().run;
            let config: Config =
                serde_json::from_value(run.model.clone()).context("its model is not an OPT")?;
            config.check()?;
            let precision = Precision::deserialize(&run.config["run"]["precision"])
                .context("its run configuration has no valid run.precision")?;
            checkpoint.file("tokenizer.json")?;
            let tokenizer = Tokenizer::load(&checkpoint.path().join("tokenizer.json"))?;
            let values = |_, parameter: &Parameter| stacked::read(&checkpoint, "model", parameter);
            Inference::new(&config, tokenizer, precision, threads, values)
        };
        let loaded =
            load().with_context(|| format!("cannot use the checkpoint {}", checkpoint.path().display()))?;
        Ok(Inference { step: checkpoint.manifest().run.step, damaged, ..loaded })
    }

    /// The model that a run with this seed begins with, before its first step.
    ///
    /// # Errors
    /// When the sizes make no model, or memory is short.
    pub fn untrained(
        config: &Config,
        tokenizer: Tokenizer,
        precision: Precision,
        threads: Option<usize>,
        seed: u64,
    ) -> Result<Inference> {
        let values = |index, parameter: &Parameter| Ok(initial_values(parameter, index, seed).into());
        Inference::new(config, tokenizer, precision, threads, values)
    }

    fn new<'v>(
        config: &Config,
        tokenizer: Tokenizer,
        precision: Precision,
        threads: Option<usize>,
        values: impl Fn(usize, &Parameter) -> Result<Cow<'v, [f32]>>,
    ) -> Result<Inference> {
        let device = open_device(threads)?;
        let model = match precision {
            Precision::F32 => Weights::F32(filled(&device, config, values)?),
            Precision::Bf16 => Weights::Bf16(filled(&device, config, values)?),
        };
        Ok(Inference { device, tokenizer, model, step: 0, damaged: Vec::new() })
    }

    /// Optimiser steps that the model has behind it.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Newer checkpoints that were passed over because they are damaged, each with what is wrong.
    pub fn damaged(&self) -> &[Error] {
        &self.damaged
    }

    /// Continues `prompt` by at most `max_tokens` tokens and hands text to `on_text` as it is made, in whole characters.
    ///
    /// # Errors
    /// When the prompt is longer than the model's positions, or `on_text` fails.
    pub fn generate(
        &self,
        prompt: &str,
        max_tokens: usize,
        sampler: &Sampler,
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Completion> {
        match &self.model {
            Weights::F32(model) => self.go_on(model, prompt, max_tokens, sampler, on_text),
            Weights::Bf16(model) => self.go_on(model, prompt, max_tokens, sampler, on_text),
        }
    }

    fn go_on<E: Element>(
        &self,
        model: &Model<CpuDevice, E>,
        prompt: &str,
        max_tokens: usize,
        sampler: &Sampler,
        on_text: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Completion> {
        let prompt = self.tokenizer.encode_prompt(prompt)?;
        let positions = model.config().positions;
        ensure!(
            prompt.len() <= positions,
            "the prompt has {} tokens, counting the </s> in front, but the model has {positions} positions; shorten it",
            prompt.len()
        );
        // The last token needs no position: nothing is computed from it.
        let room = positions - prompt.len() + 1;
        let (limit, full) =
            if max_tokens <= room { (max_tokens, Finish::MaxTokens) } else { (room, Finish::Positions) };
        let started = Instant::now();
        let mut session = Session::new(&self.device, model, (prompt.len() + limit).min(positions))?;
        let mut logits = session.feed(&prompt)?;
        let prompt_time = started.elapsed();

        // A model may have more rows than the tokenizer has tokens.
        let known = self.tokenizer.vocab_size().min(logits.len());
        let (mut text, mut tokens, mut finish) = (String::new(), Vec::new(), full);
        let mut stream = self.tokenizer.stream();
        let mut give = |piece: String| -> Result<()> {
            text += &piece;
            if piece.is_empty() { Ok(()) } else { on_text(&piece) }
        };
        while tokens.len() < limit {
            let id = sampler.pick(&logits[..known], session.len() as u64);
            if id == EOS {
                finish = Finish::EndOfText;
                break;
            }
            tokens.push(id);
            give(stream.push(id))?;
            if tokens.len() < limit {
                logits = session.feed(&[id])?;
            }
        }
        give(stream.finish())?;
        let time = started.elapsed() - prompt_time;
        Ok(Completion { text, tokens, prompt_tokens: prompt.len(), finish, prompt_time, time })
    }
}

/// The checkpoint, and newer ones that are damaged.
fn find(path: &Path, step: Option<u64>) -> Result<(Checkpoint, Vec<Error>)> {
    if path.join("manifest.json").is_file() {
        let checkpoint = Checkpoint::open(path)?;
        let found = checkpoint.manifest().run.step;
        ensure!(
            step.is_none_or(|step| step == found),
            "step {} was asked for, but {} is the checkpoint of step {found}; name the run folder to choose a step",
            step.unwrap_or_default(),
            path.display()
        );
        return Ok((checkpoint, Vec::new()));
    }
    let store = Store::open(path)?;
    if let Some(step) = step {
        return Ok((store.load(step)?, Vec::new()));
    }
    let found = store.latest_whole()?.with_context(|| {
        format!(
            "{} has no checkpoint yet; the first one is written while `ferropt train` runs",
            path.display()
        )
    })?;
    Ok((found.checkpoint, found.damaged))
}

/// A model with the given values.
pub(crate) fn filled<'v, E: Element>(
    device: &CpuDevice,
    config: &Config,
    values: impl Fn(usize, &Parameter) -> Result<Cow<'v, [f32]>>,
) -> Result<Model<CpuDevice, E>> {
    let mut model = Model::zeros(device, config)?;
    for (index, parameter) in config.parameters().iter().enumerate() {
        model.set(device, index, &values(index, parameter)?)?;
    }
    Ok(model)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_model::Choice;

    fn untrained(positions: usize) -> Inference {
        let tokenizer = Tokenizer::train([Ok("some words and some more words".repeat(9))], 270).unwrap();
        let config = Config { vocab: 300, positions, ..Config::preset("tiny").unwrap() };
        Inference::untrained(&config, tokenizer, Precision::F32, Some(1), 1).unwrap()
    }

    #[test]
    fn texts_end_where_they_must_and_the_stream_is_the_text() {
        let model = untrained(16);
        // Nearly even probabilities, so that </s> is unlikely; rows beyond the vocabulary must never be chosen.
        let sampler =
            Sampler::new(Choice::Sample { temperature: 100.0, top_k: None, top_p: 1.0 }, 5).unwrap();
        let mut streamed = String::new();
        let mut generate = |max_tokens| {
            streamed.clear();
            let made = model
                .generate("some words", max_tokens, &sampler, &mut |text| {
                    assert!(!text.is_empty());
                    streamed += text;
                    Ok(())
                })
                .unwrap();
            assert_eq!(streamed, made.text);
            assert!(made.tokens.iter().all(|&id| id < 270));
            made
        };
        assert_eq!(generate(0).tokens.len(), 0);
        let short = generate(5);
        assert_eq!((short.tokens.len(), short.finish), (5, Finish::MaxTokens));
        let long = generate(1000);
        assert_eq!(long.finish, Finish::Positions);
        assert_eq!(long.prompt_tokens + long.tokens.len(), 17, "the last token needs no position");
        assert_eq!(long.tokens[..5], short.tokens);
        assert_eq!(generate(long.tokens.len()).finish, Finish::MaxTokens);
    }

    #[test]
    fn prompts_that_are_too_long_and_failing_readers_end_it() {
        let model = untrained(8);
        let sampler = Sampler::new(Choice::Greedy, 1).unwrap();
        let long = model.generate("0123456789", 5, &sampler, &mut |_| Ok(())).unwrap_err().to_string();
        assert!(long.contains("11 tokens") && long.contains("8 positions"), "{long}");
        let broken = model.generate("0", 5, &sampler, &mut |_| Err(anyhow::anyhow!("closed"))).unwrap_err();
        assert_eq!(broken.to_string(), "closed");
    }

    #[test]
    fn folders_without_a_checkpoint_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |path: &Path| format!("{:#}", Inference::open(path, None, None).err().unwrap());
        assert!(refuse(folder.path()).contains("no checkpoint yet"));
        assert!(refuse(&folder.path().join("nowhere")).contains("nowhere"));
    }
}
