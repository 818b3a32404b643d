//! How fast a model generates and scores on this machine, as shares of what memory and processor give.

use super::{human_bytes, median};
use crate::inference::{Model, Opening};
use crate::telemetry::peak_resident_bytes;
use crate::trainer::open_device;
use crate::weight_cache::WeightCache;
use anyhow::{Result, ensure};
use ferropt_data::Tokenizer;
use ferropt_device::{Device, WeightFormat, Which, bf16};
use ferropt_engine::{Options, Parameters, Request};
use ferropt_model::Config;
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;
use std::time::Instant;

/// Tokens of a short prompt, before what is generated.
const SHORT: usize = 32;
/// Tokens of each text that is scored.
const SCORED_TOKENS: usize = 512;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Inference {
    /// Where the weights come from.
    pub weights_of: WeightsOf,
    /// How they are stored in memory; as the model's own when absent, bf16 for random ones.
    pub weights: Option<WeightFormat>,
    /// Tokens to generate.
    pub tokens: usize,
    /// Tokens of the long prompt.
    pub prompt: usize,
    /// Numbers of texts to generate together, beside one alone.
    pub batches: Vec<usize>,
    /// Texts to score together; none where it is 0.
    pub scored: usize,
    /// What computes.
    pub device: Which,
    /// Threads; all available unless given.
    pub threads: Option<usize>,
    /// Runs to measure, after one to warm up.
    pub runs: usize,
    /// Where weights of a model on the disk are kept when they are ready.
    pub cache: Option<WeightCache>,
}

/// A model to measure with.
#[derive(Clone, Debug)]
pub enum WeightsOf {
    /// Random weights of a preset's sizes.
    Preset(String),
    /// A model on the disk.
    Path(PathBuf),
}

/// One test.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Its name.
    pub test: String,
    /// Seconds of each run.
    pub seconds: Vec<f64>,
    /// Tokens per second of the median run.
    pub tokens_per_second: f64,
    /// What limits it.
    pub limit: Limit,
    /// Tokens per second at that limit, where it is known.
    pub most_tokens_per_second: Option<f64>,
    /// Share of the limit, where that is known.
    pub share: Option<f64>,
}

/// What a test is limited by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Limit {
    /// Every weight is read for every step, and the keys and values of all tokens of a text for its next one.
    Bandwidth,
    /// Products at the speed of f32 or bf16, without what 8-bit products may gain.
    Arithmetic,
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// Its exact number of parameters.
    pub parameters: u64,
    /// Device, for people.
    pub device: String,
    /// How weights are stored.
    pub weights: &'static str,
    /// What a user should know of how the model was opened.
    pub notes: Vec<String>,
    /// Bytes of weights that a token of a text alone needs.
    pub weight_bytes: u64,
    /// Bytes of keys and values that a generated token needs, on average.
    pub cache_bytes: u64,
    /// Seconds from nothing to a model that takes requests.
    pub load_seconds: f64,
    /// Bytes per second of reading memory; unknown where it could not be measured.
    pub bandwidth: Option<f64>,
    /// FLOP/s of the compute type's products; unknown where they could not be measured.
    pub peak_flops: Option<f64>,
    /// The tests.
    pub tests: Vec<Line>,
    /// Most memory that the process had resident before the bandwidth was measured, bytes.
    pub peak_rss_bytes: Option<u64>,
}

