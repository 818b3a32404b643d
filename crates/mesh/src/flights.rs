//! Exchanges that devices do themselves, as the reactor sees them: it moves none of their bytes, but it knows who waits for whom, and
//! ends them when a rank is lost. It never waits for a device, and so holds nothing of one and asks it nothing: what is over
//! it learns from the [watcher](crate::watcher).

use crate::frame::Header;
use crate::label::{Label, Operation};
use crate::trace::Trace;
use ferropt_device::{DType, Link};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often it is looked whether links are aborted.
const PRECISION: Duration = Duration::from_millis(1);

/// Exchanges of a group that were started together.
pub(crate) struct Exchanged {
    pub(crate) group: &'static str,
    pub(crate) parts: Vec<Part>,
    /// Ranks of the world that they wait for.
    pub(crate) others: Vec<usize>,
    pub(crate) posted: Instant,
    over: AtomicBool,
}

/// One of them.
pub(crate) struct Part {
    pub(crate) operation: Operation,
    pub(crate) label: Label,
    pub(crate) dtype: DType,
    /// Bytes of the memory, and of those that this rank sends.
    pub(crate) len: usize,
    pub(crate) sent: usize,
}

impl Exchanged {
    /// Exchanges that start now; there is at least one.
    pub(crate) fn now(group: &'static str, parts: Vec<Part>, others: Vec<usize>) -> Exchanged {
        Exchanged { group, parts, others, posted: Instant::now(), over: AtomicBool::new(false) }
    }

    /// They are over.
    pub(crate) fn end(&self, trace: &Trace) {
        for part in &self.parts {
            trace.communication(part.operation, self.group, part.label, part.sent, self.posted);
        }
        self.over.store(true, Ordering::Release);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    fn describe(&self) -> String {
        let of = |part: &Part| {
            Header::data(part.operation, self.group, part.label, Some(part.dtype), part.len).describe()
        };
        match &self.parts[..] {
            [first] => of(first),
            [first, more @ ..] => format!("{}, and {} more", of(first), more.len()),
            [] => "nothing".into(),
        }
    }
}

/// Links of this rank, and what is under way on them.
#[derive(Default)]
pub(crate) struct Flights {
    links: Vec<Weak<dyn Link>>,
    under_way: Vec<Arc<Exchanged>>,
    aborting: Vec<JoinHandle<()>>,
}

impl Flights {
    pub(crate) fn open(&mut self, link: Weak<dyn Link>) {
        self.links.retain(|link| link.strong_count() > 0);
        self.links.push(link);
    }

    pub(crate) fn start(&mut self, exchanged: Arc<Exchanged>) {
        self.under_way.push(exchanged);
    }

    /// Lets go of what is over.
    pub(crate) fn settle(&mut self) {
        self.under_way.retain(|exchanged| !exchanged.is_over());
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// The oldest exchange that waits for a rank.
    pub(crate) fn waits_for(&self, rank: usize) -> Option<String> {
        self.under_way.iter().find(|e| e.others.contains(&rank)).map(|e| e.describe())
    }

    /// An exchange that has been waiting for longer than others may be waited for, and what is wrong with a link; told once.
    pub(crate) fn trouble(&self, now: Instant, patience: Duration) -> Option<String> {
        let waited = |e: &&Arc<Exchanged>| now.saturating_duration_since(e.posted) > patience;
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
