//! Mapped files, and sequences of bytes that lie in them.

use anyhow::{Context, Result, ensure};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a file begins that stands for one that Git LFS has not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A file mapped for reading. Its pages are shared with every process that maps it.
#[derive(Debug)]
pub(super) struct Mapped {
    path: PathBuf,
    file: File,
    map: Mmap,
}

impl Mapped {
    /// Maps a file.
    pub(super) fn open(path: &Path) -> Result<Arc<Mapped>> {
        check_kind(path)?;
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let map = map(&file).with_context(|| format!("cannot map {}", path.display()))?;
        ensure!(
            !map.starts_with(LFS_POINTER),
            "{} only says where Git LFS keeps the file; `git lfs pull` in its folder fetches it",
            path.display()
        );
        Ok(Arc::new(Mapped { path: path.into(), file, map }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }
}

/// Refuses what is no plain file, and returns the size. To open a pipe would be to wait for whoever writes to it.
pub(super) fn check_kind(path: &Path) -> Result<u64> {
    let kind = path.metadata().with_context(|| format!("cannot read {}", path.display()))?;
    ensure!(kind.is_file(), "{} is not a file", path.display());
    Ok(kind.len())
}

#[allow(unsafe_code)] // mapping a file is the one thing here that the compiler cannot vouch for
fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is sound as long as nobody changes or truncates the file. Weights are published once: what
    // Ferropt writes it renames into place and never touches again, and so do the programs whose files it reads.
    unsafe { Mmap::map(file) }
}

/// Bytes that follow each other, though they may lie in several places of several mapped files.
#[derive(Clone, Debug, Default)]
pub(super) struct Strand {
    extents: Vec<Extent>,
}

#[derive(Clone, Debug)]
struct Extent {
    file: Arc<Mapped>,
    range: Range<usize>,
}

impl Strand {
    /// A range of a file; nothing if the file has no such range.
    pub(super) fn of(file: &Arc<Mapped>, range: Range<usize>) -> Option<Strand> {
        file.bytes().get(range.clone())?;
        Some(Strand { extents: vec![Extent { file: file.clone(), range }] })
    }

    /// Number of bytes.
    pub(super) fn len(&self) -> usize {
        self.extents.iter().map(|e| e.range.len()).sum()
    }

    /// Appends another strand.
    pub(super) fn extend(&mut self, other: Strand) {
        for extent in other.extents {
            match self.extents.last_mut() {
                Some(last)
                    if Arc::ptr_eq(&last.file, &extent.file) && last.range.end == extent.range.start =>
                {
                    last.range.end = extent.range.end;
                }
                _ => self.extents.push(extent),
            }
        }
    }

    /// The part `range` of it, which must lie inside.
    pub(super) fn slice(&self, range: Range<usize>) -> Strand {
        let mut extents = Vec::new();
        for (at, extent) in self.located() {
            let start = range.start.max(at);
            let end = range.end.min(at + extent.range.len());
            if start < end {
                let range = extent.range.start + (start - at)..extent.range.start + (end - at);
                extents.push(Extent { file: extent.file.clone(), range });
            }
        }
        Strand { extents }
    }

    /// Reads the bytes from `start` on, as many as `out` takes; they must lie inside. They do not come out of the
    /// mapping: pages that are mapped count as memory of this process, and each has to be found when it is touched.
    ///
    /// # Errors
    /// When the system cannot read the file.
    pub(super) fn read(&self, start: usize, out: &mut [u8]) -> Result<()> {
        let end = start + out.len();
        for (at, Extent { file, range }) in self.located() {
            let (from, to) = (start.max(at), end.min(at + range.len()));
            if from < to {
                let out = &mut out[from - start..to - start];
                let read = file.file.read_exact_at(out, (range.start + from - at) as u64);
                read.with_context(|| format!("cannot read {}", file.path.display()))?;
            }
        }
        Ok(())
    }

    /// The bytes, if they lie in one place.
    pub(super) fn contiguous(&self) -> Option<&[u8]> {
        match &self.extents[..] {
            [] => Some(&[]),
            [extent] => Some(extent.bytes()),
            _ => None,
        }
    }

    /// Whether both are the same places of the same files.
    pub(super) fn is_same_place(&self, other: &Strand) -> bool {
        self.extents.len() == other.extents.len()
            && self
                .extents
                .iter()
                .zip(&other.extents)
                .all(|(a, b)| Arc::ptr_eq(&a.file, &b.file) && a.range == b.range)
    }

    /// The files it lies in.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.extents.iter().map(|e| e.file.path())
    }

    fn located(&self) -> impl Iterator<Item = (usize, &Extent)> {
        self.extents.iter().scan(0, |at, extent| {
            let here = *at;
            *at += extent.range.len();
            Some((here, extent))
        })
    }
}

impl Extent {
    fn bytes(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_and_reads_cross_extents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, (0u8..20).collect::<Vec<_>>()).unwrap();
        let file = Mapped::open(&path).unwrap();
        let of = |range| Strand::of(&file, range).unwrap();
        let mut strand = of(10..14);
        strand.extend(of(14..16));
        assert!(strand.contiguous().is_some(), "neighbours become one");
        strand.extend(of(0..3));
        assert_eq!((strand.len(), strand.contiguous()), (9, None));
        let mut out = [0; 4];
        strand.slice(3..9).read(1, &mut out).unwrap();
        assert_eq!(out, [14, 15, 0, 1]);
        assert!(Strand::of(&file, 19..21).is_none());
        assert!(Mapped::open(dir.path()).unwrap_err().to_string().contains("not a file"));
    }
}
