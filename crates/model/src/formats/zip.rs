//! Zip archives whose entries are stored, not compressed, as PyTorch writes them; zip64 included.

use super::stored::Sink;
use super::strand::Mapped;
use anyhow::{Context, Result, bail, ensure};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;

const LOCAL: &[u8] = b"PK\x03\x04";
const CENTRAL: &[u8] = b"PK\x01\x02";
const END: &[u8] = b"PK\x05\x06";
const END64: &[u8] = b"PK\x06\x06";
const LOCATOR64: &[u8] = b"PK\x06\x07";
const LOCAL_LEN: usize = 30;
const CENTRAL_LEN: usize = 46;
const END_LEN: usize = 22;
const LOCATOR64_LEN: usize = 20;
const END64_LEN: usize = 56;
/// What a 32-bit field holds when the number is in the zip64 record.
const IN_ZIP64: u64 = u32::MAX as u64;
/// Where the data of an entry begins is a multiple of this, so that it can be used where it is mapped.
const ALIGNMENT: u64 = 64;

/// A file in an archive.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    /// Its bytes in the archive.
    pub(super) range: Range<usize>,
    pub(super) crc32: u32,
}

/// Whether the bytes begin as an archive does.
pub(super) fn is_zip(bytes: &[u8]) -> bool {
    bytes.starts_with(LOCAL)
}

/// Little-endian fields of a record, read one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n).context("a record of the archive is cut short")?;
        self.0 = tail;
        Ok(head)
    }

    fn number(&mut self, bytes: usize) -> Result<u64> {
        Ok(self.take(bytes)?.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)))
    }
}

/// The record at `at`, behind its signature.
fn record<'a>(bytes: &'a [u8], at: u64, signature: &[u8], what: &str) -> Result<Fields<'a>> {
    let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..));
    let rest = rest.and_then(|rest| rest.strip_prefix(signature));
    Ok(Fields(rest.with_context(|| format!("there is no {what} of a zip archive at byte {at}"))?))
}

/// The files in an archive, in the order of its directory.
pub(super) fn entries(file: &Mapped) -> Result<Vec<Entry>> {
    let bytes = file.bytes();
    let (count, size, start) = directory(bytes)?;
    let end = start.checked_add(size).filter(|end| *end <= bytes.len() as u64);
    let end = end.with_context(|| {
        format!("its directory of {size} bytes at {start} ends beyond its {} bytes", bytes.len())
    })?;
    ensure!(count <= size / CENTRAL_LEN as u64, "its directory of {size} bytes cannot list {count} files");
    let mut at = start;
    let mut entries = Vec::new();
    for _ in 0..count {
        let mut f = record(&bytes[..end as usize], at, CENTRAL, "entry in the directory")?;
        f.take(4)?; // versions
        let flags = f.number(2)?;
        let method = f.number(2)?;
        f.take(4)?; // time and date
        let crc32 = f.number(4)? as u32;
        let mut packed = f.number(4)?;
        let mut length = f.number(4)?;
        let [name_len, extra_len, comment_len] = [f.number(2)?, f.number(2)?, f.number(2)?];
        f.take(8)?; // disk, attributes
        let mut header = f.number(4)?;
        let name =
            std::str::from_utf8(f.take(name_len as usize)?).context("the name of a file is not UTF-8")?;
        let mut extra = Fields(f.take(extra_len as usize)?);
        at += CENTRAL_LEN as u64 + name_len + extra_len + comment_len;
        while extra.0.len() >= 4 {
            let (id, len) = (extra.number(2)?, extra.number(2)? as usize);
            let mut field = Fields(extra.take(len)?);
            if id == 1 {
                for number in [&mut length, &mut packed, &mut header] {
                    if *number == IN_ZIP64 {
                        *number = field.number(8)?;
                    }
                }
            }
        }
        let place = || format!("file {name:?} in the archive");
        ensure!(flags & 1 == 0, "{} is encrypted", place());
        ensure!(
            method == 0 && packed == length,
            "{} is compressed (method {method}), which torch.save does not do; load and save it again with PyTorch",
            place()
        );
        let range = data(bytes, header, length, name).with_context(place)?;
        entries.push(Entry { name: name.into(), range, crc32 });
    }
    Ok(entries)
}

