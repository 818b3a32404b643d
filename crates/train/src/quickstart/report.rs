//! The report of a quick start.

use crate::checkpoint::human_bytes;
use crate::config::Precision;
use crate::telemetry::{Energy, Record};
use crate::trainer::write_whole;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::Path;

/// Steps whose mean is reported as the training loss at the end.
const LAST_RECORDS: usize = 10;

/// What was trained on what, and what came of it. [`fmt::Display`] writes it as Markdown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Program and version.
    pub program: String,
    /// The machine.
    pub device: String,
    /// Seed of everything random.
    pub seed: u64,
    /// What was trained on.
    pub train: Part,
    /// What was held out.
    pub held_out: Part,
    /// Model and run.
    pub sizes: Sizes,
    /// What a model that knows only how frequent each token is would reach on the held-out text that is scored.
    pub unigram: Baseline,
    /// What the samples start with.
    pub prompt: String,
    /// What the model made of it before the first step.
    pub before: String,
    /// And after the last.
    pub after: Option<String>,
    /// Seconds of training, loading, validation and saving included.
    pub seconds: f64,
    /// What came of it.
    pub results: Option<Results>,
}

/// One part of the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Part {
    /// Where it comes from.
    pub text: String,
    /// Its size.
    pub bytes: u64,
    /// Its tokens, with one `</s>` a document.
    pub tokens: u64,
}

/// Model and run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sizes {
    /// Exact number of parameters.
    pub parameters: u64,
    /// L.
    pub layers: usize,
    /// H.
    pub heads: usize,
    /// C.
    pub width: usize,
    /// V.
    pub vocab: usize,
    /// T.
    pub sequence: usize,
    /// Compute type.
    pub precision: Precision,
    /// Steps planned.
    pub steps: u64,
    /// Tokens of one step.
    pub batch_tokens: u64,
    /// Highest learning rate.
    pub peak_lr: f64,
}

/// A loss to compare with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// Nats per token.
    pub loss: f64,
    /// The same in bits per byte.
    pub bits_per_byte: f64,
}

/// What came of the run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Steps done.
    pub steps: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Loss of the first step, nats per token.
    pub first_loss: f64,
    /// Mean loss of the last steps.
    pub train_loss: f64,
    /// Last loss on held-out text, nats per token.
    pub held_out_loss: Option<f64>,
    /// The same as perplexity.
    pub perplexity: Option<f64>,
    /// The same in bits per byte of text.
    pub bits_per_byte: Option<f64>,
    /// Median speed of the steps.
    pub tokens_per_second: f64,
    /// 10^12 floating-point operations per second at that speed, no recomputation counted.
    pub model_tflops: f64,
    /// Energy of the run.
    pub energy: Option<Energy>,
    /// Most memory that the process had resident.
    pub peak_memory: Option<u64>,
}

impl Sizes {
    /// Tokens of the whole run.
    pub fn tokens(&self) -> u64 {
        self.steps * self.batch_tokens
    }

    /// The model in words.
    pub fn model(&self) -> String {
        let precision = self.precision.name();
        format!(
            "OPT of {} layers, {} heads, width {}: {:.2} million parameters, {precision}",
            self.layers,
            self.heads,
            self.width,
            self.parameters as f64 * 1e-6
        )
    }
}

impl Results {
    /// From the metrics of a run that has done so many steps; `None` before one is recorded.
    pub(super) fn from_records(
        records: &[Record],
        (steps_done, tokens): (u64, u64),
        peak_memory: Option<u64>,
    ) -> Option<Results> {
        let steps: Vec<_> =
            records.iter().filter_map(|r| if let Record::Training(t) = r { Some(t) } else { None }).collect();
        let held_out =
            records.iter().rev().find_map(|r| if let Record::Validation(v) = r { Some(v) } else { None });
        let (first, last) = (steps.first()?, steps.last()?);
        let end = &steps[steps.len().saturating_sub(LAST_RECORDS)..];
        let median = |figure: fn(&crate::telemetry::Training) -> f64| {
            let mut all: Vec<f64> = steps.iter().map(|t| figure(t)).collect();
            all.sort_by(f64::total_cmp);
            all[all.len() / 2]
        };
        Some(Results {
            steps: steps_done,
            tokens,
            first_loss: first.loss,
            train_loss: end.iter().map(|t| t.loss).sum::<f64>() / end.len() as f64,
            held_out_loss: held_out.map(|v| v.loss),
            perplexity: held_out.map(|v| v.perplexity),
            bits_per_byte: held_out.and_then(|v| v.bits_per_byte),
            tokens_per_second: median(|t| t.tokens_per_second),
            model_tflops: median(|t| t.model_tflops),
            energy: last.energy,
            peak_memory,
        })
    }
}

