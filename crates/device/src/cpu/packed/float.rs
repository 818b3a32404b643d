//! Panels of f32, f16 and bf16, and products with them.

use std::sync::Arc;

use half::{bf16, f16};

use super::ahead::{Next, Place, expect_next};
use super::{Finish, Kept, Rows};
use crate::cpu::amx::{self, Tiles};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::{self, Block, Dot, Fma, Inner, Mac, Operand, Tile, Vectors, Widen, WidenF16, tile};
use crate::cpu::pack::{Matrix, pack, pack_panels};
use crate::cpu::simd::{Isa, Portable, Simd, dispatch, with_avx512, with_avx512_bf16};
use crate::cpu::{CpuDevice, Scratch};
use crate::{DType, Element};

/// Words by which weights that are read once are fetched ahead of their use: 32 KiB. A whole panel ahead, as for several tiles of
/// rows, would be more than the L2 cache holds where k is long.
const AHEAD: usize = 8 << 10;

/// `[panel][word][nr]`: a word is an f32, or a pair of bf16 that are neighbours in k. In the room of `nr` such pairs there are
/// `[2][nr]` f16, which are widened by one instruction where they lie beside each other.
pub(super) struct Panels {
    pub(super) words: Kept,
    /// Of numbers.
    dtype: DType,
    /// Of products. f16, and bf16 where there is no instruction that multiplies pairs of them, are widened when they are read.
    tile: Tile,
    /// Elements of k in a word.
    in_word: usize,
    /// Words of a panel.
    stride: usize,
}

/// Elements of k in a word.
fn in_word(dtype: DType) -> usize {
    if dtype == DType::F32 { 1 } else { 2 }
}

/// Rows and words of a panel.
pub(super) fn panel(isa: Isa, dtype: DType, k: usize) -> (usize, usize) {
    let t = tile(isa, dtype);
    (t.nr, t.nr * k.div_ceil(in_word(dtype)).next_multiple_of(t.step))
}

/// Packs rows into a panel.
pub(super) fn pack_panel(isa: Isa, dtype: DType, rows: &[f32], k: usize, out: &mut [u32]) {
    let (nr, count) = (tile(isa, dtype).nr, rows.len() / k);
    let matrix = Matrix { data: rows, ld: k, k_contiguous: true };
    match dtype {
        DType::Bf16 => {
            let mut halves = vec![bf16::ZERO; rows.len()];
            dispatch!(isa, s => narrow(s, rows, &mut halves));
            let matrix = Matrix { data: &halves, ld: k, k_contiguous: true };
            pack_panels(isa, matrix, 0..count, 0..k, nr, 2, out);
        }
        DType::F16 => {
            let mut wide = vec![0; nr * k];
            pack_panels(isa, matrix, 0..count, 0..k, nr, 1, &mut wide);
            let (halves, rest) = bytemuck::cast_slice_mut(out).split_at_mut(nr * k);
            rest.fill(f16::ZERO);
            dispatch!(isa, s => narrow_f16(s, bytemuck::cast_slice(&wide), halves));
        }
        _ => pack_panels(isa, matrix, 0..count, 0..k, nr, 1, out),
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

/// Rounds columns of panels to f16.
#[inline(always)]
fn narrow_f16<S: Simd>(s: S, x: &[f32], out: &mut [f16]) {
    for (x, out) in x.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        s.store_f16(out, s.load(x));
    }
}

/// Widens columns of panels.
#[inline(always)]
fn widen_f16<S: Simd>(s: S, x: &[f16], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(S::LANES).zip(out.chunks_exact_mut(S::LANES)) {
        s.store(out, s.load_f16(x));
    }
}

/// Widens pairs `[word][nr]` to `out` `[k][nr]`.
#[inline(always)]
fn widen<S: Simd>(s: S, nr: usize, pairs: &[u32], out: &mut [f32]) {
    for (pairs, out) in pairs.chunks_exact(nr).zip(out.chunks_mut(2 * nr)) {
        for at in (0..nr).step_by(S::LANES) {
            s.store(&mut out[at..], s.load_low(&pairs[at..]));
            if out.len() > nr {
                s.store(&mut out[nr + at..], s.load_high(&pairs[at..]));
            }
        }
    }
}

impl Panels {
    pub(super) fn new(isa: Isa, dtype: DType, k: usize, words: Kept) -> Self {
        let stride = panel(isa, dtype, k).1;
        Panels { words, dtype, tile: tile(isa, dtype), in_word: in_word(dtype), stride }
    }

    fn place(&self) -> Place {
        [self.words.as_ptr().addr(), 4 * self.stride, self.words.len() / self.stride]
    }

    fn widens(&self) -> bool {
        self.in_word > self.tile.per_unit
    }

    /// Row `i` as f32.
    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let nr = self.tile.nr;
        let panel = &self.words[i / nr * self.stride..][..self.stride];
        if self.dtype == DType::F16 {
            let halves: &[f16] = bytemuck::cast_slice(panel);
            for (half, out) in halves[i % nr..].iter().step_by(nr).zip(out) {
                *out = half.to_f32();
            }
            return;
        }
        let words = panel[i % nr..].iter().step_by(nr);
        for (word, out) in words.zip(out.chunks_mut(self.in_word)) {
            match out {
                [one] if self.in_word == 1 => *one = f32::from_bits(*word),
                _ => {
                    for (half, out) in [word << 16, word & 0xffff_0000].into_iter().zip(out) {
                        *out = f32::from_bits(half);
                    }
                }
            }
        }
    }
}

