//! Choosing tokens, a row at a time on each thread.

use std::sync::PoisonError;

use super::CpuDevice;
use super::buffer::Shards;
use crate::Draw;

/// [`crate::Device::draw`].
pub(super) fn draw(
    device: &CpuDevice,
    (width, known): (usize, usize),
    logits: &[f32],
    draws: &[(usize, Draw)],
) -> Vec<u32> {
    let mut ids = vec![0; draws.len()];
    let shards = Shards::new(&mut ids);
    device.pool.for_each(draws.len(), |number, thread| {
        let (row, draw) = &draws[number];
        let mut drawer = device.drawers[thread].lock().unwrap_or_else(PoisonError::into_inner);
        let id = drawer.draw(draw, &logits[row * width..][..known]);
        // SAFETY: each number is one task's.
        unsafe { shards.range(number..number + 1)[0] = id };
    });
    ids
}
