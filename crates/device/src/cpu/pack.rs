//! Operands of matrix products in the order in which [`super::gemm`]'s inner loop reads them.

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::CpuDevice;
use super::amx::STEP;
use super::buffer::Shards;
use super::simd::{Isa, prefetch};
use super::soon::Soon;
use crate::{DType, Element};

/// One operand: element (i, k) is at `i * ld + k` when `k_contiguous`, else at `k * ld + i`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, E> {
    pub(super) data: &'a [E],
    pub(super) ld: usize,
    pub(super) k_contiguous: bool,
}

impl<E> Matrix<'_, E> {
    /// Rows `is` and columns `ks`.
    pub(super) fn soon(&self, is: Range<usize>, ks: Range<usize>) -> Soon {
        let (outer, inner) = if self.k_contiguous { (is, ks) } else { (ks, is) };
        let start = self.data.as_ptr().wrapping_add(outer.start * self.ld + inner.start);
        Soon::new(start, outer.len(), inner.len(), self.ld)
    }
}

/// Columns of a strided matrix that a task packs: some cache lines of each row.
const COLUMNS: usize = 128;
/// Units of a strided matrix that are packed together: some cache lines of each panel.
const UNITS: usize = 8;

/// Blocks by which rows that are turned are fetched ahead.
const AHEAD: usize = 6;

/// Packs rows `is` and columns `ks` of `x` into panels of `width` rows, on all threads: `[panel][unit][width]`, zeros
/// where the matrix ends and for what else there is room in `out`, whose length says how many units a panel has.
pub(super) fn pack<E: Element>(
    device: &CpuDevice,
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    out: &mut [u32],
) {
    let panels = is.len().div_ceil(width);
    let units = out.len() / (panels * width).max(1);
    // A task reads whole cache lines of a strided matrix; a transposition of 16 rows serves two panels of 8.
    let together = if x.k_contiguous { 16_usize.div_ceil(width) } else { COLUMNS.div_ceil(width) };
    let tasks = panels.div_ceil(together);
    let shards = Shards::new(out);
    device.pool.for_each(tasks, |task, _| {
        let first = task * together;
        let here = together.min(panels - first);
        // SAFETY: each task writes its own panels.
        let out = unsafe { shards.range(first * width * units..(first + here) * width * units) };
        let i0 = is.start + first * width;
        let i1 = (i0 + here * width).min(is.end);
        pack_panels(device.isa, x, i0..i1, ks.clone(), width, per_unit, out);
    });
}

/// Packs one or more neighbouring panels on this thread, as [`pack`] does.
pub(super) fn pack_panels<E: Element>(
    isa: Isa,
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    out: &mut [u32],
) {
    let units = out.len() / (is.len().div_ceil(width) * width).max(1);
    let used = ks.len().div_ceil(per_unit);
    let whole = E::DTYPE == DType::Bf16 || per_unit == 1;
    let avx512 = isa >= Isa::Avx512 && (width == 8 || width.is_multiple_of(16)) && whole;
    match E::DTYPE {
        // SAFETY: the processor has AVX-512, and the width is right; indices are checked inside.
        DType::F32 | DType::Bf16 | DType::F16 if avx512 => unsafe {
            if x.k_contiguous {
                pack_transposed_avx512(x, is, ks, width, per_unit, units, out);
            } else {
                pack_strided_avx512(x, is, ks, width, per_unit, units, out);
            }
        },
        _ => pack_rows(x, is, ks, width, per_unit, units, out),
    }
    if used < units {
        for panel in out.chunks_exact_mut(width * units) {
            panel[used * width..].fill(0);
        }
    }
}

