//! When this rank computed and when it communicated, as a Chrome trace, which Perfetto and Chrome show
//! (<https://ui.perfetto.dev>).

use crate::label::{Label, Operation};
use anyhow::{Context, Result};
use std::fmt::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Spans of time, once it is started. Clones share them.
#[derive(Clone, Default)]
pub struct Trace(Arc<Mutex<Option<Recording>>>);

struct Recording {
    rank: usize,
    /// The same moment on both clocks: the ranks of a machine, and those whose clocks are set, share the second.
    started: Instant,
    clock: f64,
    events: Vec<Event>,
}

struct Event {
    name: String,
    lane: Lane,
    start: Instant,
    end: Instant,
    bytes: Option<usize>,
}

#[derive(Clone, Copy)]
enum Lane {
    Compute = 0,
    Communication = 1,
}

/// Ends a span of computing when dropped.
pub struct Span(Option<(Trace, Label, Instant)>);

impl Trace {
    /// Records from now on, as this rank.
    pub fn start(&self, rank: usize) {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let clock = since.as_secs_f64() * 1e6;
        *self.lock() = Some(Recording { rank, started: Instant::now(), clock, events: Vec::new() });
    }

    /// Computing on this thread, until the span is dropped. Costs next to nothing unless the trace records.
    pub fn span(&self, label: Label) -> Span {
        Span(self.lock().is_some().then(|| (self.clone(), label, Instant::now())))
    }

    /// Whether it does.
    pub(crate) fn records(&self) -> bool {
        self.lock().is_some()
    }

    /// An operation of the reactor, from when it was posted until now.
    pub(crate) fn communication(
        &self,
        operation: Operation,
        group: &str,
        label: Label,
        bytes: usize,
        posted: Instant,
    ) {
        if let Some(recording) = &mut *self.lock() {
            let name = format!("{operation} of {label} ({group})");
            recording.add(name, Lane::Communication, posted, Some(bytes));
        }
    }

    /// Writes what was recorded, and records no more. Files of several ranks may be put together with [`Trace::merge`].
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let recording = self.lock().take();
        let text = recording.map_or_else(|| "[]".into(), |recording| recording.json());
        std::fs::write(path, text).with_context(|| format!("cannot write the trace {}", path.display()))
    }

    /// Puts the traces of several ranks into one file.
    ///
    /// # Errors
    /// When a file cannot be read, or the result cannot be written.
    pub fn merge(traces: &[&Path], into: &Path) -> Result<()> {
        let mut parts = Vec::new();
        for path in traces {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the trace {}", path.display()))?;
            let inner = text.trim().trim_start_matches('[').trim_end_matches(']').trim().to_string();
            parts.extend(Some(inner).filter(|inner| !inner.is_empty()));
        }
        std::fs::write(into, format!("[\n{}\n]\n", parts.join(",\n")))
            .with_context(|| format!("cannot write the trace {}", into.display()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Recording>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recording {
    fn add(&mut self, name: String, lane: Lane, start: Instant, bytes: Option<usize>) {
        self.events.push(Event { name, lane, start, end: Instant::now(), bytes });
    }

    fn json(&self) -> String {
        let rank = self.rank;
        let mut out = format!(
            "[\n{{\"ph\":\"M\",\"pid\":{rank},\"name\":\"process_name\",\"args\":{{\"name\":\"rank {rank}\"}}}}"
        );
        for (lane, name) in [(Lane::Compute, "compute"), (Lane::Communication, "communication")] {
            let lane = lane as usize;
            let name = format!(
                "{{\"ph\":\"M\",\"pid\":{rank},\"tid\":{lane},\"name\":\"thread_name\",\"args\":{{\"name\":\"{name}\"}}}}"
            );
            let _ = write!(out, ",\n{name}"); // a String takes everything
        }
        for (number, event) in self.events.iter().enumerate() {
            let at = |moment: Instant| {
                self.clock + moment.saturating_duration_since(self.started).as_secs_f64() * 1e6
            };
            let (start, end, lane) = (at(event.start), at(event.end), event.lane as usize);
            let args = event.bytes.map_or(String::new(), |bytes| format!(",\"args\":{{\"bytes\":{bytes}}}"));
            let name = &event.name;
            // Operations overlap, so each is a pair of asynchronous events, known by a number that no other rank has; computing is
            // nested.
            let text = match event.lane {
                Lane::Compute => format!(
                    "{{\"ph\":\"X\",\"pid\":{rank},\"tid\":{lane},\"name\":\"{name}\",\"ts\":{start:.1},\"dur\":{:.1}}}",
                    end - start
                ),
                Lane::Communication => {
                    let common = format!(
                        "\"pid\":{rank},\"tid\":{lane},\"cat\":\"communication\",\"id\":\"{rank}.{number}\",\"name\":\"{name}\""
                    );
                    format!(
                        "{{\"ph\":\"b\",{common},\"ts\":{start:.1}{args}}},\n{{\"ph\":\"e\",{common},\"ts\":{end:.1}}}"
                    )
                }
            };
            let _ = write!(out, ",\n{text}"); // a String takes everything
        }
        out + "\n]\n"
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        if let Some((trace, label, start)) = self.0.take()
            && let Some(recording) = &mut *trace.lock()
        {
            recording.add(label.to_string(), Lane::Compute, start, None);
        }
    }
}
