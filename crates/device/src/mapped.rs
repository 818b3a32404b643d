//! Files mapped for reading.

use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// Part of a file that is mapped for reading. Its pages are those of the system's file cache, which every process that
/// maps the file shares, and come into memory when they are first read.
#[derive(Clone, Debug)]
pub struct Mapped {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Mapped {
    /// A whole file.
    ///
    /// # Errors
    /// When the system does not map it.
    pub fn open(file: &File) -> std::io::Result<Mapped> {
        // SAFETY: sound as long as nobody changes or cuts the file. What is mapped here is written beside its place,
        // renamed into it, and only ever deleted, which leaves a mapped file as it was.
        let map = unsafe { Mmap::map(file) }?;
        Ok(Mapped { range: 0..map.len(), map: Arc::new(map) })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// A part; nothing where it has no such.
    pub fn part(&self, range: Range<usize>) -> Option<Mapped> {
        self.bytes().get(range.clone())?;
        let start = self.range.start;
        Some(Mapped { map: self.map.clone(), range: start + range.start..start + range.end })
    }
}