impl Operand for Panels {
    fn scratch(&self, words: usize) -> usize {
        if self.widens() { words } else { 0 }
    }

    /// Where it has to, it widens: once for all rows of the product.
    fn prepare(&self, device: &CpuDevice, cols: Range, ks: Range, t: Tile, scratch: &mut [u32]) {
        if !self.widens() {
            return;
        }
        let (first, panels) = (cols.start / t.nr, cols.len().div_ceil(t.nr));
        let size = ks.len() * t.nr;
        let words = ks.start / self.in_word * t.nr..ks.end.div_ceil(self.in_word) * t.nr;
        let shards = Shards::new(&mut scratch[..panels * size]);
        device.pool.for_each(panels, |p, _| {
            // SAFETY: each task writes its own panel.
            let out = unsafe { shards.range(p * size..(p + 1) * size) };
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            let pairs = &self.words[(first + p) * self.stride..][words.clone()];
            match self.dtype {
                DType::F16 => dispatch!(device.isa, s => widen_f16(s, bytemuck::cast_slice(pairs), out)),
                _ => dispatch!(device.isa, s => widen(s, t.nr, pairs, out)),
            }
        });
    }

    fn panels<'a>(
        &'a self,
        scratch: &'a [u32],
        col: usize,
        k: usize,
        units: usize,
        t: Tile,
    ) -> gemm::Panels<'a> {
        if self.widens() {
            return gemm::Panels { data: scratch, stride: units * t.nr, start: 0, next: units * t.nr };
        }
        let (stride, start) = (self.stride, k / self.in_word * t.nr);
        gemm::Panels { data: &self.words[col / t.nr * stride..], stride, start, next: stride }
    }
}

type Range = std::ops::Range<usize>;

/// `x[m, k] * w^T`.
pub(super) fn multiply(
    device: &CpuDevice,
    shape: (usize, usize, usize),
    x: Rows,
    w: &Panels,
    next: &Arc<Next>,
    finish: &Finish,
) {
    match x {
        _ if w.tile.are_few(shape.0, shape.2) => multiply_few(device, shape, x, w, next, finish),
        Rows::F32(x) => multiply_many(device, shape, x, w, finish),
        Rows::Bf16(x) => multiply_many(device, shape, x, w, finish),
    }
}

/// Rows `x` [m, k] as an operand.
fn operand<E>(x: &[E], m: usize, k: usize) -> Matrix<'_, E> {
    Matrix { data: &x[..m * k], ld: k, k_contiguous: true }
}

fn multiply_many<E: Element>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    x: &[E],
    w: &Panels,
    finish: &Finish,
) {
    gemm::product(device, w.tile, (m, n, k), operand(x, m, k), w, finish);
}

/// Of [`Tile::are_few`]. Past the packing of `x`, nothing depends on its type.
fn multiply_few(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    x: Rows,
    w: &Panels,
    next: &Arc<Next>,
    finish: &Finish,
) {
    // As many rows in a tile as there are, so that none is computed for nothing.
    let t = w.tile.for_rows(m);
    let (mr, padded) = (t.mr, m.next_multiple_of(t.mr));
    // A panel that several tiles of rows read is read in blocks of k, which stay in the L2 cache meanwhile.
    let in_block = if m <= mr { k } else { gemm::k_block(t, k) };
    let sums = if in_block < k || t.units(k) > t.block { padded * t.nr } else { 0 };
    let mut workspace = device.workspace();
    let [packed, partials] = workspace
        .take([(Scratch::PackedA, padded * t.units(k)), (Scratch::Partials, device.threads() * sums)]);
    for start in (0..k).step_by(in_block) {
        let ks = start..(start + in_block).min(k);
        let out = &mut packed[t.units(start) * padded..][..t.units(ks.len()) * padded];
        match x {
            Rows::F32(x) => pack_few(device, operand(x, m, k), m, ks, t, out),
            Rows::Bf16(x) => pack_few(device, operand(x, m, k), m, ks, t, out),
        }
    }
    let few = Few {
        tile: t,
        rows: m,
        cols: n,
        units: t.units(k),
        in_block: t.units(in_block),
        a: packed,
        w,
        partials: Shards::new(bytemuck::cast_slice_mut(partials)),
        finish,
    };
    expect_next(device, m, next, w.place());
    gemm::each_task(device, (padded / mr, n.div_ceil(t.nr)), usize::MAX, |_, b, thread| match device.isa {
        // SAFETY: the processor has AVX-512 and tiles.
        Isa::Amx if t.step > 1 => unsafe {
            let tiles = Tiles::new();
            with_avx512(
                #[inline(always)]
                |s| match mr {
                    amx::SIDE => few.panels(s, &tiles, b, thread),
                    _ => few.panels(s, &tiles.upper(), b, thread),
                },
            )
        },
        // SAFETY: the processor has AVX-512 BF16.
        Isa::Avx512Bf16 if t.per_unit == 2 => unsafe {
            with_avx512_bf16(
                #[inline(always)]
                |s| few.task_of::<_, Dot, 8, 3>(s, b, thread),
            )
        },
        // SAFETY: the processor has AVX-512.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe {
            with_avx512(
                #[inline(always)]
                |s| few.task::<_, 8, 3>(s, b, thread),
            )
        },
        Isa::Avx2 => dispatch!(Isa::Avx2, s => few.task::<_, 6, 2>(s, b, thread)),
        Isa::Portable => few.task::<_, 4, 2>(Portable, b, thread),
    });
}

