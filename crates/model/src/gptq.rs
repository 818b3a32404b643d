//! Rounding of weights that makes up for its own errors.
//!
//! GPTQ (Frantar, Ashkboos, Hoefler, Alistarh, 2022): columns of a matrix are rounded one after the other, and the error of
//! each is spread over the columns behind it so that the layer's outputs on calibration text change least. How, follows
//! from the sums of products of the layer's inputs, `H = sum of x x^T`.

use crate::rounded::Rounded;
use anyhow::{Result, ensure};
use ferropt_device::WeightFormat;
use ferropt_device::quantise::{GROUP, Group, choose_group};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Added to the diagonal of H, as a share of its mean: inputs that hardly vary must not decide. More where the sums' own rounding
/// would otherwise leave no factor, as it may if all inputs are much alike.
const DAMPING: [f64; 3] = [0.01, 0.1, 1.0];
/// Columns that are factored or inverted together: what they need of the rows above stays in a near cache.
const PANEL: usize = 64;

/// What a layer's inputs tell about the importance of its weights; one for all matrices with these inputs.
pub struct Calibration {
    k: usize,
    /// `[k, k]`, upper triangle: the factor U of `H^-1 = U^T U`, each row divided by its first element.
    rows: Vec<f32>,
}

impl Calibration {
    /// From `H` `[k, k]`, the sum of `x x^T` over inputs x, on `threads` threads. Takes 12 k^2 bytes of memory for a while.
    ///
    /// # Errors
    /// When `H` has the wrong size, or is no such sum (it is not finite, or not positive).
    pub fn new(h: &[f32], k: usize, threads: usize) -> Result<Calibration> {
        ensure!(h.len() == k * k && k > 0, "{} sums of products were given for inputs of width {k}", h.len());
        let mean = (0..k).map(|i| h[i * k + i] as f64).sum::<f64>() / k as f64;
        ensure!(mean.is_finite() && mean >= 0.0, "the inputs' mean square is {mean}; they must be finite");
        // With rows and columns in reverse order, the inverse of a lower factor is the upper one that is wanted.
        let factor = |share: f64| {
            let damping = if mean > 0.0 { share * mean } else { 1.0 };
            let at = |i: usize, j: usize| {
                let (i, j) = (k - 1 - i, k - 1 - j);
                h[i * k + j] as f64 + if i == j { damping } else { 0.0 }
            };
            cholesky(k, &at, threads)
        };
        let [least, more, most] = DAMPING;
        let lower = factor(least).or_else(|_| factor(more)).or_else(|_| factor(most))?;
        Ok(Calibration { k, rows: scaled_inverse(k, &lower, threads) })
    }

    /// Rounds a matrix `[n, k]`, rows on `threads` threads.
    ///
    /// # Errors
    /// When the format has no codes, or the matrix is not of this width or not finite.
    pub fn round(&self, format: WeightFormat, w: &[f32], threads: usize) -> Result<Rounded> {
        Rounded::by_rows(format, w, self.k, threads, &|w, codes, groups| {
            self.round_rows(format, &mut w.to_vec(), codes, groups);
        })
    }

    /// Rounds a few rows, which are changed on the way: they go over the factor together, while a part of it is in a near
    /// cache.
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

/// Lower factor `[k, k]` of a symmetric positive matrix: `A = L L^T`, a panel of columns after the other.
fn cholesky(k: usize, a: &(dyn Fn(usize, usize) -> f64 + Sync), threads: usize) -> Result<Vec<f64>> {
    // Columns from `start` on of row `i`, as far as they lie left of the diagonal and in `above`.
    let fill = |i: usize, start: usize, above: &[f64], row: &mut [f64]| {
        for j in start..above.len() / k {
            row[j] = (a(i, j) - dot(&row[..j], &above[j * k..j * k + j])) / above[j * k + j];
        }
    };
    let mut l = vec![0.0; k * k];
    for start in (0..k).step_by(PANEL) {
        let end = (start + PANEL).min(k);
        let (above, below) = l.split_at_mut(end * k);
        for i in start..end {
            let (above, row) = above.split_at_mut(i * k);
            fill(i, start, above, row);
            let rest = a(i, i) - dot(&row[..i], &row[..i]);
            ensure!(rest > 0.0, "the inputs' sums of products have no factor: pivot {i} of {k} is {rest}");
            row[i] = rest.sqrt();
        }
        let share = (k - end).div_ceil(threads.max(1)).max(1);
        std::thread::scope(|scope| {
            for (part, rows) in below.chunks_mut(share * k).enumerate() {
                let (fill, above, first) = (&fill, &*above, end + part * share);
                scope.spawn(move || {
                    (first..).zip(rows.chunks_exact_mut(k)).for_each(|(i, row)| fill(i, start, above, row));
                });
            }
        });
    }
    Ok(l)
}

/// Inverse of a lower triangle `[k, k]` with rows and columns in reverse order, each row divided by its first element.
fn scaled_inverse(k: usize, l: &[f64], threads: usize) -> Vec<f32> {
    let rows = Mutex::new(vec![0.0; k * k]);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                // A panel's columns do not depend on those of another.
                loop {
                    let start = next.fetch_add(PANEL, Relaxed);
                    if start >= k {
                        return;
                    }
                    let panel = inverse_columns(k, l, start);
                    let mut rows = rows.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                    for (i, row) in (start..).zip(&panel) {
                        for (j, x) in (start..k.min(i + 1)).zip(row) {
                            rows[(k - 1 - i) * k + (k - 1 - j)] = (x * l[i * k + i]) as f32;
                        }
                    }
                }
            });
        }
    });
    rows.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Columns from `start` on, at most [`PANEL`] of them, of the inverse of a lower triangle; rows above them are left out.
