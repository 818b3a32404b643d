//! Matrices in codes of few bits.

use anyhow::{Result, ensure};
use ferropt_device::quantise::{Codes, GROUP, Group, largest_code, round_group};
use ferropt_device::{Device, WeightFormat, bf16};
use std::ops::Range;

/// Rows that are rounded together.
const ROWS: usize = 16;

/// Rounds rows of a matrix into their codes and groups.
pub(crate) type RoundRows<'a> = &'a (dyn Fn(&[f32], &mut [u8], &mut [Group]) + Sync);

/// A matrix `[n, k]` in codes.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// Int8, Int4 or Int3.
    pub format: WeightFormat,
    /// Its columns.
    pub k: usize,
    /// `[n, groups, GROUP]`, as [`Device::pack_codes`] takes it.
    pub codes: Vec<u8>,
    /// `[n, groups]`.
    pub groups: Vec<Group>,
}

impl Rounded {
    /// Every number to the nearest code: what [`Device::pack_weight`] does, to the bit.
    ///
    /// # Errors
    /// When the format has no codes, or the matrix is not of this width or not finite.
    pub fn nearest(format: WeightFormat, w: &[f32], k: usize, threads: usize) -> Result<Rounded> {
        Rounded::by_rows(format, w, k, threads, &|w, codes, groups| {
            let parts = w.chunks_exact(k).flat_map(|row| row.chunks(GROUP));
            for ((w, codes), group) in parts.zip(codes.as_chunks_mut().0).zip(groups) {
                *group = round_group(format, w, codes);
            }
        })
    }

    /// Hands a few rows at a time to `round`, with their codes and groups, on `threads` threads.
    pub(crate) fn by_rows(
        format: WeightFormat,
        w: &[f32],
        k: usize,
        threads: usize,
        round: RoundRows<'_>,
    ) -> Result<Rounded> {
        ensure!(largest_code(format).is_some(), "{} has no codes; use int8, int4 or int3", format.name());
        ensure!(k > 0 && w.len().is_multiple_of(k), "a matrix of {} elements has no rows of {k}", w.len());
        if let Some(at) = w.iter().position(|w| !w.is_finite()) {
            anyhow::bail!("the weight in row {}, column {} is {}", at / k, at % k, w[at]);
        }
        let (n, count) = (w.len() / k, k.div_ceil(GROUP));
        let nothing = Group { scale: bf16::ZERO, min: bf16::ZERO };
        let (mut codes, mut groups) = (vec![0; n * count * GROUP], vec![nothing; n * count]);
        let share = n.div_ceil(threads.max(1)).next_multiple_of(ROWS).max(ROWS);
        std::thread::scope(|scope| {
            let parts = w
                .chunks(share * k)
                .zip(codes.chunks_mut(share * count * GROUP))
                .zip(groups.chunks_mut(share * count));
            for ((w, codes), groups) in parts {
                scope.spawn(move || {
                    let blocks = w
                        .chunks(ROWS * k)
                        .zip(codes.chunks_mut(ROWS * count * GROUP))
                        .zip(groups.chunks_mut(ROWS * count));
                    blocks.for_each(|((w, codes), groups)| round(w, codes, groups));
                });
            }
        });
        Ok(Rounded { format, k, codes, groups })
    }

    /// Groups in a row.
    pub fn row_groups(&self) -> usize {
        self.k.div_ceil(GROUP)
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.groups.len() / self.row_groups()
    }

    /// The numbers of row `i` that the codes stand for.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        let count = self.row_groups();
        let groups = &self.groups[i * count..(i + 1) * count];
        let codes = self.codes[i * count * GROUP..].chunks_exact(GROUP);
        for ((out, group), codes) in out.chunks_mut(GROUP).zip(groups).zip(codes) {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = group.value(self.format, *code);
            }
        }
    }

    /// What rounding changed in the matrix `w`.
    pub fn error(&self, w: &[f32]) -> RoundingError {
        let mut row = vec![0.0; self.k];
        let (mut changed, mut all) = (0.0, 0.0);
        for (i, w) in w.chunks_exact(self.k).enumerate() {
            self.row(i, &mut row);
            changed += row.iter().zip(w).map(|(a, b)| (a - b) as f64 * (a - b) as f64).sum::<f64>();
            all += w.iter().map(|w| *w as f64 * *w as f64).sum::<f64>();
        }
        RoundingError { weights: (changed, all), outputs: None }
    }

    /// Laid out for a device's products.
    ///
    /// # Errors
    /// When memory is short.
    pub fn pack<D: Device>(&self, device: &D) -> Result<D::Packed> {
        let count = self.row_groups();
        let mut read = |rows: Range<usize>, to: Codes<'_>| {
            to.codes.copy_from_slice(&self.codes[rows.start * count * GROUP..rows.end * count * GROUP]);
            to.groups.copy_from_slice(&self.groups[rows.start * count..rows.end * count]);
            Ok(())
        };
        device.pack_codes(self.format, self.rows(), self.k, &mut read)
    }
}

/// What rounding changed in a matrix, or in several: sums of squares of the changes, and of what was changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundingError {
    /// In its numbers.
    pub weights: (f64, f64),
    /// In its products with the inputs of the calibration text.
    pub outputs: Option<(f64, f64)>,
}

impl RoundingError {
    /// Both together.
    pub fn and(self, other: RoundingError) -> RoundingError {
        let sum = |a: (f64, f64), b: (f64, f64)| (a.0 + b.0, a.1 + b.1);
        let outputs = match (self.outputs, other.outputs) {
            (Some(a), Some(b)) => Some(sum(a, b)),
            (a, b) => a.or(b),
        };
        RoundingError { weights: sum(self.weights, other.weights), outputs }
    }
}
