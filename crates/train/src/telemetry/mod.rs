//! What a run tells: to people on the terminal, to programs as JSON lines, to TensorBoard, and as a picture.
//!
//! [`Telemetry`] hands every [`Record`] to all of them. In the run folder:
//!
//! | file | content |
//! |---|---|
//! | `metrics.jsonl` | one record a line; the lines of an interrupted and resumed run are those of an uninterrupted one |
//! | `events.out.tfevents.*` | the same numbers as scalars, for `tensorboard --logdir RUN` |
//! | `loss.svg` | loss curves, drawn by [`Telemetry::draw`] |

mod energy;
mod jsonl;
mod memory;
mod plot;
mod progress;
mod record;
mod tensorboard;

pub use energy::{DEFAULT_WATTS_PER_CORE, Energy, Meter};
pub use jsonl::{MetricLog, Resumed};
pub use memory::peak_resident_bytes;
pub use plot::{Plot, Scale, Series, Style, loss_curves};
pub use progress::Progress;
pub use record::{Record, Skipped, Training, Validation};
pub use tensorboard::EventFile;

use crate::trainer::write_whole;
use anyhow::{Error, Result};
use std::path::{Path, PathBuf};

/// All outputs of a run.
#[derive(Debug)]
pub struct Telemetry {
    run: PathBuf,
    log: MetricLog,
    events: EventFile,
    progress: Progress,
}

impl Telemetry {
    /// Opens the outputs of the run in folder `run`, which is to make `steps` steps and continues where it was
    /// `resumed` (`None` when it begins; what an earlier start left without a checkpoint is then dropped).
    ///
    /// # Errors
    /// When a file cannot be written, or `metrics.jsonl` is damaged.
    pub fn open(run: &Path, resumed: Option<&Resumed>, steps: u64) -> Result<Telemetry> {
        let step = resumed.map(|resumed| resumed.step);
        Ok(Telemetry {
            run: run.into(),
            log: MetricLog::open(&run.join("metrics.jsonl"), resumed)?,
            events: EventFile::create(run, step)?,
            progress: Progress::start(step.unwrap_or(0), steps),
        })
    }

    /// Names of the held-out sets that were scored at `step` already.
    ///
    /// # Errors
    /// When the records cannot be read.
    pub fn scored(&self, step: u64) -> Result<Vec<String>> {
        let records = MetricLog::read(&self.run.join("metrics.jsonl"))?.into_iter();
        Ok(records
            .filter_map(|record| match record {
                Record::Validation(validation) if validation.step == step => Some(validation.set),
                _ => None,
            })
            .collect())
    }

    /// Shows and keeps a record. What cannot be made again from the checkpoint of a step must be recorded before that is
    /// saved, or a run that is resumed from there would lack it.
    ///
    /// # Errors
    /// When a file cannot be written (a full disk); the files stay readable and training may go on.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        self.progress.show(record);
        let logged = self.log.append(record);
        let plotted = self.events.scalars(record.step(), &record.scalars());
        logged.and(plotted)
    }

    /// Goes back to `step`, after which the run goes on: later records leave the log, to `aside` if they can be kept there,
    /// and TensorBoard hides them. Returns what could not be done, as on a full disk; training may go on.
    ///
    /// # Errors
    /// When the log cannot be read or shortened.
    pub fn rewind(&mut self, step: u64, steps: u64, aside: &Path) -> Result<Vec<Error>> {
        let log = self.run.join("metrics.jsonl");
        let kept = MetricLog::copy_later(&log, step, aside);
        self.log = MetricLog::open(&log, Some(&Resumed { step, skipped: Vec::new() }))?;
        let began = EventFile::create(&self.run, Some(step)).map(|events| self.events = events);
        self.progress.finish();
        self.progress = Progress::start(step, steps);
        Ok([kept, began].into_iter().filter_map(Result::err).collect())
    }

    /// The terminal, for messages and for steps that are not recorded.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Waits until all records are on the disk itself, as a checkpoint is.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.log.sync()
    }

    /// Draws the curves of all records so far to `loss.svg` in the run folder and returns its path.
    ///
    /// # Errors
    /// When the records cannot be read or the picture cannot be written.
    pub fn draw(&self, title: &str) -> Result<PathBuf> {
        let records = MetricLog::read(&self.run.join("metrics.jsonl"))?;
        let path = self.run.join("loss.svg");
        write_whole(&path, &loss_curves(&records, title).to_svg())?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(folder: &Path, resumed: Option<u64>, steps: std::ops::RangeInclusive<u64>) {
        let resumed = resumed.map(|step| Resumed { step, skipped: Vec::new() });
        let mut telemetry = Telemetry::open(folder, resumed.as_ref(), 10).unwrap();
        for step in steps {
            let loss = 10.0 / step as f64;
            telemetry.record(&Record::Training(Training { step, loss, ..Training::default() })).unwrap();
            if step % 5 == 0 {
                let set = "books".to_string();
                telemetry
                    .record(&Record::Validation(Validation { step, set, loss, ..Default::default() }))
                    .unwrap();
            }
        }
        telemetry.sync().unwrap();
        telemetry.draw("a run").unwrap();
    }

    #[test]
    fn a_resumed_run_leaves_the_log_and_picture_of_an_uninterrupted_one() {
        let (straight, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        run(straight.path(), None, 1..=10);
        run(broken.path(), None, 1..=7);
        run(broken.path(), Some(5), 6..=10);
        for file in ["metrics.jsonl", "loss.svg"] {
            let read = |run: &Path| std::fs::read_to_string(run.join(file)).unwrap();
            assert_eq!(read(straight.path()), read(broken.path()), "{file}");
        }
        assert!(
            std::fs::read_to_string(broken.path().join("loss.svg"))
                .unwrap()
                .contains("validation, books 1.000")
        );
        // TensorBoard's files are never rewritten: one for each start.
        let names = std::fs::read_dir(broken.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert_eq!(names.filter(|name| name.to_string_lossy().contains("tfevents")).count(), 2);
    }

    #[test]
    fn a_roll_back_shortens_the_log_even_where_nothing_can_be_kept() {
        let folder = tempfile::tempdir().unwrap();
        run(folder.path(), None, 1..=7);
        let resumed = Resumed { step: 7, skipped: Vec::new() };
        let mut telemetry = Telemetry::open(folder.path(), Some(&resumed), 10).unwrap();
        // A file where a folder has to be.
        let aside = folder.path().join("loss.svg/later.jsonl");
        let failed = telemetry.rewind(5, 10, &aside).unwrap();
        assert!(matches!(&failed[..], [one] if one.to_string().contains("loss.svg")), "{failed:?}");
        let steps =
            |path: &Path| -> Vec<u64> { MetricLog::read(path).unwrap().iter().map(Record::step).collect() };
        let log = folder.path().join("metrics.jsonl");
        assert_eq!(steps(&log), [1, 2, 3, 4, 5, 5]);
        let aside = folder.path().join("trouble/later.jsonl");
        assert!(telemetry.rewind(3, 10, &aside).unwrap().is_empty());
        assert_eq!((steps(&log), steps(&aside)), (vec![1, 2, 3], vec![4, 5, 5]));
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Telemetry::open(&folder.path().join("gone"), None, 1).unwrap_err().to_string();
        assert!(error.contains("gone"), "{error}");
    }
}
