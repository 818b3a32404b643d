//! The logbook of a run: what happened and why, in order, for people (`logbook.md`) and for programs (`logbook.jsonl`).
//!
//! Entries are rare, and each is on the disk before the run goes on. A run that was killed and resumed meets the same
//! trouble again between its last checkpoint and the kill; what is in the book already is not entered twice.

use crate::checkpoint::write_at_once;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
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

/// Something that was found, which is neither a beginning nor an end of a start.
pub const NOTED: &str = "noted";

/// Where lines go that are no entries.
const ASIDE: &str = "logbook-unreadable.txt";

const HEADER: &str =
    "# Logbook\n\nTimes are UTC, steps are those that were done. Notes may be added by hand.\n\n";

impl Logbook {
    /// Opens the logbook of the run in folder `run`, at which no other process writes. What a crash kept from being written whole
    /// is dropped, and entries that it kept from the page for people are added there. Lines that are no entries are set aside, and
    /// that is entered.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn open(run: &Path) -> Result<Logbook> {
        let (lines, page) = (run.join("logbook.jsonl"), run.join("logbook.md"));
        let text = read(&lines)?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        if whole < text.len() {
            let file = OpenOptions::new().write(true).open(&lines);
            file.and_then(|file| file.set_len(whole as u64))
                .with_context(|| format!("cannot shorten {}", lines.display()))?;
        }
        let (mut entries, mut sound, mut garbled) = (Vec::<Entry>::new(), Vec::new(), Vec::new());
        for line in text[..whole].split_inclusive(|byte| *byte == b'\n') {
            match serde_json::from_slice(line) {
                Ok(entry) => {
                    entries.push(entry);
                    sound.extend_from_slice(line);
                }
                Err(_) => garbled.push(line),
            }
        }
        let shown = String::from_utf8_lossy(&read(&page)?).into_owned();
        if shown.is_empty() {
            append(&page, HEADER.as_bytes())?;
        }
        for line in entries.iter().map(sentence).filter(|line| !shown.contains(line.trim_end())) {
            append(&page, line.as_bytes())?;
        }
        let mut book = Logbook { lines, page, entries, owed: 0 };
        if !garbled.is_empty() {
            // A crash between these two sets them aside twice.
            append(&run.join(ASIDE), &garbled.concat())?;
            write_at_once(&book.lines, &sound)?;
            let step = book.entries.last().map_or(0, |entry| entry.step);
            let text = format!("Lines of logbook.jsonl that were no entries are in {ASIDE} now.");
            book.add(step, NOTED, &text, json!({ "lines": garbled.len() }))?;
        }
        Ok(book)
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
            append(&self.lines, format!("{}\n", serde_json::to_string(entry)?).as_bytes())?;
            self.owed -= 1;
            append(&self.page, sentence(entry).as_bytes())?;
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

fn read(path: &Path) -> Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

fn append(path: &Path, text: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        let written = file.write_all(text).and_then(|()| file.sync_data());
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
        append(&lines, b"{\"time\":\"20").unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        book.add(5, "resumed", "again", json!({})).unwrap();
        assert_eq!(Logbook::open(run.path()).unwrap().entries().len(), 2);
        let page = fs::read_to_string(page).unwrap();
        assert!(page.contains("A note by hand."), "{page}");
        assert!(page.find("**started**").unwrap() < page.find("**resumed**").unwrap(), "{page}");
    }

    #[test]
    fn lines_that_are_no_entries_are_set_aside_and_that_is_entered() {
        let run = tempfile::tempdir().unwrap();
        let mut book = Logbook::open(run.path()).unwrap();
        book.add(0, "started", "by a test", json!({})).unwrap();
        // As two writers at a time leave them, and a disk.
        let garbled: &[u8] = b"{\"time\":\"20{\"time\":\"2026\"}\n\xff\xfe\n";
        append(&run.path().join("logbook.jsonl"), garbled).unwrap();
        book.add(5, "ended", "by a test", json!({})).unwrap();
        let mut again = Logbook::open(run.path()).unwrap();
        let events =
            |book: &Logbook| book.entries().iter().map(|entry| entry.event.clone()).collect::<Vec<_>>();
        assert_eq!(events(&again), ["started", "ended", "noted"]);
        assert_eq!((again.entries()[2].step, &again.entries()[2].figures["lines"]), (5, &json!(2)));
        assert_eq!(fs::read(run.path().join(ASIDE)).unwrap(), garbled);
        again.add(5, "resumed", "by a test", json!({})).unwrap();
        assert_eq!(events(&Logbook::open(run.path()).unwrap()), ["started", "ended", "noted", "resumed"]);
    }
}
