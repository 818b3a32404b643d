//! Weight matrices that are only read: laid out once, for products with one row or thousands.
//!
//! A matrix `[n, k]` is cut into panels of output columns, in which the inner loops walk k in memory's order: `f32`
//! and `bf16` in [`float`], groups of 8-bit or 4-bit numbers in [`groups`]. Every element of a product is summed along k
//! in one order that depends on k alone, by the same instructions for few rows and for many, so that a row's result
//! does not depend on the rows beside it: a request gives the same tokens alone and in any batch.

mod float;
mod groups;

use half::bf16;

use super::buffer::Shards;
use super::embed::add;
use super::gemm::Epilogue;
use super::simd::{Simd, dispatch};
use super::{CpuBuf, CpuDevice};
use crate::quantise::Codes;
use crate::{Activation, Buffer, DType, Element, WeightFormat};

/// Rows of a matrix as f32: fills the slice with the rows of the range.
pub(super) type ReadRows<'a> = &'a mut dyn FnMut(std::ops::Range<usize>, &mut [f32]) -> anyhow::Result<()>;

/// A matrix `[n, k]` in panels.
pub struct Packed {
    n: usize,
    k: usize,
    data: Data,
}

enum Data {
    /// Units as products read them: f32, or pairs of bf16 where there is an instruction for those.
    Words(float::Panels<u32>),
    /// bf16, widened when they are read.
    Halves(float::Panels<bf16>),
    /// Numbers of few bits with a scale for each group.
    Groups(groups::Panels),
}

impl Packed {
    pub(super) fn new(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: ReadRows,
    ) -> anyhow::Result<Packed> {
        anyhow::ensure!(n > 0 && k > 0, "a weight matrix of {n} x {k} has no elements");
        let data = match format {
            WeightFormat::F32 => Data::Words(float::words(device, DType::F32, n, k, read)?),
            WeightFormat::Bf16 if float::has_pairs(device) => {
                Data::Words(float::words(device, DType::Bf16, n, k, read)?)
            }
            WeightFormat::Bf16 => Data::Halves(float::halves(device, n, k, read)?),
            WeightFormat::Int8 | WeightFormat::Int4 => {
                Data::Groups(groups::pack(device, format, n, k, read)?)
            }
        };
        Ok(Packed { n, k, data })
    }

