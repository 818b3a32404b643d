//! Numbers of few bits: how weights and activations are rounded, a group of [`GROUP`] at a time.

use half::bf16;

use crate::{Element, WeightFormat};

/// Numbers that share a scale. Divides the widths of all of OPT's matrices; a rest is filled with zeros.
pub const GROUP: usize = 64;

/// Scale and minimum of a group of weights: `w = scale * code + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// Distance of neighbouring codes.
    pub scale: bf16,
    /// What code 0 stands for. With 8 bits it is not stored: code 128 stands for 0.
    pub min: bf16,
}

/// Bits of a format's codes, if it is one of codes.
pub fn code_bits(format: WeightFormat) -> Option<usize> {
    match format {
        WeightFormat::Int8 => Some(8),
        WeightFormat::Int4 => Some(4),
        WeightFormat::Int3 => Some(3),
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
    }
}

/// The largest code of a format, if it is one of codes.
pub fn largest_code(format: WeightFormat) -> Option<u8> {
    code_bits(format).map(|bits| 255 >> (8 - bits))
}

/// Whether the groups of a format have a minimum of their own.
pub fn has_minima(format: WeightFormat) -> bool {
    matches!(format, WeightFormat::Int4 | WeightFormat::Int3)
}

/// Rows of a matrix as codes: what [`crate::Device::pack_codes`] reads.
pub struct Codes<'a> {
    /// `[rows, groups, GROUP]`; what lies beyond the end of a row does not matter.
    pub codes: &'a mut [u8],
    /// `[rows, groups]`.
    pub groups: &'a mut [Group],
}

/// Chooses a group's scale and minimum and rounds at most [`GROUP`] numbers to the nearest codes.
pub fn round_group(format: WeightFormat, w: &[f32], codes: &mut [u8; GROUP]) -> Group {
    let group = choose_group(format, w);
    codes.fill(group.code(format, 0.0));
    for (w, code) in w.iter().zip(codes) {
        *code = group.code(format, *w);
    }
    group
}

/// A group's scale and minimum.
pub fn choose_group(format: WeightFormat, w: &[f32]) -> Group {
    let [group] = choose::<1>(format, bytemuck::cast_slice(w));
    group
}

/// Scales and minima of `N` groups that lie beside each other: element j of group l is `w[j][l]`. Loops over l are
/// innermost, for the compiler to turn into vectors; each group's numbers are added in their order all the same.
#[inline(always)]
pub(crate) fn choose<const N: usize>(format: WeightFormat, w: &[[f32; N]]) -> [Group; N] {
    match format {
        WeightFormat::Int3 => between(WeightFormat::Int3, &SHRINK, w),
        WeightFormat::Int4 => between(WeightFormat::Int4, &SHRINK[..5], w),
        _ => eight_bits(w),
    }
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

/// Eight bits, symmetric: codes are `128 + round(w / scale)`.
#[inline(always)]
fn eight_bits<const N: usize>(w: &[[f32; N]]) -> [Group; N] {
    let mut most = [0.0f32; N];
    for w in w {
        for l in 0..N {
            most[l] = most[l].max(w[l].abs());
        }
    }
    most.map(|most| {
        let scale = not_below(most / 127.0);
        Group { scale, min: bf16::from_f32(-128.0 * scale.to_f32()) }
    })
}

/// What ranges are narrowed by. The fewer codes there are, the more it pays to cut: of groups of normal numbers none takes
/// less than 0.9 with 4 bits, and most do with 3.
const SHRINK: [f32; 7] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7];

