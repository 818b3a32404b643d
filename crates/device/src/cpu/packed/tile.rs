//! How a group of activations is multiplied with one of a panel's columns.

use std::arch::x86_64::*;

use half::bf16;

use super::groups::{Bits, NR, STEPS, activation_stride};
use crate::cpu::amx::ROWS;
use crate::cpu::simd::prefetch_l2;
use crate::places::{UNIT, UNIT_STEPS, places};
use crate::quantise::GROUP;

/// Words by which weights are fetched ahead of their use.
const AHEAD: usize = 2048;
/// Units of a group.
const UNITS: usize = GROUP / UNIT;

/// Products of `R` rows with codes of `BITS` bits.
pub(super) trait Tile: Copy {
    /// Adds a group's part to `out`.
    fn group<const R: usize, const BITS: usize>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]);
}

/// Plain Rust; integers give the same sums however they are added.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl Tile for Plain {
    #[inline(always)]
    fn group<const R: usize, const BITS: usize>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]) {
        let bits = Bits::counted(BITS);
        let (words, numbers) = b.split_at(bits.words());
        let numbers: &[bf16] = bytemuck::cast_slice(numbers);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = f32::from_bits(a[STEPS * R + i]);
            let zero = a[(STEPS + 1) * R + i];
            let mut acc = [if bits.minima() { 0 } else { zero as i32 }; NR];
            for step in 0..STEPS {
                let x = a[step * R + i].to_le_bytes().map(|x| x as i8 as i32);
                for (acc, w) in acc.iter_mut().zip(step_codes::<BITS>(words, step)) {
                    for (x, shift) in x.into_iter().zip([0, 8, 16, 24]) {
                        *acc += x * (w >> shift & 0xff) as i32;
                    }
                }
            }
            for (j, out) in out.iter_mut().enumerate() {
                if bits.minima() {
                    *out += numbers[NR + j].to_f32() * f32::from_bits(zero);
                }
                *out += acc[j] as f32 * (numbers[j].to_f32() * scale);
            }
        }
    }
}

/// A step's codes of all columns, one in each byte.
#[inline(always)]
fn step_codes<const BITS: usize>(words: &[u32], step: usize) -> [u32; NR] {
    let unit = &words[step / UNIT_STEPS * BITS * NR..][..BITS * NR];
    let mut codes = [0; NR];
    for place in places(BITS, step % UNIT_STEPS) {
        for (code, word) in codes.iter_mut().zip(&unit[place.word * NR..][..NR]) {
            *code |= word >> place.shift & place.mask;
        }
    }
    codes
}

/// A group's codes of all columns, one in each byte, `[step][NR]`.
#[inline(always)]
pub(super) fn group_bytes<const BITS: usize>(b: &[u32], out: &mut [u32; STEPS * NR]) {
    if BITS == 8 {
        // As they are, but on cache lines of their own, which tile registers read twice as fast.
        out.copy_from_slice(&b[..STEPS * NR]);
        return;
    }
    for (step, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
        *out = step_codes::<BITS>(b, step);
    }
}

/// Adds a group's products, which tile registers made, to `out`: by the same operations as [`Vnni`], so to the same bits.
#[inline(always)]
pub(super) fn add_scaled<const BITS: usize>(
    sums: &[i32; ROWS * NR],
    a: &[u32],
    b: &[u32],
    out: &mut [[f32; NR]; ROWS],
) {
    let bits = Bits::counted(BITS);
    assert!(a.len() == activation_stride(ROWS) && b.len() == bits.stride());
    // SAFETY: only used where the processor has tiles, and so AVX-512; lengths are as asserted.
    unsafe {
        let [scales, minima] = numbers(bits, b);
        for (i, out) in out.iter_mut().enumerate() {
            let scale = _mm512_set1_ps(f32::from_bits(a[STEPS * ROWS + i]));
            let zero = a[(STEPS + 1) * ROWS + i];
            for j in 0..3 {
                let mut acc = _mm512_loadu_si512(sums[i * NR + j * 16..].as_ptr().cast());
                let at = out[j * 16..].as_mut_ptr();
                let mut sum = _mm512_loadu_ps(at);
                if bits.minima() {
                    sum = _mm512_fmadd_ps(minima[j], _mm512_set1_ps(f32::from_bits(zero)), sum);
                } else {
                    acc = _mm512_add_epi32(acc, _mm512_set1_epi32(zero as i32));
                }
                let factor = _mm512_mul_ps(scales[j], scale);
                _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), factor, sum));
            }
        }
    }
}

/// Scales and, if there are any, minima of a panel's columns in a group.
///
/// # Safety
/// The processor has AVX-512 F, and `b` is a group.
#[inline(always)]
unsafe fn numbers(bits: Bits, b: &[u32]) -> [[__m512; 3]; 2] {
    // SAFETY: as the caller promises.
    unsafe {
        let numbers = b.as_ptr().add(bits.words()).cast::<u16>();
        let mut widened = [[_mm512_setzero_ps(); 3]; 2];
        for (which, widened) in widened.iter_mut().enumerate().take(1 + bits.minima() as usize) {
            for (j, widened) in widened.iter_mut().enumerate() {
                let halves = _mm256_loadu_si256(numbers.add(which * NR + j * 16).cast());
                *widened = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)));
            }
        }
        widened
    }
}

