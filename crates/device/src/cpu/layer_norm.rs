//! Layer norm (Ba, Kiros, Hinton, 2016), rows in f32.

use std::ops::Range;

use super::buffer::Shards;
use super::simd::{Simd, dispatch};
use super::{CpuDevice, Scratch};
use crate::{Element, Store};

/// Added to the variance; every OPT model uses this value.
const EPS: f32 = 1e-5;
/// Rows whose parts of dgamma and dbeta are added up by one thread. Fixed, so that the order of additions is too.
const ROWS: usize = 64;
/// Columns of the reduction over those parts that a thread takes at once.
const COLUMNS: usize = 256;

/// Bytes of workspace of the backward pass.
pub(super) fn workspace_bytes(rows: usize, width: usize) -> usize {
    rows.div_ceil(ROWS) * 2 * width * size_of::<f32>()
}

pub(super) fn forward<E: Element>(
    device: &CpuDevice,
    width: usize,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    y: &mut [E],
    y_f32: Option<&mut [f32]>,
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let rows = mean.len();
    let (y, mean, rstd, y_f32) =
        (Shards::new(y), Shards::new(mean), Shards::new(rstd), y_f32.map(Shards::new));
    device.pool.for_chunks(rows, ROWS / 4, |rows| {
        for row in rows {
            let elements = row * width..(row + 1) * width;
            let x = &x[elements.clone()];
            // SAFETY: rows are disjoint.
            let (y, y_f32, mean, rstd) = unsafe {
                (
                    y.range(elements.clone()),
                    y_f32.map(|y| y.range(elements)),
                    &mut mean.range(row..row + 1)[0],
                    &mut rstd.range(row..row + 1)[0],
                )
            };
            (*mean, *rstd) = dispatch!(device.isa, s => {
                let moments = moments(s, x);
                normalize(s, x, moments, gamma, beta, y);
                if let Some(y_f32) = y_f32 {
                    normalize(s, x, moments, gamma, beta, y_f32);
                }
                moments
            });
        }
    });
}

/// Mean and reciprocal standard deviation of a row, in two passes: the difference of large squares would lose all
/// digits of a small variance.
#[inline(always)]
fn moments<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum_over(s, x, 0.0, |x| x) / n;
    let m = s.splat(mean);
    let squares = sum_over(
        s,
        x,
        mean,
        #[inline(always)]
        |x| {
            let d = s.sub(x, m);
            s.mul(d, d)
        },
    );
    let variance = squares / n;
    (mean, 1.0 / (variance + EPS).sqrt())
}

/// Sum of `f` over a row; `f(filler)` is 0.
#[inline(always)]
fn sum_over<S: Simd>(s: S, x: &[f32], filler: f32, f: impl Fn(S::F) -> S::F) -> f32 {
    // Four sums, because one would wait for its own additions.
    let mut sums = [s.zero(); 4];
    let blocks = x.chunks_exact(4 * S::LANES);
    let rest = blocks.remainder();
    for block in blocks {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, f(s.load(&block[i * S::LANES..])));
        }
    }
    for part in rest.chunks(S::LANES) {
        let mut full = [filler; 16];
        full[..part.len()].copy_from_slice(part);
        sums[0] = s.add(sums[0], f(s.load(&full)));
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}

#[inline(always)]
fn normalize<S: Simd, E: Element>(
    s: S,
    x: &[f32],
    (mean, rstd): (f32, f32),
    gamma: &[f32],
    beta: &[f32],
    y: &mut [E],
) {
    let (mean, rstd) = (s.splat(mean), s.splat(rstd));
    for c in (0..x.len()).step_by(S::LANES) {
        let normal = s.mul(s.sub(s.load_up_to(&x[c..]), mean), rstd);
        s.store_up_to(&mut y[c..], s.fma(normal, s.load_up_to(&gamma[c..]), s.load_up_to(&beta[c..])));
    }
}