/// Four or three bits between the group's smallest and largest number; among ranges that are narrower, which round most
/// numbers more finely and cut a few, the one with the smallest sum of squared errors is taken.
#[inline(always)]
fn between<const N: usize>(format: WeightFormat, shrinks: &[f32], w: &[[f32; N]]) -> [Group; N] {
    let most = largest(format);
    let (mut low, mut high) = ([0.0f32; N], [0.0f32; N]);
    for w in w {
        for l in 0..N {
            low[l] = low[l].min(w[l]);
            high[l] = high[l].max(w[l]);
        }
    }
    let mut least = [f32::INFINITY; N];
    let mut best = [Group { scale: bf16::ZERO, min: bf16::ZERO }; N];
    for shrink in shrinks {
        let (mut scale, mut inverse, mut min) = ([0.0f32; N], [0.0f32; N], [0.0f32; N]);
        for l in 0..N {
            min[l] = bf16::from_f32(low[l] * shrink).to_f32();
            scale[l] = bf16::from_f32((high[l] * shrink - min[l]) / most).to_f32();
            inverse[l] = inverse_of(scale[l]);
        }
        let mut error = [0.0f32; N];
        for w in w {
            for l in 0..N {
                let code = nearest(format, w[l], inverse[l], min[l]);
                let off = scale[l] * code + min[l] - w[l];
                error[l] += off * off;
            }
        }
        for l in 0..N {
            if error[l] < least[l] {
                least[l] = error[l];
                best[l] = Group { scale: bf16::from_f32(scale[l]), min: bf16::from_f32(min[l]) };
            }
        }
    }
    best
}

/// What a number is multiplied with to get its code.
#[inline(always)]
pub(crate) fn inverse_of(scale: f32) -> f32 {
    if scale > 0.0 { 1.0 / scale } else { 0.0 }
}

/// Added to a small number it leaves the nearest integer (ties to even) in the lowest bits.
const MAGIC: f32 = 12_582_912.0;

/// The largest code below 8 bits, as f32.
#[inline(always)]
fn largest(format: WeightFormat) -> f32 {
    if format == WeightFormat::Int4 { 15.0 } else { 7.0 }
}

/// The nearest code of a number, as a whole f32.
#[inline(always)]
pub(crate) fn nearest(format: WeightFormat, w: f32, inverse: f32, min: f32) -> f32 {
    if has_minima(format) {
        ((w - min) * inverse).clamp(0.0, largest(format)) + MAGIC - MAGIC
    } else {
        (w * inverse).clamp(-127.0, 127.0) + MAGIC - MAGIC + 128.0
    }
}

/// A whole number below 256 as bits.
#[inline(always)]
pub(crate) fn bits_of(code: f32) -> u32 {
    (code + MAGIC).to_bits() & 0xff
}

impl Group {
    /// The nearest code of a number.
    pub fn code(self, format: WeightFormat, w: f32) -> u8 {
        nearest(format, w, inverse_of(self.scale.to_f32()), self.min.to_f32()) as u8
    }

    /// The number that a code stands for.
    pub fn value(self, format: WeightFormat, code: u8) -> f32 {
        let scale = self.scale.to_f32();
        if has_minima(format) {
            scale * code as f32 + self.min.to_f32()
        } else {
            scale * (code as f32 - 128.0)
        }
    }
}

