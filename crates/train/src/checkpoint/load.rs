//! Opens a checkpoint, believing nothing that was not verified.

use super::manifest::{self, Manifest, TensorEntry, hex};
use super::store;
use super::team::Share;
use anyhow::{Context, Result, bail, ensure};
use half::bf16;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A verified checkpoint. Tensors are views of memory-mapped files: opening takes no memory, and the system may drop
/// pages that were read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
    shards: BTreeMap<String, Shard>,
}

/// A mapped safetensors file.
#[derive(Debug)]
struct Shard {
    map: Mmap,
    /// Bytes of each tensor in the file.
    places: BTreeMap<String, Range<usize>>,
}

impl Shard {
    /// Maps a shard, which must hold exactly the listed tensors.
    fn open<'a>(path: &Path, listed: impl Iterator<Item = (&'a String, &'a TensorEntry)>) -> Result<Shard> {
        let map = map(path).with_context(|| format!("cannot read {}", path.display()))?;
        let parsed = SafeTensors::deserialize(&map)
            .with_context(|| format!("{} is not a valid safetensors file", path.display()))?;
        let mut places = BTreeMap::new();
        for (name, entry) in listed {
            let differs = || format!("{} does not match the manifest: tensor {name}", path.display());
            let view = parsed.tensor(name).with_context(|| format!("{} is missing", differs()))?;
            ensure!(
                view.shape() == entry.shape && view.dtype() == entry.dtype,
                "{} is {} {:?}, the manifest says {} {:?}",
                differs(),
                view.dtype(),
                view.shape(),
                entry.dtype,
                entry.shape
            );
            ensure!(
                matches!(entry.dtype, Dtype::F32 | Dtype::BF16),
                "{}: tensor {name} has type {}; checkpoints hold F32 and BF16",
                path.display(),
                entry.dtype
            );
            let start = view.data().as_ptr() as usize - map.as_ptr() as usize;
            places.insert(name.clone(), start..start + view.data().len());
        }
        if let Some(extra) = parsed.names().into_iter().find(|name| !places.contains_key(*name)) {
            bail!("{} does not match the manifest: tensor {extra} is not in the manifest", path.display());
        }
        Ok(Shard { map, places })
    }
}

/// A tensor of a checkpoint, where it lies in the file.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Global shape.
    pub shape: &'a [usize],
    /// `F32` or `BF16`.
    pub dtype: Dtype,
    /// Row-major little-endian elements.
    pub bytes: &'a [u8],
}

impl<'a> TensorView<'a> {
    /// The values as f32: the file's own bytes where they are f32, converted (exactly) where they are bf16.
    pub fn to_f32(&self) -> Cow<'a, [f32]> {
        self.elements(0..self.shape.iter().product())
    }

    /// Some of the values, as [`TensorView::to_f32`], in row-major order; only their bytes are read.
    pub fn elements(&self, range: Range<usize>) -> Cow<'a, [f32]> {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.bytes[range.start * size..range.end * size];
        match self.dtype {
            Dtype::F32 => match bytemuck::try_cast_slice(bytes) {
                Ok(values) => Cow::Borrowed(values),
                // Only files that others wrote can be out of alignment.
                Err(_) => {
                    let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                    Cow::Owned(bytes.chunks_exact(4).map(value).collect())
                }
            },
            _ => {
                let value = |b: &[u8]| bf16::from_le_bytes([b[0], b[1]]).to_f32();
                Cow::Owned(bytes.chunks_exact(2).map(value).collect())
            }
        }
    }
}

/// Reads a checkpoint's manifest and compares the files' sizes with it, which is cheap and finds a torn checkpoint.
pub(super) fn survey(path: &Path) -> Result<Manifest> {
    let file = path.join(manifest::FILE);
    let text = match fs::read(&file) {
        Err(error) if error.kind() == ErrorKind::NotFound => Err(error)
            .with_context(|| format!("{} is not a whole checkpoint: it has no manifest", path.display())),
        read => read.with_context(|| format!("cannot read {}", file.display())),
    }?;
    let manifest =
        Manifest::from_bytes(&text).with_context(|| format!("{} cannot be used", file.display()))?;
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    ensure!(
        store::step_of(name).is_none_or(|step| step == manifest.run.step),
        "{} was renamed: its manifest says that it is of step {}",
        path.display(),
        manifest.run.step
    );
    for (name, entry) in &manifest.files {
        let file = path.join(name);
        let found = fs::metadata(&file).with_context(|| format!("{} is damaged: missing", file.display()))?;
        ensure!(
            found.is_file() && found.len() == entry.bytes,
            "{} is damaged: it has {} bytes, the manifest says {}",
            file.display(),
            found.len(),
            entry.bytes
        );
    }
    Ok(manifest)
}

/// Compares the checksums of the files that `wanted` picks with those in the manifest.
fn verify_files(path: &Path, manifest: &Manifest, wanted: impl Fn(&str) -> bool) -> Result<()> {
    for (name, entry) in manifest.files.iter().filter(|(name, _)| wanted(name)) {
        let file = path.join(name);
        let crc = checksum(&file).with_context(|| format!("cannot read {}", file.display()))?;
        ensure!(
            crc == entry.crc32c,
            "{} is damaged: its CRC-32C is {crc}, the manifest says {}",
            file.display(),
            entry.crc32c
        );
    }
    Ok(())
}

