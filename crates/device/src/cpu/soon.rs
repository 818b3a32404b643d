//! Memory that is used soon.

use super::simd::prefetch_l2;

/// Rows of it that lie apart. Others may write to them until then.
#[derive(Clone, Copy)]
pub(super) struct Soon {
    start: *const u8,
    /// How many, cache lines of each, and bytes from one to the next.
    rows: usize,
    lines: usize,
    step: usize,
}

impl Soon {
    /// So many rows of `len` numbers, the first of which begin at `start`, and one `step` numbers behind the other.
    #[inline(always)]
    pub(super) fn new<T>(start: *const T, rows: usize, len: usize, step: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(64);
        Soon { start: start.cast(), rows, lines, step: step * size_of::<T>() }
    }

    /// Brings it to the second-level cache.
    #[inline(always)]
    pub(super) fn fetch(&self) {
        for row in 0..self.rows {
            self.fetch_lines(row, 0, self.lines);
        }
    }

    /// Brings the `part`-th of so many parts of it there.
    #[inline(always)]
    pub(super) fn fetch_part(&self, part: usize, of: usize) {
        let all = self.rows * self.lines;
        let (mut at, end) = (all * part / of, all * (part + 1) / of);
        while at < end {
            let (row, line) = (at / self.lines, at % self.lines);
            let count = (self.lines - line).min(end - at);
            self.fetch_lines(row, line, count);
            at += count;
        }
    }

    #[inline(always)]
    fn fetch_lines(&self, row: usize, first: usize, count: usize) {
        for line in first..first + count {
            prefetch_l2(self.start.wrapping_add(row * self.step + 64 * line));
        }
    }
}
