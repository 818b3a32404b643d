//! A tensor of an open model, stored as numbers or as codes.

use super::dtype::Dtype;
use super::quantised::RoundedTensor;
use super::stored::StoredTensor;
use anyhow::Result;

/// A tensor as it lies in files.
#[derive(Clone, Copy, Debug)]
pub enum Tensor<'a> {
    /// Numbers.
    Plain(&'a StoredTensor),
    /// Codes of few bits.
    Rounded(&'a RoundedTensor),
}

impl Tensor<'_> {
    /// Element type of numbers.
    pub fn dtype(&self) -> Option<Dtype> {
        match self {
            Tensor::Plain(t) => Some(t.dtype()),
            Tensor::Rounded(_) => None,
        }
    }

    /// Short name of the element type: `f32`, `f16`, `bf16`, `int8`, `int4` or `int3`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Tensor::Plain(t) => t.dtype().name(),
            Tensor::Rounded(t) => t.format().name(),
        }
    }

    /// `[out, in]` or `[out]`.
    pub fn shape(&self) -> &[usize] {
        match self {
            Tensor::Plain(t) => t.shape(),
            Tensor::Rounded(t) => t.shape(),
        }
    }

    /// First dimension.
    pub fn rows(&self) -> usize {
        self.shape()[0]
    }

    /// Second dimension; 1 for vectors.
    pub fn columns(&self) -> usize {
        self.shape().get(1).copied().unwrap_or(1)
    }

    /// Size in the files.
    pub fn bytes(&self) -> u64 {
        match self {
            Tensor::Plain(t) => t.bytes(),
            Tensor::Rounded(t) => t.bytes(),
        }
    }

    /// Pieces that it is put together from.
    pub fn pieces(&self) -> usize {
        match self {
            Tensor::Plain(t) => t.pieces(),
            Tensor::Rounded(t) => t.pieces(),
        }
    }

    /// The file that it begins in.
    pub(super) fn file(&self) -> String {
        match self {
            Tensor::Plain(t) => t.file(),
            Tensor::Rounded(t) => t.file(),
        }
    }

    /// Rows that are streamed at a time.
    pub(super) fn chunk_rows(&self) -> usize {
        match self {
            Tensor::Plain(t) => t.chunk_rows(),
            Tensor::Rounded(t) => t.chunk_rows(),
        }
    }

    /// Rows from `first` on as f32: as many as `out` has room for. Of codes, the numbers that they stand for.
    ///
    /// # Errors
    /// When `out` is no whole number of rows, or the tensor has not so many.
    pub fn read_rows(&self, first: usize, out: &mut [f32]) -> Result<()> {
        match self {
            Tensor::Plain(t) => t.read_rows(first, out),
            Tensor::Rounded(t) => t.read_rows(first, out),
        }
    }
}
