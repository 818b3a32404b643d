//! Rounding of weights that makes up for its own errors.
//!
//! GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, 2022): columns of a matrix are rounded one after the other, and the error of
//! each is spread over the columns behind it so that the layer's outputs on calibration text change least. How, follows
//! from the sums of products of the layer's inputs, `H = sum of x x^T`.

use anyhow::{Result, ensure};
use ferropt_device::WeightFormat;
use ferropt_device::quantise::{GROUP, Group, choose_group, largest_code};

/// Added to the diagonal of H, as a share of its mean: inputs that hardly vary must not decide.
const DAMPING: f64 = 0.01;
/// Rows that go over the factor together, while a part of it is in a near cache.
const ROWS: usize = 16;

/// What a layer's inputs tell about the importance of its weights; one for all matrices with these inputs.
pub struct Calibration {
    k: usize,
    /// `[k, k]`, upper triangle: the factor U of `H^-1 = U^T U`, each row divided by its first element.
    rows: Vec<f32>,
}

/// A matrix `[n, k]` in codes, as [`ferropt_device::Device::pack_codes`] takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// `[n, groups, GROUP]`.
    pub codes: Vec<u8>,
    /// `[n, groups]`.
    pub groups: Vec<Group>,
}

impl Calibration {
    /// From `H` `[k, k]`, the sum of `x x^T` over inputs x.
    ///
    /// # Errors
    /// When `H` has the wrong size, or is no such sum (it is not finite, or not positive).
    pub fn new(h: &[f32], k: usize) -> Result<Calibration> {
        ensure!(h.len() == k * k && k > 0, "{} sums of products were given for inputs of width {k}", h.len());
        let mean = (0..k).map(|i| h[i * k + i] as f64).sum::<f64>() / k as f64;
        ensure!(mean.is_finite() && mean >= 0.0, "the inputs' mean square is {mean}; they must be finite");
        let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
        // With rows and columns in reverse order, the inverse of a lower factor is the upper one that is wanted.
        let at = |i: usize, j: usize| {
            let (i, j) = (k - 1 - i, k - 1 - j);
            h[i * k + j] as f64 + if i == j { damping } else { 0.0 }
        };
        let lower = cholesky(k, at)?;
        let inverse = lower_inverse(k, &lower);
        let mut rows = vec![0.0; k * k];
        for i in 0..k {
            let from = &inverse[(k - 1 - i) * k..][..k];
            let first = from[k - 1 - i];
            for j in i..k {
                rows[i * k + j] = (from[k - 1 - j] / first) as f32;
            }
        }
        Ok(Calibration { k, rows })
    }

    /// Rounds a matrix `[n, k]`, rows on `threads` threads.
    ///
    /// # Errors
    /// When the format has no codes, or the matrix is not of this width or not finite.
    pub fn round(&self, format: WeightFormat, w: &[f32], threads: usize) -> Result<Rounded> {
        let k = self.k;
        ensure!(largest_code(format).is_some(), "{} has no codes; use int8 or int4", format.name());
        ensure!(w.len().is_multiple_of(k), "a matrix of {} elements has no rows of {k}", w.len());
        if let Some(at) = w.iter().position(|w| !w.is_finite()) {
            anyhow::bail!("the weight in row {}, column {} is {}", at / k, at % k, w[at]);
        }
        let (n, count) = (w.len() / k, k.div_ceil(GROUP));
        let nothing = Group { scale: Default::default(), min: Default::default() };
        let mut rounded = Rounded { codes: vec![0; n * count * GROUP], groups: vec![nothing; n * count] };
        let share = n.div_ceil(threads.max(1)).next_multiple_of(ROWS).max(ROWS);
        std::thread::scope(|scope| {
            let parts = w
                .chunks(share * k)
                .zip(rounded.codes.chunks_mut(share * count * GROUP))
                .zip(rounded.groups.chunks_mut(share * count));
            for ((w, codes), groups) in parts {
                scope.spawn(move || {
                    let blocks = w
                        .chunks(ROWS * k)
                        .zip(codes.chunks_mut(ROWS * count * GROUP))
                        .zip(groups.chunks_mut(ROWS * count));
                    for ((w, codes), groups) in blocks {
                        self.round_rows(format, &mut w.to_vec(), codes, groups);
                    }
                });
            }
        });
        Ok(rounded)
    }

    /// Rounds a few rows, which are changed on the way.
    fn round_rows(&self, format: WeightFormat, w: &mut [f32], codes: &mut [u8], groups: &mut [Group]) {
        let (k, count) = (self.k, self.k.div_ceil(GROUP));
        for column in 0..k {
            let factors = &self.rows[column * k + column..(column + 1) * k];
            let group = column / GROUP;
            for (i, w) in w.chunks_exact_mut(k).enumerate() {
                let at = i * count + group;
                if column.is_multiple_of(GROUP) {
                    groups[at] = choose_group(format, &w[column..(column + GROUP).min(k)]);
                    codes[at * GROUP..][..GROUP].fill(groups[at].code(format, 0.0));
                }
                let code = groups[at].code(format, w[column]);
                codes[at * GROUP + column % GROUP] = code;
                let error = w[column] - groups[at].value(format, code);
                for (w, f) in w[column..].iter_mut().zip(factors) {
                    *w -= error * f;
                }
            }
        }
    }
}

