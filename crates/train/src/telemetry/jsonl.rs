//! Metrics as JSON lines.

use super::record::Record;
use anyhow::{Context, Result, bail};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A file of [`Record`]s, one JSON object a line, each written in one piece as it comes.
#[derive(Debug)]
pub struct MetricLog {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    length: u64,
}

/// Where a run is continued.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// Steps done.
    pub step: u64,
    /// Batches that the step after it was tried with in vain: they come no more.
    pub skipped: Vec<u64>,
}

impl Resumed {
    /// Whether a record will be made again.
    fn drops(&self, record: &Record) -> bool {
        let kept = match record {
            Record::Skipped(skipped) => {
                skipped.step == self.step + 1 && self.skipped.contains(&skipped.batch)
            }
            _ => false,
        };
        record.step() > self.step && !kept
    }
}

impl MetricLog {
    /// Opens the log of a run that continues where it was `resumed`, dropping what comes later and a line cut short by
    /// a crash; `None` begins anew. So an interrupted run leaves the file that an uninterrupted one would.
    ///
    /// # Errors
    /// When the file cannot be read or written, or a line to be kept is no record.
    pub fn open(path: &Path, resumed: Option<&Resumed>) -> Result<MetricLog> {
        let length = match resumed {
            None => 0,
            Some(resumed) => parse(path)?
                .into_iter()
                .find_map(|(start, record)| resumed.drops(&record).then_some(start))
                .map_or_else(|| whole_lines(path), Ok)?,
        };
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.with_context(|| format!("cannot write to {}", path.display()))?;
        file.set_len(length).with_context(|| format!("cannot shorten {}", path.display()))?;
        Ok(MetricLog { path: path.into(), file, length })
    }

    /// Copies what comes after `step` in the log `path` to `aside`, making the folder of that; whole or not at all.
    ///
    /// # Errors
    /// When a file cannot be read or written, or a line is no record.
    pub fn copy_later(path: &Path, step: u64, aside: &Path) -> Result<()> {
        let start =
            parse(path)?.into_iter().find_map(|(start, record)| (record.step() > step).then_some(start));
        let later =
            start.map_or(String::new(), |start| content(path).unwrap_or_default()[start as usize..].into());
        let folder = aside.parent().map_or(Ok(()), fs::create_dir_all);
        let written = folder.and_then(|()| fs::write(aside, later));
        if written.is_err() {
            // A part of it would be taken for all.
            let _ = fs::remove_file(aside);
        }
        written.with_context(|| format!("cannot write {}", aside.display()))
    }

    /// Adds a record.
    ///
    /// # Errors
    /// When it cannot be written; the file then ends with the record before.
    pub fn append(&mut self, record: &Record) -> Result<()> {
        let failed = || format!("cannot add step {} to {}", record.step(), self.path.display());
        let mut line = serde_json::to_vec(record).with_context(failed)?;
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // A full disk may have taken a part; nothing must ever follow a part of a line.
            let _ = self.file.set_len(self.length);
            return Err(error).with_context(failed);
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Waits until the file is on the disk itself.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().with_context(|| format!("cannot flush {} to disk", self.path.display()))
    }

    /// All records of a log, in order.
    ///
    /// # Errors
    /// When the file cannot be read or a line is no record.
    pub fn read(path: &Path) -> Result<Vec<Record>> {
        Ok(parse(path)?.into_iter().map(|(_, record)| record).collect())
    }
}

