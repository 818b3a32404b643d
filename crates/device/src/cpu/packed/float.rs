//! Panels of f32 and bf16, and products with them.

use half::bf16;

use super::{Finish, Kept, Rows};
use crate::cpu::buffer::Shards;
use crate::cpu::elementwise::convert;
use crate::cpu::gemm::{self, Block, Dot, Fma, Mac, Operand, Tile, tile};
use crate::cpu::pack::{Matrix, pack, pack_panels};
use crate::cpu::simd::{Isa, Portable, Simd, dispatch, with_avx512, with_avx512_bf16};
use crate::cpu::{CpuDevice, Scratch};
use crate::{DType, Element};

/// At most this many rows are multiplied in one pass over the weights, all of k at once: what the L2 cache holds of
/// them. More go block by block, as in training.
const FEW_ROWS: usize = 64;

/// Elements of k that are packed at a time, on the way to another type: with a panel's width, what a near cache holds.
const STEP: usize = 64;

/// `[panel][unit][nr]`.
pub(super) struct Panels<W: Element> {
    pub(super) words: Kept,
    tile: Tile,
    k: usize,
    unit: std::marker::PhantomData<W>,
}

/// Whether bf16 are multiplied in pairs on this device.
pub(super) fn has_pairs(device: &CpuDevice) -> bool {
    tile(device.isa, DType::Bf16).per_unit == 2
}

/// Rows and words of a panel of units of `dtype` as products read them.
pub(super) fn words_panel(isa: Isa, dtype: DType, k: usize) -> (usize, usize) {
    let tile = tile(isa, dtype);
    (tile.nr, tile.nr * k.div_ceil(tile.per_unit))
}

/// Rows and words of a panel of single bf16.
pub(super) fn halves_panel(isa: Isa, k: usize) -> (usize, usize) {
    let tile = tile(isa, DType::F32);
    (tile.nr, tile.nr * k / 2)
}

/// Packs rows into a panel of units.
pub(super) fn pack_words(isa: Isa, dtype: DType, rows: &[f32], k: usize, out: &mut [u32]) {
    let (tile, count) = (tile(isa, dtype), rows.len() / k);
    let mut pack = |rows: Matrix<bf16>| pack_panels(isa, rows, 0..count, 0..k, tile.nr, tile.per_unit, out);
    if dtype == DType::Bf16 {
        let mut halves = vec![bf16::ZERO; rows.len()];
        dispatch!(isa, s => narrow(s, rows, &mut halves));
        pack(Matrix { data: &halves, ld: k, k_contiguous: true });
    } else {
        let rows = Matrix { data: rows, ld: k, k_contiguous: true };
        pack_panels(isa, rows, 0..count, 0..k, tile.nr, tile.per_unit, out);
    }
}

/// Packs rows into a panel of single bf16.
pub(super) fn pack_halves(isa: Isa, rows: &[f32], k: usize, out: &mut [u32]) {
    let (nr, count) = (tile(isa, DType::F32).nr, rows.len() / k);
    let rows = Matrix { data: rows, ld: k, k_contiguous: true };
    let mut words = vec![0; nr * STEP];
    for (step, out) in bytemuck::cast_slice_mut::<u32, bf16>(out).chunks_mut(nr * STEP).enumerate() {
        let words = &mut words[..out.len()];
        pack_panels(isa, rows, 0..count, step * STEP..(step * STEP + out.len() / nr), nr, 1, words);
        dispatch!(isa, s => narrow(s, bytemuck::cast_slice(words), out));
    }
}

/// Rounds to bf16: a plain loop, compiled for the instruction set of the token. Unlike the processor's conversion it
/// keeps the smallest numbers.
#[inline(always)]
fn narrow<S: Simd>(_: S, x: &[f32], out: &mut [bf16]) {
    for (x, out) in x.iter().zip(out) {
        *out = bf16::from_f32(*x);
    }
}

impl<W: Element> Panels<W> {
    pub(super) fn new(isa: Isa, dtype: DType, k: usize, words: Kept) -> Self {
        Panels { words, tile: tile(isa, dtype), k, unit: std::marker::PhantomData }
    }

    fn data(&self) -> &[W] {
        bytemuck::cast_slice(&self.words)
    }

    fn units(&self) -> usize {
        self.k.div_ceil(self.tile.per_unit)
    }

    /// Words of row `i`, one for each unit.
    fn row(&self, i: usize) -> impl Iterator<Item = W> + '_ {
        let (nr, units) = (self.tile.nr, self.units());
        self.data()[i / nr * nr * units..][i % nr..].iter().step_by(nr).take(units).copied()
    }
}

impl Panels<u32> {
    /// Row `i` as f32.
    pub(super) fn row_of_words(&self, i: usize, out: &mut [f32]) {
        for (word, out) in self.row(i).zip(out.chunks_mut(self.tile.per_unit)) {
            match out {
                [one] if self.tile.per_unit == 1 => *one = f32::from_bits(word),
                _ => {
                    for (half, out) in [word << 16, word & 0xffff_0000].into_iter().zip(out) {
                        *out = f32::from_bits(half);
                    }
                }
            }
        }
    }
}

