//! Linear layers: products with the epilogues that OPT needs, and their gradients.

use super::blas::{Factor, Product};
use super::driver::Address;
use super::kernels::args;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, DropoutWords, name, optional};
use crate::{Activation, DType, Dropout, Element, LinearShape, Store};

/// Bytes of a product in f32 that waits for its epilogue: few enough to stay in a large GPU's second-level cache.
const WAITING: usize = 32 << 20;
/// Rows of it at least, and what their number is a multiple of: enough that weights which are read for them are worth it, and
/// whole tiles of any product.
const WAITING_ROWS: usize = 1024;
const WHOLE_TILES: usize = 256;
/// Rows that a block adds up in [`column_sums`].
const ROWS_EACH: usize = 256;

/// Most rows of `n` columns that wait at once.
fn waiting_rows(n: usize) -> usize {
    (WAITING / 4 / n.max(1) / WHOLE_TILES * WHOLE_TILES).max(WAITING_ROWS)
}

/// Bytes of workspace of a forward pass.
pub(super) fn forward_bytes(rows: usize, widest: usize) -> usize {
    4 * rows.min(waiting_rows(widest)) * widest
}

/// Bytes of workspace of [`column_sums`].
pub(super) fn sums_bytes(rows: usize, n: usize) -> usize {
    4 * rows.div_ceil(ROWS_EACH) * n
}

/// `out[rows, n] = x * w^T` of rows `first ..` of x, to any address.
fn product<E: Element>(
    d: &CudaDevice,
    s: LinearShape,
    (first, rows): (usize, usize),
    x: &CudaBuf<E>,
    w: &CudaBuf<E>,
    (out, out_dtype): (Address, DType),
) {
    let left = Factor { address: x.at(first * s.k, rows * s.k), dtype: E::DTYPE, turned: false };
    let right = Factor { address: w.at(0, s.n * s.k), dtype: E::DTYPE, turned: true };
    d.blas.multiply(&Product { m: rows, n: s.n, k: s.k, left, right, out, out_dtype, add: false });
}

/// Calls `finish(first row, rows, product in f32)` for a few rows after the other.
fn in_pieces<E: Element>(
    d: &CudaDevice,
    s: LinearShape,
    x: &CudaBuf<E>,
    w: &CudaBuf<E>,
    mut finish: impl FnMut(usize, usize, Address),
) {
    let most = waiting_rows(s.n);
    let mut workspace = d.workspace();
    let waiting = workspace.take(Scratch::Product, forward_bytes(s.m, s.n));
    for first in (0..s.m).step_by(most) {
        let rows = most.min(s.m - first);
        product(d, s, (first, rows), x, w, (waiting, DType::F32));
        finish(first, rows, waiting);
    }
}

/// `y = act(x * w^T + bias)`.
pub(super) fn forward<E: Element, O: Element>(
    d: &CudaDevice,
    s: LinearShape,
    x: &CudaBuf<E>,
    w: &CudaBuf<E>,
    bias: Option<&CudaBuf<f32>>,
    act: Activation,
    y: &mut CudaBuf<O>,
) {
    if bias.is_none() && act == Activation::Identity {
        return product(d, s, (0, s.m), x, w, (y.at(0, s.m * s.n), O::DTYPE));
    }
    let (bias, relu) = (optional(bias, s.n), (act == Activation::Relu) as u32);
    in_pieces(d, s, x, w, |first, rows, product| {
        let to = y.at(first * s.n, rows * s.n);
        let kernel = format!("finish_linear_{}", name::<O>());
        d.by_row(&kernel, rows, s.n.div_ceil(4), args![product, bias, relu, to, s.n as u32]);
    });
}

