//! Cross-entropy of a tied LM head, a chunk of rows at a time, and log-sum-exps of logits.

use super::kernels::args;
use super::linear;
use super::workspace::Scratch;
use super::{CudaBuf, CudaDevice, name};
use crate::{Combine, Element, LinearShape, LossShape, Store};

/// Rows of a chunk: enough for the products to run at full speed, and dw, which each chunk adds to, to be read and written a few
/// times only. Fixed, so that the order of additions to dw is too.
const ROWS: usize = 4096;

/// Bytes of logits, and of what is known of rows.
pub(super) fn workspace_bytes<E: Element>(rows: usize, vocab: usize) -> usize {
    rows.min(ROWS) * (vocab * size_of::<E>() + 8)
}

/// What the gradients need beside the losses.
pub(super) struct Gradients<'a, E: Element> {
    pub scale: f32,
    pub dh: &'a mut CudaBuf<E>,
    pub dw: &'a mut CudaBuf<f32>,
    pub store: Store,
}

pub(super) fn lm_loss<E: Element>(
    d: &CudaDevice,
    s: LossShape,
    h: &CudaBuf<E>,
    w: &CudaBuf<E>,
    targets: &CudaBuf<u32>,
    mut combine: Option<&mut Combine<'_>>,
    losses: &mut CudaBuf<f32>,
    mut gradients: Option<Gradients<'_, E>>,
) {
    if let (0, Some(Gradients { dw, store: Store::Overwrite, .. })) = (s.rows, &gradients) {
        dw.clear(0, s.vocab * s.width);
    }
    let mut workspace = d.loss_workspace();
    let most = ROWS.min(s.rows);
    let logits = workspace.take(Scratch::Logits, most * s.vocab * size_of::<E>());
    let sums = workspace.take(Scratch::Rows, 8 * most);
    let target_logits = sums + 4 * most as u64;
    let kernel = |kernel: &str| format!("{kernel}_{}", name::<E>());
    for first in (0..s.rows).step_by(ROWS) {
        let shape = LinearShape { m: ROWS.min(s.rows - first), n: s.vocab, k: s.width };
        linear::logits(d, shape, h, first, w, logits);
        let (begin, vocab, to) = (s.first as u32, s.vocab as u32, targets.at(first, shape.m));
        let columns = s.vocab.div_ceil(4);
        d.by_row(
            &kernel("loss_look"),
            shape.m,
            columns,
            args![logits, to, begin, vocab, sums, target_logits],
        );
        if let Some(combine) = &mut combine {
            let mut known = vec![0.0f32; 2 * most];
            d.read(sums, &mut known);
            let (of_sums, of_logits) = known.split_at_mut(most);
            combine(&mut of_sums[..shape.m], &mut of_logits[..shape.m]);
            d.write(sums, &known);
        }
        let (backward, scale) = gradients.as_ref().map_or((0u32, 0.0), |g| (1, g.scale));
        let arguments =
            args![logits, to, begin, vocab, sums, target_logits, losses.at(first, shape.m), backward, scale];
        d.by_row(&kernel("loss_finish"), shape.m, columns, arguments);
        if let Some(g) = &mut gradients {
            linear::backward_input::<E, E>(d, shape, logits, w, None, g.dh, first * s.width);
            let store = if first == 0 { g.store } else { Store::Accumulate };
            let rows = h.at(first * s.width, shape.m * s.width);
            linear::backward_weight(d, shape, E::DTYPE, (logits, rows), g.dw, store);
        }
    }
}

pub(super) fn log_sum_exp(
    d: &CudaDevice,
    (rows, width): (usize, usize),
    x: &CudaBuf<f32>,
    lse: &mut CudaBuf<f32>,
    largest: &mut CudaBuf<u32>,
) {
    let arguments = args![x.at(0, rows * width), lse.at(0, rows), largest.at(0, rows), width as u32];
    d.by_row("log_sum_exp", rows, width.div_ceil(4), arguments);
}
