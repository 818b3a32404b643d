//! Panels of 8-bit, 4-bit and 3-bit numbers, and products with them: activations are rounded to 8 bits too, a group at a
//! time, and multiplied as integers, which sums of a group are exact in.
//!
//! `sum over k of x w = sum over groups of sx (sw sum(qx qw) + mw sum(qx))`, where `x = sx qx` and `w = sw qw + mw`.
//!
//! The layout does not depend on the processor: panels of [`NR`] columns, in each the groups in order; of a group first
//! its codes, rows of a word of each column in which they lie as [`crate::places`] says, then the columns' scales and,
//! below 8 bits, their minima.

use std::ops::Range;
use std::sync::Arc;

use half::bf16;

use super::ahead::{Next, Place, expect_next};
use super::tile::{Plain, Tile, Vnni, add_scaled, group_bytes};
use super::{Finish, Kept, Rows};
use crate::cpu::amx::{ROWS, Tiles};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::{Epilogue, each_task};
use crate::cpu::simd::{Avx512, Isa, Simd, dispatch, with_avx512};
use crate::cpu::{CpuBuf, CpuDevice, Scratch};
use crate::places::{self, UNIT};
use crate::quantise::{self, Codes, GROUP, Group};
use crate::{Element, WeightFormat};

/// Columns of a panel.
pub(super) const NR: usize = 48;
/// Rows of a full tile of vectors.
const MR: usize = 8;
/// So many rows are multiplied in tile registers where there are any. Of fewer, each panel's bytes would not be used often enough
/// to be worth putting in order.
const MANY: usize = 64;
/// Tiles of rows that meet a group of a panel one after the other, while it is in the first-level cache.
const TOGETHER: usize = 4;
/// Words that hold a group of activations of one row.
pub(super) const STEPS: usize = GROUP / 4;
/// Bytes of activations that a thread works through per panel: a part of its L2 cache.
const NEAR: usize = 512 << 10;

/// How many bits a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    Eight,
    Four,
    Three,
}

impl Bits {
    fn of(format: WeightFormat) -> anyhow::Result<Bits> {
        match format {
            WeightFormat::Int8 => Ok(Bits::Eight),
            WeightFormat::Int4 => Ok(Bits::Four),
            WeightFormat::Int3 => Ok(Bits::Three),
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => {
                anyhow::bail!("{} has no codes; int8, int4 and int3 do", format.name())
            }
        }
    }

    pub(super) fn format(self) -> WeightFormat {
        match self {
            Bits::Eight => WeightFormat::Int8,
            Bits::Four => WeightFormat::Int4,
            Bits::Three => WeightFormat::Int3,
        }
    }

    /// As a number.
    pub(super) const fn count(self) -> usize {
        match self {
            Bits::Eight => 8,
            Bits::Four => 4,
            Bits::Three => 3,
        }
    }

    /// The same the other way round, of 8, 4 or 3.
    pub(super) const fn counted(count: usize) -> Bits {
        match count {
            8 => Bits::Eight,
            4 => Bits::Four,
            _ => Bits::Three,
        }
    }

    /// Whether the groups have minima.
    pub(super) const fn minima(self) -> bool {
        self.count() < 8
    }

    /// Words of codes in a group of a panel.
    pub(super) const fn words(self) -> usize {
        GROUP / UNIT * self.count() * NR
    }

    /// Words of a group: its codes, then its columns' scales and minima.
    pub(super) const fn stride(self) -> usize {
        self.words() + if self.minima() { NR } else { NR / 2 }
    }
}

/// Rows of the matrix in a panel, and its words.
pub(super) fn panel(bits: Bits, k: usize) -> (usize, usize) {
    (NR, k.div_ceil(GROUP) * bits.stride())
}

/// A matrix in groups.
pub(super) struct Panels {
    bits: Bits,
    n: usize,
    groups: usize,
    pub(super) words: Kept,
}

