//! A tensor on its way into a file.

use super::super::dtype::Dtype;
use super::super::stored::{Sink, StoredTensor};
use anyhow::{Context, Result};
use std::ops::Range;

/// A tensor under its name in the target.
pub(super) struct Outgoing<'a> {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    /// Blocks of stored tensors, one above the other.
    Blocks(Vec<Block<'a>>),
    /// Bytes of a buffer that every model has.
    Constant(Vec<u8>),
}

/// Part of a stored tensor.
#[derive(Clone)]
pub(super) struct Block<'a> {
    pub(super) tensor: &'a StoredTensor,
    pub(super) rows: Range<usize>,
    pub(super) columns: Range<usize>,
}

impl<'a> Block<'a> {
    /// All of a tensor.
    pub(super) fn whole(tensor: &'a StoredTensor) -> Block<'a> {
        Block { tensor, rows: 0..tensor.rows(), columns: 0..tensor.columns() }
    }
}

impl<'a> Outgoing<'a> {
    /// The blocks are of the same width, and of tensors of the same type unless `dtype` says which.
    pub(super) fn new(name: String, dtype: Option<Dtype>, blocks: Vec<Block<'a>>) -> Result<Outgoing<'a>> {
        let first = blocks.first().context("a tensor is made of nothing")?;
        let rows = blocks.iter().map(|b| b.rows.len()).sum();
        let shape =
            if first.tensor.shape().len() == 1 { vec![rows] } else { vec![rows, first.columns.len()] };
        // q, k and v in different types become the first's only if that loses nothing.
        let widest = if blocks.iter().all(|b| b.tensor.dtype() == first.tensor.dtype()) {
            first.tensor.dtype()
        } else {
            Dtype::F32
        };
        Ok(Outgoing { name, dtype: dtype.unwrap_or(widest), shape, content: Content::Blocks(blocks) })
    }

    /// A vector with one value.
    pub(super) fn constant(name: &str, dtype: Dtype, value: f32) -> Result<Outgoing<'a>> {
        let mut bytes = Vec::new();
        dtype.append(&[value], &mut bytes)?;
        Ok(Outgoing { name: name.into(), dtype, shape: vec![1], content: Content::Constant(bytes) })
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }

    /// Hands over all bytes, a few megabytes at a time.
    pub(super) fn stream(&self, sink: &mut Sink) -> Result<()> {
        let (mut values, mut converted) = (Vec::new(), Vec::new());
        let blocks = match &self.content {
            Content::Constant(bytes) => return sink(bytes),
            Content::Blocks(blocks) => blocks,
        };
        for Block { tensor, rows, columns } in blocks {
            tensor.stream(rows.clone(), columns.clone(), &mut |bytes| {
                if tensor.dtype() == self.dtype {
                    return sink(bytes);
                }
                values.resize(bytes.len() / tensor.dtype().size(), 0.0);
                tensor.dtype().to_f32(bytes, &mut values);
                converted.clear();
                self.dtype
                    .append(&values, &mut converted)
                    .with_context(|| format!("tensor {}", self.name))?;
                sink(&converted)
            })?;
        }
        Ok(())
    }
}
