//! The log: lines of JSON, written by a thread of their own. Whoever reads them may stop to, as a full pipe or a full disk does;
//! the service then goes on without them, and counts what it left out.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Bytes of lines that may wait to be written. A line that is longer by itself may when no other does.
const WAITING: usize = 4 << 20;

/// Where lines of the log go.
pub struct Log {
    lines: Option<Arc<Lines>>,
    /// Whether prompts and texts are in it.
    texts: bool,
}

/// Lines on their way to the thread that writes them.
#[derive(Default)]
struct Lines {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    text: String,
    /// Lines that there was no room for.
    dropped: usize,
    /// Whether others are being written.
    writing: bool,
    /// Whether no more will come.
    closed: bool,
}

impl Log {
    /// JSON objects, one a line, into `out`. Prompts and texts are only in it when `texts` says so.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub fn new(out: impl Write + Send + 'static, texts: bool) -> Result<Log> {
        let lines = Arc::new(Lines::default());
        let own = lines.clone();
        let write = move || own.write(out);
        thread::Builder::new().name("log".into()).spawn(write).context("cannot start the log's thread")?;
        Ok(Log { lines: Some(lines), texts })
    }

    /// No log.
    pub fn off() -> Log {
        Log { lines: None, texts: false }
    }

    /// Writes a line, without waiting for it: `time` in seconds since 1970, `event`, and what else there is.
    pub(crate) fn line(&self, event: &str, more: Value) {
        if let Some(lines) = &self.lines {
            lines.add(&line(event, more));
        }
    }

    /// Waits until all lines are written, for `within` at most.
    pub(crate) fn finish(&self, within: Duration) {
        let Some(lines) = &self.lines else { return };
        let busy = |waiting: &mut Waiting| waiting.writing || !waiting.text.is_empty();
        // When time is over, they are lost.
        let _ = lines.changed.wait_timeout_while(lines.lock(), within, busy);
    }

    /// Whether prompts and texts are in it.
    pub(crate) fn has_texts(&self) -> bool {
        self.texts && self.lines.is_some()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        if let Some(lines) = &self.lines {
            lines.lock().closed = true;
            lines.changed.notify_all();
        }
    }
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, line: &str) {
        let mut waiting = self.lock();
        if !waiting.text.is_empty() && waiting.text.len() + line.len() > WAITING {
            waiting.dropped += 1;
            return;
        }
        waiting.text += line;
        drop(waiting);
        self.changed.notify_all();
    }

    /// Writes what comes until no more will. Nothing is locked meanwhile.
    fn write(&self, mut out: impl Write) {
        loop {
            let mut waiting = self.lock();
            waiting.writing = false;
            self.changed.notify_all();
            let idle = |waiting: &mut Waiting| waiting.text.is_empty() && !waiting.closed;
            let mut waiting = self.changed.wait_while(waiting, idle).unwrap_or_else(PoisonError::into_inner);
            if waiting.text.is_empty() {
                return;
            }
            let mut text = std::mem::take(&mut waiting.text);
            // They came when there was no more room behind these.
            let dropped = std::mem::take(&mut waiting.dropped);
            waiting.writing = true;
            drop(waiting);
            if dropped > 0 {
                text += &line("lines_dropped", json!({ "lines": dropped }));
            }
            // A log that cannot be written must not stop the service.
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        }
    }
}

fn line(event: &str, more: Value) -> String {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let mut line = json!({ "time": time, "event": event });
    if let (Some(line), Value::Object(more)) = (line.as_object_mut(), more) {
        line.extend(more.into_iter().filter(|(_, value)| !value.is_null()));
    }
    format!("{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::mpsc::{Receiver, Sender, channel};

    /// Takes in a piece whenever it is let, and tells what it was.
    struct Stalled(Receiver<()>, Sender<String>);

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.recv().map_err(io::Error::other)?;
            let _ = self.1.send(String::from_utf8_lossy(bytes).into_owned());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_who_reads_the_log_and_lost_lines_are_counted() {
        let (go, wait) = channel();
        let (tell, told) = channel();
        let log = Log::new(Stalled(wait, tell), false).unwrap();
        log.line("first", json!({ "number": 1, "nothing": null }));
        // The thread has taken it, and hangs.
        while !log.lines.as_ref().unwrap().lock().writing {
            thread::yield_now();
        }
        let long = "x".repeat(1 << 20);
        for _ in 0..10 {
            log.line("long", json!({ "text": long }));
        }
        log.finish(Duration::from_millis(20));
        (0..2).for_each(|_| go.send(()).unwrap());
        log.finish(Duration::from_secs(60));
        let first = told.recv().unwrap();
        assert!(first.contains("\"number\":1") && !first.contains("nothing"), "{first}");
        let rest = told.recv().unwrap();
        let lines: Vec<Value> = rest.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 4, "three of a megabyte each, and what became of the others");
        assert_eq!((&lines[3]["event"], &lines[3]["lines"]), (&json!("lines_dropped"), &json!(7)));
    }
}