/// The plain way, for any element and layout; also defines what the fast ways do.
fn pack_rows<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    units: usize,
    out: &mut [u32],
) {
    let at = |i: usize, k: usize| if x.k_contiguous { x.data[i * x.ld + k] } else { x.data[k * x.ld + i] };
    for (panel, out) in out.chunks_exact_mut(width * units).enumerate() {
        let i0 = is.start + panel * width;
        let rows = width.min(is.end.saturating_sub(i0));
        for (unit, out) in out.chunks_exact_mut(width).take(ks.len().div_ceil(per_unit)).enumerate() {
            let k = ks.start + unit * per_unit;
            if per_unit == 1 && !x.k_contiguous {
                let row = &x.data[k * x.ld + i0..k * x.ld + i0 + rows];
                for (o, v) in out.iter_mut().zip(row) {
                    *o = v.to_f32().to_bits();
                }
            } else {
                for (i, o) in out[..rows].iter_mut().enumerate() {
                    *o = if per_unit == 1 {
                        at(i0 + i, k).to_f32().to_bits()
                    } else {
                        let bits = |k: usize| if k < ks.end { pair_bits(at(i0 + i, k)) } else { 0 };
                        bits(k) | bits(k + 1) << 16
                    };
                }
            }
            out[rows..].fill(0);
        }
    }
}

/// The 16 bits of a bf16, as a number.
fn pair_bits<E: Element>(x: E) -> u32 {
    bf16::from_f32(x.to_f32()).to_bits() as u32
}

/// Where 16 neighbouring rows of packed panels go: one piece of a wide panel, or two panels of 8.
#[derive(Clone, Copy)]
struct Place {
    width: usize,
    first: usize,
    second: Option<usize>,
}

impl Place {
    /// Of rows `row .. row + 16` among `rows`.
    fn new(width: usize, units: usize, rows: usize, row: usize) -> Self {
        let start = |row: usize| row / width * width * units + row % width;
        Place { width, first: start(row), second: (width == 8 && row + 8 < rows).then(|| start(row + 8)) }
    }

    /// Stores the rows' words of one unit.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(self, out: &mut [u32], unit: usize, words: __m512i) {
        let at = self.first + unit * self.width;
        if self.width == 8 {
            // SAFETY: the slices have 8 elements.
            unsafe {
                _mm256_storeu_si256(out[at..at + 8].as_mut_ptr().cast(), _mm512_castsi512_si256(words));
                if let Some(second) = self.second {
                    let at = second + unit * 8;
                    let words = _mm512_extracti64x4_epi64::<1>(words);
                    _mm256_storeu_si256(out[at..at + 8].as_mut_ptr().cast(), words);
                }
            }
        } else {
            // SAFETY: the slice has 16 elements.
            unsafe { _mm512_storeu_si512(out[at..at + 16].as_mut_ptr().cast(), words) };
        }
    }
}

/// Packs a k-contiguous matrix: 16 x 16 words of its rows are turned at a time, which are units, or pairs of halves to
/// be widened.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL; `width` is 8 or a multiple of 16; `E` is f32 or f16 with one to a
/// unit, or bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_transposed_avx512<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    units: usize,
    out: &mut [u32],
) {
    let widen = size_of::<E>() == 2 && per_unit == 1;
    let rows = out.len() / units;
    // Elements of k in 16 words.
    let block = 64 / size_of::<E>();
    for row in (0..rows).step_by(16) {
        let place = Place::new(width, units, rows, row);
        let full = is.end.saturating_sub(is.start + row).min(rows - row).min(16);
        for k in ks.clone().step_by(block) {
            let count = block.min(ks.end - k);
            let halves = count * size_of::<E>() / 2;
            let mask = if halves == 32 { !0u32 } else { (1u32 << halves) - 1 };
            let mut t = [_mm512_setzero_si512(); 16];
            for (r, t) in t[..full].iter_mut().enumerate() {
                let at = (is.start + row + r) * x.ld + k;
                // More rows than the processor can guess where reading goes on.
                prefetch(x.data.as_ptr().wrapping_add(at + AHEAD * block));
                // SAFETY: the mask covers the elements of the slice and no more.
                *t = unsafe { _mm512_maskz_loadu_epi16(mask, x.data[at..at + count].as_ptr().cast()) };
            }
            transpose(&mut t);
            let unit = (k - ks.start) / per_unit;
            if widen {
                for (u, t) in t.iter().take(count.div_ceil(2)).enumerate() {
                    place.store(out, unit + 2 * u, widened::<E>(*t));
                    if 2 * u + 1 < count {
                        place.store(out, unit + 2 * u + 1, widened::<E>(_mm512_srli_epi32::<16>(*t)));
                    }
                }
            } else {
                for (u, t) in t.iter().take(count.div_ceil(per_unit)).enumerate() {
                    place.store(out, unit + u, *t);
                }
            }
        }
    }
}

