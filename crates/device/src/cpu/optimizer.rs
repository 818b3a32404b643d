//! Optimiser steps, each one pass over a parameter: these are bound by memory (28 bytes a parameter for AdamW with a
//! split master), so the arithmetic is plain Rust that the compiler turns into vectors.
//!
//! Products and sums are not fused, so every instruction set gives the same bits.

use std::ops::Range;

use super::CpuDevice;
use super::buffer::Shards;
use super::random::words;
use super::simd::{Simd, dispatch};
use crate::rng::BLOCK;
use crate::{AdamW, DType, Element, Param, Rounding, Sgd};

/// Elements that a thread takes at once.
const CHUNK: usize = 1 << 15;
/// Master values that are worked on at once; 4 KiB, which stays in the first-level cache.
const TILE: usize = 1024;

/// A parameter's storage, as threads share it.
struct Master<'a, E> {
    w: Shards<'a, E>,
    low: Option<Shards<'a, i16>>,
    rounding: Option<Rounding>,
}

impl<'a, E: Element> Master<'a, E> {
    fn new(param: Param<'a, CpuDevice, E>) -> Self {
        Master {
            w: Shards::new(param.w),
            low: param.low.map(|low| Shards::new(&mut low[..])),
            rounding: param.rounding,
        }
    }

    /// Replaces the master values by what `f(range, values)` makes of them.
    fn update(&self, device: &CpuDevice, f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
        device.pool.for_chunks(self.w.len(), CHUNK, |chunk| {
            dispatch!(device.isa, s => self.update_chunk(s, chunk, &f));
        });
    }

    #[inline(always)]
    fn update_chunk<S: Simd>(&self, s: S, chunk: Range<usize>, f: &impl Fn(Range<usize>, &mut [f32])) {
        let mut tile = [0.0; TILE];
        for start in chunk.clone().step_by(TILE) {
            let range = start..chunk.end.min(start + TILE);
            let values = &mut tile[..range.len()];
            // SAFETY: chunks are disjoint, and so are the tiles in one.
            let (w, low) =
                unsafe { (self.w.range(range.clone()), self.low.map(|low| low.range(range.clone()))) };
            read(s, w, low.as_deref(), values);
            f(range, values);
            write(s, values, w, low, self.rounding.map(|rounding| (rounding, start)));
        }
    }
}

/// Master values of some elements.
#[inline(always)]
fn read<S: Simd, E: Element>(s: S, w: &[E], low: Option<&[i16]>, values: &mut [f32]) {
    match (E::DTYPE, low) {
        (DType::Bf16, Some(low)) => {
            let w: &[u16] = bytemuck::cast_slice(w);
            for ((value, w), low) in values.iter_mut().zip(w).zip(low) {
                *value = f32::from_bits(((*w as u32) << 16).wrapping_add(*low as i32 as u32));
            }
        }
        _ => {
            for (value, w) in values.chunks_mut(S::LANES).zip(w.chunks(S::LANES)) {
                s.store_up_to(value, s.load_up_to(w));
            }
            if let Some(low) = low {
                for (value, low) in values.iter_mut().zip(low) {
                    *value += f32::from(*low) * low_unit(*value);
                }
            }
        }
    }
}

/// The nearest number that a split master of f16 can be: below 2^-14 a multiple of 2^-39, ties to even. A weight and its low
/// half must follow from their sum alone, which is all that a checkpoint has.
#[inline(always)]
fn representable(value: f32) -> f32 {
    const UNIT: f32 = 1.0 / (1u64 << 39) as f32;
    if value.abs() < 1.0 / 16384.0 {
        // Minus zero does not survive a sum.
        (value * (1.0 / UNIT)).round_ties_even() * UNIT + 0.0
    } else {
        value
    }
}

/// What the low half of an f16 weight counts: 2^-25 of its power of two, or of 2^-14 where that is more.
#[inline(always)]
fn low_unit(w: f32) -> f32 {
    const SMALLEST: u32 = 0x3880_0000;
    f32::from_bits((w.to_bits() & 0x7f80_0000).max(SMALLEST) - (25 << 23))
}

