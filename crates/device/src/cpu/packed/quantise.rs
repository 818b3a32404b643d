//! Numbers of few bits: how weights and activations are rounded, a group of [`GROUP`] at a time.

use half::bf16;

use crate::Element;

/// Numbers that share a scale. Divides the widths of all of OPT's matrices; a rest is filled with zeros.
pub const GROUP: usize = 64;

/// A group of weights: `w = scale * code + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Group {
    pub(super) scale: bf16,
    pub(super) min: bf16,
}

/// The nearest bf16 that is not smaller.
fn not_below(x: f32) -> bf16 {
    let near = bf16::from_f32(x);
    // Next towards plus infinity: away from 0 if positive, towards it if negative.
    let step = if near.to_f32() >= x {
        0
    } else if near.is_sign_negative() {
        -1
    } else {
        1
    };
    bf16::from_bits((near.to_bits() as i32 + step) as u16)
}

/// Eight bits, symmetric: codes are `128 + round(w / scale)`, so that `min` is `-128 scale`, exactly.
pub(super) fn eight_bits(w: &[f32], codes: &mut [u8; GROUP]) -> Group {
    let most = w.iter().fold(0.0f32, |most, w| most.max(w.abs()));
    let scale = not_below(most / 127.0);
    let inverse = if most > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
    codes.fill(128);
    for (w, code) in w.iter().zip(codes) {
        *code = ((w * inverse).round_ties_even().clamp(-127.0, 127.0) + 128.0) as u8;
    }
    Group { scale, min: bf16::from_f32(-128.0 * scale.to_f32()) }
}

/// Four bits between the group's smallest and largest number; among ranges that are a little narrower, which round most
/// numbers more finely and cut a few, the one with the smallest sum of squared errors is taken.
pub(super) fn four_bits(w: &[f32], codes: &mut [u8; GROUP]) -> Group {
    let low = w.iter().copied().fold(0.0f32, f32::min);
    let high = w.iter().copied().fold(0.0f32, f32::max);
    codes.fill(0);
    if high == low {
        return Group { scale: bf16::ZERO, min: bf16::ZERO };
    }
    let mut best = (f32::INFINITY, Group { scale: bf16::ZERO, min: bf16::ZERO });
    for shrink in [1.0, 0.95, 0.9, 0.85, 0.8] {
        let min = bf16::from_f32(low * shrink);
        let scale = bf16::from_f32((high * shrink - min.to_f32()) / 15.0);
        if scale == bf16::ZERO {
            continue;
        }
        let group = Group { scale, min };
        let error: f32 = w.iter().map(|w| (group.value(group.four_bit_code(*w)) - w).powi(2)).sum();
        if error < best.0 {
            best = (error, group);
        }
    }
    let group = best.1;
    if group.scale != bf16::ZERO {
        for (w, code) in w.iter().zip(codes) {
            *code = group.four_bit_code(*w);
        }
    }
    group
}

impl Group {
    fn four_bit_code(self, w: f32) -> u8 {
        ((w - self.min.to_f32()) / self.scale.to_f32()).round_ties_even().clamp(0.0, 15.0) as u8
    }

    /// The number that a code stands for.
    pub(super) fn value(self, code: u8) -> f32 {
        self.scale.to_f32() * code as f32 + self.min.to_f32()
    }
}

/// Eight bits of activations, symmetric, to the nearest (ties to even). Returns the scale and the sum of the numbers.
#[inline(always)]
pub(super) fn activations<E: Element>(x: &[E], codes: &mut [i8; GROUP]) -> (f32, i32) {
    /// Added to a small number it leaves the nearest integer in the lowest bits.
    const MAGIC: f32 = 12_582_912.0;
    let mut wide = [0.0f32; GROUP];
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.to_f32();
    }
    // Bits of absolute values are ordered as the values are, and whole numbers have a largest without a branch.
    let most = wide.iter().fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let scale = f32::from_bits(most) / 127.0;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut sum = 0;
    for (x, code) in wide.iter().zip(codes) {
        *code = (x * inverse + MAGIC).to_bits() as i8;
        sum += *code as i32;
    }
    (scale, sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::{Purpose, Stream};

    fn numbers(scale: f32) -> [f32; GROUP] {
        let s = Stream::new(3, Purpose::Init, 0, 0);
        std::array::from_fn(|i| (s.uniform(0, i) - 0.4) * scale)
    }

    #[test]
    fn rounding_is_within_half_a_step() {
        for scale in [1e-6, 0.01, 1.0, 1e4] {
            let w = numbers(scale);
            let mut codes = [0; GROUP];
            let g = eight_bits(&w, &mut codes);
            for (w, code) in w.iter().zip(codes) {
                let got = g.scale.to_f32() * (code as f32 - 128.0);
                assert!((got - w).abs() <= 0.501 * g.scale.to_f32(), "{w} {got}");
                assert!((g.value(code) - got).abs() <= 1e-4 * g.scale.to_f32());
            }
            let g = four_bits(&w, &mut codes);
            let rms = |e: f32| (e / GROUP as f32).sqrt();
            let error = rms(w.iter().zip(codes).map(|(w, c)| (g.value(c) - w).powi(2)).sum());
            // Even rounding of this range would give 1/sqrt(12) of a fifteenth.
            assert!(error < 0.31 * scale / 15.0, "{error} of {scale}");
            let mut codes = [0; GROUP];
            let (step, sum) = activations(&w, &mut codes);
            assert_eq!(sum, codes.iter().map(|c| *c as i32).sum::<i32>());
            for (w, code) in w.iter().zip(codes) {
                assert!((step * code as f32 - w).abs() <= 0.501 * step, "{w}");
            }
        }
    }

    #[test]
    fn groups_of_nothing_are_nothing() {
        let mut codes = [7; GROUP];
        let g = four_bits(&[0.0; 9], &mut codes);
        assert_eq!(g.value(codes[0]), 0.0);
        let g = eight_bits(&[0.0; 9], &mut codes);
        assert_eq!(g.value(codes[0]), 0.0);
        assert_eq!(activations(&[0.0f32; 5], &mut [1; GROUP]), (0.0, 0));
    }

    #[test]
    fn scales_are_rounded_up() {
        for x in [0.0, 1.0, 1.001, 3.1415927, 1e-30, 255.9] {
            let up = not_below(x).to_f32();
            assert!(up >= x && up <= x * 1.008, "{x} {up}");
        }
    }
}
