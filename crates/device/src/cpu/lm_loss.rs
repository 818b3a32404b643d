//! Cross-entropy of a tied LM head. Logits exist for a chunk of rows at a time and are turned into their own gradient
//! in place, so that memory is a chunk's [2048, V] whatever the batch.

use super::buffer::Shards;
use super::simd::{Simd, dispatch};
use super::{CpuDevice, Scratch, linear};
use crate::{Activation, Combine, Element, IGNORE, LinearShape, LossShape, Store};

/// Rows of a chunk: enough that reading the table for each chunk, and adding to its gradient, cost little beside the
/// products (206 MB of bf16 logits for OPT's vocabulary).
/// Fixed, so that the order of additions to dw is too.
pub(super) const ROWS: usize = 2048;

/// Bytes of logits.
pub(super) fn workspace_bytes<E: Element>(rows: usize, vocab: usize) -> usize {
    rows.min(ROWS) * vocab * size_of::<E>()
}

pub(super) fn forward<E: Element>(
    device: &CpuDevice,
    s: LossShape,
    h: &[E],
    w: &[E],
    targets: &[u32],
    combine: Option<&mut Combine<'_>>,
    losses: &mut [f32],
) {
    for_chunks(device, s, h, w, targets, combine, losses, None, |_, _, _| ());
}

pub(super) fn backward<E: Element>(
    device: &CpuDevice,
    s: LossShape,
    h: &[E],
    w: &[E],
    targets: &[u32],
    combine: Option<&mut Combine<'_>>,
    scale: f32,
    losses: &mut [f32],
    dh: &mut [E],
    dw: &mut [f32],
    store: Store,
) {
    if s.rows == 0 && store == Store::Overwrite {
        dw[..s.vocab * s.width].fill(0.0);
    }
    for_chunks(device, s, h, w, targets, combine, losses, Some(scale), |first, shape, dlogits| {
        let rows = first * s.width..(first + shape.m) * s.width;
        linear::backward_input(device, shape, dlogits, w, None, &mut dh[rows.clone()]);
        let store = if first == 0 { store } else { Store::Accumulate };
        linear::backward_weight(device, shape, dlogits, &h[rows], dw, None, store);
    });
}

/// Fills `losses`, a chunk of rows at a time, and calls `then(first row, shape, logits)` for each chunk, whose logits
/// have been replaced by their gradient if `scale` is given.
fn for_chunks<E: Element>(
    device: &CpuDevice,
    s: LossShape,
    h: &[E],
    w: &[E],
    targets: &[u32],
    mut combine: Option<&mut Combine<'_>>,
    losses: &mut [f32],
    scale: Option<f32>,
    mut then: impl FnMut(usize, LinearShape, &[E]),
) {
    let mut workspace = device.loss_workspace();
    let words = workspace_bytes::<E>(s.rows, s.vocab).div_ceil(size_of::<u32>());
    let [logits] = workspace.take([(Scratch::Logits, words)]);
    let logits: &mut [E] = bytemuck::cast_slice_mut(logits);
    for first in (0..s.rows).step_by(ROWS) {
        let shape = LinearShape { m: ROWS.min(s.rows - first), n: s.vocab, k: s.width };
        let logits = &mut logits[..shape.m * s.vocab];
        let h = &h[first * s.width..][..shape.m * s.width];
        linear::forward(device, shape, h, w, None, Activation::Identity, logits);
        let target = |row: usize| Target::of(targets[first + row], s);
        let losses = Shards::new(&mut losses[first..first + shape.m]);
        let shards = Shards::new(logits);
        // SAFETY: every task has its own row.
        let row_of = |row: usize| unsafe { shards.range(row * s.vocab..(row + 1) * s.vocab) };
        // SAFETY: as above.
        let loss_of = |row: usize| unsafe { &mut losses.range(row..row + 1)[0] };
        match &mut combine {
            None => device.pool.for_each(shape.m, |row, _| {
                *loss_of(row) = dispatch!(device.isa, v => row_loss(v, row_of(row), target(row), scale));
            }),
            Some(combine) => {
                let (mut sums, mut logits) = (vec![0.0; shape.m], vec![0.0; shape.m]);
                let (sums_of, logits_of) = (Shards::new(&mut sums), Shards::new(&mut logits));
                device.pool.for_each(shape.m, |row, _| {
                    let known = dispatch!(device.isa, v => look(v, row_of(row), target(row)));
                    // SAFETY: as above.
                    unsafe {
                        sums_of.range(row..row + 1)[0] = known.log_sum;
                        logits_of.range(row..row + 1)[0] = known.target_logit;
                    }
                });
                combine(&mut sums, &mut logits);
                device.pool.for_each(shape.m, |row, _| {
                    let known = Known { log_sum: sums[row], target_logit: logits[row] };
                    *loss_of(row) =
                        dispatch!(device.isa, v => finish(v, row_of(row), target(row), known, scale));
                });
            }
        }
        // SAFETY: all tasks are done.
        then(first, shape, unsafe { shards.range(0..shape.m * s.vocab) });
    }
}