/// Stores master values. `rounding` has the number of the first element here.
#[inline(always)]
fn write<S: Simd, E: Element>(
    s: S,
    values: &[f32],
    w: &mut [E],
    low: Option<&mut [i16]>,
    rounding: Option<(Rounding, usize)>,
) {
    match (E::DTYPE, low, rounding) {
        (DType::Bf16, Some(low), _) => {
            let w: &mut [u16] = bytemuck::cast_slice_mut(w);
            for ((value, w), low) in values.iter().zip(w).zip(low) {
                let bits = value.to_bits();
                // The magnitude sits in the bits below the sign, so this rounds ties away from zero, and what is
                // left over lies in -2^15 .. 2^15.
                *w = (bits.wrapping_add(0x8000) >> 16) as u16;
                *low = bits as i16;
            }
        }
        (DType::Bf16, None, Some((Rounding { stream, place }, first))) => {
            let w: &mut [u16] = bytemuck::cast_slice_mut(w);
            for (start, element, len) in place.pieces(first..first + values.len()) {
                let piece = start - first..start - first + len;
                let (mut values, mut w, mut element) = (&values[piece.clone()], &mut w[piece], element);
                while !values.is_empty() {
                    let skip = element % BLOCK;
                    let count = values.len().min(BLOCK - skip);
                    let (now, later) = values.split_at(count);
                    let (w_now, w_later) = w.split_at_mut(count);
                    round_at_random(&words(s, &stream, 0, element / BLOCK)[skip..], now, w_now);
                    (values, w, element) = (later, w_later, element + count);
                }
            }
        }
        (_, Some(low), _) => {
            let places = w.chunks_mut(S::LANES).zip(low.chunks_mut(S::LANES));
            for (values, (w, low)) in values.chunks(S::LANES).zip(places) {
                let mut exact = [0.0; 16];
                for (exact, value) in exact.iter_mut().zip(values) {
                    *exact = representable(*value);
                }
                s.store_up_to(w, s.load(&exact));
                let near = s.to_array(s.load_up_to(w));
                for ((exact, near), low) in exact.iter().zip(near).zip(low) {
                    // A whole number, at most 2^14; of an infinity or a NaN, nothing is left that counts.
                    let left = (exact - near) * (1.0 / low_unit(near));
                    *low = if left.abs() <= 32767.0 { left as i16 } else { 0 };
                }
            }
        }
        (_, None, _) => {
            for (value, w) in values.chunks(S::LANES).zip(w.chunks_mut(S::LANES)) {
                s.store_up_to(w, s.load_up_to(value));
            }
        }
    }
}

/// bf16 bits of values, rounded up with the probability that the dropped bits say.
#[inline(always)]
fn round_at_random(words: &[u32], values: &[f32], w: &mut [u16]) {
    for ((value, w), word) in values.iter().zip(w).zip(words) {
        let bits = value.to_bits();
        let up = bits.wrapping_add(word & 0xffff);
        // A carry must not make a number of a NaN.
        *w = (if value.is_nan() { bits | 0x40_0000 } else { up } >> 16) as u16;
    }
}

pub(super) fn adamw<E: Element>(
    device: &CpuDevice,
    hyper: AdamW,
    param: Param<'_, CpuDevice, E>,
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_scale } = hyper;
    let decay = 1.0 - lr * weight_decay;
    let step = lr / bias_correction1;
    let root = bias_correction2.sqrt();
    let (m, v) = (Shards::new(m), Shards::new(v));
    Master::new(param).update(
        device,
        #[inline(always)]
        |range, values| {
            let grad = &grad[range.clone()];
            // SAFETY: `update` calls with disjoint ranges.
            let (m, v) = unsafe { (m.range(range.clone()), v.range(range)) };
            for ((value, g), (m, v)) in values.iter_mut().zip(grad).zip(m.iter_mut().zip(v)) {
                let g = g * grad_scale;
                *m += (1.0 - beta1) * (g - *m);
                *v = beta2 * *v + (1.0 - beta2) * (g * g);
                *value = *value * decay - step * (*m / (v.sqrt() / root + eps));
            }
        },
    );
}

