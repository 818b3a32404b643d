//! A line of the log for each request, and what the metrics count of it.

use crate::app::{App, Busy};
use crate::keys::Use;
use serde_json::{Map, Value, json};
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where lines of the log go.
pub struct Log {
    out: Option<Mutex<Box<dyn Write + Send>>>,
    /// Whether prompts and texts are in it.
    texts: bool,
}

impl Log {
    /// JSON objects, one a line, into `out`. Prompts and texts are only in it when `texts` says so.
    pub fn new(out: impl Write + Send + 'static, texts: bool) -> Log {
        Log { out: Some(Mutex::new(Box::new(out))), texts }
    }

    /// No log.
    pub fn off() -> Log {
        Log { out: None, texts: false }
    }

    /// Writes a line: `time` in seconds since 1970, `event`, and what else there is.
    pub(crate) fn line(&self, event: &str, more: Value) {
        let Some(out) = &self.out else { return };
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let mut line = json!({ "time": time, "event": event });
        if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
            line.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
        }
        let mut out = out.lock().unwrap_or_else(PoisonError::into_inner);
        // A log that cannot be written must not stop the service.
        let _ = out.write_all(format!("{line}\n").as_bytes()).and_then(|_| out.flush());
    }

    /// Whether prompts and texts are in it.
    pub(crate) fn has_texts(&self) -> bool {
        self.texts && self.out.is_some()
    }
}

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
    /// Under which key's limits it is.
    under: OnceLock<Use>,
    _busy: Busy,
}

#[derive(Default)]
struct Notes {
    status: Option<u16>,
    code: Option<&'static str>,
    /// Whether the answer was given to the client in full.
    complete: bool,
    more: Map<String, Value>,
}

impl Record {
    pub(crate) fn new(app: Arc<App>, route: &'static str, method: &str) -> Record {
        let id = format!("{:016x}", app.random());
        let busy = app.busy();
        let (notes, under) = (Mutex::default(), OnceLock::new());
        let record = Record { app, id, started: Instant::now(), route, notes, under, _busy: busy };
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

    /// Adds the time since the request came, unless it is there.
    pub(crate) fn note_time(&self, name: &str) -> Duration {
        let time = self.started.elapsed();
        self.with(|notes| {
            notes.more.entry(name).or_insert_with(|| time.as_secs_f64().into());
        });
        time
    }

    /// Counts it under a key's limits until it is over.
    pub(crate) fn is_under(&self, limits: Use) {
        // A request has one key.
        let _ = self.under.set(limits);
    }

    pub(crate) fn status(&self, status: u16) {
        self.with(|notes| notes.status = Some(status));
    }

    pub(crate) fn error(&self, code: &'static str) {
        self.with(|notes| notes.code = Some(code));
    }

    /// The answer was made in full.
    pub(crate) fn complete(&self) {
        self.with(|notes| notes.complete = true);
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
        if let Some(line) = line.as_object_mut() {
            line.extend(notes.more);
        }
        self.app.log.line("request", line);
    }
}
