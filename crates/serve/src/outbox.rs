//! Answers on their way out: how much memory those may have that clients have not taken in yet.
//!
//! Nobody waits for a slow client: the engine goes on with others, and what it made is kept until the client takes it in. Would
//! all of it be kept, a few clients that take in nothing could have all memory. So when there is too much, the connection is
//! closed whose client has taken in nothing for longest, and whatever is kept for it is gone.

use crate::app::Busy;
use crate::metrics::Counters;
use axum::body::Bytes;
use prometheus_client::metrics::gauge::Gauge;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Instant;
use tokio::sync::Notify;

/// All answers that were not taken in.
pub(crate) struct Outbox {
    /// Bytes that they may have, and that they have.
    limit: usize,
    kept: Gauge,
    /// Clients that were left, by what was short.
    slow: Counters,
    readers: Mutex<Vec<Weak<Reader>>>,
    begun: Instant,
}

/// The client of a connection, as one that takes in answers.
pub(crate) struct Reader {
    outbox: Arc<Outbox>,
    /// Bytes that are kept for it.
    kept: AtomicUsize,
    /// Microseconds after the beginning: when it took something in last, or there was something for it again.
    since: AtomicU64,
    is_left: AtomicBool,
    left: Notify,
}

/// Bytes that are kept for a reader until this is dropped.
pub(crate) struct Kept {
    reader: Arc<Reader>,
    bytes: usize,
}

impl Outbox {
    /// Of `limit` bytes, with those that are kept in a gauge, and a counter of clients that are left.
    pub(crate) fn new(limit: usize, kept: Gauge, slow: Counters) -> Arc<Outbox> {
        Arc::new(Outbox { limit, kept, slow, readers: Mutex::default(), begun: Instant::now() })
    }

    /// The client of a new connection.
    pub(crate) fn reader(self: &Arc<Self>) -> Arc<Reader> {
        let reader = Arc::new(Reader {
            outbox: self.clone(),
            kept: AtomicUsize::new(0),
            since: AtomicU64::new(0),
            is_left: AtomicBool::new(false),
            left: Notify::new(),
        });
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.retain(|reader| reader.strong_count() > 0);
        readers.push(Arc::downgrade(&reader));
        reader
    }

    /// Leaves the slowest readers until what is kept for the others is not too much.
    fn make_room(&self) {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut waiting: Vec<Arc<Reader>> = readers.iter().filter_map(Weak::upgrade).collect();
        // What was kept for those that are left is about to be gone.
        waiting.retain(|reader| !reader.is_left.load(Ordering::Relaxed) && reader.kept() > 0);
        waiting.sort_by_key(|reader| reader.since.load(Ordering::Relaxed));
        let mut kept: usize = waiting.iter().map(|reader| reader.kept()).sum();
        for slowest in waiting {
            if kept <= self.limit {
                return;
            }
            kept = kept.saturating_sub(slowest.kept());
            slowest.is_left.store(true, Ordering::Relaxed);
            slowest.left.notify_one();
            self.count("memory");
        }
    }

    fn count(&self, short: &str) {
        self.slow.get_or_create(&vec![("reason", short.to_string())]).inc();
    }
}

impl Reader {
    /// Bytes that are kept for it.
    pub(crate) fn kept(&self) -> usize {
        self.kept.load(Ordering::Relaxed)
    }

    /// Notes that it took something in.
    pub(crate) fn took(&self) {
        let now = self.outbox.begun.elapsed().as_micros();
        self.since.store(u64::try_from(now).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Counts that its connection is closed because it took nothing in for as long as it may.
    pub(crate) fn ran_out_of_time(&self) {
        self.outbox.count("time");
    }

    /// Waits until its connection is to be closed for what is kept for it.
    pub(crate) async fn left(&self) {
        self.left.notified().await;
    }

    /// Counts bytes that are kept for it from now on; if all are too many, the slowest reader is left.
    pub(crate) fn keep(self: &Arc<Self>, bytes: usize) -> Kept {
        if self.kept() == 0 {
            self.took();
        }
        self.kept.fetch_add(bytes, Ordering::Relaxed);
        let all = self.outbox.kept.inc_by(bytes as i64) as usize + bytes;
        if all > self.outbox.limit {
            self.outbox.make_room();
        }
        Kept { reader: self.clone(), bytes }
    }

    /// A part of an answer, which counts, and keeps its request busy, until all of it is taken in, or the connection is closed.
    pub(crate) fn send(self: &Arc<Self>, text: String, busy: &Arc<Busy>) -> Bytes {
        let kept = self.keep(text.capacity());
        Bytes::from_owner(Part { text, _kept: kept, _busy: busy.clone() })
    }
}

/// What [`Reader::send`] gives, for as long as any of it is in memory.
struct Part {
    text: String,
    _kept: Kept,
    _busy: Arc<Busy>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.reader.kept.fetch_sub(self.bytes, Ordering::Relaxed);
        self.reader.outbox.kept.dec_by(self.bytes as i64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;
    use std::time::Duration;

    #[test]
    fn who_took_nothing_in_for_longest_is_left() {
        let (gauge, slow_clients) = (Gauge::default(), Counters::default());
        let outbox = Outbox::new(100, gauge.clone(), slow_clients.clone());
        let [idle, slow, slower, late] = [(); 4].map(|()| outbox.reader());
        let pause = || sleep(Duration::from_millis(2));
        let is_left = |reader: &Reader| reader.is_left.load(Ordering::Relaxed);
        let first = slow.keep(40);
        pause();
        let in_flight = Arc::default();
        let second = slower.send("x".repeat(60), &Busy::new(&in_flight));
        pause();
        slow.took();
        assert_eq!((gauge.get(), is_left(&slow), is_left(&slower)), (100, false, false));
        let third = late.keep(30);
        assert_eq!([&idle, &slow, &slower, &late].map(|reader| is_left(reader)), [false, false, true, false]);
        // Its own are not gone yet, and nobody else has to leave for that.
        let fourth = late.keep(30);
        assert!(!is_left(&slow));
        let part = second.slice(10..20);
        drop(second);
        assert_eq!(gauge.get(), 160, "a part keeps the whole in memory");
        assert_eq!(in_flight.load(Ordering::Relaxed), 1, "and its request busy");
        drop((first, part, third));
        assert_eq!(in_flight.load(Ordering::Relaxed), 0);
        assert_eq!((gauge.get(), slow.kept(), late.kept()), (30, 0, 30));
        drop(fourth);
        let alone = idle.keep(101);
        assert!(is_left(&idle));
        drop(alone);
        assert_eq!(gauge.get(), 0);
        idle.ran_out_of_time();
        let count = |reason: &str| slow_clients.get_or_create(&vec![("reason", reason.into())]).get();
        assert_eq!((count("memory"), count("time")), (2, 1));
    }
}