/// Packs a matrix that was rounded before, a panel of rows at a time.
pub(super) fn pack_codes(
    device: &CpuDevice,
    format: WeightFormat,
    n: usize,
    k: usize,
    read: &mut dyn FnMut(Range<usize>, Codes<'_>) -> anyhow::Result<()>,
) -> anyhow::Result<Panels> {
    let most = quantise::largest_code(format);
    let (bits, count) = (Bits::of(format)?, k.div_ceil(GROUP));
    let mut words = CpuBuf::<u32>::zeroed(n.div_ceil(NR) * count * bits.stride())?;
    let mut codes = vec![0; NR * count * GROUP];
    let mut groups = vec![Group { scale: bf16::ZERO, min: bf16::ZERO }; NR * count];
    for (p, out) in words.chunks_exact_mut(count * bits.stride()).enumerate() {
        let rows = p * NR..((p + 1) * NR).min(n);
        let codes = &mut codes[..rows.len() * count * GROUP];
        let groups = &mut groups[..rows.len() * count];
        read(rows.clone(), Codes { codes, groups })?;
        if let Some(at) = codes.iter().position(|code| Some(*code) > most) {
            let row = rows.start + at / (count * GROUP);
            anyhow::bail!(
                "row {row} has the code {}, and {} has none above {most:?}",
                codes[at],
                format.name()
            );
        }
        let shards = Shards::new(out);
        device.pool.for_each(count, |g, _| {
            // SAFETY: each task writes its own group of the panel.
            let out = unsafe { shards.range(g * bits.stride()..(g + 1) * bits.stride()) };
            for column in 0..rows.len() {
                let at = column * count + g;
                let mut group = [0; GROUP];
                group.copy_from_slice(&codes[at * GROUP..][..GROUP]);
                put(bits, out, column, groups[at], &group);
            }
        });
    }
    Ok(Panels::new(bits, n, k, Kept::Own(words)))
}

/// Puts a column's group in its place in a panel.
fn put(bits: Bits, out: &mut [u32], column: usize, group: Group, codes: &[u8; GROUP]) {
    let (words, numbers) = out.split_at_mut(bits.words());
    for (codes, words) in codes.as_chunks().0.iter().zip(words.chunks_exact_mut(bits.count() * NR)) {
        places::put(bits.count(), codes, |word, bits| words[word * NR + column] |= bits);
    }
    let numbers: &mut [bf16] = bytemuck::cast_slice_mut(numbers);
    numbers[column] = group.scale;
    if bits.minima() {
        numbers[NR + column] = group.min;
    }
}

impl Panels {
    pub(super) fn new(bits: Bits, n: usize, k: usize, words: Kept) -> Panels {
        Panels { bits, n, groups: k.div_ceil(GROUP), words }
    }

    fn place(&self) -> Place {
        let stride = self.groups * self.bits.stride();
        [self.words.as_ptr().addr(), 4 * stride, self.n.div_ceil(NR)]
    }

    /// Row `i` as f32.
    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let (panel, column) = (i / NR, i % NR);
        let stride = self.bits.stride();
        let panel = &self.words[panel * self.groups * stride..][..self.groups * stride];
        for (group, out) in panel.chunks_exact(stride).zip(out.chunks_mut(GROUP)) {
            let (words, numbers) = group.split_at(self.bits.words());
            let numbers: &[bf16] = bytemuck::cast_slice(numbers);
            let min = if self.bits.minima() { numbers[NR + column] } else { bf16::ZERO };
            let group = Group { scale: numbers[column], min };
            let units = words.chunks_exact(self.bits.count() * NR);
            for (words, out) in units.zip(out.chunks_mut(UNIT)) {
                let codes = places::take(self.bits.count(), |word| words[word * NR + column]);
                out.iter_mut().zip(codes).for_each(|(x, code)| *x = group.value(self.bits.format(), code));
            }
        }
    }
}

/// Words of one group of `mr` rows of activations: codes, then scales (f32), then what the weights' zero adds: with 8 bits
/// `-128 sum(qx)` (i32), below that `sx sum(qx)` (f32), which is multiplied with the minimum.
pub(super) const fn activation_stride(mr: usize) -> usize {
    (STEPS + 2) * mr
}