    pub(super) fn from_codes(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: &mut dyn FnMut(std::ops::Range<usize>, Codes<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Packed> {
        anyhow::ensure!(n > 0 && k > 0, "a weight matrix of {n} x {k} has no elements");
        Ok(Packed { n, k, data: Data::Groups(groups::pack_codes(device, format, n, k, read)?) })
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        match &self.data {
            Data::Words(p) => 4 * p.data.len(),
            Data::Halves(p) => 2 * p.data.len(),
            Data::Groups(p) => p.bytes(),
        }
    }

    /// Row `i` as f32.
    fn row(&self, i: usize, out: &mut [f32]) {
        match &self.data {
            Data::Words(p) => p.row_of_words(i, out),
            Data::Halves(p) => p.row_of_halves(i, out),
            Data::Groups(p) => p.row(i, out),
        }
    }
}

/// Rows `x` `[m, k]` of either compute type.
#[derive(Clone, Copy)]
pub(super) enum Rows<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl<'a> Rows<'a> {
    pub(super) fn new<E: Element>(x: &'a [E]) -> Self {
        match E::DTYPE {
            DType::Bf16 => Rows::Bf16(bytemuck::cast_slice(x)),
            _ => Rows::F32(bytemuck::cast_slice(x)),
        }
    }
}

/// Where a product goes, and what happens to it on the way. Chosen when it runs rather than when it is compiled: the
/// kernels exist once, whatever the types around them.
pub(super) struct Finish<'a> {
    n: usize,
    bias: Option<&'a [f32]>,
    act: Activation,
    residual: Option<&'a [f32]>,
    y: Out<'a>,
}

enum Out<'a> {
    F32(Shards<'a, f32>),
    Bf16(Shards<'a, bf16>),
}

impl<'a> Finish<'a> {
    pub(super) fn new<O: Element>(
        w: &Packed,
        bias: Option<&'a [f32]>,
        act: Activation,
        residual: Option<&'a [f32]>,
        y: &'a mut [O],
    ) -> Self {
        let y = match O::DTYPE {
            DType::Bf16 => Out::Bf16(Shards::new(bytemuck::cast_slice_mut(y))),
            _ => Out::F32(Shards::new(bytemuck::cast_slice_mut(y))),
        };
        Finish { n: w.n, bias, act, residual, y }
    }
}

impl Epilogue for Finish<'_> {
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]) {
        let start = row * self.n + col;
        let to = start..start + acc.len();
        for at in (0..acc.len()).step_by(S::LANES) {
            let end = (at + S::LANES).min(acc.len());
            let mut v = s.load_up_to(&acc[at..end]);
            if let Some(bias) = self.bias {
                v = s.add(v, s.load_up_to(&bias[col + at..col + end]));
            }
            if self.act == Activation::Relu {
                v = s.max(v, s.zero());
            }
            if let Some(residual) = self.residual {
                v = s.add(v, s.load_up_to(&residual[start + at..start + end]));
            }
            // SAFETY: every part of every row comes once.
            unsafe {
                match &self.y {
                    Out::F32(y) => s.store_up_to(&mut y.range(to.clone())[at..end], v),
                    Out::Bf16(y) => s.store_up_to(&mut y.range(to.clone())[at..end], v),
                }
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        match &self.y {
            Out::F32(y) => y.prefetch(row * self.n + col, len),
            Out::Bf16(y) => y.prefetch(row * self.n + col, len),
        }
    }
}

/// `x[m, k] * w^T`, handed to `finish`.
pub(super) fn multiply(device: &CpuDevice, m: usize, x: Rows, w: &Packed, finish: &Finish) {
    match &w.data {
        Data::Words(panels) => float::multiply(device, (m, w.n, w.k), x, panels, finish),
        Data::Halves(panels) => float::multiply(device, (m, w.n, w.k), x, panels, finish),
        Data::Groups(panels) => groups::multiply(device, m, w.k, x, panels, finish),
    }
}

/// Rows `ids` of `w`, plus rows of a second table.
pub(super) fn embed(
    device: &CpuDevice,
    ids: &[u32],
    w: &Packed,
    second: Option<(&[u32], &[f32])>,
    out: &mut [f32],
) {
    let k = w.k;
    let out = Shards::new(&mut out[..ids.len() * k]);
    device.pool.for_each(ids.len(), |i, _| {
        // SAFETY: rows are disjoint.
        let out = unsafe { out.range(i * k..(i + 1) * k) };
        w.row(ids[i] as usize, out);
        if let Some((ids, table)) = second {
            let other = &table[ids[i] as usize * k..][..k];
            dispatch!(device.isa, s => add(s, other, out));
        }
    });
}

/// Reads the matrix a few panels at a time, and hands each panel's rows `[at most nr, k]` to `pack` with the panel's own
/// part of `out`, on all threads.
fn read_panels<T: Element>(
    device: &CpuDevice,
    (n, k, nr): (usize, usize, usize),
    read: ReadRows,
    out: &mut CpuBuf<T>,
    pack: impl Fn(&[f32], &mut [T]) + Sync,
) -> anyhow::Result<()> {
    let panels = n.div_ceil(nr);
    let stride = out.len() / panels;
    let together = (4 * device.threads()).min(panels);
    let mut rows = CpuBuf::<f32>::zeroed(together * nr * k)?;
    for first in (0..panels).step_by(together) {
        let range = first * nr..((first + together) * nr).min(n);
        let rows = &mut rows[..range.len() * k];
        read(range.clone(), rows)?;
        let (rows, count) = (&*rows, range.len().div_ceil(nr));
        let shards = Shards::new(&mut out[first * stride..(first + count) * stride]);
        device.pool.for_each(count, |p, _| {
            // SAFETY: each task writes its own panel.
            let out = unsafe { shards.range(p * stride..(p + 1) * stride) };
            pack(&rows[p * nr * k..((p + 1) * nr * k).min(rows.len())], out);
        });
    }
    Ok(())
}
