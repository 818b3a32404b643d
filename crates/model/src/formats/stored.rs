//! A tensor as it lies in files.

use super::dtype::Dtype;
use super::strand::Strand;
use anyhow::{Context, Result, ensure};
use std::ops::Range;

/// Most bytes that streaming holds at a time, but for a single row that is longer.
const CHUNK: usize = 4 << 20;

/// Most bytes that are read on the way to another type, but for a single row that is longer.
const NEAR: usize = 64 << 10;

/// Takes bytes, piece by piece.
pub(super) type Sink<'a> = dyn FnMut(&[u8]) -> Result<()> + 'a;

/// A tensor with one or two dimensions under a Hugging Face name. Nothing of it is in memory: it is put together from
/// mapped files when it is read.
#[derive(Clone, Debug)]
pub struct StoredTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    pieces: Vec<Piece>,
}

/// Part of a tensor, row by row. A vector is a matrix with one column.
#[derive(Clone, Debug)]
struct Piece {
    rows: Range<usize>,
    columns: Range<usize>,
    data: Strand,
}

/// A tensor out of one file, or out of the shards of one.
#[derive(Clone, Debug)]
pub(super) struct Flat {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Row-major; as many bytes as the shape says.
    pub(super) data: Strand,
}

/// Elements of a shape, unless the number is out of all proportion.
pub(super) fn elements(shape: &[usize]) -> Option<usize> {
    let count = shape.iter().try_fold(1usize, |n, x| n.checked_mul(*x))?;
    (count <= isize::MAX as usize / 8).then_some(count)
}

impl Flat {
    /// Row `i` of `n` equally large parts, one above the other.
    pub(super) fn rows_part(&self, i: usize, n: usize) -> Result<Flat> {
        let rows =
            self.shape.first().copied().with_context(|| format!("has shape {:?}, no rows", self.shape))?;
        ensure!(rows.is_multiple_of(n), "has shape {:?}, whose rows do not divide by {n}", self.shape);
        let bytes = self.data.len() / n;
        let mut shape = self.shape.clone();
        shape[0] = rows / n;
        Ok(Flat { dtype: self.dtype, shape, data: self.data.slice(i * bytes..(i + 1) * bytes) })
    }
}

impl StoredTensor {
    /// Tensors of the same type, one above the other.
    pub(super) fn stack_rows(parts: &[&Flat]) -> Result<StoredTensor> {
        let first = parts.first().context("is missing")?;
        let mut tensor = StoredTensor { dtype: first.dtype, shape: first.shape.clone(), pieces: Vec::new() };
        let mut end = 0;
        for part in parts {
            ensure!(
                part.dtype == first.dtype && part.shape.get(1..) == first.shape.get(1..),
                "has parts that do not fit each other: {} {:?} and {} {:?}",
                first.dtype,
                first.shape,
                part.dtype,
                part.shape
            );
            ensure!(matches!(part.shape.len(), 1 | 2), "has shape {:?}", part.shape);
            let rows = end..end + part.shape[0];
            end = rows.end;
            tensor.pieces.push(Piece { rows, columns: 0..columns(&part.shape), data: part.data.clone() });
        }
        tensor.shape[0] = end;
        Ok(tensor)
    }