/// Number of files, and size and place of the directory.
fn directory(bytes: &[u8]) -> Result<(u64, u64, u64)> {
    // A comment of up to 65,535 bytes may follow the last record.
    let first = bytes.len().saturating_sub(END_LEN + usize::from(u16::MAX));
    let at = (first..(bytes.len() + 1).saturating_sub(END_LEN)).rev().find(|at| {
        bytes[*at..].starts_with(END)
            && usize::from(u16::from_le_bytes([bytes[at + 20], bytes[at + 21]])) == bytes.len() - at - END_LEN
    });
    let at = at.context("it is no zip archive, or was cut short: it has no end record")?;
    let mut f = record(bytes, at as u64, END, "end record")?;
    f.take(6)?; // disks, files on this disk
    let plain = (f.number(2)?, f.number(4)?, f.number(4)?);
    let locator = at.checked_sub(LOCATOR64_LEN).map(|l| record(bytes, l as u64, LOCATOR64, "zip64 locator"));
    let Some(Ok(mut locator)) = locator else { return Ok(plain) };
    locator.take(4)?; // disk
    let mut f = record(bytes, locator.number(8)?, END64, "zip64 end record")?;
    f.take(28)?; // size of the record, versions, disks, files on this disk
    Ok((f.number(8)?, f.number(8)?, f.number(8)?))
}

/// Where the data of the entry is whose local header is at `header`.
fn data(bytes: &[u8], header: u64, length: u64, name: &str) -> Result<Range<usize>> {
    let mut f = record(bytes, header, LOCAL, "header of a file")?;
    f.take(22)?;
    let [name_len, extra_len] = [f.number(2)?, f.number(2)?];
    ensure!(f.take(name_len as usize)? == name.as_bytes(), "its header has another name");
    let start = header + LOCAL_LEN as u64 + name_len + extra_len;
    let end = start.checked_add(length).filter(|end| *end <= bytes.len() as u64);
    let Some(end) = end else {
        bail!("it has {length} bytes from {start} on, but the archive has {}: it was cut short", bytes.len());
    };
    Ok(start as usize..end as usize)
}

/// Writes an archive. Times are zero, so that the same content always gives the same bytes.
pub(super) struct Writer<W: Write + Seek> {
    out: W,
    at: u64,
    written: Vec<(String, Written)>,
}

#[derive(Clone, Copy)]
struct Written {
    header: u64,
    length: u64,
    crc32: u32,
}

impl<W: Write + Seek> Writer<W> {
    pub(super) fn new(out: W) -> Writer<W> {
        Writer { out, at: 0, written: Vec::new() }
    }

    /// Adds a file of `length` bytes that `content` hands over piece by piece.
    pub(super) fn add(
        &mut self,
        name: &str,
        length: u64,
        content: impl FnOnce(&mut Sink) -> Result<()>,
    ) -> Result<()> {
        let header = self.at;
        let plain = local_header(name, length, 0, 0);
        let start = header + plain.len() as u64;
        // An extra field needs 4 bytes for its own head.
        let padding = (start + 4).next_multiple_of(ALIGNMENT) - start;
        self.put(&local_header(name, length, 0, padding as usize))?;
        let (mut hasher, mut count) = (crc32fast::Hasher::new(), 0);
        let out = &mut self.out;
        content(&mut |bytes| {
            hasher.update(bytes);
            count += bytes.len() as u64;
            Ok(out.write_all(bytes)?)
        })?;
        ensure!(count == length, "{name} was to have {length} bytes and has {count}");
        self.at += count;
        let crc32 = hasher.finalize();
        self.out.seek(SeekFrom::Start(header))?;
        self.out.write_all(&local_header(name, length, crc32, padding as usize))?;
        self.out.seek(SeekFrom::Start(self.at))?;
        self.written.push((name.into(), Written { header, length, crc32 }));
        Ok(())
    }

    /// Writes the directory and returns what was written to.
    pub(super) fn finish(mut self) -> Result<W> {
        let start = self.at;
        let written = std::mem::take(&mut self.written);
        for (name, entry) in &written {
            self.put(&central_entry(name, *entry))?;
        }
        let (count, size) = (written.len() as u64, self.at - start);
        if count >= u64::from(u16::MAX) || start + size >= IN_ZIP64 {
            let end64 = self.at;
            let mut record =
                [END64, &(END64_LEN as u64 - 12).to_le_bytes(), &[45, 0, 45, 0], &[0; 8]].concat();
            for number in [count, count, size, start] {
                record.extend(number.to_le_bytes());
            }
            record.extend([LOCATOR64, &[0; 4], &end64.to_le_bytes(), &1u32.to_le_bytes()].concat());
            self.put(&record)?;
        }
        let mut record = [END, &[0; 4]].concat();
        let short = (count.min(u64::from(u16::MAX)) as u16).to_le_bytes();
        record.extend([short, short].concat());
        record.extend((size.min(IN_ZIP64) as u32).to_le_bytes());
        record.extend((start.min(IN_ZIP64) as u32).to_le_bytes());
        record.extend([0; 2]);
        self.put(&record)?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }
}