/// Names of a checkpoint's files but for those of other groups of tensors than `group`.
fn files_of<'a>(manifest: &'a Manifest, group: &str) -> BTreeSet<&'a String> {
    let others = manifest.groups.iter().filter(|(name, _)| *name != group);
    let others: BTreeSet<&String> =
        others.flat_map(|(_, tensors)| tensors.values()).map(|tensor| &tensor.file).collect();
    manifest.files.keys().filter(|name| !others.contains(name)).collect()
}

/// The files of a checkpoint directory that [`verify_group`] looks at, its manifest first.
///
/// # Errors
/// When the manifest is damaged, or a file is missing or has another size.
pub fn group_files(path: &Path, group: &str) -> Result<Vec<PathBuf>> {
    let manifest = survey(path)?;
    let files = files_of(&manifest, group).into_iter().map(|name| path.join(name));
    Ok([path.join(manifest::FILE)].into_iter().chain(files).collect())
}

/// Verifies every byte of a checkpoint directory but for groups of tensors other than `group`.
///
/// # Errors
/// When a file is missing or damaged; the error names it.
pub fn verify_group(path: &Path, group: &str) -> Result<()> {
    let manifest = survey(path)?;
    let wanted = files_of(&manifest, group);
    verify_files(path, &manifest, |name| wanted.iter().any(|wanted| *wanted == name))
}

impl Checkpoint {
    /// Opens a checkpoint directory after verifying every byte of it.
    ///
    /// # Errors
    /// When a file is missing, damaged or not what the manifest says; the error names it.
    pub fn open(path: &Path) -> Result<Checkpoint> {
        Checkpoint::open_share(path, Share::alone())
    }

    /// Opens a checkpoint directory after verifying one rank's share of its bytes, and the sizes of all files. It may be
    /// used once the other ranks have found nothing wrong with theirs: see
    /// [`Store::latest_whole_together`](super::Store::latest_whole_together).
    ///
    /// # Errors
    /// When a file is missing, damaged or not what the manifest says; the error names it.
    pub fn open_share(path: &Path, share: Share) -> Result<Checkpoint> {
        let manifest = survey(path)?;
        let sizes: Vec<u64> = manifest.files.values().map(|file| file.bytes).collect();
        let mine = manifest.files.keys().zip(share.pick(&sizes)).filter(|(_, mine)| *mine);
        let mine: BTreeSet<&String> = mine.map(|(name, _)| name).collect();
        verify_files(path, &manifest, |name| mine.iter().any(|mine| *mine == name))?;
        let mut shards = BTreeMap::new();
        for name in manifest.files.keys().filter(|name| name.ends_with(".safetensors")) {
            let listed = manifest.groups.values().flatten().filter(|(_, tensor)| tensor.file == *name);
            shards.insert(name.clone(), Shard::open(&path.join(name), listed)?);
        }
        Ok(Checkpoint { path: path.into(), shards, manifest })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A tensor by group and name.
    ///
    /// # Errors
    /// When the checkpoint has no such tensor.
    pub fn tensor(&self, group: &str, name: &str) -> Result<TensorView<'_>> {
        let find = || {
            let entry = self.manifest.groups.get(group)?.get(name)?;
            let shard = self.shards.get(&entry.file)?;
            let bytes = shard.map.get(shard.places.get(name)?.clone())?;
            Some(TensorView { shape: &entry.shape, dtype: entry.dtype, bytes })
        };
        find().with_context(|| {
            let groups: Vec<String> =
                self.manifest.groups.iter().map(|(g, t)| format!("{g} ({})", t.len())).collect();
            format!(
                "checkpoint {} has no tensor {name} in group {group}; its groups (and tensors): {}",
                self.path.display(),
                groups.join(", ")
            )
        })
    }

    /// Content of a small file kept beside the tensors.
    ///
    /// # Errors
    /// When the checkpoint has no such file.
    pub fn file(&self, name: &str) -> Result<Vec<u8>> {
        ensure!(
            self.manifest.files.contains_key(name),
            "checkpoint {} has no file {name}; it has {}",
            self.path.display(),
            self.manifest.files.keys().cloned().collect::<Vec<_>>().join(", ")
        );
        let file = self.path.join(name);
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
    }
}

/// CRC-32C of a file, read in pieces: mapped pages would count as memory of this process.
fn checksum(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut piece = vec![0; 1 << 20];
    let mut crc = 0;
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex(crc)),
            count => crc = crc32c::crc32c_append(crc, &piece[..count]),
        }
    }
}

/// Maps a file for reading.
#[allow(unsafe_code)] // mapping a file is the one thing here that the compiler cannot vouch for
fn map(path: &Path) -> std::io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the mapping is sound as long as nobody changes or truncates the file. Ferropt never writes to a file
    // of a published checkpoint: it replaces and deletes whole directories, which leaves a mapped file as it was.
    unsafe { Mmap::map(&file) }
}
