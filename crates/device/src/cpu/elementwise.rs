//! Operations that treat every element alike: bound by memory, so one pass each.

use super::CpuDevice;
use super::buffer::Shards;
use super::random::mask_row;
use super::simd::{Simd, dispatch};
use crate::rng::BLOCK;
use crate::{Dropout, Element};

/// Elements that a thread takes at once: far more work than taking them costs, and few enough to share out evenly.
const CHUNK: usize = 1 << 15;

pub(super) fn fill<T: Element>(device: &CpuDevice, dst: &mut [T], value: T) {
    let len = dst.len();
    let dst = Shards::new(dst);
    device.pool.for_chunks(len, CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        unsafe { dst.range(range) }.fill(value);
    });
}

pub(super) fn cast<S: Element, T: Element>(device: &CpuDevice, src: &[S], dst: &mut [T]) {
    let dst = Shards::new(&mut dst[..src.len()]);
    device.pool.for_chunks(src.len(), CHUNK, |range| {
        let src = &src[range.clone()];
        // SAFETY: chunks are disjoint.
        let dst = unsafe { dst.range(range) };
        if S::DTYPE == T::DTYPE {
            dst.copy_from_slice(bytemuck::cast_slice(src));
        } else {
            dispatch!(device.isa, s => convert(s, src, dst));
        }
    });
}

/// [`crate::Device::copy_blocks`]; memory sets the pace of one thread already.
pub(super) fn copy_blocks<T: Element>(size: usize, pairs: &[(u32, u32)], x: &mut [T]) {
    for (from, to) in pairs {
        let from = *from as usize * size;
        x.copy_within(from..from + size, *to as usize * size);
    }
}

/// `dst = src`, in its own type.
#[inline(always)]
pub(super) fn convert<V: Simd, S: Element, T: Element>(s: V, src: &[S], dst: &mut [T]) {
    for (src, dst) in src.chunks(V::LANES).zip(dst.chunks_mut(V::LANES)) {
        s.store_up_to(dst, s.load_up_to(src));
    }
}

pub(super) fn residual_backward<E: Element>(
    device: &CpuDevice,
    width: usize,
    dres: &[f32],
    dropout: Option<Dropout>,
    dy: &mut [E],
) {
    let Some(dropout) = dropout else {
        return cast(device, dres, dy);
    };
    let rows = dres.len() / width;
    let dy = Shards::new(dy);
    device.pool.for_chunks(rows, (CHUNK / width).max(1), |range| {
        for row in range {
            let elements = row * width..(row + 1) * width;
            // SAFETY: rows are disjoint.
            let dy = unsafe { dy.range(elements.clone()) };
            let dres = &dres[elements];
            dispatch!(device.isa, s => masked(s, &dropout, dropout.first_row + row as u64, dres, dy));
        }
    });
}

#[inline(always)]
fn masked<S: Simd, E: Element>(s: S, dropout: &Dropout, row: u64, src: &[f32], dst: &mut [E]) {
    let mut mask = [0.0; BLOCK];
    for (block, (src, dst)) in src.chunks(BLOCK).zip(dst.chunks_mut(BLOCK)).enumerate() {
        let mask = &mut mask[..src.len()];
        mask_row(s, dropout, row, block * BLOCK, mask);
        for ((src, dst), mask) in
            src.chunks(S::LANES).zip(dst.chunks_mut(S::LANES)).zip(mask.chunks(S::LANES))
        {
            s.store_up_to(dst, s.mul(s.load_up_to(src), s.load_up_to(mask)));
        }
    }
}