impl Report {
    /// Reads what [`Report::save`] wrote.
    ///
    /// # Errors
    /// When there is no report in the folder, or it is damaged.
    pub fn load(dir: &Path) -> Result<Report> {
        let path = dir.join("report.json");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is no report of a quick start; remove {} and begin anew",
                path.display(),
                dir.display()
            )
        })
    }

    /// Writes `report.json` and `report.md`.
    ///
    /// # Errors
    /// When they cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        for (name, text) in [
            ("report.json", serde_json::to_string_pretty(self)? + "\n"),
            ("report.md", format!("{self}\n![Loss by step](loss.svg)\n")),
        ] {
            let path = dir.join(name);
            write_whole(&path, &text)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.sizes;
        let part = |p: &Part| format!("{:.2} MB, {} tokens: {}", p.bytes as f64 * 1e-6, p.tokens, p.text);
        writeln!(f, "# Quick start\n\n| | |\n|---|---|")?;
        let mut row = |name: &str, value: String| writeln!(f, "| {name} | {value} |");
        row("text", part(&self.train))?;
        row("held out", part(&self.held_out))?;
        row("model", s.model())?;
        row("vocabulary, sequence", format!("{} tokens, {} positions", s.vocab, s.sequence))?;
        row("machine", self.device.clone())?;
        row("program, seed", format!("{}, {}", self.program, self.seed))?;
        match &self.results {
            None => row("steps", format!("none of {} yet", s.steps))?,
            Some(r) => {
                row(
                    "steps",
                    format!(
                        "{} of {}, {} tokens each, {} in all",
                        r.steps, s.steps, s.batch_tokens, r.tokens
                    ),
                )?;
                let joules = |e: Energy| {
                    format!(", {:.0} J{}", e.joules, if e.estimated { " (estimate)" } else { "" })
                };
                row(
                    "time, energy",
                    format!("{:.0} s{}", self.seconds, r.energy.map(joules).unwrap_or_default()),
                )?;
                let memory =
                    r.peak_memory.map(|b| format!(", {} at most", human_bytes(b))).unwrap_or_default();
                row(
                    "speed",
                    format!(
                        "{:.0} tokens/s, {:.3} model TFLOP/s{memory}",
                        r.tokens_per_second, r.model_tflops
                    ),
                )?;
                row(
                    "training loss",
                    format!("{:.3} at first, {:.3} at the end (nats per token)", r.first_loss, r.train_loss),
                )?;
                if let (Some(loss), Some(perplexity)) = (r.held_out_loss, r.perplexity) {
                    let bits = r.bits_per_byte.map(|b| format!(", {b:.3} bits per byte")).unwrap_or_default();
                    row("held-out loss", format!("{loss:.3}, perplexity {perplexity:.1}{bits}"))?;
                }
            }
        }
        let unigram = format!("{:.3}, {:.3} bits per byte", self.unigram.loss, self.unigram.bits_per_byte);
        row("guessing by frequency", unigram)?;
        let samples = [("Before training", Some(&self.before)), ("After training", self.after.as_ref())];
        for (title, text) in samples {
            let Some(text) = text else { continue };
            writeln!(f, "\n## {title}\n")?;
            // Indented by four, whatever the text contains is code to Markdown.
            for line in format!("{}{text}", self.prompt).lines() {
                writeln!(f, "    {}", line.replace(|c: char| c.is_control() && c != '\t', " "))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{Training, Validation};

    fn report() -> Report {
        let part = |text: &str| Part { text: text.into(), bytes: 2_000_000, tokens: 600_000 };
        Report {
            program: "ferropt".into(),
            device: "2 threads".into(),
            seed: 1,
            train: part("all of it"),
            held_out: part("the rest"),
            sizes: Sizes {
                parameters: 4_272_640,
                layers: 4,
                heads: 4,
                width: 256,
                vocab: 4096,
                sequence: 256,
                precision: Precision::Bf16,
                steps: 40,
                batch_tokens: 4096,
                peak_lr: 1e-3,
            },
            unigram: Baseline { loss: 6.5, bits_per_byte: 2.9 },
            prompt: "Returns the".into(),
            before: "qq\n```\n\u{7}x".into(),
            after: None,
            seconds: 0.0,
            results: None,
        }
    }

    #[test]
    fn figures_come_from_the_metrics() {
        let step = |step, loss, tokens_per_second| {
            Record::Training(Training { step, loss, tokens_per_second, ..Training::default() })
        };
        let held_out = |step, loss: f64| {
            Record::Validation(Validation { step, loss, perplexity: loss.exp(), ..Validation::default() })
        };
        assert_eq!(Results::from_records(&[], (0, 0), None), None);
        let mut records = vec![step(1, 8.3, 1.0), held_out(1, 8.0)];
        records.extend((2..=30).map(|i| step(i, if i > 20 { 4.0 } else { 6.0 }, 100.0)));
        records.push(held_out(30, 4.5));
        let results = Results::from_records(&records, (30, 77), Some(3)).unwrap();
        assert_eq!((results.steps, results.tokens, results.peak_memory), (30, 77, Some(3)));
        assert_eq!((results.first_loss, results.train_loss), (8.3, 4.0));
        assert_eq!((results.held_out_loss, results.tokens_per_second), (Some(4.5), 100.0));

        let folder = tempfile::tempdir().unwrap();
        let report = Report { results: Some(results), after: Some(" value.".into()), ..report() };
        report.save(folder.path()).unwrap();
        assert_eq!(Report::load(folder.path()).unwrap(), report);
        let page = fs::read_to_string(folder.path().join("report.md")).unwrap();
        for part in
            ["4.27 million", "4.500", "guessing by frequency | 6.500", "    Returns the value.", "loss.svg"]
        {
            assert!(page.contains(part), "{part}: {page}");
        }
    }

    #[test]
    fn samples_cannot_break_the_page() {
        let page = report().to_string();
        assert!(page.contains("none of 40 yet") && !page.contains("After"), "{page}");
        assert!(page.contains("    Returns theqq\n    ```\n     x\n"), "{page}");
    }
}
