//! The thread that asks devices whether exchanges are over. The reactor does not ask: a driver may not answer before its device has
//! done what waits for a lost rank, and the reactor is who ends that waiting.

use crate::flights::Exchanged;
use crate::left::Left;
use crate::trace::Trace;
use crate::world::thread_has_died;
use anyhow::{Context, Result};
use ferropt_device::{Watch, failures};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often devices are asked, for a trace and otherwise.
const PRECISION: Duration = Duration::from_millis(1);
const LEISURE: Duration = Duration::from_millis(20);

/// An exchange, and how to know that it is over.
struct Asked {
    watch: Watch,
    exchanged: Arc<Exchanged>,
}

pub(crate) struct Watcher {
    asked: Option<Sender<Asked>>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    pub(crate) fn start(trace: Trace, left: Left) -> Result<Watcher> {
        let (asked, inbox) = channel();
        let thread = std::thread::Builder::new()
            .name("exchanges".into())
            .spawn(move || run(&inbox, &trace, &left))
            .context("cannot start the thread that watches exchanges between devices")?;
        Ok(Watcher { asked: Some(asked), thread: Some(thread) })
    }

    /// Watches an exchange until it is over.
    pub(crate) fn watch(&self, watch: Watch, exchanged: Arc<Exchanged>) -> Result<()> {
        let Some(asked) = &self.asked else { return Ok(()) };
        asked.send(Asked { watch, exchanged }).map_err(thread_has_died)
    }
}

fn run(inbox: &Receiver<Asked>, trace: &Trace, left: &Left) {
    let mut under_way: Vec<Asked> = Vec::new();
    loop {
        let rest = match (under_way.is_empty(), trace.records()) {
            (true, _) => Duration::MAX,
            (false, true) => PRECISION,
            (false, false) => LEISURE,
        };
        match inbox.recv_timeout(rest) {
            Ok(asked) => under_way.push(asked),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        under_way.extend(inbox.try_iter());
        // A device that failed does nothing any more.
        let over = |asked: &mut Asked| failures(|| Ok(asked.watch.is_over())).unwrap_or(true);
        for Asked { watch, exchanged } in under_way.extract_if(.., over) {
            exchanged.end(trace);
            left.leave(watch);
        }
    }
    under_way.into_iter().for_each(|asked| left.leave(asked.watch));
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.asked = None;
        if let Some(thread) = self.thread.take() {
            // If it has died there is nothing left to do.
            let _ = thread.join();
        }
    }
}
