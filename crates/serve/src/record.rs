//! A line of the log for each request, and what the metrics count of it.

use crate::app::{App, Busy};
use crate::error::ApiError;
use crate::keys::Use;
use serde_json::map::Entry;
use serde_json::{Map, Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Routes whose requests are logged when they are refused only.
const ASKED_OFTEN: [&str; 5] = ["/health", "/ready", "/metrics", "/", "/page/{*file}"];

/// What is known of a request. When the last holder drops it, the request is over: it is logged and counted.
pub(crate) struct Record {
    app: Arc<App>,
    /// Names the request in the log, in its answer and in the header `x-request-id`.
    pub(crate) id: String,
    pub(crate) started: Instant,
    /// The route's path as the OpenAPI page writes it.
    route: &'static str,
    notes: Mutex<Notes>,
    pub(crate) tokens: Arc<Tokens>,
    /// Kept by parts of its answer, too, which are sent when the request is over here.
    pub(crate) busy: Arc<Busy>,
}

/// Tokens that were computed for a request, also for one that is given up.
#[derive(Default)]
pub(crate) struct Tokens {
    pub(crate) prompt: AtomicUsize,
    pub(crate) generated: AtomicUsize,
}

#[derive(Default)]
struct Notes {
    status: Option<u16>,
    code: Option<&'static str>,
    /// Whether the answer was given to the client in full.
    complete: bool,
    /// Under which key's limits it is.
    under: Option<Use>,
    more: Map<String, Value>,
}

impl Record {
    pub(crate) fn new(app: Arc<App>, route: &'static str, method: &str) -> Record {
        let id = format!("{:016x}", app.random());
        let busy = app.busy();
        let (notes, tokens) = (Mutex::default(), Arc::default());
        let record = Record { app, id, started: Instant::now(), route, notes, tokens, busy };
        record.note("method", method);
        record
    }

    fn with<R>(&self, change: impl FnOnce(&mut Notes) -> R) -> R {
        change(&mut self.notes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds something to the line.
    pub(crate) fn note(&self, name: &str, value: impl Into<Value>) {
        self.with(|notes| notes.more.insert(name.into(), value.into()));
    }

    /// Adds the time since the request came, in seconds, and returns it; nothing if it was there.
    pub(crate) fn note_time(&self, name: &str) -> Option<f64> {
        self.with(|notes| match notes.more.entry(name) {
            Entry::Occupied(_) => None,
            Entry::Vacant(place) => {
                let seconds = self.started.elapsed().as_secs_f64();
                place.insert(seconds.into());
                Some(seconds)
            }
        })
    }

    /// Counts it under a key's limits until its answer was made in full, or it is over.
    pub(crate) fn is_under(&self, limits: Use) {
        self.with(|notes| notes.under = Some(limits));
    }

    pub(crate) fn status(&self, status: u16) {
        self.with(|notes| notes.status = Some(status));
    }

    pub(crate) fn error(&self, error: &ApiError) {
        self.with(|notes| notes.code = Some(error.code));
        if let Some(param) = &error.param {
            self.note("param", param.as_str());
        }
    }

    /// The answer was made in full. Its key may be used for the next one, which can come before all who hold this record, on other
    /// threads, have dropped it.
    pub(crate) fn complete(&self) {
        self.with(|notes| {
            notes.complete = true;
            notes.under = None;
        });
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f64();
        let notes = std::mem::take(self.notes.get_mut().unwrap_or_else(PoisonError::into_inner));
        let code = notes.code.or((!notes.complete).then_some("client_left"));
        // As nginx counts those who leave before there is a status.
        let status = notes.status.unwrap_or(499);
        self.app.metrics.answered(self.route, status, seconds, code);
        // Probes ask every second or so, and the web page is many files; they would bury the rest.
        if ASKED_OFTEN.contains(&self.route) && code.is_none() {
            return;
        }
        let mut line = json!({ "id": self.id, "route": self.route, "status": status, "seconds": seconds, "error": code });
        let count = |tokens: &AtomicUsize| tokens.load(Ordering::Relaxed);
        let (prompt, generated) = (count(&self.tokens.prompt), count(&self.tokens.generated));
        if let Some(line) = line.as_object_mut() {
            line.extend(notes.more);
            // Otherwise nothing was computed.
            if prompt > 0 {
                line.insert("prompt_tokens".into(), prompt.into());
                line.insert("generated_tokens".into(), generated.into());
            }
        }
        self.app.log.line("request", line);
    }
}