/// Version, flags (names are UTF-8), method, time, date, checksum.
fn common(version: u8, crc32: u32) -> Vec<u8> {
    [&[version, 0, 0, 8, 0, 0, 0, 0, 0, 0][..], &crc32.to_le_bytes()].concat()
}

fn short(len: usize) -> [u8; 2] {
    (len as u16).to_le_bytes()
}

/// Header of an entry, with `padding` bytes of an extra field that means nothing.
fn local_header(name: &str, length: u64, crc32: u32, padding: usize) -> Vec<u8> {
    let mut extra = Vec::new();
    if length >= IN_ZIP64 {
        extra.extend([&[1, 0, 16, 0][..], &length.to_le_bytes(), &length.to_le_bytes()].concat());
    }
    if padding > 0 {
        extra.extend([&b"FB"[..], &short(padding - 4), &vec![b'Z'; padding - 4]].concat()); // as PyTorch pads
    }
    let size = (length.min(IN_ZIP64) as u32).to_le_bytes();
    let version = if length >= IN_ZIP64 { 45 } else { 20 };
    let fixed = [LOCAL, &common(version, crc32), &size, &size, &short(name.len()), &short(extra.len())];
    [&fixed.concat()[..], name.as_bytes(), &extra].concat()
}

fn central_entry(name: &str, Written { header, length, crc32 }: Written) -> Vec<u8> {
    let mut extra = Vec::new();
    if length >= IN_ZIP64 {
        extra.extend([length.to_le_bytes(), length.to_le_bytes()].concat());
    }
    if header >= IN_ZIP64 {
        extra.extend(header.to_le_bytes());
    }
    let version = if extra.is_empty() { 20 } else { 45 };
    if !extra.is_empty() {
        extra = [&[1, 0][..], &short(extra.len()), &extra].concat();
    }
    let size = (length.min(IN_ZIP64) as u32).to_le_bytes();
    let fixed = [CENTRAL, &[version, 0], &common(version, crc32), &size, &size, &short(name.len())].concat();
    let place = (header.min(IN_ZIP64) as u32).to_le_bytes();
    [&fixed[..], &short(extra.len()), &[0; 10], &place, name.as_bytes(), &extra].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// A file in which long runs of zeros take no room.
    struct Sparse(File);

    impl Write for Sparse {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if bytes.len() >= 1 << 20 && bytes.iter().all(|b| *b == 0) {
                self.0.seek(SeekFrom::Current(bytes.len() as i64))?;
                return Ok(bytes.len());
            }
            self.0.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            self.0.flush()
        }
    }

    impl Seek for Sparse {
        fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }

    fn written(lengths: &[u64], path: &std::path::Path) -> Vec<Entry> {
        let zeros = vec![0; 1 << 22];
        let mut archive = Writer::new(Sparse(File::create(path).unwrap()));
        for (i, length) in lengths.iter().enumerate() {
            let send = |sink: &mut Sink| {
                (0..length / (1 << 22)).try_for_each(|_| sink(&zeros))?;
                sink(&vec![i as u8 + 1; (length % (1 << 22)) as usize])
            };
            archive.add(&format!("a/{i}"), *length, send).unwrap();
        }
        archive.finish().unwrap();
        let file = Mapped::open(path).unwrap();
        let entries = entries(&file).unwrap();
        for (i, (entry, length)) in entries.iter().zip(lengths).enumerate() {
            assert_eq!((entry.name.as_str(), entry.range.len() as u64), (format!("a/{i}").as_str(), *length));
            assert!(entry.range.start.is_multiple_of(ALIGNMENT as usize));
            let end = &file.bytes()[entry.range.clone()];
            assert_eq!(end.last(), Some(&(i as u8 + 1)));
        }
        entries
    }

    #[test]
    fn small_archives() {
        let dir = tempfile::tempdir().unwrap();
        let entries = written(&[1, 63, 64, 65, 5000], &dir.path().join("z"));
        assert_eq!(entries.len(), 5);
        assert_eq!(entries[2].crc32, crc32fast::hash(&[3; 64]));
    }

    /// A file of more than 4 GiB, and one that begins behind it: both need zip64.
    #[test]
    fn archives_beyond_4_gib() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(written(&[7, (1 << 32) + 9, 11], &dir.path().join("z")).len(), 3);
    }
}
