//! TensorBoard event files.
//!
//! A file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, payload, masked CRC-32C of the
//! payload, all little-endian. Each payload is an `Event` protocol buffer, of which five fields are needed:
//!
//! ```text
//! Event      1 wall_time: double   2 step: int64   3 file_version: string   5 summary: Summary   7 session_log: SessionLog
//! Summary    1 value: repeated Value               Value   1 tag: string   2 simple_value: float
//! SessionLog 1 status: enum, 1 = START
//! ```

use anyhow::{Context, Result};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// A file of scalars for TensorBoard.
#[derive(Debug)]
pub struct EventFile {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    length: u64,
}

impl EventFile {
    /// Creates an event file in `folder`. A run that continues after step `resumed` says so in it, and TensorBoard then
    /// hides what earlier files have beyond that step.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(folder: &Path, resumed: Option<u64>) -> Result<EventFile> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // TensorBoard reads the files of a folder in the order of their names, so the time comes first.
        let name = format!("events.out.tfevents.{:010}.{:09}.ferropt", now.as_secs(), now.subsec_nanos());
        let path = folder.join(name);
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let file = file.with_context(|| format!("cannot create {}", path.display()))?;
        let mut events = EventFile { path, file, length: 0 };
        let mut version = Message::default();
        version.bytes(3, b"brain.Event:2");
        events.write(0, version)?;
        let mut start = Message::default();
        start.int(1, 1);
        let mut session = Message::default();
        session.bytes(7, &start.0);
        events.write(resumed.map_or(0, |step| step + 1), session)?;
        Ok(events)
    }

    /// Adds scalars (tag, value) of one step.
    ///
    /// # Errors
    /// When the file cannot be written; it then ends with the record before.
    pub fn scalars(&mut self, step: u64, scalars: &[(String, f64)]) -> Result<()> {
        let mut summary = Message::default();
        for (tag, value) in scalars {
            let mut entry = Message::default();
            entry.bytes(1, tag.as_bytes());
            entry.float(2, *value as f32);
            summary.bytes(1, &entry.0);
        }
        let mut event = Message::default();
        event.bytes(5, &summary.0);
        self.write(step, event)
    }

    fn write(&mut self, step: u64, content: Message) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut event = Message::default();
        event.double(1, now.as_secs_f64());
        event.int(2, step);
        event.0.extend_from_slice(&content.0);
        let record = frame(&event.0);
        if let Err(error) = self.file.write_all(&record) {
            // A full disk may have taken a part; TensorBoard reads nothing behind it.
            let _ = self.file.set_len(self.length);
            return Err(error).with_context(|| format!("cannot write to {}", self.path.display()));
        }
        self.length += record.len() as u64;
        Ok(())
    }
}