pub(super) fn backward<G: Element>(
    device: &CpuDevice,
    width: usize,
    dy: &[G],
    x: &[f32],
    mean: &[f32],
    rstd: &[f32],
    gamma: &[f32],
    dx: &mut [f32],
    dx_store: Store,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    grad_store: Store,
) {
    let rows = x.len() / width;
    let mut workspace = device.workspace();
    let [parts] = workspace.take([(Scratch::Partials, workspace_bytes(rows, width) / size_of::<f32>())]);
    let parts: &mut [f32] = bytemuck::cast_slice_mut(parts);
    let (dx, shards) = (Shards::new(dx), Shards::new(parts));
    device.pool.for_chunks(rows, ROWS, |rows| {
        let part = rows.start / ROWS * 2 * width;
        // SAFETY: each chunk of rows has its own part.
        let sums = unsafe { shards.range(part..part + 2 * width) };
        sums.fill(0.0);
        let (dgamma, dbeta) = sums.split_at_mut(width);
        for row in rows {
            let elements = row * width..(row + 1) * width;
            // SAFETY: rows are disjoint.
            let dx = unsafe { dx.range(elements.clone()) };
            let (dy, x) = (&dy[elements.clone()], &x[elements]);
            let moments = (mean[row], rstd[row]);
            dispatch!(device.isa, s => backward_row(s, dy, x, moments, gamma, dx, dx_store, dgamma, dbeta));
        }
    });
    let (dgamma, dbeta, parts) =
        (Shards::new(&mut dgamma[..width]), Shards::new(&mut dbeta[..width]), &*parts);
    device.pool.for_chunks(width, COLUMNS, |columns| {
        // SAFETY: ranges of columns are disjoint.
        let (dgamma, dbeta) = unsafe { (dgamma.range(columns.clone()), dbeta.range(columns.clone())) };
        for (which, sum) in [dgamma, dbeta].into_iter().enumerate() {
            let columns = which * width + columns.start..which * width + columns.end;
            dispatch!(device.isa, s => reduce(s, parts, 2 * width, columns.clone(), sum, grad_store));
        }
    });
}

/// With `n` the normalised row and `g = dy * gamma`: `dx = rstd * (g - mean(g) - n * mean(g * n))`.
#[inline(always)]
fn backward_row<S: Simd, G: Element>(
    s: S,
    dy: &[G],
    x: &[f32],
    (mean, rstd): (f32, f32),
    gamma: &[f32],
    dx: &mut [f32],
    store: Store,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
) {
    let (shift, rstd) = (s.splat(mean), s.splat(rstd));
    let (mut sum_g, mut sum_gn) = (s.zero(), s.zero());
    for c in (0..x.len()).step_by(S::LANES) {
        let normal = s.mul(s.sub(s.load_up_to(&x[c..]), shift), rstd);
        let dy = s.load_up_to(&dy[c..]);
        // Missing lanes of dy are 0, so they add nothing to any of the sums.
        let g = s.mul(dy, s.load_up_to(&gamma[c..]));
        sum_g = s.add(sum_g, g);
        sum_gn = s.fma(g, normal, sum_gn);
        let (gamma_sum, beta_sum) = (s.load_up_to(&dgamma[c..]), s.load_up_to(&dbeta[c..]));
        s.store_up_to(&mut dgamma[c..], s.fma(dy, normal, gamma_sum));
        s.store_up_to(&mut dbeta[c..], s.add(dy, beta_sum));
    }
    let n = x.len() as f32;
    let (mean_g, mean_gn) = (s.splat(s.sum(sum_g) / n), s.splat(s.sum(sum_gn) / n));
    for c in (0..x.len()).step_by(S::LANES) {
        let normal = s.mul(s.sub(s.load_up_to(&x[c..]), shift), rstd);
        let g = s.mul(s.load_up_to(&dy[c..]), s.load_up_to(&gamma[c..]));
        let centred = s.sub(s.sub(g, mean_g), s.mul(normal, mean_gn));
        let d = match store {
            Store::Overwrite => s.mul(rstd, centred),
            Store::Accumulate => s.fma(rstd, centred, s.load_up_to(&dx[c..])),
        };
        s.store_up_to(&mut dx[c..], d);
    }
}

/// `sum (+)= parts[..., columns]`, parts in order.
#[inline(always)]
fn reduce<S: Simd>(s: S, parts: &[f32], stride: usize, columns: Range<usize>, sum: &mut [f32], store: Store) {
    if store == Store::Overwrite {
        sum.fill(0.0);
    }
    for part in parts.chunks_exact(stride) {
        let part = &part[columns.clone()];
        for (sum, part) in sum.chunks_mut(S::LANES).zip(part.chunks(S::LANES)) {
            s.store_up_to(sum, s.add(s.load_up_to(sum), s.load_up_to(part)));
        }
    }
}
