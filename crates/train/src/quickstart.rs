//! The quick start: from text that is already on the machine to a trained model and a report, in minutes.
//!
//! Everything is in one folder:
//!
//! | name | what |
//! |---|---|
//! | `data/` | the text, a tokenizer trained on it, and its tokens |
//! | `quickstart.toml` | the run, as `ferropt train` takes it |
//! | `report.md`, `report.json` | what was trained and what came of it |
//! | everything else | a run folder like any other |
//!
//! [`run`] prepares that, trains, and reports. Called again it goes on from where it stopped.

mod plan;
mod report;
mod text;

pub use report::{Baseline, Part, Report, Results, Sizes};

use crate::config::Config;
use crate::inference::{Model, Opening};
use crate::signals::Stop;
use crate::telemetry::{MetricLog, peak_resident_bytes};
use crate::trainer::{Ending, train};
use anyhow::{Context, Result, ensure};
use ferropt_data::on_threads;
use ferropt_engine::{Parameters, Request};
use plan::Planned;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Tokens of each sample.
const SAMPLE_TOKENS: usize = 120;

/// Kept from the minutes asked for: the last checkpoint, the sample after training, the report.
const RESERVE: Duration = Duration::from_millis(1500);

/// Longest that a run may be late, when the machine gets slower than it was measured: so long, and this share of the
/// minutes. It is better to be late than to stop short of the schedule's end.
const LATE: (Duration, f64) = (Duration::from_secs(20), 0.15);

/// What the user may choose.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder.
    pub dir: PathBuf,
    /// Files or folders of text; the documentation of crates if there are none.
    pub texts: Vec<PathBuf>,
    /// Field of JSON lines that holds the text.
    pub text_field: String,
    /// Content of the `Cargo.lock` whose crates to take.
    pub lock: String,
    /// How long all of it should take, for which the number of steps is chosen.
    pub minutes: f64,
    /// Threads; all available unless given.
    pub threads: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
}

/// How a quick start ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Why training ended.
    pub ending: Ending,
    /// What is known so far; complete unless somebody stopped it.
    pub report: Report,
    /// The run, as `ferropt train` takes it.
    pub config: PathBuf,
}

/// Prepares, trains and reports. `say` gets a line for each thing done, for people.
///
/// # Errors
/// When there is too little text, or the folder cannot be written.
pub fn run(options: &Options, stop: &Stop, say: &mut dyn FnMut(&str)) -> Result<Outcome> {
    let (started, minutes) = (Instant::now(), options.minutes);
    ensure!(
        minutes > 0.0 && minutes.is_finite(),
        "--minutes {minutes} is no length of time; give a number above 0, for example 4"
    );
    let deadline = started + Duration::from_secs_f64((minutes * 60.0).min(1e7));
    let config = options.dir.join("quickstart.toml");
    let mut report = if config.exists() {
        say(&format!("resuming   {} as it was begun; another --dir begins anew", options.dir.display()));
        Report::load(&options.dir)?
    } else {
        ensure!(
            !options.dir.join("checkpoints").exists(),
            "--dir {} holds a run that no quick start began; give another folder, or go on with that run by `ferropt train`",
            options.dir.display()
        );
        prepare(options, &config, deadline, say)?
    };

    let mut run = Config::load(&config, &[])?;
    run.run.threads = options.threads;
    let left = deadline.saturating_duration_since(Instant::now()).saturating_sub(RESERVE) + LATE.0;
    run.run.max_minutes = Some(left.as_secs_f64() / 60.0 + minutes * LATE.1);
    let begun = Instant::now();
    let outcome = train(run, stop, &mut |_| {})?;
    let results = match outcome.step {
        0 => None,
        steps => {
            let records = MetricLog::read(&outcome.run.join("metrics.jsonl"))?;
            Results::from_records(&records, (steps, outcome.tokens), peak_resident_bytes())
        }
    };
    // A start that was stopped in the last validation has reported all steps, but not that.
    let reported = match (&report.results, &results) {
        (Some(then), Some(now)) => *then == Results { peak_memory: then.peak_memory, ..now.clone() },
        _ => false,
    };
    if outcome.ending == Ending::AlreadyComplete && reported {
        return Ok(Outcome { ending: outcome.ending, report, config });
    }
    report.seconds += begun.elapsed().as_secs_f64();
    if outcome.step > 0 {
        report.results = results;
        let opening = Opening { threads: options.threads, ..Opening::default() };
        let model = Model::open(&outcome.run, &opening)?;
        report.after = Some(sample(&model, &report.prompt, report.seed)?);
    }
    report.save(&options.dir)?;
    Ok(Outcome { ending: outcome.ending, report, config })
}