/// Rounds up to `mr` rows `[_, k]` into a panel `[group][step][mr]`, or for tile registers `[group][mr][step]`, with the rest
/// of each group behind its codes.
fn round_rows<E: Element>(isa: Isa, bits: Bits, x: &[E], k: usize, mr: usize, out: &mut [u32]) {
    let (of_row, of_step) = if mr == ROWS { (STEPS, 1) } else { (1, mr) };
    let rows = x.len() / k;
    for (g, out) in out.chunks_exact_mut(activation_stride(mr)).enumerate() {
        let (words, numbers) = out.split_at_mut(STEPS * mr);
        for i in 0..mr {
            let mut codes = [0i8; GROUP];
            let (scale, sum) = if i < rows {
                let x = &x[i * k + g * GROUP..i * k + ((g + 1) * GROUP).min(k)];
                dispatch!(isa, s => round_group(s, x, &mut codes))
            } else {
                (0.0, 0)
            };
            for (step, codes) in codes.as_chunks().0.iter().enumerate() {
                words[i * of_row + step * of_step] = u32::from_le_bytes(codes.map(|code| code as u8));
            }
            numbers[i] = scale.to_bits();
            numbers[mr + i] = match bits {
                Bits::Eight => (-128 * sum) as u32,
                Bits::Four | Bits::Three => (scale * sum as f32).to_bits(),
            };
        }
    }
}

/// Plain loops, compiled for the instruction set of the token.
#[inline(always)]
fn round_group<S: Simd, E: Element>(_: S, x: &[E], codes: &mut [i8; GROUP]) -> (f32, i32) {
    quantise::activations(x, codes)
}

/// `x[m, k] * w^T`.
pub(super) fn multiply(
    device: &CpuDevice,
    m: usize,
    k: usize,
    x: Rows,
    w: &Panels,
    next: &Arc<Next>,
    finish: &Finish,
) {
    if m == 0 {
        return;
    }
    let in_tiles = device.isa == Isa::Amx && m >= MANY;
    let mr = if in_tiles { ROWS } else { [1, 2, 4].into_iter().find(|mr| *mr >= m).unwrap_or(MR) };
    let (a_panels, b_panels) = (m.div_ceil(mr), w.n.div_ceil(NR));
    let stride = w.groups * activation_stride(mr);
    let mut workspace = device.workspace();
    let bytes = if in_tiles { w.groups * STEPS * NR } else { 0 };
    let [packed, bytes_of] =
        workspace.take([(Scratch::PackedA, a_panels * stride), (Scratch::PackedB, device.threads() * bytes)]);
    let bytes_of = Shards::new(bytes_of);
    let round = |p: usize, out: &mut [u32]| {
        let rows = p * mr * k..((p + 1) * mr).min(m) * k;
        match x {
            Rows::F32(x) => round_rows(device.isa, w.bits, &x[rows], k, mr, out),
            Rows::Bf16(x) => round_rows(device.isa, w.bits, &x[rows], k, mr, out),
        }
    };
    if a_panels == 1 {
        // A task on another thread would take longer to begin than this takes.
        round(0, packed);
    } else {
        let shards = Shards::new(packed);
        device.pool.for_each(a_panels, |p, _| {
            // SAFETY: each task writes its own panel.
            round(p, unsafe { shards.range(p * stride..(p + 1) * stride) });
        });
    }
    let product = Product { m, mr, w, words: &w.words, a: packed, finish };
    expect_next(device, m, next, w.place());
    each_task(device, (a_panels, b_panels), NEAR / (4 * stride), |a, b, thread| {
        if in_tiles {
            // SAFETY: the processor has AVX-512 and tiles, and each thread has its own bytes.
            unsafe {
                let bytes = bytes_of.range(thread * bytes..(thread + 1) * bytes);
                let tiles = Tiles::new();
                with_avx512(
                    #[inline(always)]
                    |s| product.in_tiles(s, a, b, &tiles, bytes),
                )
            }
        } else if device.isa >= Isa::Avx512 {
            // SAFETY: the processor has AVX-512 with VNNI.
            unsafe {
                with_avx512(
                    #[inline(always)]
                    |s| product.task(s, a, b, Vnni),
                )
            }
        } else {
            dispatch!(device.isa, s => product.task(s, a, b, Plain));
        }
    });
}

struct Product<'a> {
    m: usize,
    /// Rows of a tile: 1, 2, 4, [`MR`] or [`ROWS`].
    mr: usize,
    w: &'a Panels,
    /// Those of the panels.
    words: &'a [u32],
    a: &'a [u32],
    finish: &'a Finish<'a>,
}

