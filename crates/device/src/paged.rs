//! New tokens of many sequences, and where they are in a cache of keys and values in pages.

use crate::{Buffer, Device};

/// Tokens in a page of a KV cache.
pub const PAGE: usize = 64;

/// New tokens of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// How many.
    pub rows: usize,
    /// Tokens before them, whose keys and values are in the cache.
    pub past: usize,
    /// The sequence's pages, in order; at least as many as `past + rows` tokens need.
    pub pages: &'a [u32],
}

impl<'a> Segment<'a> {
    /// The pages that are read or written to: none without new tokens.
    fn used(&self) -> &'a [u32] {
        let needed = if self.rows == 0 { 0 } else { (self.past + self.rows).div_ceil(PAGE) };
        assert!(
            self.pages.len() >= needed,
            "{} tokens need {needed} pages, not {}",
            self.past + self.rows,
            self.pages.len()
        );
        &self.pages[..needed]
    }

    /// Page numbers are within the cache, and no two segments write to the same page.
    fn check(segments: &[Segment<'_>], capacity: usize) {
        let mut written: Vec<u32> = Vec::with_capacity(segments.len());
        for s in segments {
            let used = s.used();
            for page in used {
                assert!((*page as usize) < capacity, "page {page} of a cache of {capacity}");
            }
            written.extend(used.iter().skip(s.past / PAGE));
        }
        written.sort_unstable();
        assert!(written.windows(2).all(|w| w[0] != w[1]), "two sequences write to one page: {written:?}");
    }
}

/// Where the rows of a step are in their sequences' pages, in memory of a device: filled once a step, read by
/// [`Device::attention_paged`] in every layer. The memory stays where it is, so that steps that differ in nothing else are
/// the same operations (see [`Device::repeated`]).
pub struct Places<D: Device> {
    /// For each row where its sequence's pages begin in here, and its position; then the pages of all sequences.
    words: D::Buf<u32>,
    /// The same, on its way.
    staged: Vec<u32>,
    rows: usize,
    capacity: usize,
}

impl<D: Device> Places<D> {
    /// Room for `rows` rows of sequences of at most so many `pages`.
    ///
    /// # Errors
    /// When memory is short.
    pub fn new(device: &D, rows: usize, pages: usize) -> anyhow::Result<Self> {
        let words = device.alloc(rows * (2 + pages))?;
        Ok(Places { words, staged: Vec::new(), rows: 0, capacity: 0 })
    }

    /// Fills it for the rows of these segments, one after the other, over caches of `capacity` pages.
    ///
    /// # Panics
    /// When a segment has too few pages, or one that is not in the cache, when two write to the same one, or when there is
    /// no room for so many rows and pages.
    pub fn put(&mut self, device: &D, segments: &[Segment<'_>], capacity: usize) {
        Segment::check(segments, capacity);
        (self.rows, self.capacity) = (segments.iter().map(|s| s.rows).sum(), capacity);
        self.staged.clear();
        let mut first = 2 * self.rows;
        for s in segments {
            self.staged.extend((s.past..s.past + s.rows).flat_map(|at| [first as u32, at as u32]));
            first += s.used().len();
        }
        self.staged.extend(segments.iter().flat_map(Segment::used));
        let (all, room) = (self.staged.len(), self.words.len());
        assert!(
            all <= room,
            "{} rows and their pages are {all} numbers, more than the {room} there is room for",
            self.rows
        );
        device.upload(&mut self.words, 0, &self.staged);
    }

    /// For an operation.
    pub fn placed(&self) -> Placed<'_, D> {
        Placed { rows: self.rows, capacity: self.capacity, words: &self.words }
    }
}

/// [`Places`] as an operation sees them.
pub struct Placed<'a, D: Device> {
    /// Number of rows.
    pub(crate) rows: usize,
    /// Pages of the caches that they are in.
    pub(crate) capacity: usize,
    /// As in [`Places`].
    pub(crate) words: &'a D::Buf<u32>,
}

impl<D: Device> Placed<'_, D> {
    /// The caches have all pages that may be named.
    pub(crate) fn check(&self, k_pages: usize, v_pages: usize, page: usize) {
        let there = k_pages.min(v_pages) / page;
        assert!(self.capacity <= there, "places in caches of {} pages, which have {there}", self.capacity);
    }
}
