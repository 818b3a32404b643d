//! What all requests share.

use crate::body::Room;
use crate::keys::Keys;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::models::Models;
use crate::outbox::Outbox;
use crate::tls::Tls;
use crate::{Options, THREADS};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{Semaphore, watch};

/// What a request, a client and the server may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Prompts that may wait for one model, of all clients together. A request has a quarter of them at most.
    pub queue: usize,
    /// How long a request may wait for its turn.
    pub queue_time: Duration,
    /// How long a request may take, waiting included.
    pub request_time: Duration,
    /// Texts of a request, over all of its prompts.
    pub texts: usize,
    /// Bytes of a request's body.
    pub body: usize,
    /// Bytes of memory for the bodies of all requests while they are received and read.
    pub body_memory: usize,
    /// Bytes of memory for answers, and parts of them, that clients have not taken in.
    pub answer_memory: usize,
    /// How long a client may take for the handshake of TLS, to send headers, to send a body, or to take in what is sent to it.
    pub client_time: Duration,
    /// A stream that has nothing else to send has a comment so often, which keeps proxies from closing its connection.
    pub silence: Duration,
    /// Connections at one time, apart from a few more on which only probes are answered.
    pub connections: usize,
    /// Connections of one address, or of one network of 2^64 addresses of IPv6, at one time.
    pub client_connections: usize,
}

impl Default for Limits {
    /// For clients that are people or programs of one team.
    fn default() -> Self {
        Limits {
            queue: 256,
            queue_time: Duration::from_secs(60),
            request_time: Duration::from_secs(600),
            texts: 2048,
            body: 4 << 20,
            body_memory: 256 << 20,
            answer_memory: 512 << 20,
            client_time: Duration::from_secs(30),
            silence: Duration::from_secs(15),
            connections: 1024,
            client_connections: 768,
        }
    }
}

impl Limits {
    /// No time is longer than this: a deadline must be a moment that the system can tell.
    pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 60 * 60);

    /// With times that can be waited for.
    pub(crate) fn possible(self) -> Limits {
        Limits {
            queue_time: self.queue_time.min(Self::LONGEST),
            request_time: self.request_time.min(Self::LONGEST),
            client_time: self.client_time.min(Self::LONGEST),
            silence: self.silence.min(Self::LONGEST),
            ..self
        }
    }
}

/// How far the server's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Takes requests.
    Serving,
    /// Completes those that it has.
    Draining,
    /// Ends what is left.
    Ending,
}

pub(crate) struct App {
    pub(crate) models: Models,
    pub(crate) keys: Keys,
    /// How connections are encrypted, if they are.
    pub(crate) tls: Option<Tls>,
    /// Origins of web pages that may use the API.
    pub(crate) cors: Vec<String>,
    /// Names by which clients on the same machine may call it.
    pub(crate) allowed_hosts: Vec<String>,
    /// Whether `/metrics` needs no key.
    pub(crate) open_metrics: bool,
    /// Whether prompts of one key may be found in the cache by those of another.
    pub(crate) share_prefixes: bool,
    pub(crate) limits: Limits,
    /// Where bodies of requests are kept until they are read.
    pub(crate) bodies: Room,
    /// Where answers are kept until clients take them in.
    pub(crate) outbox: Arc<Outbox>,
    /// `/tokenize` takes so many long texts at a time: each takes a thread, and some times its own memory.
    pub(crate) long_texts: Semaphore,
    pub(crate) metrics: Metrics,
    pub(crate) log: Log,
    pub(crate) phase: watch::Sender<Phase>,
    in_flight: Arc<AtomicUsize>,
    random: RandomState,
    numbers: AtomicU64,
}

/// A request whose answer was not taken in completely; the drain waits for it.
pub(crate) struct Busy(Arc<AtomicUsize>);

impl App {
    /// With `models` in place of those that the options have.
    pub(crate) fn new(models: Models, options: Options) -> App {
        let Options { keys, tls, cors, allowed_hosts, open_metrics, share_prefixes, limits, log, .. } =
            options;
        let metrics = Metrics::new();
        App {
            models,
            keys,
            tls,
            cors,
            allowed_hosts,
            open_metrics,
            share_prefixes,
            limits: limits.possible(),
            bodies: Room::new(limits.body_memory, metrics.body_memory.clone()),
            outbox: Outbox::new(
                limits.answer_memory,
                metrics.answer_memory.clone(),
                metrics.slow_clients.clone(),
            ),
            long_texts: Semaphore::new(THREADS),
            metrics,
            log,
            phase: watch::Sender::new(Phase::Serving),
            in_flight: Arc::default(),
            random: RandomState::new(),
            numbers: AtomicU64::new(0),
        }
    }

    /// Counts a request until what this returns is dropped.
    pub(crate) fn busy(&self) -> Arc<Busy> {
        Busy::new(&self.in_flight)
    }

    /// Requests whose answers were not taken in completely.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// A number that nobody can foresee and that does not come again soon: for seeds and the names of answers.
    pub(crate) fn random(&self) -> u64 {
        self.random.hash_one(self.numbers.fetch_add(1, Ordering::Relaxed))
    }
}

impl Busy {
    /// Counts one.
    pub(crate) fn new(in_flight: &Arc<AtomicUsize>) -> Arc<Busy> {
        in_flight.fetch_add(1, Ordering::SeqCst);
        Arc::new(Busy(in_flight.clone()))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
