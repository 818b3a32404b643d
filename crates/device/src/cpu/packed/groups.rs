//! Panels of 8-bit and 4-bit numbers, and products with them: activations are rounded to 8 bits too, a group at a time,
//! and multiplied as integers, which sums of a group are exact in.
//!
//! `sum over k of x w = sum over groups of sx (sw sum(qx qw) + mw sum(qx))`, where `x = sx qx` and `w = sw qw + mw`.
//!
//! The layout does not depend on the processor: panels of [`NR`] columns, in each the groups in order; of a group first
//! its codes, four elements of k of a column to a word (with 4 bits eight: low halves of the bytes before high ones),
//! then the columns' scales and, with 4 bits, their minima.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::{Finish, Kept, Rows};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::{Epilogue, each_task};
use crate::cpu::simd::{Isa, Simd, dispatch, prefetch_l2, with_avx512};
use crate::cpu::{CpuBuf, CpuDevice, Scratch};
use crate::quantise::{self, Codes, GROUP, Group};
use crate::{Element, WeightFormat};

/// Columns of a panel.
pub(super) const NR: usize = 48;
/// Rows of a full tile.
const MR: usize = 8;
/// Words that hold a group of activations of one row.
const STEPS: usize = GROUP / 4;
/// Bytes of activations that a thread works through per panel: a part of its L2 cache.
const NEAR: usize = 512 << 10;

/// How many bits a weight has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bits {
    Eight,
    Four,
}

impl Bits {
    fn of(format: WeightFormat) -> anyhow::Result<Bits> {
        match format {
            WeightFormat::Int8 => Ok(Bits::Eight),
            WeightFormat::Int4 => Ok(Bits::Four),
            WeightFormat::F32 | WeightFormat::Bf16 => {
                anyhow::bail!("{} has no codes; int8 and int4 do", format.name())
            }
        }
    }

    pub(super) fn format(self) -> WeightFormat {
        match self {
            Bits::Eight => WeightFormat::Int8,
            Bits::Four => WeightFormat::Int4,
        }
    }

    /// Words of codes in a group of a panel.
    pub(super) const fn words(self) -> usize {
        match self {
            Bits::Eight => STEPS * NR,
            Bits::Four => STEPS * NR / 2,
        }
    }

    /// Words of a group: its codes, then its columns' scales and minima.
    pub(super) const fn stride(self) -> usize {
        match self {
            Bits::Eight => self.words() + NR / 2,
            Bits::Four => self.words() + NR,
        }
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
    match bits {
        Bits::Eight => {
            for (codes, out) in codes.chunks_exact(4).zip(words.chunks_exact_mut(NR)) {
                out[column] = u32::from_le_bytes(std::array::from_fn(|i| codes[i]));
            }
        }
        Bits::Four => {
            for (codes, out) in codes.chunks_exact(8).zip(words.chunks_exact_mut(NR)) {
                out[column] = u32::from_le_bytes(std::array::from_fn(|i| codes[i] | codes[4 + i] << 4));
            }
        }
    }
    let numbers: &mut [bf16] = bytemuck::cast_slice_mut(numbers);
    numbers[column] = group.scale;
    if bits == Bits::Four {
        numbers[NR + column] = group.min;
    }
}

impl Panels {
    pub(super) fn new(bits: Bits, n: usize, k: usize, words: Kept) -> Panels {
        Panels { bits, n, groups: k.div_ceil(GROUP), words }
    }

    /// Row `i` as f32.
    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let (panel, column) = (i / NR, i % NR);
        let stride = self.bits.stride();
        let panel = &self.words[panel * self.groups * stride..][..self.groups * stride];
        for (group, out) in panel.chunks_exact(stride).zip(out.chunks_mut(GROUP)) {
            let (words, numbers) = group.split_at(self.bits.words());
            let numbers: &[bf16] = bytemuck::cast_slice(numbers);
            let min = if self.bits == Bits::Four { numbers[NR + column] } else { bf16::ZERO };
            let group = Group { scale: numbers[column], min };
            for (j, out) in out.iter_mut().enumerate() {
                let code = match self.bits {
                    Bits::Eight => words[j / 4 * NR + column].to_le_bytes()[j % 4],
                    Bits::Four => words[j / 8 * NR + column].to_le_bytes()[j % 4] >> (j % 8 / 4 * 4) & 15,
                };
                *out = group.value(self.bits.format(), code);
            }
        }
    }
}