/// Measures one text, batches, a prompt, and scores.
///
/// # Errors
/// When the options make no sense, the model cannot be opened or memory is short.
pub fn inference(wanted: &Inference) -> Result<Report> {
    ensure!(wanted.runs > 0, "--runs 0 measures nothing; use 1 or more");
    ensure!(wanted.tokens > 1, "--tokens {} is too short to measure; use 2 or more", wanted.tokens);
    ensure!(!wanted.batches.contains(&0), "--batch 0 is no batch; use 1 text or more");
    let most = wanted.batches.iter().copied().max().unwrap_or(1);
    let generated = SHORT + wanted.tokens;
    let tests = [(most, generated), (1, wanted.prompt + 1), (wanted.scored, SCORED_TOKENS)];
    let opening = Opening {
        weights: wanted.weights,
        device: wanted.device,
        threads: wanted.threads,
        sequences: most.max(wanted.scored),
        longest: tests.iter().map(|(_, tokens)| *tokens).max(),
        // What the largest test takes: many short texts or one long prompt, never many of that length.
        cache_tokens: tests.iter().map(|(texts, tokens)| Options::new(*texts, *tokens).cache_tokens).max(),
        // No prompt comes twice.
        reuse: false,
        cache: wanted.cache.clone(),
        ..Opening::default()
    };
    let (name, model) = match &wanted.weights_of {
        WeightsOf::Preset(name) => {
            let weights = Some(wanted.weights.unwrap_or(WeightFormat::Bf16));
            let tokenizer = Tokenizer::train([Ok("no text is encoded or read".to_string())], 260)?;
            let opening = Opening { weights, ..opening };
            (name.clone(), Model::random(&Config::preset(name)?, tokenizer, &opening, 1)?)
        }
        WeightsOf::Path(path) => (path.display().to_string(), Model::open(path, &opening)?),
    };
    let positions = model.config.positions;
    for (option, tokens) in [("--prompt", wanted.prompt), ("--tokens", generated)] {
        ensure!(
            (1..=positions).contains(&tokens),
            "{option} needs texts of {tokens} tokens, but the model has {positions} positions"
        );
    }
    let mut tests = Tests { model: &model, runs: wanted.runs, turn: 0 };
    let weight_bytes = model.weight_bytes as f64;
    // Of a text that is half as long as it becomes, of all layers.
    let element = if model.weights.computes_in_f32() { 4.0 } else { 2.0 };
    let of_token = 2.0 * element * (model.config.layers * model.config.width) as f64;
    let cache_bytes = of_token * (SHORT as f64 + wanted.tokens as f64 / 2.0);
    let head = model.config.forward_flops(1).head;
    let prompt_flops = |tokens: usize| {
        let flops = model.config.forward_flops(tokens);
        // Of attention's square a causal model needs half.
        flops.products + flops.attention / 2.0
    };

    let first = tests.generate(1, 1, SHORT)?;
    let rest = tests.generate(1, wanted.tokens, SHORT)?;
    let mut lines = vec![];
    let seconds: Vec<f64> = rest.iter().map(|s| (s - median(&first)).max(1e-9)).collect();
    lines.push((
        "decode".to_string(),
        seconds,
        wanted.tokens - 1,
        Limit::Bandwidth,
        weight_bytes + cache_bytes,
    ));
    for batch in &wanted.batches {
        let seconds = tests.generate(*batch, wanted.tokens, SHORT)?;
        let tokens = batch * wanted.tokens;
        let bytes = weight_bytes / *batch as f64 + cache_bytes;
        lines.push((format!("batch of {batch}"), seconds, tokens, Limit::Bandwidth, bytes));
    }
    let seconds = tests.generate(1, 1, wanted.prompt)?;
    let flops = prompt_flops(wanted.prompt) + head / wanted.prompt as f64;
    lines.push((format!("prompt of {}", wanted.prompt), seconds, wanted.prompt, Limit::Arithmetic, flops));
    if wanted.scored > 0 {
        let tokens = SCORED_TOKENS.min(positions);
        let seconds = tests.score(wanted.scored, tokens)?;
        let (test, flops) = (format!("score of {} x {tokens}", wanted.scored), prompt_flops(tokens) + head);
        lines.push((test, seconds, wanted.scored * tokens, Limit::Arithmetic, flops));
    }

    let peak_rss_bytes = peak_resident_bytes();
    let (parameters, weights, load_seconds) =
        (model.config.parameter_count(), model.weights, model.load_seconds);
    let (bytes, notes) = (model.weight_bytes, model.notes());
    // The limits are measured where it was, for which there may be no room beside it.
    drop(model);
    let device = open_device(wanted.device, wanted.threads)?;
    let bandwidth = device.measured_bandwidth().ok();
    let peak_flops = if weights.computes_in_f32() {
        device.measured_peak::<f32>()
    } else {
        device.measured_peak::<bf16>()
    };
    let peak_flops = Some(peak_flops).filter(|peak| peak.is_finite());
    let tests = lines
        .into_iter()
        .map(|(test, seconds, tokens, limit, work)| {
            let tokens_per_second = tokens as f64 / median(&seconds);
            let most = if limit == Limit::Bandwidth { bandwidth } else { peak_flops };
            let most_tokens_per_second = most.map(|most| most / work);
            let share = most_tokens_per_second.map(|most| tokens_per_second / most);
            Line { test, seconds, tokens_per_second, limit, most_tokens_per_second, share }
        })
        .collect();
    Ok(Report {
        model: name,
        parameters,
        device: device.describe(),
        weights: weights.name(),
        notes,
        weight_bytes: bytes,
        cache_bytes: cache_bytes as u64,
        load_seconds,
        bandwidth,
        peak_flops,
        tests,
        peak_rss_bytes,
    })
}

struct Tests<'a> {
    model: &'a Model,
    runs: usize,
    /// Runs so far: no prompt comes twice.
    turn: usize,
}

