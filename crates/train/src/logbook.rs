//! The logbook of a run: what happened and why, in order, for people (`logbook.md`) and for programs (`logbook.jsonl`).
//!
//! Entries are rare, and each is on the disk before the run goes on. A run that was killed and resumed meets the same
//! trouble again between its last checkpoint and the kill; what is in the book already is not entered twice.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// One entry.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in UTC: `2026-11-28T07:30:00Z`.
    pub time: String,
    /// Optimiser steps done.
    pub step: u64,
    /// What happened, in a word or two: `started`, `skipped`, `rolled-back`.
    pub event: String,
    /// The same in a sentence.
    pub text: String,
    /// Its figures.
    #[serde(flatten)]
    pub figures: Map<String, Value>,
}

/// An open logbook.
#[derive(Debug)]
pub struct Logbook {
    lines: PathBuf,
    page: PathBuf,
    entries: Vec<Entry>,
    /// The last so many entries are not on the disk yet, which was full.
    owed: usize,
}

const HEADER: &str =
    "# Logbook\n\nTimes are UTC, steps are those that were done. Notes may be added by hand.\n\n";

impl Logbook {
    /// Opens the logbook of the run in folder `run`. What a crash kept from being written whole is dropped, and entries
    /// that it kept from the page for people are added there.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a line of `logbook.jsonl` is no entry.
    pub fn open(run: &Path) -> Result<Logbook> {
        let (lines, page) = (run.join("logbook.jsonl"), run.join("logbook.md"));
        let text = read(&lines)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            let file = OpenOptions::new().write(true).open(&lines);
            file.and_then(|file| file.set_len(whole as u64))
                .with_context(|| format!("cannot shorten {}", lines.display()))?;
        }
        let parse = |(number, line): (usize, &str)| {
            serde_json::from_str(line).with_context(|| {
                format!(
                    "line {} of {} is no entry of a logbook: repair or remove it, or move the file away",
                    number + 1,
                    lines.display()
                )
            })
        };
        let entries: Vec<Entry> = text[..whole].lines().enumerate().map(parse).collect::<Result<_>>()?;
        let shown = read(&page)?;
        if shown.is_empty() {
            append(&page, HEADER)?;
        }
        for line in entries.iter().map(sentence).filter(|line| !shown.contains(line.trim_end())) {
            append(&page, &line)?;
        }
        Ok(Logbook { lines, page, entries, owed: 0 })
    }

    /// All entries, oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Adds an entry; it is on the disk when this returns.
    ///
    /// # Errors
    /// When the files cannot be written. The entry is kept, and is written before the next one.
    pub fn add(&mut self, step: u64, event: &str, text: &str, figures: Value) -> Result<()> {
        let figures = match figures {
            Value::Object(figures) => figures,
            _ => Map::new(),
        };
        self.entries.push(Entry { time: now(), step, event: event.into(), text: text.into(), figures });
        self.owed += 1;
        while self.owed > 0 {
            let entry = &self.entries[self.entries.len() - self.owed];
            append(&self.lines, &format!("{}\n", serde_json::to_string(entry)?))?;
            self.owed -= 1;
            append(&self.page, &sentence(entry))?;
        }
        Ok(())
    }

    /// [`Logbook::add`], unless the same was entered before, at whatever time.
    ///
    /// # Errors
    /// As [`Logbook::add`].
    pub fn add_once(&mut self, step: u64, event: &str, text: &str, figures: Value) -> Result<()> {
        let known = |e: &Entry| (e.step, &*e.event, &*e.text) == (step, event, text);
        if self.entries.iter().any(known) { Ok(()) } else { self.add(step, event, text, figures) }
    }
}

/// An entry's line on the page for people.
fn sentence(entry: &Entry) -> String {
    let (event, text) = (entry.event.replace('-', " "), entry.text.replace('\n', "\n  "));
    format!("- {}, step {}: **{event}**. {text}\n", entry.time, entry.step)
}

fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

fn append(path: &Path, text: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_data());
        if written.is_err() {
            // A full disk may have taken a part; nothing must ever follow a part of a line.
            let _ = file.set_len(before);
        }
        written
    };
    write().with_context(|| format!("cannot add to {}", path.display()))
}

/// The time in UTC, to the second, as RFC 3339 has it.
fn now() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let (day, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, date) = civil(day);
    let (h, m, s) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{date:02}T{h:02}:{m:02}:{s:02}Z")
}

/// Year, month and day of a number of days since 1970-01-01, in the Gregorian calendar.
fn civil(mut day: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn days() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(59), (1970, 3, 1));
        assert_eq!(civil(19_782), (2024, 2, 29));
        assert_eq!(civil(20_085), (2024, 12, 28));
        assert_eq!(now().len(), "2026-11-28T07:30:00Z".len());
    }

    #[test]
    fn entries_come_back_in_order_and_once() {
        let run = tempfile::tempdir().unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        book.add(0, "started", "by a test", json!({"ranks": 1})).unwrap();
        for _ in 0..2 {
            book.add_once(7, "skipped", "loss 9", json!({"loss": 9.0})).unwrap();
        }
        let mut again = Logbook::open(run.path()).unwrap();
        again.add_once(7, "skipped", "loss 9", json!({"loss": 9.0})).unwrap();
        assert_eq!(again.entries(), book.entries());
        assert_eq!(again.entries().len(), 2);
        assert_eq!(again.entries()[1].figures["loss"], 9.0);
        let page = fs::read_to_string(run.path().join("logbook.md")).unwrap();
        assert_eq!(page.matches("**skipped**. loss 9").count(), 1, "{page}");
    }

    #[test]
    fn what_a_full_disk_did_not_take_is_written_later_in_order() {
        let run = tempfile::tempdir().unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        // A folder in the place of the file cannot be written to, as a full disk cannot.
        fs::create_dir(run.path().join("logbook.jsonl")).unwrap();
        assert!(book.add(1, "skipped", "one", json!({})).is_err());
        fs::remove_dir(run.path().join("logbook.jsonl")).unwrap();
        book.add_once(1, "skipped", "one", json!({})).unwrap();
        book.add(2, "skipped", "two", json!({})).unwrap();
        let again = Logbook::open(run.path()).unwrap();
        assert_eq!(again.entries().iter().map(|e| &*e.text).collect::<Vec<_>>(), ["one", "two"]);
        assert_eq!(again.entries(), book.entries());
    }

    #[test]
    fn what_a_crash_left_torn_or_out_of_the_page_is_mended_and_notes_stay() {
        let run = tempfile::tempdir().unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        book.add(0, "started", "by a test", json!(null)).unwrap();
        let (lines, page) = (run.path().join("logbook.jsonl"), run.path().join("logbook.md"));
        fs::write(&page, format!("{HEADER}A note by hand.\n")).unwrap();
        append(&lines, "{\"time\":\"20").unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        book.add(5, "resumed", "again", json!({})).unwrap();
        assert_eq!(Logbook::open(run.path()).unwrap().entries().len(), 2);
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains("A note by hand."), "{page}");
        assert!(page.find("**started**").unwrap() < page.find("**resumed**").unwrap(), "{page}");
        append(&lines, "no entry\n").unwrap();
        let error = format!("{:#}", Logbook::open(run.path()).unwrap_err());
        assert!(error.contains("line 3") && error.contains("logbook.jsonl"), "{error}");
    }
}
