//! Weight matrices that are only read: laid out once, for products with one row or thousands.
//!
//! A matrix `[n, k]` is cut into panels of output columns, in which the inner loops walk k in memory's order: `f32`,
//! `f16` and `bf16` in [`float`], groups of numbers of 8, 4 or 3 bits in [`groups`]. Every element of a product is summed along k
//! in one order that depends on k alone, by the same instructions for few rows and for many, so that a row's result
//! does not depend on the rows beside it: a request gives the same tokens alone and in any batch.

mod ahead;
mod float;
mod groups;
mod kept;
mod random;
mod rounding;
mod tile;

use std::sync::{Arc, Mutex, PoisonError};

use half::bf16;

use super::buffer::Shards;
use super::embed::add;
use super::gemm::Epilogue;
use super::linear::finish;
use super::simd::{Simd, dispatch, prefetch};
use super::{CpuBuf, CpuDevice, Scratch};
use crate::element::check_rows;
use crate::quantise::Codes;
use crate::{Activation, DType, Element, Mapped, ReadRows, WeightFormat, WritePiece};
pub(super) use ahead::Next;
use groups::Bits;
use kept::Kept;

/// A matrix `[n, k]` in panels.
pub struct Packed {
    n: usize,
    k: usize,
    data: Data,
    next: Arc<Next>,
}

enum Data {
    /// f32, or halves.
    Float(float::Panels),
    /// Numbers of few bits with a scale for each group.
    Groups(groups::Panels),
}

/// How a panel is laid out. All kinds are whole words.
#[derive(Clone, Copy, Debug)]
enum Layout {
    Float(DType),
    Groups(Bits),
}

impl Layout {
    fn new(format: WeightFormat) -> Layout {
        match format {
            WeightFormat::F32 => Layout::Float(DType::F32),
            WeightFormat::F16 => Layout::Float(DType::F16),
            WeightFormat::Bf16 => Layout::Float(DType::Bf16),
            WeightFormat::Int8 => Layout::Groups(Bits::Eight),
            WeightFormat::Int4 => Layout::Groups(Bits::Four),
            WeightFormat::Int3 => Layout::Groups(Bits::Three),
        }
    }

    /// Rows of the matrix in a panel, and words of a panel.
    fn panel(self, device: &CpuDevice, k: usize) -> (usize, usize) {
        match self {
            Layout::Float(dtype) => float::panel(device.isa, dtype, k),
            Layout::Groups(bits) => groups::panel(bits, k),
        }
    }

    /// Packs a panel's rows, at most as many as it has room for.
    fn pack(self, device: &CpuDevice, rows: &[f32], k: usize, out: &mut [u32]) {
        match self {
            Layout::Float(dtype) => float::pack_panel(device.isa, dtype, rows, k, out),
            Layout::Groups(bits) => rounding::pack(device.isa, bits, rows, k, out),
        }
    }
}

/// Bytes of a packed matrix.
pub(super) fn size(device: &CpuDevice, format: WeightFormat, n: usize, k: usize) -> usize {
    let (nr, words) = Layout::new(format).panel(device, k);
    4 * n.div_ceil(nr) * words
}

/// What decides how panels look, beside format and sizes.
pub(super) fn layout(device: &CpuDevice) -> String {
    /// Raised when the same sizes get another layout.
    const VERSION: u32 = 2;
    let width = |dtype| float::panel(device.isa, dtype, 1).0;
    format!("cpu {VERSION}, f32 x{}, bf16 x{}", width(DType::F32), width(DType::Bf16))
}

