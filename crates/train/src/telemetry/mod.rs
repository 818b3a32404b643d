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
pub use jsonl::MetricLog;
pub use memory::peak_resident_bytes;
pub use plot::{Plot, Scale, Series, Style, loss_curves};
pub use progress::Progress;
pub use record::{Record, Training, Validation};
pub use tensorboard::EventFile;

use anyhow::{Context, Result};
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
    /// Opens the outputs of the run in folder `run`, which is to make `steps` steps and continues after
    /// `resumed` (`None` when it begins; what an earlier start left without a checkpoint is then dropped).
    ///
    /// # Errors
    /// When a file cannot be written, or `metrics.jsonl` is damaged.
    pub fn open(run: &Path, resumed: Option<u64>, steps: u64) -> Result<Telemetry> {
        Ok(Telemetry {
            run: run.into(),
            log: MetricLog::open(&run.join("metrics.jsonl"), resumed)?,
            events: EventFile::create(run, resumed)?,
            progress: Progress::start(resumed.unwrap_or(0), steps),
        })
    }

    /// Shows and keeps a record. Everything about a step must be recorded before its checkpoint is saved, or a run
    /// that is resumed from there would lack it.
    ///
    /// # Errors
    /// When a file cannot be written (a full disk); the files stay readable and training may go on.
    pub fn record(&mut self, record: &Record) -> Result<()> {
        self.progress.show(record);
        self.log.append(record)?;
        self.events.scalars(record.step(), &record.scalars())
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
        std::fs::write(&path, loss_curves(&records, title).to_svg())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}