/// Words of one group of `mr` rows of activations: codes, then scales (f32), then what the weights' zero adds: with 8 bits
/// `-128 sum(qx)` (i32), with 4 bits `sx sum(qx)` (f32), which is multiplied with the minimum.
fn activation_stride(mr: usize) -> usize {
    (STEPS + 2) * mr
}

/// Rounds up to `mr` rows `[_, k]` into a panel `[group][step][mr]`, with the rest of each group behind its codes.
fn round_rows<E: Element>(isa: Isa, bits: Bits, x: &[E], k: usize, mr: usize, out: &mut [u32]) {
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
            for (codes, out) in codes.chunks_exact(4).zip(words.chunks_exact_mut(mr)) {
                out[i] = u32::from_le_bytes(std::array::from_fn(|j| codes[j] as u8));
            }
            numbers[i] = scale.to_bits();
            numbers[mr + i] = match bits {
                Bits::Eight => (-128 * sum) as u32,
                Bits::Four => (scale * sum as f32).to_bits(),
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
pub(super) fn multiply(device: &CpuDevice, m: usize, k: usize, x: Rows, w: &Panels, finish: &Finish) {
    match x {
        Rows::F32(x) => multiply_rows(device, m, k, x, w, finish),
        Rows::Bf16(x) => multiply_rows(device, m, k, x, w, finish),
    }
}

fn multiply_rows<E: Element>(device: &CpuDevice, m: usize, k: usize, x: &[E], w: &Panels, finish: &Finish) {
    if m == 0 {
        return;
    }
    let mr = [1, 2, 4].into_iter().find(|mr| *mr >= m).unwrap_or(MR);
    let (a_panels, b_panels) = (m.div_ceil(mr), w.n.div_ceil(NR));
    let stride = w.groups * activation_stride(mr);
    let mut workspace = device.workspace();
    let [packed] = workspace.take([(Scratch::PackedA, a_panels * stride)]);
    let x = &x[..m * k];
    let round = |p: usize, out: &mut [u32]| {
        round_rows(device.isa, w.bits, &x[p * mr * k..((p + 1) * mr * k).min(x.len())], k, mr, out);
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
    each_task(device, (a_panels, b_panels), NEAR / (4 * stride), |a, b, _| {
        if device.isa >= Isa::Avx512 {
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
    /// Rows of a tile: 1, 2, 4 or [`MR`].
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
        match (self.mr, self.w.bits) {
            (1, Bits::Eight) => self.tiles::<S, T, 1, false>(s, a, b, tile),
            (2, Bits::Eight) => self.tiles::<S, T, 2, false>(s, a, b, tile),
            (4, Bits::Eight) => self.tiles::<S, T, 4, false>(s, a, b, tile),
            (_, Bits::Eight) => self.tiles::<S, T, MR, false>(s, a, b, tile),
            (1, Bits::Four) => self.tiles::<S, T, 1, true>(s, a, b, tile),
            (2, Bits::Four) => self.tiles::<S, T, 2, true>(s, a, b, tile),
            (4, Bits::Four) => self.tiles::<S, T, 4, true>(s, a, b, tile),
            (_, Bits::Four) => self.tiles::<S, T, MR, true>(s, a, b, tile),
        }
    }

    #[inline(always)]
    fn tiles<S: Simd, T: Tile, const R: usize, const FOUR: bool>(
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
                    tile.group::<R, FOUR>(a, b, &mut out);
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

/// How a group of a tile is multiplied.
trait Tile: Copy {
    /// Adds a group's part to `out`.
    fn group<const R: usize, const FOUR: bool>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]);
}

/// Plain Rust; integers give the same sums however they are added.
#[derive(Clone, Copy)]
struct Plain;

impl Tile for Plain {
    #[inline(always)]
    fn group<const R: usize, const FOUR: bool>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]) {
        let bits = if FOUR { Bits::Four } else { Bits::Eight };
        let (words, numbers) = b.split_at(bits.words());
        let numbers: &[bf16] = bytemuck::cast_slice(numbers);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = f32::from_bits(a[STEPS * R + i]);
            let zero = a[(STEPS + 1) * R + i];
            let mut acc = [if FOUR { 0 } else { zero as i32 }; NR];
            for step in 0..STEPS {
                let x = a[step * R + i].to_le_bytes().map(|x| x as i8 as i32);
                let row = if FOUR { step / 2 } else { step };
                for (acc, w) in acc.iter_mut().zip(&words[row * NR..][..NR]) {
                    let w = if FOUR { w >> (step % 2 * 4) & 0x0f0f_0f0f } else { *w };
                    for (x, shift) in x.into_iter().zip([0, 8, 16, 24]) {
                        *acc += x * (w >> shift & 0xff) as i32;
                    }
                }
            }
            for (j, out) in out.iter_mut().enumerate() {
                if FOUR {
                    *out += numbers[NR + j].to_f32() * f32::from_bits(zero);
                }
                *out += acc[j] as f32 * (numbers[j].to_f32() * scale);
            }
        }
    }
}

/// `vpdpbusd`: four products of an unsigned and a signed byte, added to a 32-bit sum.
#[derive(Clone, Copy)]
struct Vnni;

impl Tile for Vnni {
    #[inline(always)]
    fn group<const R: usize, const FOUR: bool>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]) {
        let bits = if FOUR { Bits::Four } else { Bits::Eight };
        assert!(a.len() == activation_stride(R) && b.len() == bits.stride());
        // SAFETY: this tile is only used where the processor has AVX-512 F, BW and VNNI; lengths are as asserted.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); 3]; R];
            if !FOUR {
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = [_mm512_set1_epi32(a[(STEPS + 1) * R + i] as i32); 3];
                }
            }
            let low = _mm512_set1_epi32(0x0f0f_0f0f);
            for step in 0..if FOUR { STEPS / 2 } else { STEPS } {
                let words = b.as_ptr().add(step * NR);
                prefetch_l2(words.wrapping_add(AHEAD));
                prefetch_l2(words.wrapping_add(AHEAD + 16));
                prefetch_l2(words.wrapping_add(AHEAD + 32));
                let w: [__m512i; 3] = std::array::from_fn(|j| _mm512_loadu_si512(words.add(j * 16).cast()));
                if FOUR {
                    // One half after the other: both together would not leave registers for the sums.
                    let halves = |shift: bool| {
                        w.map(|w| _mm512_and_si512(if shift { _mm512_srli_epi32::<4>(w) } else { w }, low))
                    };
                    for half in 0..2 {
                        let w = halves(half == 1);
                        for (i, acc) in acc.iter_mut().enumerate() {
                            let x = _mm512_set1_epi32(a[(2 * step + half) * R + i] as i32);
                            for j in 0..3 {
                                acc[j] = _mm512_dpbusd_epi32(acc[j], w[j], x);
                            }
                        }
                    }
                } else {
                    for (i, acc) in acc.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(a[step * R + i] as i32);
                        for j in 0..3 {
                            acc[j] = _mm512_dpbusd_epi32(acc[j], w[j], x);
                        }
                    }
                }
            }
            let numbers = b.as_ptr().add(bits.words()).cast::<u16>();
            let widened = |at: usize| {
                let halves = _mm256_loadu_si256(numbers.add(at).cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
            };
            for j in 0..3 {
                let scales = widened(j * 16);
                let minima = if FOUR { widened(NR + j * 16) } else { scales };
                for (i, out) in out.iter_mut().enumerate() {
                    let scale = f32::from_bits(a[STEPS * R + i]);
                    let at = out[j * 16..].as_mut_ptr();
                    let mut sum = _mm512_loadu_ps(at);
                    if FOUR {
                        let zero = f32::from_bits(a[(STEPS + 1) * R + i]);
                        sum = _mm512_fmadd_ps(minima, _mm512_set1_ps(zero), sum);
                    }
                    let factor = _mm512_mul_ps(scales, _mm512_set1_ps(scale));
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][j]), factor, sum));
                }
            }
        }
    }
}

/// Words by which weights are fetched ahead of their use.
const AHEAD: usize = 2048;