pub(super) fn sgd<E: Element>(
    device: &CpuDevice,
    hyper: Sgd,
    param: Param<'_, CpuDevice, E>,
    grad: &[f32],
    momentum: Option<&mut [f32]>,
) {
    let Sgd { lr, momentum: keep, weight_decay, grad_scale } = hyper;
    let momentum = momentum.map(Shards::new);
    Master::new(param).update(
        device,
        #[inline(always)]
        |range, values| {
            let grad = &grad[range.clone()];
            match momentum {
                Some(momentum) => {
                    // SAFETY: `update` calls with disjoint ranges.
                    let momentum = unsafe { momentum.range(range) };
                    for ((value, g), momentum) in values.iter_mut().zip(grad).zip(momentum) {
                        *momentum = keep * *momentum + (g * grad_scale + weight_decay * *value);
                        *value -= lr * *momentum;
                    }
                }
                None => {
                    for (value, g) in values.iter_mut().zip(grad) {
                        *value -= lr * (g * grad_scale + weight_decay * *value);
                    }
                }
            }
        },
    );
}

pub(super) fn set_master<E: Element>(device: &CpuDevice, param: Param<'_, CpuDevice, E>, values: &[f32]) {
    // Given values are rounded to nearest, not at random: loading a checkpoint twice gives the same weights.
    let nearest = Param { rounding: None, ..param };
    Master::new(nearest).update(device, |range, master| master.copy_from_slice(&values[range]));
}

pub(super) fn get_master<E: Element>(device: &CpuDevice, w: &[E], low: Option<&[i16]>, values: &mut [f32]) {
    let values = Shards::new(&mut values[..w.len()]);
    device.pool.for_chunks(w.len(), CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        let values = unsafe { values.range(range.clone()) };
        let low = low.map(|low| &low[range.clone()]);
        dispatch!(device.isa, s => read(s, &w[range], low, values));
    });
}

pub(super) fn sum_of_squares(device: &CpuDevice, x: &[f32]) -> f64 {
    let mut parts = vec![0.0; x.len().div_ceil(CHUNK)];
    let shards = Shards::new(&mut parts);
    device.pool.for_chunks(x.len(), CHUNK, |range| {
        let part = range.start / CHUNK;
        // SAFETY: each chunk has its own part.
        let part = unsafe { shards.range(part..part + 1) };
        part[0] = dispatch!(device.isa, s => squares(s, &x[range]));
    });
    parts.iter().sum()
}

