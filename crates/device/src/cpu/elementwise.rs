//! Operations that treat every element alike: bound by memory, so one pass each.

use super::CpuDevice;
use super::buffer::Shards;
use super::embed::add;
use super::random::mask_row;
use super::simd::{Simd, dispatch};
use crate::rng::BLOCK;
use crate::{Dropout, Element, Store};

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

pub(super) fn copy<T: Element>(device: &CpuDevice, src: &[T], dst: &mut [T]) {
    let dst = Shards::new(dst);
    device.pool.for_chunks(src.len(), CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        unsafe { dst.range(range.clone()) }.copy_from_slice(&src[range]);
    });
}

pub(super) fn accumulate(device: &CpuDevice, src: &[f32], dst: &mut [f32], store: Store) {
    if store == Store::Overwrite {
        return copy(device, src, dst);
    }
    let dst = Shards::new(dst);
    device.pool.for_chunks(src.len(), CHUNK, |range| {
        // SAFETY: chunks are disjoint.
        let dst = unsafe { dst.range(range.clone()) };
        dispatch!(device.isa, s => add(s, &src[range], dst));
    });
}

pub(super) fn residual<E: Element>(
    device: &CpuDevice,
    rows: usize,
    width: usize,
    branch: &[E],
    bias: Option<&[f32]>,
    dropout: Option<Dropout>,
    residual: &[f32],
    out: &mut [f32],
) {
    let out = Shards::new(&mut out[..rows * width]);
    device.pool.for_chunks(rows, (CHUNK / width).max(1), |range| {
        for row in range {
            let elements = row * width..(row + 1) * width;
            // SAFETY: rows are disjoint.
            let out = unsafe { out.range(elements.clone()) };
            let (branch, residual) = (&branch[elements.clone()], &residual[elements]);
            dispatch!(device.isa, s => end_of_branch(s, branch, bias, dropout, row, residual, out));
        }
    });
}

/// `out = residual + dropout(branch + bias)` of one row.
#[inline(always)]
fn end_of_branch<S: Simd, E: Element>(
    s: S,
    branch: &[E],
    bias: Option<&[f32]>,
    dropout: Option<Dropout>,
    row: usize,
    residual: &[f32],
    out: &mut [f32],
) {
    let mut mask = [1.0; BLOCK];
    for start in (0..branch.len()).step_by(BLOCK) {
        let end = branch.len().min(start + BLOCK);
        if let Some(d) = &dropout {
            mask_row(s, d, d.first_row + row as u64, start, &mut mask[..end - start]);
        }
        for at in (start..end).step_by(S::LANES) {
            let lanes = at..end.min(at + S::LANES);
            let mut v = s.load_up_to(&branch[lanes.clone()]);
            if let Some(bias) = bias {
                v = s.add(v, s.load_up_to(&bias[lanes.clone()]));
            }
            if dropout.is_some() {
                v = s.mul(v, s.load_up_to(&mask[lanes.start - start..lanes.end - start]));
            }
            s.store_up_to(&mut out[lanes.clone()], s.add(s.load_up_to(&residual[lanes]), v));
        }
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
