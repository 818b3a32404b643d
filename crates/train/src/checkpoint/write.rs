//! Puts a snapshot on disk, all of it or nothing.

use super::manifest::{self, FileEntry, Manifest, TensorEntry, hex};
use super::snapshot::{Group, Snapshot, Tensor};
use super::{human_bytes, store};
use anyhow::{Context, Error, Result, anyhow};
use ferropt_model::formats::safetensors_header;
use rustix::fs::{CWD, RenameFlags};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Size at which a group starts another shard: 2 GiB, which every file system and object store takes in one piece.
pub const DEFAULT_SHARD_BYTES: u64 = 2 << 30;

/// Bytes that are checksummed and handed to the kernel at a time; small enough to be still in cache for the copy.
const CHUNK: usize = 1 << 20;

/// One safetensors file before it is written: tensors in file order and the text that precedes them.
struct Shard {
    group: String,
    file: String,
    header: Vec<u8>,
    tensors: Vec<Tensor>,
}

/// A checkpoint that is durable on disk.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
}

/// Writes `snapshot` to `root/step-N` so that it is there entirely or not at all, whatever happens in between.
/// An existing checkpoint of that step is replaced.
pub(super) fn write(root: &Path, snapshot: Snapshot, shard_bytes: u64) -> Result<Written> {
    snapshot.check()?;
    let step = snapshot.run.step;
    let temporary = store::temporary(root, step);
    let place = root.join(store::directory(step));
    let mut needed = 0;
    let result = (|| {
        let mut manifest = Manifest::new(snapshot.run);
        let mut files = snapshot.files;
        let mut shards = Vec::new();
        for group in snapshot.groups {
            plan(group, shard_bytes, &mut manifest, &mut shards, &mut files)?;
        }
        needed = files.iter().map(|(_, content)| content.len() as u64).sum::<u64>()
            + shards.iter().map(Shard::bytes).sum::<u64>();
        // Filling the disk to the brim would also stop whoever else writes to it, so look first.
        if free_bytes(root).is_some_and(|free| free < needed) {
            return Err(io::Error::from(ErrorKind::StorageFull).into());
        }

        remove(&temporary)?;
        fs::create_dir(&temporary).with_context(|| format!("cannot create {}", temporary.display()))?;
        for (name, content) in files {
            let entry = write_file(&temporary.join(&name), &content)?;
            manifest.files.insert(name, entry);
        }
        for Shard { file, header, tensors, .. } in shards {
            let mut out = Output::create(&temporary.join(&file))?;
            out.write(&header)?;
            for tensor in tensors {
                out.write(tensor.data.bytes())?; // and free it before the next
            }
            manifest.files.insert(file, out.finish()?);
        }
        write_file(&temporary.join(manifest::FILE), &manifest.to_bytes()?)?;
        sync_directory(&temporary)?;
        publish(root, &temporary, &place)?;
        Ok(manifest.bytes())
    })();
    match result {
        Ok(bytes) => Ok(Written { path: place, bytes }),
        Err(error) => {
            let error = explain(error, &place, needed);
            Err(match remove(&temporary) {
                Ok(()) => error,
                Err(left) => error.context(format!("and its remains could not be removed ({left:#})")),
            })
        }
    }
}

/// Splits a group into shards of at most `limit` bytes (a larger tensor has one to itself), names them as Hugging
/// Face does, and enters the tensors in the manifest.
fn plan(
    group: Group,
    limit: u64,
    manifest: &mut Manifest,
    shards: &mut Vec<Shard>,
    files: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let Group { name: group, mut tensors } = group;
    // Wider types first keeps every tensor aligned to its elements, so that it can be used where it is mapped.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.data.dtype().bitsize()));
    let mut parts: Vec<Vec<Tensor>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let bytes = tensor.data.bytes().len() as u64;
        if filled > 0 && filled + bytes > limit {
            parts.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        if let Some(part) = parts.last_mut() {
            part.push(tensor);
        }
    }

    let count = parts.len();
    let mut weight_map = BTreeMap::new();
    let entries = manifest.groups.entry(group.clone()).or_default();
    for (index, tensors) in parts.into_iter().enumerate() {
        let file = match count {
            1 => format!("{group}.safetensors"),
            _ => format!("{group}-{:05}-of-{count:05}.safetensors", index + 1),
        };
        for tensor in &tensors {
            let entry =
                TensorEntry { shape: tensor.shape.clone(), dtype: tensor.data.dtype(), file: file.clone() };
            entries.insert(tensor.name.clone(), entry);
            weight_map.insert(tensor.name.clone(), file.clone());
        }
        let infos = tensors.iter().map(|t| (t.name.clone(), t.data.dtype(), t.shape.clone()));
        let header = safetensors_header(infos)?;
        shards.push(Shard { group: group.clone(), header, file, tensors });
    }
    if count > 1 {
        let total: u64 = shards.iter().filter(|shard| shard.group == group).map(Shard::data_bytes).sum();
        let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        files.push((format!("{group}.safetensors.index.json"), serde_json::to_vec_pretty(&index)?));
    }
    Ok(())
}