/// Lower factor `[k, k]` of a symmetric positive matrix: `A = L L^T`.
fn cholesky(k: usize, a: impl Fn(usize, usize) -> f64) -> Result<Vec<f64>> {
    let mut l = vec![0.0; k * k];
    for i in 0..k {
        let (above, row) = l.split_at_mut(i * k);
        for j in 0..=i {
            let other = if j < i { &above[j * k..j * k + j] } else { &[][..] };
            let rest = a(i, j) - if j < i { dot(&row[..j], other) } else { dot(&row[..j], &row[..j]) };
            if j < i {
                row[j] = rest / above[j * k + j];
            } else {
                ensure!(
                    rest > 0.0,
                    "the inputs' sums of products have no factor: pivot {i} of {k} is {rest}"
                );
                row[i] = rest.sqrt();
            }
        }
    }
    Ok(l)
}

/// Sum of products in eight parts, which the compiler keeps in registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a_parts, b_parts) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a_parts.remainder().iter().zip(b_parts.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_parts.zip(b_parts) {
        for (sum, (a, b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// Inverse of a lower triangle `[k, k]`.
fn lower_inverse(k: usize, l: &[f64]) -> Vec<f64> {
    let mut inverse = vec![0.0; k * k];
    for i in 0..k {
        let (above, row) = inverse.split_at_mut(i * k);
        let row = &mut row[..=i];
        for (t, factor) in l[i * k..i * k + i].iter().enumerate() {
            for (sum, x) in row.iter_mut().zip(&above[t * k..=t * k + t]) {
                *sum -= factor * x;
            }
        }
        let pivot = l[i * k + i];
        row[i] = 1.0;
        row.iter_mut().for_each(|x| *x /= pivot);
    }
    inverse
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::quantise::round_group;
    use ferropt_device::rng::{Purpose, Stream};

    fn numbers(which: usize, len: usize) -> Vec<f32> {
        let stream = Stream::new(9, Purpose::Init, which, 0);
        (0..len).map(|i| stream.normal(0, i)).collect()
    }

    fn plain(format: WeightFormat, w: &[f32], k: usize) -> Rounded {
        let count = k.div_ceil(GROUP);
        let mut rounded = Rounded { codes: Vec::new(), groups: Vec::new() };
        for row in w.chunks(k) {
            for part in row.chunks(GROUP) {
                let mut codes = [0; GROUP];
                rounded.groups.push(round_group(format, part, &mut codes));
                rounded.codes.extend(codes);
            }
        }
        assert_eq!(rounded.groups.len(), w.len() / k * count);
        rounded
    }

    fn values(format: WeightFormat, r: &Rounded, k: usize) -> Vec<f32> {
        let count = k.div_ceil(GROUP);
        let rows = r.groups.len() / count;
        let value = |i: usize, j: usize| {
            let at = i * count + j / GROUP;
            r.groups[at].value(format, r.codes[at * GROUP + j % GROUP])
        };
        (0..rows * k).map(|at| value(at / k, at % k)).collect()
    }

    #[test]
    fn unrelated_inputs_leave_plain_rounding() {
        let (n, k) = (35, 150);
        let w = numbers(1, n * k);
        let mut h = vec![0.0; k * k];
        (0..k).for_each(|i| h[i * k + i] = 1.0 + i as f32);
        let calibration = Calibration::new(&h, k).unwrap();
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            for threads in [1, 2, 5] {
                assert_eq!(calibration.round(format, &w, threads).unwrap(), plain(format, &w, k));
            }
        }
    }

    #[test]
    fn outputs_of_related_inputs_change_less() {
        let (n, k, inputs) = (24, 130, 400);
        let (w, mixing) = (numbers(1, n * k), numbers(2, 20 * k));
        let x: Vec<f32> = (0..inputs)
            .flat_map(|i| {
                let (cause, noise) = (numbers(100 + i, 20), numbers(1000 + i, k));
                let mixing = &mixing;
                (0..k)
                    .map(move |j| (0..20).map(|c| cause[c] * mixing[c * k + j]).sum::<f32>() + 0.3 * noise[j])
                    .collect::<Vec<_>>()
            })
            .collect();
        let mut h = vec![0.0f32; k * k];
        for x in x.chunks(k) {
            for i in 0..k {
                for j in 0..k {
                    h[i * k + j] += x[i] * x[j];
                }
            }
        }
        let calibration = Calibration::new(&h, k).unwrap();
        let error = |rounded: &[f32]| -> f64 {
            let difference: Vec<f32> = rounded.iter().zip(&w).map(|(a, b)| a - b).collect();
            x.chunks(k)
                .flat_map(|x| {
                    difference.chunks(k).map(move |d| d.iter().zip(x).map(|(d, x)| d * x).sum::<f32>())
                })
                .map(|e| (e as f64).powi(2))
                .sum()
        };
        for format in [WeightFormat::Int8, WeightFormat::Int4] {
            let rounded = calibration.round(format, &w, 2).unwrap();
            let (ours, plain) =
                (error(&values(format, &rounded, k)), error(&values(format, &plain(format, &w, k), k)));
            assert!(ours < 0.4 * plain, "{format:?}: {ours} and {plain} with plain rounding");
        }
    }

    #[test]
    fn sums_that_are_none_and_weights_that_are_not_finite_are_refused() {
        assert!(Calibration::new(&[1.0; 5], 2).is_err());
        assert!(Calibration::new(&[f32::NAN; 4], 2).err().unwrap().to_string().contains("finite"));
        let negative = Calibration::new(&[1.0, 9.0, 9.0, 1.0], 2).err().unwrap().to_string();
        assert!(negative.contains("pivot"), "{negative}");
        // Inputs that were always 0 are no reason to fail.
        let calibration = Calibration::new(&[0.0; 4], 2).unwrap();
        let infinite = calibration.round(WeightFormat::Int4, &[0.0, f32::INFINITY], 1);
        assert!(infinite.unwrap_err().to_string().contains("row 0, column 1"));
        assert!(
            calibration.round(WeightFormat::Bf16, &[0.0; 2], 1).unwrap_err().to_string().contains("codes")
        );
    }
}
