//! Files and directories that are on the disk itself before anyone relies on them.

use super::human_bytes;
use super::manifest::{FileEntry, hex};
use anyhow::{Context, Error, Result};
use rustix::fs::{CWD, RenameFlags};
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Bytes that are checksummed and handed to the kernel at a time; small enough to be still in cache for the copy.
const CHUNK: usize = 1 << 20;

/// A file being written and checksummed in one pass.
pub(super) struct Output {
    path: PathBuf,
    file: File,
    bytes: u64,
    crc: u32,
}

impl Output {
    pub(super) fn create(path: &Path) -> Result<Output> {
        let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Output { path: path.into(), file, bytes: 0, crc: 0 })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.crc = crc32c::crc32c_append(self.crc, chunk);
            self.file.write_all(chunk).with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Waits until the file is on the disk itself.
    pub(super) fn finish(self) -> Result<FileEntry> {
        self.file.sync_all().with_context(|| format!("cannot flush {} to disk", self.path.display()))?;
        Ok(FileEntry { bytes: self.bytes, crc32c: hex(self.crc) })
    }
}

pub(super) fn write_file(path: &Path, content: &[u8]) -> Result<FileEntry> {
    let mut file = Output::create(path)?;
    file.write(content)?;
    file.finish()
}

/// Writes a file that is there with all its content or not at all, for readers of other processes and machines; on the disk before it
/// takes the place of another one.
pub(crate) fn write_at_once(path: &Path, content: &[u8]) -> Result<()> {
    let beside = beside(path, "-writing");
    remove(&beside)?; // of an attempt that had no room
    write_file(&beside, content)?;
    rename(&beside, path)
}

/// Gives the finished temporary its name, durably. Where a checkpoint of that step exists the two change places in one
/// indivisible operation, so that at no moment there is none; the old one goes once the new one is safe.
pub(super) fn publish(root: &Path, temporary: &Path, place: &Path) -> Result<()> {
    if !place.exists() {
        rename(temporary, place)?;
        return sync_directory(root);
    }
    let old = if rustix::fs::renameat_with(CWD, temporary, CWD, place, RenameFlags::EXCHANGE).is_ok() {
        temporary.to_path_buf()
    } else {
        // The file system cannot exchange. A kill between these two renames loses this step, but no other.
        let old = beside(temporary, "-old");
        rename(place, &old)?;
        rename(temporary, place)?;
        old
    };
    sync_directory(root)?;
    remove(&old)
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot rename {} to {}", from.display(), to.display()))
}

/// Makes renames and new names in a directory durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("cannot flush the directory {} to disk", path.display()))
}

/// Removes a file or a directory tree, which need not exist.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes a temporary that other ranks may still be writing into: once it has another name, nothing new gets in.
pub(super) fn discard(temporary: &Path) -> Result<()> {
    let old = beside(temporary, "-old");
    remove(&old)?;
    match fs::rename(temporary, &old) {
        Ok(()) => remove(&old),
        Err(_) => remove(temporary),
    }
}

/// The name of `path` with something behind it.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Bytes that an unprivileged process may still write on the file system of `path`.
fn free_bytes(path: &Path) -> Option<u64> {
    let status = rustix::fs::statvfs(path).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

/// Refuses to fill the disk to the brim, which would also stop whoever else writes to it.
pub(super) fn check_room(root: &Path, needed: u64) -> Result<()> {
    match free_bytes(root) {
        Some(free) if free < needed => Err(io::Error::from(ErrorKind::StorageFull).into()),
        _ => Ok(()),
    }
}

/// Says what failed, and what to do about the failures that have a cure.
pub(super) fn explain(error: &Error, root: &Path, needed: u64) -> String {
    let full = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|cause| {
        matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
    });
    if !full {
        return format!("check that the disk is mounted, writable and healthy: {error:#}");
    }
    let free = free_bytes(root).map_or("an unknown number of bytes".into(), human_bytes);
    format!(
        "there is no room: it needs {} ({needed} bytes) and {free} are free. Free some space, raise the quota or file-size \
         limit, keep fewer checkpoints, or move the run folder to a larger disk: {error:#}",
        human_bytes(needed)
    )
}