/// A protocol buffer being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    /// Field number and wire type: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
    fn key(&mut self, field: u64, wire: u64) {
        self.varint(field << 3 | wire);
    }

    fn int(&mut self, field: u64, value: u64) {
        self.key(field, 0);
        self.varint(value);
    }

    fn double(&mut self, field: u64, value: f64) {
        self.key(field, 1);
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.key(field, 2);
        self.varint(value.len() as u64);
        self.0.extend_from_slice(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.key(field, 5);
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}

/// CRC-32C, rotated and shifted: TFRecord's guard against checksums of data that holds checksums.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// A TFRecord.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(payload.len() + 16);
    record.extend_from_slice(&length);
    record.extend_from_slice(&masked_crc(&length).to_le_bytes());
    record.extend_from_slice(payload);
    record.extend_from_slice(&masked_crc(payload).to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::process::Command;

    /// A field's value as it is on the wire.
    #[derive(Debug, PartialEq)]
    enum Field {
        Int(u64),
        Double(f64),
        Bytes(Vec<u8>),
        Float(f32),
    }

    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << shift;
            if first & 0x80 == 0 {
                break;
            }
        }
        value
    }

    fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
        let (front, rest) = bytes.split_at(count);
        *bytes = rest;
        front
    }

    fn fields(mut bytes: &[u8]) -> Vec<(u64, Field)> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes);
            let field = match key & 7 {
                0 => Field::Int(varint(&mut bytes)),
                1 => Field::Double(f64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
                2 => {
                    let count = varint(&mut bytes) as usize;
                    Field::Bytes(take(&mut bytes, count).to_vec())
                }
                5 => Field::Float(f32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap())),
                wire => panic!("wire type {wire}"),
            };
            fields.push((key >> 3, field));
        }
        fields
    }

    /// CRC-32C bit by bit, from its definition (reflected polynomial 0x82f63b78).
    fn slow_masked_crc(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
            }
        }
        let crc = !crc;
        crc.rotate_right(15).wrapping_add(0xa282_ead8)
    }

    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut records = Vec::new();
        while !bytes.is_empty() {
            let length = take(&mut bytes, 8);
            assert_eq!(take(&mut bytes, 4), slow_masked_crc(length).to_le_bytes());
            let payload = take(&mut bytes, u64::from_le_bytes(length.try_into().unwrap()) as usize);
            assert_eq!(take(&mut bytes, 4), slow_masked_crc(payload).to_le_bytes());
            records.push(payload.to_vec());
        }
        records
    }

    #[test]
    fn decodes_by_the_specification() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), Some(99)).unwrap();
        let scalars = [("train/loss".to_string(), 2.5), ("validation/é/loss".to_string(), f64::NAN)];
        file.scalars(1 << 40, &scalars).unwrap();
        let events = records(&std::fs::read(&file.path).unwrap());
        assert_eq!(events.len(), 3);

        let version = fields(&events[0]);
        assert!(matches!(version[0], (1, Field::Double(time)) if time > 1.7e9));
        assert_eq!(version[1..], [(2, Field::Int(0)), (3, Field::Bytes(b"brain.Event:2".to_vec()))]);

        let session = fields(&events[1]);
        assert_eq!(session[1], (2, Field::Int(100)), "what TensorBoard is to hide starts at the next step");
        assert_eq!(session[2], (7, Field::Bytes(vec![1 << 3, 1])));

        let event = fields(&events[2]);
        assert_eq!(event[1], (2, Field::Int(1 << 40)));
        let (5, Field::Bytes(summary)) = &event[2] else { panic!("{event:?}") };
        let mut values = BTreeMap::new();
        for (number, value) in fields(summary) {
            let (1, Field::Bytes(value)) = (number, value) else { panic!() };
            let value = fields(&value);
            let [(1, Field::Bytes(tag)), (2, Field::Float(number))] = &value[..] else { panic!("{value:?}") };
            values.insert(String::from_utf8(tag.clone()).unwrap(), *number);
        }
        assert_eq!(values["train/loss"], 2.5);
        assert!(values["validation/é/loss"].is_nan());
    }

    #[test]
    fn a_record_that_does_not_fit_leaves_no_part() {
        const INSIDE: &str = "FERROPT_TEST_LIMITED";
        if std::env::var_os(INSIDE).is_none() {
            // Limits hold for whole processes: this test again, in one that may write little to a file.
            let this = "telemetry::tensorboard::tests::a_record_that_does_not_fit_leaves_no_part";
            let mut limited = Command::new("sh");
            limited.args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$0\" --exact \"$1\""]);
            let out =
                limited.arg(std::env::current_exe().unwrap()).arg(this).env(INSIDE, "1").output().unwrap();
            let said = String::from_utf8_lossy(&out.stdout);
            assert!(out.status.success() && said.contains("1 passed"), "{said}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(folder.path(), None).unwrap();
        assert!(file.scalars(1, &[("long".repeat(1000), 1.0)]).is_err());
        file.scalars(2, &[("short".into(), 2.0)]).unwrap();
        let events = records(&std::fs::read(&file.path).unwrap());
        assert_eq!(events.len(), 3);
        assert_eq!(fields(&events[2])[1], (2, Field::Int(2)));
    }

    #[test]
    fn two_starts_make_two_files_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let first = EventFile::create(folder.path(), None).unwrap();
        let second = EventFile::create(folder.path(), Some(5)).unwrap();
        assert!(first.path < second.path);
        assert!(second.path.to_str().unwrap().contains("tfevents"));
    }
}