/// Sixteen sums, so that the order of additions is the same for every width of registers.
#[inline(always)]
fn squares<S: Simd>(_compiled_for: S, x: &[f32]) -> f64 {
    let mut sums = [0.0; 16];
    for block in x.chunks(16) {
        for (sum, x) in sums.iter_mut().zip(block) {
            *sum += *x as f64 * *x as f64;
        }
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strided;
    use crate::cpu::simd::Isa;
    use crate::rng::{Purpose, Stream};
    use crate::{bf16, f16};

    /// Every exponent, signs, ties, the largest numbers, infinities and NaNs.
    fn awkward() -> Vec<f32> {
        let mut x: Vec<f32> = (0..=0xffffu32)
            .flat_map(|high| {
                [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| f32::from_bits(high << 16 | low))
            })
            .collect();
        x.truncate(x.len() - 3);
        x
    }

    #[test]
    fn a_split_master_is_exact_and_its_weight_is_the_nearest() {
        let x = awkward();
        for isa in Isa::available() {
            let (mut w, mut low, mut back) =
                (vec![bf16::ZERO; x.len()], vec![0i16; x.len()], vec![0.0; x.len()]);
            dispatch!(isa, s => {
                write(s, &x, &mut w, Some(&mut low), None);
                read(s, &w, Some(&low), &mut back)
            });
            for ((x, back), w) in x.iter().zip(&back).zip(&w) {
                assert_eq!(x.to_bits(), back.to_bits(), "{isa:?}: {x} came back as {back}");
                let (value, w) = (*x as f64, w.to_f64());
                if x.is_finite() && w.is_finite() {
                    let up = bf16::from_bits(bf16::from_f64(w).to_bits() + 1).to_f64();
                    let half_step = if up.is_finite() { (up - w).abs() / 2.0 } else { f64::INFINITY };
                    assert!((value - w).abs() <= half_step, "{isa:?}: {value} is not nearest to {w}");
                    // Halfway lies further out.
                    assert!(
                        (value - w).abs() < half_step || w.abs() > value.abs(),
                        "{isa:?}: tie {value} went to {w}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_split_master_of_f16_is_exact_above_the_smallest_and_kept_by_its_sum() {
        let x = awkward();
        let smallest = 2f32.powi(-39);
        for isa in Isa::available() {
            let (mut w, mut low, mut back) =
                (vec![f16::ZERO; x.len()], vec![0i16; x.len()], vec![0.0; x.len()]);
            dispatch!(isa, s => {
                write(s, &x, &mut w, Some(&mut low), None);
                read(s, &w, Some(&low), &mut back)
            });
            for ((x, back), w) in x.iter().zip(&back).zip(&w) {
                if !back.is_nan() {
                    assert_eq!(
                        w.to_bits(),
                        f16::from_f32(*back).to_bits(),
                        "{isa:?}: the weight of {x} is {w}"
                    );
                }
                if w.is_infinite() || x.is_nan() {
                    assert!(!back.is_finite(), "{isa:?}: {x} came back as {back}");
                } else if x.abs() >= 2f32.powi(-14) {
                    assert_eq!(x, back, "{isa:?}: {x} came back as {back}");
                } else {
                    assert!((x - back).abs() <= smallest / 2.0, "{isa:?}: {x} came back as {back}");
                    assert_eq!(back / smallest, (back / smallest).round(), "{isa:?}: {back}");
                }
            }
            // What came back is kept.
            let (first, w_first, low_first) = (back.clone(), w.clone(), low.clone());
            dispatch!(isa, s => {
                write(s, &first, &mut w, Some(&mut low), None);
                read(s, &w, Some(&low), &mut back)
            });
            let kept = |i: &usize| first[*i].is_finite();
            for i in (0..x.len()).filter(kept) {
                assert_eq!(
                    (w[i].to_bits(), low[i]),
                    (w_first[i].to_bits(), low_first[i]),
                    "{isa:?}: {}",
                    x[i]
                );
                assert_eq!(first[i].to_bits(), back[i].to_bits(), "{isa:?}: {}", x[i]);
            }
        }
    }

    #[test]
    fn stochastic_rounding_is_unbiased_repeatable_and_keeps_what_fits() {
        let stream = Stream::new(3, Purpose::Rounding, 1, 17);
        let n = 1 << 16;
        for isa in Isa::available() {
            // 0.3 of the way from 1 to the next bf16.
            let x = vec![1.0 + 0.3 / 128.0; n];
            let mut w = vec![bf16::ZERO; n];
            dispatch!(isa, s => write(s, &x, &mut w, None, Some((Rounding { stream, place: Strided::WHOLE }, 128))));
            let up = w.iter().filter(|w| w.to_f32() == 1.0 + 1.0 / 128.0).count();
            let down = w.iter().filter(|w| w.to_f32() == 1.0).count();
            assert_eq!(up + down, n, "{isa:?}: only neighbours");
            // Standard deviation of the share: sqrt(0.21 / 65536) = 0.0018.
            assert!((up as f64 / n as f64 - 0.3).abs() < 0.009, "{isa:?}: {up} of {n} up");
            for (i, w) in w.iter().enumerate() {
                let dropped = ((x[i] - 1.0) * (1 << 23) as f32) as u32;
                let up = dropped + (stream.word(0, 128 + i) & 0xffff) >= 1 << 16;
                assert_eq!(w.to_f32() > 1.0, up, "{isa:?} element {i}");
            }
            let special =
                [0.0, -0.0, 1.5, -3.0, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fff_ffff)];
            let mut w = [bf16::ONE; 7];
            dispatch!(isa, s => write(s, &special, &mut w, None, Some((Rounding { stream, place: Strided::WHOLE }, 0))));
            for (x, w) in special.iter().zip(w).take(6) {
                assert_eq!(x.to_bits(), w.to_f32().to_bits(), "{isa:?}");
            }
            assert!(w[6].is_nan(), "{isa:?}");
        }
    }
}
