//! A file of weights: a header, then the matrices as a device reads them.
//!
//! ```text
//! magic     8 bytes
//! checksum  CRC-32C of the rest of the header
//! key       its length, 4 bytes
//! body      its length, 8 bytes
//!           the key, JSON; zeros up to a whole page; the body
//! ```
//!
//! A file appears under its name once all of it is on the disk. Of the body only the length is compared: to look at it would
//! be to read it.

use super::sync_folder;
use anyhow::{Context, Result};
use ferropt_device::{Mapped, WritePiece};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// How the names end.
pub(super) const ENDING: &str = ".weights";
/// Begins every file; the last byte is the version of the header.
const MAGIC: &[u8; 8] = b"ferropt\x01";
/// Bytes before the key.
const FIXED: usize = 24;
const PAGE: usize = 4096;
/// No key is longer: one of a thousand files has 200 kB.
const LONGEST_KEY: usize = 16 << 20;

/// Whether a file has the name of one that is whole.
pub(super) fn is_weights(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    !name.starts_with('.') && name.ends_with(ENDING)
}

/// Whether it has the name of one that is being written.
pub(super) fn is_temporary(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with('.') && name.contains(&format!("{ENDING}.tmp-"))
}

/// A name beside `path` that nothing else has.
fn temporary(path: &Path) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.tmp-{}-{count}", std::process::id()))
}

fn header_size(key: usize) -> usize {
    (FIXED + key).next_multiple_of(PAGE)
}

/// Size of a file.
pub(super) fn size(key: &str, body: usize) -> u64 {
    (header_size(key.len()) + body) as u64
}

fn header(key: &str, body: usize) -> Vec<u8> {
    let mut header = [MAGIC, &[0; 4][..]].concat();
    header.extend((key.len() as u32).to_le_bytes());
    header.extend((body as u64).to_le_bytes());
    header.extend(key.as_bytes());
    header.resize(header_size(key.len()), 0);
    let checksum = crc32c::crc32c(&header[12..]);
    header[8..12].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// The key of a file that is whole, as far as its header and size tell.
pub(super) fn key_of(path: &Path) -> Option<String> {
    read_header(&File::open(path).ok()?).map(|(key, _)| key)
}

/// Key, and length of the body.
fn read_header(mut file: &File) -> Option<(String, usize)> {
    let metadata = file.metadata().ok().filter(|file| file.is_file())?;
    let mut fixed = [0; FIXED];
    file.read_exact(&mut fixed).ok()?;
    let length = u32::from_le_bytes(fixed[12..16].try_into().ok()?) as usize;
    let body = u64::from_le_bytes(fixed[16..24].try_into().ok()?);
    if fixed[..8] != *MAGIC || length > LONGEST_KEY {
        return None;
    }
    let mut key = vec![0; length];
    file.read_exact(&mut key).ok()?;
    let key = String::from_utf8(key).ok()?;
    let body = usize::try_from(body).ok()?;
    let whole = (header_size(length) as u64).checked_add(body as u64) == Some(metadata.len());
    (whole && header(&key, body)[..FIXED] == fixed).then_some((key, body))
}

/// The body of a file, if it is whole and has this key and as many bytes. Notes that it was used.
pub(super) fn open(path: &Path, key: &str, body: usize) -> Option<Mapped> {
    let file = File::open(path).ok()?;
    if read_header(&file)? != (key.to_string(), body) {
        return None;
    }
    // In a folder that is only read nothing is removed either.
    let _ = file.set_modified(SystemTime::now());
    let start = header_size(key.len());
    Mapped::open(&file).ok()?.part(start..start + body)
}

/// Writes a file whose body `fill` makes, and maps the body. Nothing is left of it if that fails.
pub(super) fn write(
    path: &Path,
    key: &str,
    body: usize,
    fill: impl FnOnce(&WritePiece<'_>) -> Result<()>,
) -> Result<Mapped> {
    let place = temporary(path);
    let make = || -> Result<Mapped> {
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&place);
        let file = file.with_context(|| format!("cannot create {}", place.display()))?;
        let start = header_size(key.len());
        reserve(&file, size(key, body))?;
        fill(&|at, bytes| Ok(file.write_all_at(bytes, (start + at) as u64)?))?;
        file.write_all_at(&header(key, body), 0)?;
        file.sync_all()?;
        fs::rename(&place, path)?;
        sync_folder(path.parent().unwrap_or(Path::new(".")))?;
        Mapped::open(&file)?.part(start..start + body).context("the file was cut short while it was written")
    };
    let made = make();
    if made.is_err() {
        // What cannot be removed now is removed when it is found abandoned.
        let _ = fs::remove_file(&place);
    }
    made
}

/// Has the file system set bytes aside, so that a disk that is too full says so at once.
fn reserve(file: &File, bytes: u64) -> std::io::Result<()> {
    match rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, bytes).map_err(Into::into) {
        // There is nothing to set aside where the file system does not know how.
        Err(error) if std::io::Error::kind(&error) == ErrorKind::Unsupported => file.set_len(bytes),
        reserved => reserved,
    }
}