/// `out = residual + dropout(x * w^T + bias)`.
pub(super) fn forward_residual<E: Element>(
    d: &CudaDevice,
    s: LinearShape,
    x: &CudaBuf<E>,
    w: &CudaBuf<E>,
    bias: Option<&CudaBuf<f32>>,
    dropout: Option<Dropout>,
    residual: &CudaBuf<f32>,
    out: &mut CudaBuf<f32>,
) {
    let bias = optional(bias, s.n);
    in_pieces(d, s, x, w, |first, rows, product| {
        let (at, len) = (first * s.n, rows * s.n);
        let dropout =
            DropoutWords::new(dropout.map(|d| Dropout { first_row: d.first_row + first as u64, ..d }));
        let arguments = args![product, bias, dropout, residual.at(at, len), out.at(at, len), s.n as u32];
        d.by_row("residual_f32", rows, s.n.div_ceil(64) * 16, arguments);
    });
}

/// `dx = dy * w`, zeroed where `relu_output` is not above 0. `first` is dx's first element.
pub(super) fn backward_input<E: Element, O: Element>(
    d: &CudaDevice,
    s: LinearShape,
    dy: Address,
    w: &CudaBuf<E>,
    relu_output: Option<&CudaBuf<E>>,
    dx: &mut CudaBuf<O>,
    first: usize,
) {
    let to = dx.at(first, s.m * s.k);
    d.blas.multiply(&Product {
        m: s.m,
        n: s.k,
        k: s.n,
        left: Factor { address: dy, dtype: E::DTYPE, turned: false },
        right: Factor { address: w.at(0, s.n * s.k), dtype: E::DTYPE, turned: false },
        out: to,
        out_dtype: O::DTYPE,
        add: false,
    });
    if let Some(output) = relu_output {
        let len = s.m * s.k;
        let kernel = format!("relu_backward_{}_{}", name::<E>(), name::<O>());
        d.by_element(&kernel, len.div_ceil(4), args![output.at(0, len), to, len as u64]);
    }
}

/// `dw (+)= dy^T * x`; dy and x are [m, n] and [m, k].
pub(super) fn backward_weight(
    d: &CudaDevice,
    s: LinearShape,
    dtype: DType,
    (dy, x): (Address, Address),
    dw: &mut CudaBuf<f32>,
    store: Store,
) {
    d.blas.multiply(&Product {
        m: s.n,
        n: s.k,
        k: s.m,
        left: Factor { address: dy, dtype, turned: true },
        right: Factor { address: x, dtype, turned: false },
        out: dw.at(0, s.n * s.k),
        out_dtype: DType::F32,
        add: store == Store::Accumulate,
    });
}

/// `sums[n] (+)= sum of x's rows`.
pub(super) fn column_sums<E: Element>(
    d: &CudaDevice,
    (rows, n): (usize, usize),
    x: &CudaBuf<E>,
    sums: &mut CudaBuf<f32>,
    store: Store,
) {
    let pieces = rows.div_ceil(ROWS_EACH);
    let mut workspace = d.workspace();
    let parts = workspace.take(Scratch::Parts, sums_bytes(rows, n));
    let arguments = args![x.at(0, rows * n), parts, rows as u32, n as u32, ROWS_EACH as u32];
    let kernel = format!("column_sums_{}", name::<E>());
    d.kernels.launch(&kernel, (n.div_ceil(128), pieces), (32, 8), 0, arguments);
    add_parts(d, parts, pieces, n, n, sums.at(0, n), store);
}

/// `sums[n] (+)= parts[0] + parts[1] + ...`, parts being `stride` numbers apart.
pub(super) fn add_parts(
    d: &CudaDevice,
    parts: Address,
    count: usize,
    stride: usize,
    n: usize,
    sums: Address,
    store: Store,
) {
    let add = (store == Store::Accumulate) as u32;
    let arguments = args![parts, count as u32, stride as u32, n as u32, sums, add];
    d.kernels.launch("add_parts", (n.div_ceil(32), 1), (32, 32), 0, arguments);
}

/// Logits of rows `first ..` of h: `out[m, V] = h * w^T`, in the compute type.
pub(super) fn logits<E: Element>(
    d: &CudaDevice,
    s: LinearShape,
    h: &CudaBuf<E>,
    first: usize,
    w: &CudaBuf<E>,
    out: Address,
) {
    product(d, s, (first, s.m), h, w, (out, E::DTYPE));
}