fn inverse_columns(k: usize, l: &[f64], start: usize) -> Vec<[f64; PANEL]> {
    let mut panel: Vec<[f64; PANEL]> = Vec::with_capacity(k - start);
    for i in start..k {
        let mut row = [0.0; PANEL];
        for (factor, above) in l[i * k + start..i * k + i].iter().zip(&panel) {
            for (sum, x) in row.iter_mut().zip(above) {
                *sum -= factor * x;
            }
        }
        if i < start + PANEL {
            row[i - start] = 1.0;
        }
        let pivot = l[i * k + i];
        row.iter_mut().for_each(|x| *x /= pivot);
        panel.push(row);
    }
    panel
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

#[cfg(test)]
mod tests {
    use super::*;
    use ferropt_device::rng::{Purpose, Stream};

    fn numbers(which: usize, len: usize) -> Vec<f32> {
        let stream = Stream::new(9, Purpose::Init, which, 0);
        (0..len).map(|i| stream.normal(0, i)).collect()
    }

    fn values(r: &Rounded) -> Vec<f32> {
        let mut values = vec![0.0; r.rows() * r.k];
        values.chunks_exact_mut(r.k).enumerate().for_each(|(i, out)| r.row(i, out));
        values
    }

    #[test]
    fn unrelated_inputs_leave_plain_rounding() {
        let (n, k) = (35, 150);
        let w = numbers(1, n * k);
        let mut h = vec![0.0; k * k];
        (0..k).for_each(|i| h[i * k + i] = 1.0 + i as f32);
        let calibration = Calibration::new(&h, k, 2).unwrap();
        for format in WeightFormat::CODES {
            let nearest = Rounded::nearest(format, &w, k, 3).unwrap();
            for threads in [1, 2, 5] {
                assert_eq!(calibration.round(format, &w, threads).unwrap(), nearest);
            }
        }
    }

    #[test]
    fn sums_that_rounding_left_without_a_factor_are_damped_more() {
        // Two inputs that are equal, with sums that say they are more than that: no damping below 5 % has a factor.
        let calibration = Calibration::new(&[1.0, 1.05, 1.05, 1.0], 2, 1).unwrap();
        assert!(calibration.rows.iter().all(|factor| factor.is_finite()));
        let error = Calibration::new(&[1.0, 9.0, 9.0, 1.0], 2, 1).err().unwrap().to_string();
        assert!(error.contains("pivot 1 of 2"), "{error}");
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
        let calibration = Calibration::new(&h, k, 2).unwrap();
        assert_eq!(Calibration::new(&h, k, 5).unwrap().rows, calibration.rows);
        let error = |rounded: &[f32]| -> f64 {
            let difference: Vec<f32> = rounded.iter().zip(&w).map(|(a, b)| a - b).collect();
            x.chunks(k)
                .flat_map(|x| {
                    difference.chunks(k).map(move |d| d.iter().zip(x).map(|(d, x)| d * x).sum::<f32>())
                })
                .map(|e| (e as f64).powi(2))
                .sum()
        };
        for format in WeightFormat::CODES {
            let rounded = calibration.round(format, &w, 2).unwrap();
            let plain = Rounded::nearest(format, &w, k, 2).unwrap();
            let (ours, plain) = (error(&values(&rounded)), error(&values(&plain)));
            assert!(ours < 0.4 * plain, "{format:?}: {ours} and {plain} with plain rounding");
        }
    }

    #[test]
    fn sums_that_are_none_and_weights_that_are_not_finite_are_refused() {
        assert!(Calibration::new(&[1.0; 5], 2, 1).is_err());
        assert!(Calibration::new(&[f32::NAN; 4], 2, 1).err().unwrap().to_string().contains("finite"));
        let negative = Calibration::new(&[1.0, 9.0, 9.0, 1.0], 2, 1).err().unwrap().to_string();
        assert!(negative.contains("pivot"), "{negative}");
        // Inputs that were always 0 are no reason to fail.
        let calibration = Calibration::new(&[0.0; 4], 2, 1).unwrap();
        let infinite = calibration.round(WeightFormat::Int4, &[0.0, f32::INFINITY], 1);
        assert!(infinite.unwrap_err().to_string().contains("row 0, column 1"));
        assert!(
            calibration.round(WeightFormat::Bf16, &[0.0; 2], 1).unwrap_err().to_string().contains("codes")
        );
    }
}
