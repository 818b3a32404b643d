//! Linear layers: products with the epilogues that OPT needs, and their gradients.

use super::buffer::Shards;
use super::gemm::{Epilogue, gemm};
use super::pack::Matrix;
use super::simd::{Simd, dispatch, relu};
use super::{CpuDevice, random};
use crate::rng::BLOCK;
use crate::{Activation, Dropout, Element, LinearShape, Store};

/// Columns in a task of [`column_sums`].
const COLUMNS: usize = 64;

/// `y = act(x * w^T + bias)`.
pub(super) fn forward<E: Element, O: Element>(
    device: &CpuDevice,
    s: LinearShape,
    x: &[E],
    w: &[E],
    bias: Option<&[f32]>,
    act: Activation,
    y: &mut [O],
) {
    let epilogue = Forward { n: s.n, bias, act, y: Shards::new(&mut y[..s.m * s.n]) };
    multiply(device, s, x, w, &epilogue);
}

/// `out = residual + dropout(x * w^T + bias)`.
pub(super) fn forward_residual<E: Element>(
    device: &CpuDevice,
    s: LinearShape,
    x: &[E],
    w: &[E],
    bias: Option<&[f32]>,
    dropout: Option<Dropout>,
    residual: &[f32],
    out: &mut [f32],
) {
    let out = Shards::new(&mut out[..s.m * s.n]);
    multiply(device, s, x, w, &Residual { n: s.n, bias, dropout, residual, out });
}

/// `x * w^T`.
fn multiply<E: Element, P: Epilogue>(device: &CpuDevice, s: LinearShape, x: &[E], w: &[E], epilogue: &P) {
    let (x, w) = (&x[..s.m * s.k], &w[..s.n * s.k]);
    let a = Matrix { data: x, ld: s.k, k_contiguous: true };
    let b = Matrix { data: w, ld: s.k, k_contiguous: true };
    gemm(device, (s.m, s.n, s.k), a, b, epilogue);
}

/// `dx = dy * w`, zeroed where `relu_output` is not above 0.
pub(super) fn backward_input<E: Element, O: Element>(
    device: &CpuDevice,
    s: LinearShape,
    dy: &[E],
    w: &[E],
    relu_output: Option<&[E]>,
    dx: &mut [O],
) {
    let a = Matrix { data: &dy[..s.m * s.n], ld: s.n, k_contiguous: true };
    let b = Matrix { data: &w[..s.n * s.k], ld: s.k, k_contiguous: false };
    let epilogue = InputGradient { k: s.k, relu_output, dx: Shards::new(&mut dx[..s.m * s.k]) };
    gemm(device, (s.m, s.k, s.n), a, b, &epilogue);
}

/// `dw (+)= dy^T * x`, `dbias (+)= column sums of dy`.
pub(super) fn backward_weight<E: Element>(
    device: &CpuDevice,
    s: LinearShape,
    dy: &[E],
    x: &[E],
    dw: &mut [f32],
    dbias: Option<&mut [f32]>,
    store: Store,
) {
    let (dy, x) = (&dy[..s.m * s.n], &x[..s.m * s.k]);
    let a = Matrix { data: dy, ld: s.n, k_contiguous: false };
    let b = Matrix { data: x, ld: s.k, k_contiguous: false };
    gemm(
        device,
        (s.n, s.k, s.m),
        a,
        b,
        &WeightGradient { k: s.k, store, dw: Shards::new(&mut dw[..s.n * s.k]) },
    );
    if let Some(dbias) = dbias {
        column_sums(device, s.n, dy, &mut dbias[..s.n], store);
    }
}

/// Sums rows of `x` [_, n] in order into `sums` [n].
fn column_sums<E: Element>(device: &CpuDevice, n: usize, x: &[E], sums: &mut [f32], store: Store) {
    let sums = Shards::new(sums);
    device.pool.for_each(n.div_ceil(COLUMNS), |task, _| {
        let columns = task * COLUMNS..((task + 1) * COLUMNS).min(n);
        // SAFETY: each task has its own columns.
        let out = unsafe { sums.range(columns.clone()) };
        dispatch!(device.isa, s => {
            let mut acc = [s.zero(); COLUMNS / 4];
            for row in x.chunks_exact(n) {
                for (acc, x) in acc.iter_mut().zip(row[columns.clone()].chunks(lanes(s))) {
                    *acc = s.add(*acc, s.load_up_to(x));
                }
            }
            for (acc, out) in acc.iter().zip(out.chunks_mut(lanes(s))) {
                let old = if store == Store::Accumulate { s.load_up_to(out) } else { s.zero() };
                s.store_up_to(out, s.add(old, *acc));
            }
        });
    });
}

