//! Exchanges that devices do themselves, as the reactor sees them: it moves none of their bytes, but it knows who waits for whom,
//! tells the trace when they are over, and ends them when a rank is lost.

use crate::frame::Header;
use crate::label::{Label, Operation};
use crate::trace::Trace;
use ferropt_device::{DType, Link, Watch};
use std::sync::Weak;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often the end of an exchange is looked for, for a trace.
const PRECISION: Duration = Duration::from_millis(1);

/// An exchange that was started.
pub(crate) struct Exchanged {
    pub(crate) operation: Operation,
    pub(crate) group: &'static str,
    pub(crate) label: Label,
    pub(crate) dtype: DType,
    /// Bytes of the memory, and of those that this rank sends.
    pub(crate) len: usize,
    pub(crate) sent: usize,
    /// Ranks of the world that it waits for.
    pub(crate) others: Vec<usize>,
    pub(crate) posted: Instant,
    pub(crate) watch: Watch,
}

impl Exchanged {
    fn describe(&self) -> String {
        Header::data(self.operation, self.group, self.label, Some(self.dtype), self.len).describe()
    }
}

/// Links of this rank, and what is under way on them.
#[derive(Default)]
pub(crate) struct Flights {
    links: Vec<Weak<dyn Link>>,
    under_way: Vec<Exchanged>,
    aborting: Vec<JoinHandle<()>>,
}

impl Flights {
    pub(crate) fn open(&mut self, link: Weak<dyn Link>) {
        self.links.retain(|link| link.strong_count() > 0);
        self.links.push(link);
    }

    pub(crate) fn start(&mut self, exchanged: Exchanged) {
        self.under_way.push(exchanged);
    }

    /// Lets go of what is over. Memory that nobody waited for is given back with it.
    pub(crate) fn settle(&mut self, trace: &Trace) {
        self.under_way.retain(|e| {
            let over = e.watch.is_over();
            if over {
                trace.communication(e.operation, e.group, e.label, e.sent, e.posted);
            }
            !over
        });
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// How long the reactor may sleep.
    pub(crate) fn rest(&self, trace: &Trace) -> Duration {
        if self.under_way.is_empty() || !trace.records() { Duration::MAX } else { PRECISION }
    }

    /// The oldest exchange that waits for a rank.
    pub(crate) fn waits_for(&self, rank: usize) -> Option<String> {
        self.under_way.iter().find(|e| e.others.contains(&rank)).map(Exchanged::describe)
    }

    /// An exchange that has been waiting for longer than others may be waited for, and what is wrong with a link; told once.
    pub(crate) fn trouble(&self, now: Instant, patience: Duration) -> Option<String> {
        let waited = |e: &&Exchanged| now.saturating_duration_since(e.posted) > patience;
        if let Some(late) = self.under_way.iter().find(waited) {
            let (what, others) = (late.describe(), &late.others);
            return Some(format!(
                "for {:.0} s this rank waits for {what}, and one of the ranks {others:?}, which are alive, does not take part",
                patience.as_secs_f64()
            ));
        }
        let failed = self.links.iter().filter_map(Weak::upgrade).find_map(|link| link.check().err())?;
        let during = match self.under_way.first() {
            Some(first) => format!("{} failed", first.describe()),
            None => "an exchange between devices failed".into(),
        };
        Some(format!("{during}: {failed:#}"))
    }

    /// Ends everything that is under way. A link may have to wait until its device has done what waits for another link, so
    /// each has a thread.
    pub(crate) fn abort(&mut self) {
        for link in self.links.drain(..).filter_map(|link| link.upgrade()) {
            let thread = std::thread::Builder::new().name("abort".into());
            // Without a thread it hangs until the process ends.
            self.aborting.extend(thread.spawn(move || link.abort()).ok());
        }
    }

    /// Waits until that is done, so that the process does not end in the middle of it.
    pub(crate) fn part(&mut self, at_most: Duration) {
        let started = Instant::now();
        while self.aborting.iter().any(|thread| !thread.is_finished()) && started.elapsed() < at_most {
            std::thread::sleep(PRECISION);
        }
    }
}