fn content(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        read => read.with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Bytes up to the end of the last line that is complete.
fn whole_lines(path: &Path) -> Result<u64> {
    Ok(content(path)?.rfind('\n').map_or(0, |end| end as u64 + 1))
}

/// Records of the complete lines, each with the place where its line starts. Blank lines, which editors leave, are none.
fn parse(path: &Path) -> Result<Vec<(u64, Record)>> {
    let content = content(path)?;
    let mut records = Vec::new();
    let mut start = 0;
    for (index, line) in content.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
        match serde_json::from_str(line) {
            Ok(record) => records.push((start, record)),
            Err(_) if line.trim().is_empty() => {}
            Err(error) => bail!(
                "line {} of {} is no record of Ferropt ({error}): repair or remove the line, or move the file away",
                index + 1,
                path.display()
            ),
        }
        start += line.len() as u64;
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Skipped, Training, Validation};
    use super::*;

    fn after(step: u64) -> Option<Resumed> {
        Some(Resumed { step, skipped: Vec::new() })
    }

    fn training(step: u64) -> Record {
        Record::Training(Training {
            step,
            tokens: step * 64,
            loss: 10.0 / (step as f64 + 0.1),
            ..Training::default()
        })
    }

    fn validation(step: u64) -> Record {
        let set = "books".to_string();
        Record::Validation(Validation {
            step,
            set,
            loss: 0.1 + 0.2,
            bits_per_byte: Some(1.0 / 3.0),
            ..Default::default()
        })
    }

    fn write(path: &Path, resumed: Option<Resumed>, steps: std::ops::RangeInclusive<u64>) {
        let mut log = MetricLog::open(path, resumed.as_ref()).unwrap();
        for step in steps {
            log.append(&training(step)).unwrap();
            if step % 4 == 0 {
                log.append(&validation(step)).unwrap();
            }
        }
        log.sync().unwrap();
    }

    #[test]
    fn an_interrupted_run_leaves_the_file_of_an_uninterrupted_one() {
        let folder = tempfile::tempdir().unwrap();
        let (straight, broken) = (folder.path().join("a"), folder.path().join("b"));
        write(&straight, None, 1..=12);
        write(&broken, None, 1..=10); // then killed; the last checkpoint is of step 8
        let mut torn = fs::read(&broken).unwrap();
        torn.extend_from_slice(b"{\"kind\":\"train");
        fs::write(&broken, torn).unwrap();
        write(&broken, after(8), 9..=12);
        assert_eq!(fs::read(&straight).unwrap(), fs::read(&broken).unwrap());
        // Killed before the first checkpoint.
        write(&broken, None, 1..=12);
        assert_eq!(fs::read(&straight).unwrap(), fs::read(&broken).unwrap());
        // Nothing to drop but a torn line.
        write(&broken, None, 1..=8);
        fs::write(&broken, [&fs::read(&broken).unwrap()[..], b"{"].concat()).unwrap();
        write(&broken, after(8), 9..=12);
        assert_eq!(fs::read(&straight).unwrap(), fs::read(&broken).unwrap());
    }

    #[test]
    fn records_come_back_and_nan_with_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, 1..=4);
        let records = MetricLog::read(&path).unwrap();
        assert_eq!(records[..3], [training(1), training(2), training(3)]);
        assert_eq!(records[4], validation(4));
        let mut log = MetricLog::open(&path, None).unwrap();
        log.append(&Record::Training(Training { step: 1, loss: f64::NAN, ..Training::default() })).unwrap();
        let records = MetricLog::read(&path).unwrap();
        assert!(matches!(&records[..], [Record::Training(t)] if t.loss.is_nan()), "{records:?}");
    }

    #[test]
    fn a_damaged_line_is_named_and_nothing_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, 1..=4);
        let damaged =
            fs::read_to_string(&path).unwrap().replacen("{\"kind\":\"training\",\"step\":2", "{\"ki", 1);
        fs::write(&path, &damaged).unwrap();
        let error = MetricLog::open(&path, after(4).as_ref()).unwrap_err().to_string();
        assert!(error.contains("line 2") && error.contains("metrics.jsonl"), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), damaged);
    }

    #[test]
    fn steps_that_were_skipped_before_a_checkpoint_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let skipped = |step, batch| Record::Skipped(Skipped { step, batch, ..Skipped::default() });
        let records = [training(1), training(2), skipped(3, 2), skipped(3, 3), training(3), skipped(4, 5)];
        let resume = |step, batches: &[u64]| {
            let mut log = MetricLog::open(&path, None).unwrap();
            records.iter().for_each(|record| log.append(record).unwrap());
            MetricLog::open(&path, Some(&Resumed { step, skipped: batches.to_vec() })).unwrap();
            MetricLog::read(&path).unwrap()
        };
        // A stop right after a skip saves what was learnt from it, so that it does not come again.
        assert_eq!(resume(2, &[2, 3]), records[..4]);
        assert_eq!(resume(2, &[2]), records[..3]);
        // A checkpoint from before it knows of none.
        assert_eq!(resume(2, &[]), records[..2]);
        assert_eq!(resume(1, &[2, 3]), records[..1]);
        assert_eq!(resume(3, &[2, 3, 5]), records);
    }

    #[test]
    fn blank_lines_count_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        write(&path, None, 1..=3);
        let blank = fs::read_to_string(&path).unwrap().replace('\n', "\n\n \r\n");
        fs::write(&path, blank).unwrap();
        write(&path, after(2), 3..=3);
        assert_eq!(MetricLog::read(&path).unwrap(), [training(1), training(2), training(3)]);
    }
}
