//! What ranks say: all of it goes to their logs, warnings to the terminal, and the last lines are kept for when one fails.

use anyhow::{Context, Result};
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Lines that are kept.
const TAIL: usize = 40;

/// A thread that takes a rank's output until the rank ends.
pub(super) struct Relay {
    thread: JoinHandle<VecDeque<String>>,
}

/// A rank's log in folder `logs`.
pub(super) fn log_file(logs: &Path, rank: usize) -> PathBuf {
    logs.join(format!("rank-{rank:05}.log"))
}

impl Relay {
    /// Starts relaying; returns the end that the rank writes to.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub(super) fn start(logs: &Path, rank: usize) -> Result<(Relay, PipeWriter)> {
        let cure = "what ranks print goes there: make it possible, or choose another run.dir";
        std::fs::create_dir_all(logs).with_context(|| format!("cannot make {}; {cure}", logs.display()))?;
        let path = log_file(logs, rank);
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("cannot write {}; {cure}", path.display()))?;
        let (reader, writer) = std::io::pipe().context("cannot make a pipe for a rank's output")?;
        let thread = std::thread::Builder::new()
            .name(format!("output of rank {rank}"))
            .spawn(move || relay(reader, log, rank))
            .context("cannot start the thread that takes a rank's output")?;
        Ok((Relay { thread }, writer))
    }

    /// The error that the rank ended with, as it printed it; nothing if it printed none.
    pub(super) fn error(self) -> String {
        let tail = self.thread.join().unwrap_or_default();
        let start = tail.iter().rposition(|line| line.starts_with("error: "));
        start.map_or(String::new(), |start| Vec::from_iter(tail.range(start..).cloned()).join("\n"))
    }
}

fn relay(reader: PipeReader, mut log: File, rank: usize) -> VecDeque<String> {
    let mut tail = VecDeque::new();
    for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
        // A full disk takes the log, not the run.
        let _ = log.write_all(&[&line[..], b"\n"].concat());
        let line = String::from_utf8_lossy(&line).into_owned();
        if line.starts_with("warning") {
            let _ = writeln!(std::io::stderr(), "rank {rank}: {line}");
        }
        tail.push_back(line);
        if tail.len() > TAIL {
            tail.pop_front();
        }
    }
    tail
}