impl Product<'_> {
    #[inline(always)]
    fn task<S: Simd, T: Tile>(&self, s: S, a: Range<usize>, b: Range<usize>, tile: T) {
        match self.w.bits {
            Bits::Eight => self.rows::<S, T, 8>(s, a, b, tile),
            Bits::Four => self.rows::<S, T, 4>(s, a, b, tile),
            Bits::Three => self.rows::<S, T, 3>(s, a, b, tile),
        }
    }

    #[inline(always)]
    fn rows<S: Simd, T: Tile, const BITS: usize>(&self, s: S, a: Range<usize>, b: Range<usize>, tile: T) {
        match self.mr {
            1 => self.tiles::<S, T, 1, BITS>(s, a, b, tile),
            2 => self.tiles::<S, T, 2, BITS>(s, a, b, tile),
            4 => self.tiles::<S, T, 4, BITS>(s, a, b, tile),
            _ => self.tiles::<S, T, MR, BITS>(s, a, b, tile),
        }
    }

    /// In tile registers: a panel's codes become bytes once for all rows.
    #[inline(always)]
    fn in_tiles(&self, s: Avx512, a: Range<usize>, b: Range<usize>, tiles: &Tiles, bytes: &mut [u32]) {
        match self.w.bits {
            Bits::Eight => self.many_rows::<8>(s, a, b, tiles, bytes),
            Bits::Four => self.many_rows::<4>(s, a, b, tiles, bytes),
            Bits::Three => self.many_rows::<3>(s, a, b, tiles, bytes),
        }
    }

    #[inline(always)]
    fn many_rows<const BITS: usize>(
        &self,
        s: Avx512,
        a_panels: Range<usize>,
        b_panels: Range<usize>,
        tiles: &Tiles,
        bytes: &mut [u32],
    ) {
        let (w_stride, a_stride) = (self.w.bits.stride(), activation_stride(ROWS));
        let panel = self.w.groups * w_stride;
        let bytes = bytes.as_chunks_mut::<{ STEPS * NR }>().0;
        let of_group = |a: usize, g: usize| &self.a[(a * self.w.groups + g) * a_stride..][..a_stride];
        for bp in b_panels {
            let b = &self.words[bp * panel..(bp + 1) * panel];
            for (b, bytes) in b.chunks_exact(w_stride).zip(bytes.iter_mut()) {
                group_bytes::<BITS>(b, bytes);
            }
            for first in a_panels.clone().step_by(TOGETHER) {
                let rows = first..(first + TOGETHER).min(a_panels.end);
                let mut out = [[[0.0f32; NR]; ROWS]; TOGETHER];
                // All rows meet one group after the other. The next product is made while this one is scaled.
                let mut sums = [[0; ROWS * NR]; 2];
                let all = rows.len() * self.w.groups;
                for next in 0..=all {
                    if next < all {
                        let (g, i) = (next / rows.len(), next % rows.len());
                        tiles.multiply_bytes(of_group(first + i, g), &bytes[g], &mut sums[next % 2]);
                    }
                    if let Some(this) = next.checked_sub(1) {
                        let (g, i) = (this / rows.len(), this % rows.len());
                        let b = &b[g * w_stride..][..w_stride];
                        add_scaled::<BITS>(&sums[this % 2], of_group(first + i, g), b, &mut out[i]);
                    }
                }
                for (ap, out) in rows.zip(&out) {
                    let (row, col) = (ap * ROWS, bp * NR);
                    let width = NR.min(self.w.n - col);
                    for (i, out) in out[..ROWS.min(self.m - row)].iter().enumerate() {
                        self.finish.row(s, row + i, col, &out[..width]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    fn tiles<S: Simd, T: Tile, const R: usize, const BITS: usize>(
        &self,
        s: S,
        a_panels: Range<usize>,
        b_panels: Range<usize>,
        tile: T,
    ) {
        let (w_stride, a_stride) = (self.w.bits.stride(), activation_stride(R));
        let panel = self.w.groups * w_stride;
        for bp in b_panels {
            let b = &self.words[bp * panel..(bp + 1) * panel];
            for ap in a_panels.clone() {
                let a = &self.a[ap * self.w.groups * a_stride..(ap + 1) * self.w.groups * a_stride];
                let mut out = [[0.0f32; NR]; R];
                for (a, b) in a.chunks_exact(a_stride).zip(b.chunks_exact(w_stride)) {
                    tile.group::<R, BITS>(a, b, &mut out);
                }
                let (row, col) = (ap * R, bp * NR);
                let width = NR.min(self.w.n - col);
                for (i, out) in out[..R.min(self.m - row)].iter().enumerate() {
                    self.finish.row(s, row + i, col, &out[..width]);
                }
            }
        }
    }
}
