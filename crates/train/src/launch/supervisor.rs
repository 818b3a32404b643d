//! Starts a run again until it is done.

use super::AGAIN;
use super::group::{Failure, Group};
use crate::checkpoint::Store;
use crate::logbook::Logbook;
use crate::signals::Stop;
use anyhow::Result;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How to supervise.
pub struct Supervision<'f> {
    /// The run folder.
    pub run: PathBuf,
    /// Starts without progress, one after the other, after which it is no use.
    pub restarts: u32,
    /// Fewest ranks to go on with when some cannot be started; the number of ranks for all or none.
    pub min_ranks: usize,
    /// Wait before the first start without progress; it doubles with each, up to a minute.
    pub backoff: Duration,
    /// Which of the run's ranks a process is that is supervised alone, as far as that is known before it starts. Each rank
    /// then has its own supervisor, and that of the first one keeps the logbook.
    pub rank: Option<usize>,
    /// Whether so many ranks can share out the work.
    pub fits: Box<dyn Fn(usize) -> bool + 'f>,
}

/// Longest wait before a start.
const LONGEST: Duration = Duration::from_secs(60);

/// A start without a step that ends so soon has not begun to work.
const EARLY: Duration = Duration::from_secs(60);

/// Runs `group` until all ranks are done, somebody asks to stop, a rank fails in a way that would repeat itself, or so
/// many starts in a row have not brought the run on. A new checkpoint is progress. Returns the status to end with;
/// `say` gets a line for each thing done.
///
/// # Errors
/// As [`Group::run`].
pub fn supervise(
    mut group: Group,
    how: &Supervision<'_>,
    stop: &Stop,
    say: &mut dyn FnMut(&str),
) -> Result<u8> {
    let mut idle = 0;
    loop {
        let (before, started) = (progress(&how.run), Instant::now());
        let Some(failure) = group.run(stop)? else { return Ok(0) };
        let what = group.describe(&failure);
        say(&what);
        if stop.requested() || !failure.end.may_start_again() {
            return Ok(failure.end.status());
        }
        let now = progress(&how.run);
        idle = if now == before { idle + 1 } else { 0 };
        let early = now == before && started.elapsed() < EARLY;
        let next = if idle >= 2 && early { fewer(&group, how) } else { None };
        let text = format!(
            "{}. {}",
            what.replace('\n', "\n  ").trim_end_matches('.'),
            match (idle > how.restarts, next) {
                (true, _) => format!("{} starts brought the run no further; it is not started again", idle),
                (false, None) => "All ranks are started again from the last checkpoint".into(),
                (false, Some(ranks)) => {
                    format!("The run goes on with {ranks} ranks from the last checkpoint")
                }
            }
        );
        if group.ranks.is_some() || how.rank == Some(0) {
            enter(&how.run, &failure, &text);
        }
        if idle > how.restarts {
            say(&format!("{idle} starts brought the run no further"));
            return Ok(AGAIN);
        }
        if next.is_some() {
            group.ranks = next;
            idle = 0;
        }
        let wait = (how.backoff * 2u32.saturating_pow(idle.saturating_sub(1))).min(LONGEST);
        say(&format!("starting again in {:.0} s", wait.as_secs_f64()));
        let until = Instant::now() + wait;
        while Instant::now() < until {
            if stop.requested() {
                return Ok(if stop.terminated() { AGAIN } else { 0 });
            }
            std::thread::sleep(Duration::from_millis(20).min(wait));
        }
    }
}

/// The next smaller number of ranks that may do.
fn fewer(group: &Group, how: &Supervision<'_>) -> Option<usize> {
    (how.min_ranks.max(1)..group.ranks?).rev().find(|&ranks| (how.fits)(ranks))
}

/// What changes when the run gets on: its newest checkpoint that is there.
fn progress(run: &Path) -> Option<(u64, u64)> {
    let list = Store::open(run).and_then(|store| store.list()).unwrap_or_default();
    list.iter().rfind(|entry| entry.damage.is_none()).map(|entry| (entry.rollbacks, entry.step))
}

/// Writes into the logbook of a run that no rank works at.
fn enter(run: &Path, failure: &Failure, text: &str) {
    let step = progress(run).map_or(0, |(_, step)| step);
    let figures = json!({ "rank": failure.rank, "how": failure.end.to_string() });
    // The run may not have a folder yet, or be on a full disk; its people see it on the terminal.
    let _ = Logbook::open(run).and_then(|mut book| book.add(step, "rank-lost", text, figures));
}