/// Packs a matrix, each panel on some thread: its rows are read into memory of that thread, which stays in a near cache,
/// and the panel that becomes of them is handed to `write`.
pub(super) fn pack_to(
    device: &CpuDevice,
    format: WeightFormat,
    (n, k): (usize, usize),
    read: &ReadRows<'_>,
    write: &WritePiece<'_>,
) -> anyhow::Result<()> {
    check_sizes(n, k)?;
    let layout = Layout::new(format);
    let (nr, words) = layout.panel(device, k);
    let own = nr * k + words;
    let mut workspace = device.workspace();
    let [memory] = workspace.take([(Scratch::PackedB, device.threads() * own)]);
    let memory = Shards::new(memory);
    let failure = Mutex::new(None);
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    device.pool.for_each(n.div_ceil(nr), |panel, thread| {
        // SAFETY: each thread has its own part.
        let (rows, packed) = unsafe { memory.range(thread * own..(thread + 1) * own) }.split_at_mut(nr * k);
        let range = panel * nr..((panel + 1) * nr).min(n);
        let rows: &mut [f32] = &mut bytemuck::cast_slice_mut(rows)[..range.len() * k];
        if failed().is_some() {
            return;
        }
        let made = read(range.clone(), rows).and_then(|()| {
            check_rows(format, range.start, k, rows)?;
            layout.pack(device, rows, k, packed);
            write(4 * panel * words, bytemuck::cast_slice(packed))
        });
        if let Err(error) = made {
            failed().get_or_insert(error);
        }
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

fn check_sizes(n: usize, k: usize) -> anyhow::Result<()> {
    anyhow::ensure!(n > 0 && k > 0, "a weight matrix of {n} x {k} has no elements");
    Ok(())
}

impl Packed {
    pub(super) fn new(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: &ReadRows<'_>,
    ) -> anyhow::Result<Packed> {
        let mut memory = CpuBuf::<u32>::zeroed(size(device, format, n, k) / 4)?;
        let shards = Shards::new(&mut memory);
        pack_to(device, format, (n, k), read, &|at, bytes| {
            // SAFETY: pieces do not overlap.
            let to = unsafe { shards.range(at / 4..(at + bytes.len()) / 4) };
            bytemuck::cast_slice_mut(to).copy_from_slice(bytes);
            Ok(())
        })?;
        Ok(Packed::of(device, format, n, k, Kept::Own(memory)))
    }

    /// What was packed before, for the same layout.
    pub(super) fn mapped(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        bytes: Mapped,
    ) -> anyhow::Result<Packed> {
        check_sizes(n, k)?;
        let (has, needs) = (bytes.bytes().len(), size(device, format, n, k));
        anyhow::ensure!(
            has == needs,
            "{has} bytes were given for a matrix of {n} x {k} in {}, which has {needs}",
            format.name()
        );
        Ok(Packed::of(device, format, n, k, Kept::mapped(bytes)?))
    }

    fn of(device: &CpuDevice, format: WeightFormat, n: usize, k: usize, kept: Kept) -> Packed {
        let data = match Layout::new(format) {
            Layout::Float(dtype) => Data::Float(float::Panels::new(device.isa, dtype, k, kept)),
            Layout::Groups(bits) => Data::Groups(groups::Panels::new(bits, n, k, kept)),
        };
        Packed { n, k, data, next: Arc::default() }
    }

    pub(super) fn from_codes(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        read: &mut dyn FnMut(std::ops::Range<usize>, Codes<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<Packed> {
        check_sizes(n, k)?;
        let data = Data::Groups(groups::pack_codes(device, format, n, k, read)?);
        Ok(Packed { n, k, data, next: Arc::default() })
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> usize {
        4 * match &self.data {
            Data::Float(p) => p.words.len(),
            Data::Groups(p) => p.words.len(),
        }
    }

    /// Row `i` as f32.
    fn row(&self, i: usize, out: &mut [f32]) {
        match &self.data {
            Data::Float(p) => p.row(i, out),
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
        let bias = self.bias.map(|bias| &bias[col..col + acc.len()]);
        let residual = self.residual.map(|residual| &residual[to.clone()]);
        // SAFETY: every part of every row comes once.
        unsafe {
            match &self.y {
                Out::F32(y) => finish(s, acc, bias, self.act, residual, y.range(to)),
                Out::Bf16(y) => finish(s, acc, bias, self.act, residual, y.range(to)),
            }
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        let start = row * self.n + col;
        if let Some(residual) = self.residual {
            for at in (0..len).step_by(16) {
                prefetch(residual.as_ptr().wrapping_add(start + at));
            }
        }
        match &self.y {
            Out::F32(y) => y.prefetch_row(start, len),
            Out::Bf16(y) => y.prefetch_row(start, len),
        }
    }
}

/// `x[m, k] * w^T`, handed to `finish`.
pub(super) fn multiply(device: &CpuDevice, m: usize, x: Rows, w: &Packed, finish: &Finish) {
    match &w.data {
        Data::Float(panels) => float::multiply(device, (m, w.n, w.k), x, panels, &w.next, finish),
        Data::Groups(panels) => groups::multiply(device, m, w.k, x, panels, &w.next, finish),
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