/// What a row is compared with.
#[derive(Clone, Copy)]
enum Target {
    Ignored,
    /// A column of this part of the vocabulary.
    Here(usize),
    Elsewhere,
}

impl Target {
    fn of(id: u32, s: LossShape) -> Target {
        match (id as usize).checked_sub(s.first) {
            _ if id == IGNORE => Target::Ignored,
            Some(column) if column < s.vocab => Target::Here(column),
            _ => Target::Elsewhere,
        }
    }
}

/// What the loss and its gradient follow from.
struct Known {
    log_sum: f32,
    /// 0 where the target is elsewhere.
    target_logit: f32,
}

/// Loss of one row, whose logits become their gradient if `scale` is given.
#[inline(always)]
fn row_loss<S: Simd, E: Element>(s: S, logits: &mut [E], target: Target, scale: Option<f32>) -> f32 {
    let known = look(s, logits, target);
    finish(s, logits, target, known, scale)
}

/// Log-sum-exp of a row, and the target's logit.
#[inline(always)]
fn look<S: Simd, E: Element>(s: S, logits: &[E], target: Target) -> Known {
    let target_logit = match target {
        Target::Ignored => return Known { log_sum: 0.0, target_logit: 0.0 },
        Target::Here(column) => logits[column].to_f32(),
        Target::Elsewhere => 0.0,
    };
    let mut max = s.splat(f32::NEG_INFINITY);
    for part in logits.chunks(S::LANES) {
        max = s.max(max, load(s, part));
    }
    let max = s.max_lane(max);
    let (shift, mut sum) = (s.splat(max), s.zero());
    for part in logits.chunks(S::LANES) {
        sum = s.add(sum, s.exp(s.sub(load(s, part), shift)));
    }
    Known { log_sum: max + s.sum(sum).ln(), target_logit }
}

/// The loss, and the gradient of `scale` times it in the logits' place.
#[inline(always)]
fn finish<S: Simd, E: Element>(
    s: S,
    logits: &mut [E],
    target: Target,
    known: Known,
    scale: Option<f32>,
) -> f32 {
    if let Target::Ignored = target {
        if scale.is_some() {
            logits.fill(E::default());
        }
        return 0.0;
    }
    let Known { log_sum, target_logit } = known;
    if let Some(scale) = scale {
        let (shift, factor) = (s.splat(log_sum), s.splat(scale));
        for part in logits.chunks_mut(S::LANES) {
            let p = s.exp(s.sub(s.load_up_to(part), shift));
            s.store_up_to(part, s.mul(p, factor));
        }
        if let Target::Here(column) = target {
            // From the f32 probability, not from the stored one.
            logits[column] = E::from_f32(((target_logit - log_sum).exp() - 1.0) * scale);
        }
    }
    log_sum - target_logit
}

/// Part of a row; missing lanes are logits of probability 0.
#[inline(always)]
fn load<S: Simd, E: Element>(s: S, part: &[E]) -> S::F {
    if part.len() == S::LANES {
        return s.load_as(part);
    }
    let mut full = [f32::NEG_INFINITY; 16];
    for (full, part) in full.iter_mut().zip(part) {
        *full = part.to_f32();
    }
    s.load(&full)
}
