//! Operations on rows and on elements alone: embeddings, layer norm, ends of residual branches.

use super::kernels::args;
use super::linear::add_parts;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, DropoutWords, name, optional};
use crate::{Buffer, Dropout, Element, Store};

/// Rows whose parts of dgamma and dbeta are added up by one block. Fixed, so that the order of additions is too.
const ROWS_EACH: usize = 32;
/// Threads of a block that adds rows in their order; see kernels/embed.cu.
const ADDING: usize = 256;

/// Bytes of workspace of layer norm's backward pass.
pub(super) fn layer_norm_bytes(rows: usize, width: usize) -> usize {
    4 * rows.div_ceil(ROWS_EACH) * 2 * width
}

pub(super) fn embed<E: Element, O: Element>(
    d: &CudaDevice,
    (rows, width): (usize, usize),
    ids: &CudaBuf<u32>,
    table: &CudaBuf<E>,
    second: Option<(&CudaBuf<u32>, &CudaBuf<E>)>,
    out: &mut CudaBuf<O>,
) {
    let (ids2, table2) = second.map_or((0, 0), |(ids, table)| (ids.at(0, rows), table.at(0, 0)));
    let arguments =
        args![ids.at(0, rows), table.at(0, 0), ids2, table2, out.at(0, rows * width), width as u32];
    d.by_row(&format!("embed_{}_{}", name::<E>(), name::<O>()), rows, width.div_ceil(4), arguments);
}

pub(super) fn embed_backward<G: Element>(
    d: &CudaDevice,
    width: usize,
    ids: &CudaBuf<u32>,
    dout: &CudaBuf<G>,
    dtable: &mut CudaBuf<f32>,
) {
    let rows = ids.len();
    let arguments =
        args![ids.at(0, rows), dout.at(0, rows * width), dtable.at(0, 0), rows as u32, width as u32];
    d.kernels.launch(&format!("embed_backward_{}", name::<G>()), (rows, 1), (ADDING, 1), 0, arguments);
}

pub(super) fn layer_norm<E: Element>(
    d: &CudaDevice,
    (rows, width): (usize, usize),
    x: &CudaBuf<f32>,
    gamma: &CudaBuf<f32>,
    beta: &CudaBuf<f32>,
    y: &mut CudaBuf<E>,
    y_f32: Option<&mut CudaBuf<f32>>,
    mean: &mut CudaBuf<f32>,
    rstd: &mut CudaBuf<f32>,
) {
    let len = rows * width;
    let arguments = args![
        x.at(0, len),
        gamma.at(0, width),
        beta.at(0, width),
        y.at(0, len),
        optional(y_f32.as_deref(), len),
        mean.at(0, rows),
        rstd.at(0, rows),
        width as u32
    ];
    d.by_row(&format!("layer_norm_{}", name::<E>()), rows, width.div_ceil(4), arguments);
}

pub(super) fn layer_norm_backward<G: Element>(
    d: &CudaDevice,
    width: usize,
    dy: &CudaBuf<G>,
    x: &CudaBuf<f32>,
    mean: &CudaBuf<f32>,
    rstd: &CudaBuf<f32>,
    gamma: &CudaBuf<f32>,
    dx: &mut CudaBuf<f32>,
    dx_store: Store,
    dgamma: &mut CudaBuf<f32>,
    dbeta: &mut CudaBuf<f32>,
    grad_store: Store,
) {
    let (len, rows) = (x.len(), x.len() / width);
    let blocks = rows.div_ceil(ROWS_EACH);
    let mut workspace = d.workspace();
    let parts = workspace.take(Scratch::Parts, layer_norm_bytes(rows, width));
    let arguments = args![
        dy.at(0, len),
        x.at(0, len),
        mean.at(0, rows),
        rstd.at(0, rows),
        gamma.at(0, width),
        dx.at(0, len),
        (dx_store == Store::Accumulate) as u32,
        parts,
        rows as u32,
        width as u32,
        ROWS_EACH as u32
    ];
    let kernel = format!("layer_norm_backward_{}", name::<G>());
    d.kernels.launch(&kernel, (blocks, 1), (super::threads_for(width), 1), 8 * width, arguments);
    for (which, sum) in [dgamma, dbeta].into_iter().enumerate() {
        let part = parts + (4 * which * width) as u64;
        add_parts(d, part, blocks, 2 * width, width, sum.at(0, width), grad_store);
    }
}

pub(super) fn residual<E: Element>(
    d: &CudaDevice,
    (rows, width): (usize, usize),
    branch: &CudaBuf<E>,
    bias: Option<&CudaBuf<f32>>,
    dropout: Option<Dropout>,
    residual: &CudaBuf<f32>,
    out: &mut CudaBuf<f32>,
) {
    let len = rows * width;
    let (bias, dropout) = (optional(bias, width), DropoutWords::new(dropout));
    let arguments =
        args![branch.at(0, len), bias, dropout, residual.at(0, len), out.at(0, len), width as u32];
    d.by_row(&format!("residual_{}", name::<E>()), rows, width.div_ceil(64) * 16, arguments);
}

pub(super) fn residual_backward<E: Element>(
    d: &CudaDevice,
    width: usize,
    dres: &CudaBuf<f32>,
    dropout: Option<Dropout>,
    dy: &mut CudaBuf<E>,
) {
    if dropout.is_none() {
        return cast(d, dres, dy);
    }
    let len = dres.len();
    let arguments = args![dres.at(0, len), DropoutWords::new(dropout), dy.at(0, len), width as u32];
    d.by_row(&format!("residual_backward_{}", name::<E>()), len / width, width.div_ceil(64) * 16, arguments);
}

pub(super) fn fill<T: Element>(d: &CudaDevice, dst: &mut CudaBuf<T>, value: T) {
    let (len, bytes) = (dst.len(), bytemuck::bytes_of(&value));
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    let arguments = args![dst.at(0, len), u32::from_le_bytes(word), len as u64];
    d.by_element(if bytes.len() == 2 { "fill_2" } else { "fill_4" }, len, arguments);
}

pub(super) fn cast<S: Element, T: Element>(d: &CudaDevice, src: &CudaBuf<S>, dst: &mut CudaBuf<T>) {
    let len = src.len();
    let (from, to) = (src.at(0, len), dst.at(0, len));
    if S::DTYPE == T::DTYPE {
        return d.copy_bytes(to, from, len * size_of::<S>());
    }
    let kernel = format!("cast_{}_{}", name::<S>(), name::<T>());
    d.by_element(&kernel, len.div_ceil(4), args![from, to, len as u64]);
}

pub(super) fn accumulate(
    d: &CudaDevice,
    src: &CudaBuf<f32>,
    from: usize,
    dst: &mut CudaBuf<f32>,
    store: Store,
) {
    let len = dst.len();
    match store {
        Store::Overwrite => dst.copy_from(0, src, from, len),
        Store::Accumulate => {
            d.by_element("add", len.div_ceil(4), args![src.at(from, len), dst.at(0, len), len as u64])
        }
    }
}