impl Panels<bf16> {
    /// Row `i` as f32.
    pub(super) fn row_of_halves(&self, i: usize, out: &mut [f32]) {
        for (x, out) in self.row(i).zip(out) {
            *out = x.to_f32();
        }
    }
}

impl Operand for Panels<u32> {
    fn scratch(&self, _: usize) -> usize {
        0
    }

    fn prepare(&self, _: &CpuDevice, _: Range, _: Range, _: Tile, _: &mut [u32]) {}

    fn panels<'a>(&'a self, _: &'a [u32], col: usize, k: usize, _: usize, t: Tile) -> gemm::Panels<'a, u32> {
        let stride = self.units() * t.nr;
        gemm::Panels { data: &self.data()[col / t.nr * stride..], stride, start: k / t.per_unit * t.nr }
    }
}

impl Operand for Panels<bf16> {
    /// Widens: once for all rows of the product.
    fn prepare(&self, device: &CpuDevice, cols: Range, ks: Range, t: Tile, scratch: &mut [u32]) {
        let (size, stride) = (ks.len() * t.nr, self.k * t.nr);
        let panels = cols.len().div_ceil(t.nr);
        let shards = Shards::new(&mut scratch[..panels * size]);
        let data = self.data();
        device.pool.for_each(panels, |p, _| {
            // SAFETY: each task writes its own panel.
            let out = unsafe { shards.range(p * size..(p + 1) * size) };
            let x = &data[(cols.start / t.nr + p) * stride + ks.start * t.nr..][..size];
            dispatch!(device.isa, s => convert(s, x, bytemuck::cast_slice_mut::<u32, f32>(out)));
        });
    }
}

type Range = std::ops::Range<usize>;

/// `x[m, k] * w^T`.
pub(super) fn multiply<W: Element>(
    device: &CpuDevice,
    shape: (usize, usize, usize),
    x: Rows,
    w: &Panels<W>,
    finish: &Finish,
) where
    Panels<W>: Operand,
{
    match x {
        Rows::F32(x) => multiply_rows(device, shape, x, w, finish),
        Rows::Bf16(x) => multiply_rows(device, shape, x, w, finish),
    }
}

fn multiply_rows<E: Element, W: Element>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    x: &[E],
    w: &Panels<W>,
    finish: &Finish,
) where
    Panels<W>: Operand,
{
    let x = Matrix { data: &x[..m * k], ld: k, k_contiguous: true };
    if m > FEW_ROWS {
        return gemm::product(device, w.tile, (m, n, k), x, w, finish);
    }
    // As many rows in a tile as there are, so that none is computed for nothing.
    let mr = [1, 2, 4].into_iter().find(|mr| *mr >= m).unwrap_or(w.tile.mr).min(w.tile.mr);
    let Tile { nr, per_unit, .. } = w.tile;
    let units = w.units();
    let mut workspace = device.workspace();
    let [packed] = workspace.take([(Scratch::PackedA, m.next_multiple_of(mr) * units)]);
    if m <= mr {
        // A task on another thread would take longer to begin than this takes.
        pack_panels(device.isa, x, 0..m, 0..k, mr, per_unit, packed);
    } else {
        pack(device, x, 0..m, 0..k, mr, per_unit, packed);
    }
    let block = Block {
        tile: Tile { mr, nr, per_unit },
        units,
        rows: 0..m,
        cols: 0..n,
        first: true,
        last: true,
        a: packed,
        b: gemm::Panels { data: w.data(), stride: units * nr, start: 0 },
        partials_from: 0,
    };
    gemm::each_task(device, block.panels(), usize::MAX, |a, b| match device.isa {
        // SAFETY: the processor has AVX-512 BF16.
        Isa::Avx512Bf16 if per_unit == 2 => unsafe {
            with_avx512_bf16(
                #[inline(always)]
                |s| few::<_, Dot, _, 8, 3>(s, &block, a, b, finish),
            )
        },
        // SAFETY: the processor has AVX-512.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe {
            with_avx512(
                #[inline(always)]
                |s| few::<_, Fma, _, 8, 3>(s, &block, a, b, finish),
            )
        },
        Isa::Avx2 => dispatch!(Isa::Avx2, s => few::<_, Fma, _, 6, 2>(s, &block, a, b, finish)),
        Isa::Portable => few::<_, Fma, _, 4, 2>(Portable, &block, a, b, finish),
    });
}

/// A task with as many rows in a tile as the block says.
#[inline(always)]
fn few<S: Simd, M: Mac<S>, W: Element, const MR: usize, const NV: usize>(
    s: S,
    block: &Block<W>,
    a: Range,
    b: Range,
    finish: &Finish,
) {
    let none = Shards::new(&mut []);
    match block.tile.mr {
        1 => block.task::<S, M, _, 1, NV>(s, a, b, none, finish),
        2 => block.task::<S, M, _, 2, NV>(s, a, b, none, finish),
        4 => block.task::<S, M, _, 4, NV>(s, a, b, none, finish),
        _ => block.task::<S, M, _, MR, NV>(s, a, b, none, finish),
    }
}