impl Shard {
    fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.data.bytes().len() as u64).sum()
    }

    fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.data_bytes()
    }
}

/// A file being written and checksummed in one pass.
struct Output {
    path: PathBuf,
    file: File,
    bytes: u64,
    crc: u32,
}

impl Output {
    fn create(path: &Path) -> Result<Output> {
        let file = File::create_new(path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Output { path: path.into(), file, bytes: 0, crc: 0 })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(CHUNK) {
            self.crc = crc32c::crc32c_append(self.crc, chunk);
            self.file.write_all(chunk).with_context(|| format!("cannot write {}", self.path.display()))?;
        }
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Waits until the file is on the disk itself.
    fn finish(self) -> Result<FileEntry> {
        self.file.sync_all().with_context(|| format!("cannot flush {} to disk", self.path.display()))?;
        Ok(FileEntry { bytes: self.bytes, crc32c: hex(self.crc) })
    }
}

fn write_file(path: &Path, content: &[u8]) -> Result<FileEntry> {
    let mut file = Output::create(path)?;
    file.write(content)?;
    file.finish()
}

/// Gives the finished temporary its name, durably. Where a checkpoint of that step exists the two change places in one
/// indivisible operation, so that at no moment there is none; the old one goes once the new one is safe.
fn publish(root: &Path, temporary: &Path, place: &Path) -> Result<()> {
    let failed = || format!("cannot rename {} to {}", temporary.display(), place.display());
    if !place.exists() {
        fs::rename(temporary, place).with_context(failed)?;
        return sync_directory(root);
    }
    let old = if rustix::fs::renameat_with(CWD, temporary, CWD, place, RenameFlags::EXCHANGE).is_ok() {
        temporary.to_path_buf()
    } else {
        // The file system cannot exchange. A kill between these two renames loses this step, but no other.
        let old = temporary.with_extension(format!("tmp-{}-old", std::process::id()));
        fs::rename(place, &old).and_then(|()| fs::rename(temporary, place)).with_context(failed)?;
        old
    };
    sync_directory(root)?;
    remove(&old)
}

/// Makes renames and new names in a directory durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .with_context(|| format!("cannot flush the directory {} to disk", path.display()))
}

/// Removes a directory tree, which need not exist.
pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Bytes that an unprivileged process may still write on the file system of `path`.
fn free_bytes(path: &Path) -> Option<u64> {
    let status = rustix::fs::statvfs(path).ok()?;
    Some(status.f_bavail.saturating_mul(status.f_frsize))
}

/// Says what failed, and what to do about the failures that have a cure.
fn explain(error: Error, place: &Path, needed: u64) -> Error {
    let full = error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|cause| {
        matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)
    });
    let free = place.parent().and_then(free_bytes).map_or("an unknown number of bytes".into(), human_bytes);
    let advice = if full {
        format!(
            "there is no room: it needs {} ({needed} bytes) and {free} are free. Free some space, raise the quota \
             or file-size limit, keep fewer checkpoints, or move the run folder to a larger disk",
            human_bytes(needed)
        )
    } else {
        "check that the disk is mounted, writable and healthy".to_string()
    };
    anyhow!("{error:#}").context(format!(
        "checkpoint {} was not saved (earlier ones are untouched): {advice}",
        place.display()
    ))
}