/// The halves in the lower parts of words, as f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn widened<E: Element>(words: __m512i) -> __m512i {
    match E::DTYPE {
        DType::F16 => _mm512_castps_si512(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))),
        _ => _mm512_slli_epi32::<16>(words),
    }
}

/// Transposes 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(t: &mut [__m512i; 16]) {
    let mut a = *t;
    for i in (0..16).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
    }
    let mut b = a;
    for i in (0..16).step_by(4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // b[4g + j] holds, in 128-bit lane l, words 4l + j of rows 4g ..= 4g + 3.
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        t[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        t[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        t[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        t[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
}

/// Packs a k-strided matrix: its rows are widened, or two of them interleaved, a few at a time, so that both they and
/// the panels are walked by whole cache lines.
///
/// # Safety
/// As for [`pack_transposed_avx512`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_strided_avx512<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    units: usize,
    out: &mut [u32],
) {
    let rows = out.len() / units;
    assert!(x.data.len() >= (ks.end - 1) * x.ld + is.end, "matrix ends inside the packed part");
    let load = |k: usize, i: usize, mask: u16| {
        let at = x.data.as_ptr().wrapping_add(k * x.ld + i);
        // SAFETY: the mask ends at `is.end`, which row `ks.end - 1` of the matrix reaches, as asserted.
        unsafe {
            match E::DTYPE {
                DType::F32 => _mm512_maskz_loadu_epi32(mask, at.cast()),
                _ => _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at.cast())),
            }
        }
    };
    let used = ks.len().div_ceil(per_unit);
    for first in (0..used).step_by(UNITS) {
        let block = first..(first + UNITS).min(used);
        for k in (block.end * per_unit..).take(UNITS * per_unit) {
            for i in is.clone().step_by(64 / size_of::<E>()) {
                prefetch(x.data.as_ptr().wrapping_add((ks.start + k) * x.ld + i));
            }
        }
        for row in (0..rows).step_by(16) {
            let place = Place::new(width, units, rows, row);
            let i = (is.start + row).min(is.end);
            let mask = ((1u32 << (is.end - i).min(16)) - 1) as u16;
            for unit in block.clone() {
                let k = ks.start + unit * per_unit;
                let mut words = load(k, i, mask);
                if per_unit == 2 {
                    if k + 1 < ks.end {
                        words = _mm512_or_si512(words, _mm512_slli_epi32::<16>(load(k + 1, i, mask)));
                    }
                } else if size_of::<E>() == 2 {
                    words = widened::<E>(words);
                }
                place.store(out, unit, words);
            }
        }
    }
}

/// Packs rows `is` and columns `ks` of `x` for tile registers, on this thread: `[panel][step][tile][16 rows][STEP]`, where a
/// panel has `mr` rows in tiles of 16, and a step [`STEP`] units; zeros where columns end. Rows that the matrix does not have
/// are left as they are.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn pack_tiles<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    mr: usize,
    out: &mut [u32],
) {
    let steps = ks.len().div_ceil(2 * STEP);
    // Where a row of a tile begins.
    let place = |i: usize, step: usize| (i / mr * steps + step) * mr * STEP + i % mr * STEP;
    if x.k_contiguous {
        for i in 0..is.len() {
            let start = (is.start + i) * x.ld;
            let row = &x.data[start + ks.start..start + ks.end];
            for step in 0..steps {
                let at = place(i, step);
                let to: &mut [bf16; 2 * STEP] =
                    bytemuck::cast_mut(out[at..].first_chunk_mut::<STEP>().expect("a row of a tile"));
                match row[(2 * STEP * step).min(row.len())..].first_chunk::<{ 2 * STEP }>() {
                    Some(all) if E::DTYPE == DType::Bf16 => to.copy_from_slice(bytemuck::cast_slice(all)),
                    _ => {
                        let part =
                            &row[(2 * STEP * step).min(row.len())..(2 * STEP * (step + 1)).min(row.len())];
                        to[part.len()..].fill(bf16::ZERO);
                        for (to, x) in to.iter_mut().zip(part) {
                            *to = bf16::from_f32(x.to_f32());
                        }
                    }
                }
            }
        }
        return;
    }
    let halves: &[u16] = bytemuck::cast_slice(x.data);
    assert!(
        E::DTYPE == DType::Bf16 && halves.len() >= (ks.end - 1) * x.ld + is.end,
        "matrix ends inside the packed part"
    );
    for step in 0..steps {
        let from = ks.start + step * 2 * STEP;
        for k in from + 2 * STEP..(from + 4 * STEP).min(ks.end) {
            for i in is.clone().step_by(32) {
                prefetch(halves.as_ptr().wrapping_add(k * x.ld + i));
            }
        }
        for i in (0..is.len()).step_by(32) {
            let left = (is.len() - i).min(32);
            let mask = if left == 32 { !0 } else { (1u32 << left) - 1 };
            let load = |k: usize| {
                let mask = if k < ks.end { mask } else { 0 };
                // SAFETY: the mask ends at `is.end`, which every row below `ks.end` reaches, as asserted.
                unsafe {
                    _mm512_maskz_loadu_epi16(
                        mask,
                        halves.as_ptr().wrapping_add(k * x.ld + is.start + i).cast(),
                    )
                }
            };
            let (mut low, mut high) = ([_mm512_setzero_si512(); 16], [_mm512_setzero_si512(); 16]);
            for unit in 0..16 {
                let (even, odd) = (load(from + 2 * unit), load(from + 2 * unit + 1));
                low[unit] = _mm512_unpacklo_epi16(even, odd);
                high[unit] = _mm512_unpackhi_epi16(even, odd);
            }
            // Each 128 bits of `low` are of the first four of eight rows, those of `high` of the others.
            for (words, first) in [(&mut low, 0), (&mut high, 4)] {
                transpose(words);
                for (at, words) in words.iter().enumerate() {
                    let i = i + at / 4 * 8 + first + at % 4;
                    if i >= is.len() {
                        continue;
                    }
                    let at = place(i, step);
                    // SAFETY: the slice has 16 elements.
                    unsafe { _mm512_storeu_si512(out[at..at + 16].as_mut_ptr().cast(), *words) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_in_tiles_are_where_the_layout_says() {
        if Isa::available().last() < Some(&Isa::Avx512) {
            return println!("skipped: this processor has no AVX-512");
        }
        let (m, k) = (70, 150);
        let data: Vec<bf16> = (0..m * k).map(|i| bf16::from_bits(i as u16)).collect();
        let (is, ks) = (3..67, 5..142);
        for k_contiguous in [true, false] {
            let x = Matrix { data: &data, ld: if k_contiguous { k } else { m }, k_contiguous };
            for mr in [16, 32] {
                let steps = ks.len().div_ceil(2 * STEP);
                let mut out = vec![0; is.len().div_ceil(mr) * mr * STEP * steps];
                // SAFETY: the processor has AVX-512.
                unsafe { pack_tiles(x, is.clone(), ks.clone(), mr, &mut out) };
                for (at, word) in out.iter().enumerate() {
                    let (unit, row, step) = (at % STEP, at / STEP % mr, at / (STEP * mr) % steps);
                    let i = is.start + at / (STEP * mr * steps) * mr + row;
                    let half = |k: usize| match i < is.end && k < ks.end {
                        true if k_contiguous => data[i * x.ld + k].to_bits() as u32,
                        true => data[k * x.ld + i].to_bits() as u32,
                        false => 0,
                    };
                    let k = ks.start + 2 * (step * STEP + unit);
                    assert_eq!(*word, half(k) | half(k + 1) << 16, "row {i}, k {k}");
                }
            }
        }
    }
}