/// Packs all `m` rows and columns `ks` of `x`.
fn pack_few<E: Element>(device: &CpuDevice, x: Matrix<E>, m: usize, ks: Range, t: Tile, out: &mut [u32]) {
    if m <= t.mr {
        // A task on another thread would take longer to begin than this takes.
        t.pack_rows(device.isa, x, 0..m, ks, out);
    } else if t.step == 1 {
        pack(device, x, 0..m, ks, t.mr, t.per_unit, out);
    } else {
        let panel = t.mr * t.units(ks.len());
        let shards = Shards::new(out);
        device.pool.for_each(m.div_ceil(t.mr), |p, _| {
            // SAFETY: each task writes its own panel.
            let out = unsafe { shards.range(p * panel..(p + 1) * panel) };
            t.pack_rows(device.isa, x, p * t.mr..((p + 1) * t.mr).min(m), ks.clone(), out);
        });
    }
}

/// A product with few rows.
struct Few<'a> {
    tile: Tile,
    rows: usize,
    cols: usize,
    /// Of k, all and in a block.
    units: usize,
    in_block: usize,
    /// All panels of one block of k after those of another.
    a: &'a [u32],
    w: &'a Panels,
    /// For each thread those of one panel of the weights, between blocks of k.
    partials: Shards<'a, f32>,
    finish: &'a Finish<'a>,
}

impl Few<'_> {
    /// A task with units of f32.
    #[inline(always)]
    fn task<S: Simd, const MR: usize, const NV: usize>(&self, s: S, b: Range, thread: usize) {
        match self.w.dtype {
            DType::F32 => self.task_of::<S, Fma, MR, NV>(s, b, thread),
            DType::F16 => self.task_of::<S, WidenF16, MR, NV>(s, b, thread),
            _ => self.task_of::<S, Widen, MR, NV>(s, b, thread),
        }
    }

    /// A task with as many rows in a tile as the tile says.
    #[inline(always)]
    fn task_of<S: Simd, M: Mac<S>, const MR: usize, const NV: usize>(&self, s: S, b: Range, thread: usize) {
        match self.tile.mr {
            1 => self.panels(s, &Vectors::<M, 1, NV>::NEW, b, thread),
            2 => self.panels(s, &Vectors::<M, 2, NV>::NEW, b, thread),
            4 => self.panels(s, &Vectors::<M, 4, NV>::NEW, b, thread),
            _ => self.panels(s, &Vectors::<M, MR, NV>::NEW, b, thread),
        }
    }

    /// All rows with some panels of the weights, block after block of each.
    #[inline(always)]
    fn panels<S: Simd, I: Inner<S>>(&self, s: S, inner: &I, b: Range, thread: usize) {
        let (mr, nr, stride) = (self.tile.mr, self.tile.nr, self.w.stride);
        let count = self.rows.div_ceil(mr);
        for panel in b {
            for start in (0..self.units).step_by(self.in_block) {
                let units = self.in_block.min(self.units - start);
                let words = |units: usize| units.div_ceil(I::IN_WORD) * nr;
                let block = Block {
                    tile: self.tile,
                    units,
                    rows: 0..self.rows,
                    cols: panel * nr..((panel + 1) * nr).min(self.cols),
                    first: start == 0,
                    last: start + units == self.units,
                    a: &self.a[start * count * mr..],
                    b: gemm::Panels {
                        data: &self.w.words,
                        stride,
                        start: panel * stride + words(start),
                        next: if count == 1 { words(units).min(AHEAD) } else { words(units) },
                    },
                    soon: None,
                    sums_from: thread * count * mr * nr,
                    one_panel: true,
                };
                block.task(s, inner, 0..count, 0..1, self.partials, self.finish);
            }
        }
    }
}