/// `vpdpbusd`: four products of an unsigned and a signed byte, added to a 32-bit sum.
#[derive(Clone, Copy)]
pub(super) struct Vnni;

/// A word of every column of a panel.
type Row = [__m512i; 3];

/// # Safety
/// The processor has AVX-512 F, and there are `NR` words.
#[inline(always)]
unsafe fn row(words: *const u32) -> Row {
    // SAFETY: as the caller promises.
    unsafe {
        [
            _mm512_loadu_si512(words.cast()),
            _mm512_loadu_si512(words.add(16).cast()),
            _mm512_loadu_si512(words.add(32).cast()),
        ]
    }
}

/// One of the last two steps of a unit of 3-bit codes: its lower bits are at the top of the bytes of `lower`, its highest bit
/// is in those of `highest`, `SHIFT` above where it belongs.
///
/// # Safety
/// The processor has AVX-512 F.
#[inline(always)]
unsafe fn joined<const SHIFT: u32>(lower: Row, highest: Row) -> Row {
    // SAFETY: as the caller promises.
    unsafe {
        let [two, one] = [0x0303_0303, 0x0404_0404].map(|mask| _mm512_set1_epi32(mask));
        let mut codes = lower;
        for (code, highest) in codes.iter_mut().zip(highest) {
            let lower = _mm512_and_si512(_mm512_srli_epi32::<6>(*code), two);
            *code = _mm512_or_si512(lower, _mm512_and_si512(_mm512_srli_epi32::<SHIFT>(highest), one));
        }
        codes
    }
}

/// Adds a step's products: codes `w`, one in each byte, with the words of `R` rows of activations at `x`.
///
/// # Safety
/// The processor has AVX-512 F and VNNI, and there are `R` words.
#[inline(always)]
unsafe fn add_step<const R: usize>(acc: &mut [Row; R], w: Row, x: *const u32) {
    // SAFETY: as the caller promises.
    unsafe {
        for (i, acc) in acc.iter_mut().enumerate() {
            let x = _mm512_set1_epi32(*x.add(i) as i32);
            for j in 0..3 {
                acc[j] = _mm512_dpbusd_epi32(acc[j], w[j], x);
            }
        }
    }
}

impl Tile for Vnni {
    #[inline(always)]
    fn group<const R: usize, const BITS: usize>(self, a: &[u32], b: &[u32], out: &mut [[f32; NR]; R]) {
        let bits = Bits::counted(BITS);
        assert!(a.len() == activation_stride(R) && b.len() == bits.stride());
        // SAFETY: this tile is only used where the processor has AVX-512 F, BW and VNNI; lengths are as asserted.
        unsafe {
            let mut acc = [[_mm512_setzero_si512(); 3]; R];
            if !bits.minima() {
                for (i, acc) in acc.iter_mut().enumerate() {
                    *acc = [_mm512_set1_epi32(a[(STEPS + 1) * R + i] as i32); 3];
                }
            }
            let low = _mm512_set1_epi32(if BITS == 4 { 0x0f0f_0f0f } else { 0x0707_0707 });
            for unit in 0..UNITS {
                let words = b.as_ptr().add(unit * BITS * NR);
                let x = a.as_ptr().add(unit * UNIT_STEPS * R);
                for i in 0..BITS {
                    let words = words.add(i * NR);
                    prefetch_l2(words.wrapping_add(AHEAD));
                    prefetch_l2(words.wrapping_add(AHEAD + 16));
                    prefetch_l2(words.wrapping_add(AHEAD + 32));
                    let w = row(words);
                    if BITS == 8 {
                        add_step(&mut acc, w, x.add(i * R));
                        continue;
                    }
                    // One step after the other: both together would not leave registers for the sums.
                    add_step(&mut acc, w.map(|w| _mm512_and_si512(w, low)), x.add(2 * i * R));
                    let w =
                        w.map(
                            |w| if BITS == 4 { _mm512_srli_epi32::<4>(w) } else { _mm512_srli_epi32::<3>(w) },
                        );
                    add_step(&mut acc, w.map(|w| _mm512_and_si512(w, low)), x.add((2 * i + 1) * R));
                }
                if BITS == 3 {
                    add_step(&mut acc, joined::<4>(row(words), row(words.add(NR))), x.add(6 * R));
                    add_step(&mut acc, joined::<5>(row(words.add(2 * NR)), row(words.add(NR))), x.add(7 * R));
                }
            }
            // These lie among the codes, and a group would wait for them alone.
            for at in (bits.words()..bits.stride()).step_by(16) {
                prefetch_l2(b.as_ptr().wrapping_add(AHEAD + at));
            }
            let [scales, minima] = numbers(bits, b);
            for j in 0..3 {
                for (i, out) in out.iter_mut().enumerate() {
                    let scale = f32::from_bits(a[STEPS * R + i]);
                    let at = out[j * 16..].as_mut_ptr();
                    let mut sum = _mm512_loadu_ps(at);
                    if bits.minima() {
                        let zero = f32::from_bits(a[(STEPS + 1) * R + i]);
                        sum = _mm512_fmadd_ps(minima[j], _mm512_set1_ps(zero), sum);
                    }
                    let factor = _mm512_mul_ps(scales[j], _mm512_set1_ps(scale));
                    _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[i][j]), factor, sum));
                }
            }
        }
    }
}