/// Makes text, tokenizer, configuration and the first half of the report; the configuration last, as its presence says
/// that the rest is there.
fn prepare(options: &Options, config: &Path, deadline: Instant, say: &mut dyn FnMut(&str)) -> Result<Report> {
    let data = options.dir.join("data");
    let text = text::collect(options)?;
    let (train_bytes, held_out_bytes) = text.split.bytes();
    say(&format!("text       {:.1} MB: {}", train_bytes as f64 * 1e-6, text.source));
    say(&format!("           {:.1} MB held out: {}", held_out_bytes as f64 * 1e-6, text.held_out));
    text.split.write(&data)?;

    let tokenizer = on_threads(options.threads, || text::tokenizer(&text.split))??;
    tokenizer.save(&data.join("tokenizer.json"))?;
    let counts = on_threads(options.threads, || text::count(&text.split, &tokenizer))??;
    say(&format!(
        "tokenizer  byte-level BPE of {} tokens, trained on the text; {:.2} bytes a token",
        tokenizer.vocab_size(),
        train_bytes as f64 / counts.train as f64
    ));

    let planned = Planned::measure(options, &counts, deadline)?;
    let sizes = planned.sizes();
    say(&format!("model      {}", sizes.model()));
    say(&format!(
        "speed      {:.0} tokens/s on this machine: {} steps of {} tokens, {:.1} times through the text",
        planned.tokens_per_second,
        sizes.steps,
        sizes.batch_tokens,
        sizes.tokens() as f64 / counts.train as f64
    ));
    let held_out = match counts.scored < counts.held_out {
        true => format!("{}; the first {} tokens are scored", text.held_out, counts.scored),
        false => text.held_out,
    };
    let Planned { run, toml, device, .. } = planned;
    let weights = Some(run.config.run.precision.into());
    let opening = Opening { threads: options.threads, weights, ..Opening::default() };
    let untrained = Model::untrained(&run.model, tokenizer, &opening, options.seed)?;
    let before = sample(&untrained, &text.prompt, options.seed)?;
    say(&format!("untrained  {}", one_line(&text.prompt, &before)));

    let report = Report {
        program: concat!("ferropt ", env!("CARGO_PKG_VERSION")).into(),
        device,
        seed: options.seed,
        train: Part { text: text.source, bytes: train_bytes as u64, tokens: counts.train },
        held_out: Part { text: held_out, bytes: held_out_bytes as u64, tokens: counts.held_out },
        sizes,
        unigram: counts.unigram,
        prompt: text.prompt,
        before,
        after: None,
        seconds: 0.0,
        results: None,
    };
    report.save(&options.dir)?;
    let beside = config.with_extension("toml.part");
    fs::write(&beside, toml)
        .and_then(|()| fs::rename(&beside, config))
        .with_context(|| format!("cannot write {}", config.display()))?;
    Ok(report)
}

/// What the model makes of the prompt.
fn sample(model: &Model, prompt: &str, seed: u64) -> Result<String> {
    let (temperature, top_p, max_tokens) = (0.7, 0.95, Some(SAMPLE_TOKENS));
    let parameters = Parameters { temperature, top_p, max_tokens, seed, ..Parameters::default() };
    let prompt = model.engine.tokenizer().encode_prompt(prompt)?;
    let made = model.engine.complete(Request { prompt, parameters })?;
    Ok(made.choices.into_iter().map(|choice| choice.text).collect())
}

/// The start of a text, without line ends and control characters.
fn one_line(prompt: &str, text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    format!("{prompt}{text}").chars().map(plain).take(90).chain("…".chars()).collect()
}
