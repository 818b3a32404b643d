//! The run on the terminal: one aligned line for each record, and a bar below where standard error is a terminal.

use super::energy::Energy;
use super::record::{Record, Training, Validation};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Writes to standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    first: u64,
    steps: u64,
    started: Instant,
}

impl Progress {
    /// For a run that has done `done` of `steps` steps.
    pub fn start(done: u64, steps: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::hidden());
        if std::io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        let style = ProgressStyle::with_template("{bar:40} {pos}/{len} steps  {elapsed} gone, {msg}");
        if let Ok(style) = style {
            bar.set_style(style.progress_chars("━╸ "));
        }
        bar.set_position(done);
        Progress { bar, first: done, steps, started: Instant::now() }
    }

    /// Moves the bar to a step.
    pub fn step(&self, step: u64) {
        self.bar.set_position(step);
        self.bar.set_message(self.eta(step).map_or("…".into(), |eta| format!("{} to go", duration(eta))));
    }

    /// Prints a record's line.
    pub fn show(&self, record: &Record) {
        match record {
            Record::Training(training) => {
                self.step(training.step);
                self.line(&training_line(training, self.steps, self.eta(training.step)));
            }
            Record::Validation(validation) => self.line(&validation_line(validation, self.steps)),
            // Told with its reason by whoever decided it.
            Record::Skipped(_) => {}
        }
    }

    /// Prints a line above the bar.
    pub fn line(&self, line: &str) {
        // A closed standard error is no reason to stop training.
        self.bar.suspend(|| drop(writeln!(std::io::stderr(), "{line}")));
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Time to go at the pace since the start, validation and checkpoints included.
    fn eta(&self, step: u64) -> Option<Duration> {
        let done = step.checked_sub(self.first).filter(|&done| done > 0)?;
        let left = self.steps.saturating_sub(step);
        Duration::try_from_secs_f64(self.started.elapsed().as_secs_f64() / done as f64 * left as f64).ok()
    }
}

fn training_line(t: &Training, steps: u64, eta: Option<Duration>) -> String {
    let width = digits(steps);
    let peak = t.peak_share.map(|share| format!("  {:5.1} % of peak", share * 100.0)).unwrap_or_default();
    let energy = t.energy.map(|energy| format!("  {}", joules(energy))).unwrap_or_default();
    format!(
        "step {:>width$}/{steps}  loss {:7.4}  lr {:8.2e}  grad {:7.3}  {:>9} tok/s  TFLOP/s {:.3} model {:.3} hardware{peak}  ETA {:>7}{energy}",
        t.step,
        t.loss,
        t.lr,
        t.grad_norm,
        thousands(t.tokens_per_second),
        t.model_tflops,
        t.hardware_tflops,
        eta.map_or("-".into(), duration),
    )
}

fn validation_line(v: &Validation, steps: u64) -> String {
    let width = digits(steps);
    let bits = v.bits_per_byte.map(|bits| format!("  {bits:.4} bits/byte")).unwrap_or_default();
    format!(
        "step {:>width$}/{steps}  loss {:7.4}  validation on {}: perplexity {:.2}{bits}",
        v.step, v.loss, v.set, v.perplexity
    )
}

fn digits(number: u64) -> usize {
    number.to_string().len()
}

/// "12,345".
fn thousands(number: f64) -> String {
    if !number.is_finite() {
        return number.to_string();
    }
    let plain = format!("{number:.0}");
    let mut grouped = String::new();
    for (place, digit) in plain.chars().enumerate() {
        if place > 0
            && (plain.len() - place).is_multiple_of(3)
            && digit.is_ascii_digit()
            && !grouped.ends_with('-')
        {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// "45s", "12m03s", "5h07m", "3d04h".
fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{minutes}m{:02}s", seconds % 60),
        3600..86400 => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// "1.23 kJ", with "est." where it is an estimate.
fn joules(energy: Energy) -> String {
    const UNITS: [&str; 4] = ["J", "kJ", "MJ", "GJ"];
    let mut value = energy.joules;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = if unit == 0 || value >= 99.95 { 0 } else { 2 };
    format!("{value:6.decimals$} {}{}", UNITS[unit], if energy.estimated { " (est.)" } else { "" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_aligned_and_complete() {
        let record = Training {
            step: 120,
            tokens: 1 << 20,
            loss: 5.43214,
            lr: 6e-4,
            grad_norm: 1.2345,
            loss_scale: None,
            tokens_per_second: 12345.4,
            model_tflops: 0.3841,
            hardware_tflops: 0.4012,
            peak_share: Some(0.8412),
            energy: Some(Energy { joules: 1234.0, estimated: true }),
        };
        let line = training_line(&record, 1000, Some(Duration::from_secs(723)));
        assert_eq!(
            line,
            "step  120/1000  loss  5.4321  lr  6.00e-4  grad   1.234     12,345 tok/s  TFLOP/s 0.384 model 0.401 \
             hardware   84.1 % of peak  ETA  12m03s    1.23 kJ (est.)"
        );
        let next = Training {
            step: 1000,
            loss: 10.9,
            lr: 1.25e-4,
            grad_norm: 123.4,
            tokens_per_second: 999.6,
            ..record
        };
        let next = training_line(&next, 1000, Some(Duration::ZERO));
        assert_eq!(line.find("ETA"), next.find("ETA"), "\n{line}\n{next}");
        let bare = training_line(&Training { step: 1, loss: f64::NAN, ..Training::default() }, 10, None);
        assert!(bare.contains("NaN") && !bare.contains("peak") && bare.contains("ETA       -"), "{bare}");
    }

    #[test]
    fn validation_lines_up_with_training() {
        let validation = Validation {
            step: 50,
            set: "books".into(),
            loss: 3.0,
            perplexity: 20.0855,
            bits_per_byte: Some(1.25),
            tokens: 0,
        };
        assert_eq!(
            validation_line(&validation, 1000),
            "step   50/1000  loss  3.0000  validation on books: perplexity 20.09  1.2500 bits/byte"
        );
    }

    #[test]
    fn figures_for_people() {
        assert_eq!([0.0, 999.0, 1000.0, 1234567.0].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(thousands(f64::INFINITY), "inf");
        assert_eq!(
            [0, 59, 60, 3599, 3600, 86399, 90000].map(|s| duration(Duration::from_secs(s))),
            ["0s", "59s", "1m00s", "59m59s", "1h00m", "23h59m", "1d01h"]
        );
        let text = |joules_: f64| joules(Energy { joules: joules_, estimated: false }).trim().to_string();
        assert_eq!(
            [0.4, 999.0, 1000.0, 999_600.0, 3.6e6, 2e10].map(text),
            ["0 J", "999 J", "1.00 kJ", "1.00 MJ", "3.60 MJ", "20.00 GJ"]
        );
    }

    #[test]
    fn time_to_go_counts_only_this_start() {
        let progress = Progress::start(90, 100);
        assert_eq!(progress.eta(90), None);
        std::thread::sleep(Duration::from_millis(20));
        let eta = progress.eta(95).unwrap();
        assert!(eta >= Duration::from_millis(20) && eta < Duration::from_secs(20), "{eta:?}");
    }
}
