//! Parts of a tensor.

use std::ops::Range;

/// Which elements of a tensor a part of it holds, in the tensor's row-major order: runs of equal length, equally far from
/// each other, without the first few. Rows are one run, columns are a run in every row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strided {
    /// Element of the tensor where the first run begins.
    pub first: usize,
    /// Elements of a run, at least 1.
    pub run: usize,
    /// Elements from the beginning of a run to that of the next.
    pub stride: usize,
    /// Elements of the runs that come before the part.
    pub skip: usize,
}

impl Strided {
    /// All elements.
    pub const WHOLE: Strided = Strided { first: 0, run: usize::MAX, stride: usize::MAX, skip: 0 };

    /// The part without its first `elements` elements.
    pub fn after(self, elements: usize) -> Strided {
        Strided { skip: self.skip + elements, ..self }
    }

    /// Elements `range` of the part, as pieces that follow each other in the tensor: where each begins in the part, where
    /// in the tensor, and its length.
    pub fn pieces(self, range: Range<usize>) -> impl Iterator<Item = (usize, usize, usize)> {
        let mut at = range.start;
        std::iter::from_fn(move || {
            let left = range.end.checked_sub(at).filter(|left| *left > 0)?;
            let (number, within) = ((self.skip + at) / self.run, (self.skip + at) % self.run);
            let piece = (at, self.first + number * self.stride + within, left.min(self.run - within));
            at += piece.2;
            Some(piece)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(part: Strided, range: Range<usize>) -> Vec<usize> {
        part.pieces(range).flat_map(|(_, start, len)| start..start + len).collect()
    }

    #[test]
    fn rows_columns_and_what_is_left_of_them() {
        // Of a tensor [4, 6].
        assert_eq!(elements(Strided::WHOLE, 3..7), [3, 4, 5, 6]);
        let rows = Strided { first: 12, run: 12, stride: 24, skip: 0 };
        assert_eq!(elements(rows, 0..12), (12..24).collect::<Vec<_>>());
        let columns = Strided { first: 2, run: 2, stride: 6, skip: 0 };
        assert_eq!(elements(columns, 0..8), [2, 3, 8, 9, 14, 15, 20, 21]);
        assert_eq!(elements(columns.after(3), 0..4), [9, 14, 15, 20]);
        assert_eq!(columns.after(3).pieces(1..4).collect::<Vec<_>>(), [(1, 14, 2), (3, 20, 1)]);
        assert_eq!(columns.pieces(5..5).count(), 0);
    }
}