    /// Matrices of the same type, side by side.
    pub(super) fn stack_columns(parts: &[&Flat]) -> Result<StoredTensor> {
        let first = parts.first().context("is missing")?;
        let mut tensor = StoredTensor { dtype: first.dtype, shape: first.shape.clone(), pieces: Vec::new() };
        let mut end = 0;
        for part in parts {
            ensure!(
                part.dtype == first.dtype
                    && part.shape.len() == 2
                    && part.shape.first() == first.shape.first(),
                "has parts that do not fit each other: {} {:?} and {} {:?}",
                first.dtype,
                first.shape,
                part.dtype,
                part.shape
            );
            let columns = end..end + part.shape[1];
            end = columns.end;
            tensor.pieces.push(Piece { rows: 0..part.shape[0], columns, data: part.data.clone() });
        }
        tensor.shape[1] = end;
        Ok(tensor)
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `[out, in]` or `[out]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// First dimension.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Second dimension; 1 for vectors.
    pub fn columns(&self) -> usize {
        columns(&self.shape)
    }

    /// Size in the files.
    pub fn bytes(&self) -> u64 {
        (self.rows() * self.columns() * self.dtype.size()) as u64
    }

    /// Pieces that it is put together from: 1 unless it is split among files.
    pub fn pieces(&self) -> usize {
        self.pieces.len()
    }

    /// All bytes, row-major and little-endian, where they are mapped; nothing if they lie in several places. They may
    /// be out of alignment.
    pub fn mapped(&self) -> Option<&[u8]> {
        match &self.pieces[..] {
            [piece] => piece.data.contiguous(),
            _ => None,
        }
    }

    /// The file that it begins in.
    pub(super) fn file(&self) -> String {
        let file = self.pieces.iter().flat_map(|p| p.data.files()).next();
        file.map_or_else(|| "no file".into(), |path| path.display().to_string())
    }

    /// Whether both lie at the same places of the same files.
    pub(super) fn is_same_place(&self, other: &StoredTensor) -> bool {
        self.pieces.len() == other.pieces.len()
            && self.pieces.iter().zip(&other.pieces).all(|(a, b)| a.data.is_same_place(&b.data))
    }

    /// Copies a block as it is stored: `out` has exactly its bytes.
    ///
    /// # Errors
    /// When the tensor has no such block, or `out` has another size.
    pub fn read_block(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [u8]) -> Result<()> {
        let size = self.dtype.size();
        ensure!(
            rows.start <= rows.end && rows.end <= self.rows(),
            "rows {rows:?} of a tensor with {}",
            self.rows()
        );
        ensure!(
            columns.start <= columns.end && columns.end <= self.columns(),
            "columns {columns:?} of a tensor with {}",
            self.columns()
        );
        let width = columns.len() * size;
        ensure!(
            out.len() == rows.len() * width,
            "a block of {} bytes was to be read into {}",
            rows.len() * width,
            out.len()
        );
        for piece in &self.pieces {
            let r = rows.start.max(piece.rows.start)..rows.end.min(piece.rows.end);
            let c = columns.start.max(piece.columns.start)..columns.end.min(piece.columns.end);
            if r.start >= r.end || c.start >= c.end {
                continue;
            }
            let stride = piece.columns.len() * size;
            let from = (r.start - piece.rows.start) * stride + (c.start - piece.columns.start) * size;
            if c == piece.columns && c == columns {
                let to = (r.start - rows.start) * width;
                piece.data.read(from, &mut out[to..to + r.len() * width])?;
                continue;
            }
            for i in 0..r.len() {
                let to = (r.start + i - rows.start) * width + (c.start - columns.start) * size;
                piece.data.read(from + i * stride, &mut out[to..to + c.len() * size])?;
            }
        }
        Ok(())
    }

    /// Rows from `first` on as f32, which is exact: as many as `out` has room for.
    ///
    /// # Errors
    /// When `out` is no whole number of rows, or the tensor has not so many.
    pub fn read_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        let columns = self.columns();
        ensure!(
            out.len().is_multiple_of(columns),
            "{} values are no whole number of rows of {columns}",
            out.len()
        );
        let last = first + out.len() / columns;
        ensure!(last <= self.rows(), "rows {first}..{last} of a tensor with {}", self.rows());
        let size = self.dtype.size();
        if self.dtype == Dtype::F32 {
            self.read_block(first..last, 0..columns, bytemuck::cast_slice_mut(out))?;
            out.iter_mut().for_each(|x| *x = f32::from_bits(u32::from_le(x.to_bits())));
            return Ok(());
        }
        // What is read is converted while it is in a near cache.
        let step = (NEAR / (columns * size).max(1)).max(1);
        let mut buffer = vec![0; step.min(last - first) * columns * size];
        for start in (first..last).step_by(step) {
            let end = (start + step).min(last);
            let bytes = &mut buffer[..(end - start) * columns * size];
            self.read_block(start..end, 0..columns, bytes)?;
            self.dtype.to_f32(bytes, &mut out[(start - first) * columns..(end - first) * columns]);
        }
        Ok(())
    }

    /// Rows that are streamed at a time.
    pub(super) fn chunk_rows(&self) -> usize {
        (CHUNK / (self.columns() * self.dtype.size()).max(1)).max(1)
    }

    /// Hands a block over as it is stored, a few rows at a time.
    pub(super) fn stream(&self, rows: Range<usize>, columns: Range<usize>, sink: &mut Sink) -> Result<()> {
        let step = self.chunk_rows();
        if columns == (0..self.columns())
            && let Some(all) = self.mapped()
        {
            let stride = self.columns() * self.dtype.size();
            return all[rows.start * stride..rows.end * stride].chunks(CHUNK).try_for_each(sink);
        }
        let row = columns.len() * self.dtype.size();
        let mut buffer = vec![0; step.min(rows.len()) * row];
        for start in rows.clone().step_by(step) {
            let end = (start + step).min(rows.end);
            let bytes = &mut buffer[..(end - start) * row];
            self.read_block(start..end, columns.clone(), bytes)?;
            sink(bytes)?;
        }
        Ok(())
    }
}

fn columns(shape: &[usize]) -> usize {
    shape.get(1).copied().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::super::strand::Mapped;
    use super::*;

    #[test]
    fn what_has_no_rows_has_no_parts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, [0; 24]).unwrap();
        let data = Strand::of(&Mapped::open(&path).unwrap(), 0..24).unwrap();
        let flat = |shape: &[usize]| Flat { dtype: Dtype::F32, shape: shape.into(), data: data.clone() };
        assert_eq!(flat(&[6]).rows_part(1, 3).unwrap().shape, [2]);
        for shape in [&[][..], &[4, 2]] {
            let error = flat(shape).rows_part(0, 3).unwrap_err().to_string();
            assert!(error.contains(&format!("{shape:?}")), "{error}");
        }
    }
}