/// Eight bits of activations, symmetric, to the nearest (ties to even). Returns the scale and the sum of the numbers.
#[inline(always)]
pub(crate) fn activations<E: Element>(x: &[E], codes: &mut [i8; GROUP]) -> (f32, i32) {
    let mut wide = [0.0f32; GROUP];
    for (wide, x) in wide.iter_mut().zip(x) {
        *wide = x.to_f32();
    }
    // Bits of absolute values are ordered as the values are, and whole numbers have a largest without a branch.
    let most = wide.iter().fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let scale = f32::from_bits(most) / 127.0;
    let inverse = inverse_of(scale);
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
            let g = round_group(WeightFormat::Int8, &w, &mut codes);
            for (w, code) in w.iter().zip(codes) {
                let got = g.value(WeightFormat::Int8, code);
                assert!((got - w).abs() <= 0.501 * g.scale.to_f32(), "{w} {got}");
            }
            for format in [WeightFormat::Int4, WeightFormat::Int3] {
                let g = round_group(format, &w, &mut codes);
                let rms = |e: f32| (e / GROUP as f32).sqrt();
                let error = rms(w.iter().zip(codes).map(|(w, c)| (g.value(format, c) - w).powi(2)).sum());
                // Even rounding of this range would give 1/sqrt(12) of a step.
                assert!(error < 0.31 * scale / largest(format), "{error} of {scale} in {format:?}");
            }
            let mut codes = [0; GROUP];
            let (step, sum) = activations(&w, &mut codes);
            assert_eq!(sum, codes.iter().map(|c| *c as i32).sum::<i32>());
            for (w, code) in w.iter().zip(codes) {
                assert!((step * code as f32 - w).abs() <= 0.501 * step, "{w}");
            }
        }
    }

    /// The definition of 4 and 3 bits, said plainly.
    fn best_range(format: WeightFormat, w: &[f32]) -> Group {
        let (most, shrinks): (_, &[f32]) = match format {
            WeightFormat::Int4 => (15.0, &[1.0, 0.95, 0.9, 0.85, 0.8]),
            _ => (7.0, &[1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7]),
        };
        let low = w.iter().copied().fold(0.0f32, f32::min);
        let high = w.iter().copied().fold(0.0f32, f32::max);
        let mut best = (f32::INFINITY, Group { scale: bf16::ZERO, min: bf16::ZERO });
        for shrink in shrinks {
            let min = bf16::from_f32(low * shrink);
            let group = Group { scale: bf16::from_f32((high * shrink - min.to_f32()) / most), min };
            let (scale, min) = (group.scale.to_f32(), group.min.to_f32());
            let code = |w: f32| ((w - min) * inverse_of(scale)).round_ties_even().clamp(0.0, most);
            let error: f32 = w.iter().map(|w| (scale * code(*w) + min - w).powi(2)).sum();
            if error < best.0 {
                best = (error, group);
            }
        }
        best.1
    }

    #[test]
    fn groups_beside_each_other_are_chosen_as_each_alone() {
        const N: usize = 7;
        for (trial, scale) in [1e-30, 1e-3, 0.02, 1.0, 3e4, 1e30].into_iter().enumerate() {
            for len in [1, 5, 63, GROUP] {
                let stream = Stream::new(3, Purpose::Init, trial, len as u64);
                let w: Vec<[f32; N]> = (0..len)
                    .map(|j| {
                        std::array::from_fn(|l| (stream.normal(l as u64, j) + 0.3 * l as f32 - 1.0) * scale)
                    })
                    .collect();
                for format in WeightFormat::CODES {
                    let together = choose(format, &w);
                    for l in 0..N {
                        let alone: Vec<f32> = w.iter().map(|w| w[l]).collect();
                        assert_eq!(together[l], choose_group(format, &alone));
                        if has_minima(format) {
                            assert_eq!(together[l], best_range(format, &alone), "{alone:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn codes_are_the_nearest_with_ties_to_even() {
        let group = Group { scale: bf16::from_f32(0.5), min: bf16::from_f32(-2.0) };
        for (w, want) in [
            (0.0, [128, 4, 4]),
            (0.25, [128, 4, 4]),
            (0.75, [130, 6, 6]),
            (-0.25, [128, 4, 4]),
            (1e9, [255, 15, 7]),
            (-1e9, [1, 0, 0]),
            (0.3, [129, 5, 5]),
        ] {
            assert_eq!(WeightFormat::CODES.map(|format| group.code(format, w)), want, "{w}");
            let bits = |format| bits_of(nearest(format, w, 2.0, -2.0));
            assert_eq!(WeightFormat::CODES.map(bits), want.map(u32::from), "{w}");
        }
    }

    #[test]
    fn groups_of_nothing_are_nothing() {
        for format in WeightFormat::CODES {
            let mut codes = [7; GROUP];
            let g = round_group(format, &[0.0; 9], &mut codes);
            assert!(codes.iter().all(|code| g.value(format, *code) == 0.0));
        }
        assert_eq!(activations(&[0.0f32; 5], &mut [1; GROUP]), (0.0, 0));
    }

    #[test]
    fn scales_are_rounded_up() {
        for x in [0.0, 1.0, 1.001, 3.3, 1e-30, 255.9] {
            let up = not_below(x).to_f32();
            assert!(up >= x && up <= x * 1.008, "{x} {up}");
        }
    }
}