impl Tests<'_> {
    /// Seconds to generate so many tokens behind each of `batch` prompts of `prompt` tokens, run by run.
    fn generate(&mut self, batch: usize, tokens: usize, prompt: usize) -> Result<Vec<f64>> {
        let max_tokens = Some(tokens);
        self.run(
            batch,
            prompt,
            &Parameters { max_tokens, temperature: 0.0, ignore_end: true, ..Parameters::default() },
        )
    }

    /// Seconds to score so many texts of so many tokens, run by run.
    fn score(&mut self, texts: usize, tokens: usize) -> Result<Vec<f64>> {
        let (max_tokens, echo, log_probs) = (Some(0), Some(0), Some(0));
        self.run(texts, tokens, &Parameters { max_tokens, echo, log_probs, ..Parameters::default() })
    }

    fn run(&mut self, batch: usize, prompt: usize, parameters: &Parameters) -> Result<Vec<f64>> {
        let ids = self.model.config.vocab as u64;
        let mut seconds = Vec::new();
        for run in 0..=self.runs {
            self.turn += 1;
            let id = |b: usize, i: usize| (i * 7919 + b * 104_729 + self.turn * 15_485_863 + 13) as u64 % ids;
            let request = |b| Request {
                prompt: (0..prompt).map(|i| id(b, i) as u32).collect(),
                parameters: parameters.clone(),
            };
            let requests: Vec<Request> = (0..batch).map(request).collect();
            let start = Instant::now();
            let under_way: Vec<_> =
                requests.into_iter().map(|r| self.model.engine.submit(r)).collect::<Result<_, _>>()?;
            for events in under_way {
                events.complete()?;
            }
            if run > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        Ok(seconds)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "model           {}, {} parameters, {} weights",
            self.model, self.parameters, self.weights
        )?;
        writeln!(f, "device          {}", self.device)?;
        writeln!(
            f,
            "limits          {} GB/s read, {} GFLOP/s; {} of weights and {} of keys and values for each token",
            self.bandwidth.map_or("unknown".into(), |rate| format!("{:.1}", rate * 1e-9)),
            self.peak_flops.map_or("unknown".into(), |rate| format!("{:.0}", rate * 1e-9)),
            human_bytes(self.weight_bytes),
            human_bytes(self.cache_bytes)
        )?;
        let peak = self.peak_rss_bytes.map_or("unknown".into(), human_bytes);
        writeln!(f, "load            {:.2} s; {peak} resident at most\n", self.load_seconds)?;
        write!(
            f,
            "{:<18} {:>10}  {:>10}  {:>9}  share of the limit",
            "test", "tokens/s", "at most", "seconds"
        )?;
        for line in &self.tests {
            let limit = match line.limit {
                Limit::Bandwidth => "bandwidth",
                Limit::Arithmetic => "arithmetic",
            };
            write!(
                f,
                "\n{:<18} {:>10.1}  {:>10}  {:>9.3}  {} of {limit}",
                line.test,
                line.tokens_per_second,
                line.most_tokens_per_second.map_or("unknown".into(), |most| format!("{most:.1}")),
                median(&line.seconds),
                line.share.map_or("unknown".into(), |share| format!("{:>5.1} %", 100.0 * share))
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Inference {
        Inference {
            weights_of: WeightsOf::Preset("tiny".into()),
            weights: Some(WeightFormat::Int8),
            tokens: 4,
            prompt: 70,
            batches: vec![2, 3],
            scored: 1,
            device: Which::Cpu,
            threads: Some(1),
            runs: 2,
            cache: None,
        }
    }

    #[test]
    fn every_test_has_its_runs_and_speeds() {
        let report = inference(&wanted()).unwrap();
        let names: Vec<&str> = report.tests.iter().map(|t| t.test.as_str()).collect();
        assert_eq!(names, ["decode", "batch of 2", "batch of 3", "prompt of 70", "score of 1 x 512"]);
        for line in &report.tests {
            assert!(
                line.seconds.len() == 2 && line.tokens_per_second > 0.0 && line.share > Some(0.0),
                "{line:?}"
            );
        }
        assert!(report.to_string().contains("% of bandwidth"), "{report}");
        // A text alone reads all weights for each token, one of two half of them, and each reads its own keys and values.
        let (weights, cache) = (report.weight_bytes as f64, report.cache_bytes as f64);
        let most = |line: usize| report.tests[line].most_tokens_per_second.unwrap();
        let times = (weights + cache) / (weights / 2.0 + cache);
        assert!((most(1) / most(0) / times - 1.0).abs() < 1e-6, "{report:?}");
        let config = Config::preset("tiny").unwrap();
        assert_eq!(report.cache_bytes, (2 * 2 * config.layers * config.width * (SHORT + 2)) as u64);
        let matrices = report.weight_bytes as f64 / report.parameters as f64;
        // 8 bits and a scale in 64, and a few parameters that are no matrices.
        assert!((0.9..1.04).contains(&matrices), "{matrices} bytes for a parameter");
    }

    #[test]
    fn wrong_sizes_are_refused_by_the_option() {
        for (wrong, part) in [
            (Inference { runs: 0, ..wanted() }, "--runs 0"),
            (Inference { tokens: 1, ..wanted() }, "--tokens 1"),
            (Inference { batches: vec![0], ..wanted() }, "--batch 0"),
            (Inference { prompt: 5000, ..wanted() }, "--prompt"),
            (Inference { weights_of: WeightsOf::Preset("125".into()), ..wanted() }, "125m"),
        ] {
            let message = inference(&wrong).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