#[inline(always)]
fn lanes<S: Simd>(_: S) -> usize {
    S::LANES
}

/// `y = act(acc + bias) + residual`. All are of one length.
#[inline(always)]
pub(super) fn finish<S: Simd, O: Element>(
    s: S,
    acc: &[f32],
    bias: Option<&[f32]>,
    act: Activation,
    residual: Option<&[f32]>,
    y: &mut [O],
) {
    s.write_row(
        acc,
        y,
        #[inline(always)]
        |part, mut v| {
            if let Some(bias) = bias {
                v = s.add(v, s.load_up_to(&bias[part.clone()]));
            }
            if act == Activation::Relu {
                v = relu(s, v);
            }
            if let Some(residual) = residual {
                v = s.add(v, s.load_up_to(&residual[part]));
            }
            v
        },
    );
}

struct Forward<'a, O> {
    n: usize,
    bias: Option<&'a [f32]>,
    act: Activation,
    y: Shards<'a, O>,
}

impl<O: Element> Epilogue for Forward<'_, O> {
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]) {
        let start = row * self.n + col;
        // SAFETY: every part of every row comes once.
        let y = unsafe { self.y.range(start..start + acc.len()) };
        finish(s, acc, self.bias.map(|bias| &bias[col..col + acc.len()]), self.act, None, y);
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        self.y.prefetch_row(row * self.n + col, len);
    }
}

struct Residual<'a> {
    n: usize,
    bias: Option<&'a [f32]>,
    dropout: Option<Dropout>,
    residual: &'a [f32],
    out: Shards<'a, f32>,
}

impl Epilogue for Residual<'_> {
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]) {
        let start = row * self.n + col;
        // SAFETY: every part of every row comes once.
        let out = unsafe { self.out.range(start..start + acc.len()) };
        let residual = &self.residual[start..start + acc.len()];
        let bias = self.bias.map(|bias| &bias[col..col + acc.len()]);
        // Masks come in blocks of 64 columns; a tile's columns lie in two of them at most.
        let mut mask = [1.0f32; 2 * BLOCK];
        let skip = col % BLOCK;
        if let Some(d) = &self.dropout {
            let blocks = (skip + acc.len()).next_multiple_of(BLOCK);
            random::mask_row(s, d, d.first_row + row as u64, col - skip, &mut mask[..blocks]);
        }
        s.write_row(
            acc,
            out,
            #[inline(always)]
            |part, mut v| {
                if let Some(bias) = bias {
                    v = s.add(v, s.load_up_to(&bias[part.clone()]));
                }
                if self.dropout.is_some() {
                    v = s.mul(v, s.load_up_to(&mask[skip + part.start..skip + part.end]));
                }
                s.add(s.load_up_to(&residual[part]), v)
            },
        );
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        self.out.prefetch_row(row * self.n + col, len);
    }
}

struct InputGradient<'a, E, O> {
    k: usize,
    relu_output: Option<&'a [E]>,
    dx: Shards<'a, O>,
}

impl<E: Element, O: Element> Epilogue for InputGradient<'_, E, O> {
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]) {
        let start = row * self.k + col;
        // SAFETY: every part of every row comes once.
        let dx = unsafe { self.dx.range(start..start + acc.len()) };
        let relu_output = self.relu_output.map(|y| &y[start..start + acc.len()]);
        s.write_row(
            acc,
            dx,
            #[inline(always)]
            |part, v| match relu_output {
                Some(y) => s.select_gt(s.load_up_to(&y[part]), s.zero(), v, s.zero()),
                None => v,
            },
        );
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        self.dx.prefetch_row(row * self.k + col, len);
    }
}

struct WeightGradient<'a> {
    k: usize,
    store: Store,
    dw: Shards<'a, f32>,
}

impl Epilogue for WeightGradient<'_> {
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]) {
        let start = row * self.k + col;
        // SAFETY: every part of every row comes once.
        let dw = unsafe { self.dw.range(start..start + acc.len()) };
        if self.store == Store::Overwrite {
            s.write_row(
                acc,
                dw,
                #[inline(always)]
                |_, v| v,
            );
            return;
        }
        for (dw, v) in dw.chunks_mut(S::LANES).zip(acc.chunks(S::LANES)) {
            let sum = s.add(s.load_up_to(dw), s.load_up_to(v));
            s.store_up_to(dw, sum);
        }
    }

    #[inline(always)]
    fn prefetch(&self, row: usize, col: usize, len: usize) {
        let start = row * self.k + col;
        match self.store {
            Store::Overwrite => self.dw.prefetch_row(start, len),
            Store::Accumulate => self.dw.prefetch(start, len),
        }
    }
}
