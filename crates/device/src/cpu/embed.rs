//! Rows of tables by number: token and position embeddings.

use super::CpuDevice;
use super::buffer::Shards;
use super::simd::{Simd, dispatch};
use crate::{Element, IGNORE};

/// Rows of output that a thread takes at once.
const ROWS: usize = 32;
/// Columns that a thread adds up in the backward pass: a few cache lines of each row, so that threads share no line
/// and the order of additions is that of the rows whatever the number of threads.
const COLUMNS: usize = 64;

pub(super) fn forward<E: Element, O: Element>(
    device: &CpuDevice,
    width: usize,
    ids: &[u32],
    table: &[E],
    second: Option<(&[u32], &[E])>,
    out: &mut [O],
) {
    let out = Shards::new(out);
    device.pool.for_chunks(ids.len(), ROWS, |range| {
        for i in range {
            // SAFETY: rows are disjoint.
            let out = unsafe { out.range(i * width..(i + 1) * width) };
            if ids[i] == IGNORE {
                out.fill(O::default());
                continue;
            }
            let row = &table[ids[i] as usize * width..][..width];
            let other = second.map(|(ids, table)| &table[ids[i] as usize * width..][..width]);
            dispatch!(device.isa, s => gather(s, row, other, out));
        }
    });
}

#[inline(always)]
fn gather<S: Simd, E: Element, O: Element>(s: S, row: &[E], other: Option<&[E]>, out: &mut [O]) {
    match other {
        None => {
            for (row, out) in row.chunks(S::LANES).zip(out.chunks_mut(S::LANES)) {
                s.store_up_to(out, s.load_up_to(row));
            }
        }
        Some(other) => {
            for ((row, other), out) in
                row.chunks(S::LANES).zip(other.chunks(S::LANES)).zip(out.chunks_mut(S::LANES))
            {
                s.store_up_to(out, s.add(s.load_up_to(row), s.load_up_to(other)));
            }
        }
    }
}

pub(super) fn backward<G: Element>(
    device: &CpuDevice,
    width: usize,
    ids: &[u32],
    dout: &[G],
    dtable: &mut [f32],
) {
    let dtable = Shards::new(dtable);
    device.pool.for_chunks(width, COLUMNS, |columns| {
        for (i, &id) in ids.iter().enumerate().filter(|(_, id)| **id != IGNORE) {
            let dout = &dout[i * width..][columns.clone()];
            let start = id as usize * width;
            // SAFETY: column ranges are disjoint, and a thread is done with one row before the next.
            let sum = unsafe { dtable.range(start + columns.start..start + columns.end) };
            dispatch!(device.isa, s => add(s, dout, sum));
        }
    });
}

/// `sum += x`
#[inline(always)]
pub(super) fn add<S: Simd, G: Element>(s: S, x: &[G], sum: &mut [f32]) {
    for (x, sum) in x.chunks(S::LANES).zip(sum.chunks_mut(S::LANES)) {
        s.store_up_to(sum, s.add(s.load_up_to(sum), s.load_up_to(x)));
    }
}
