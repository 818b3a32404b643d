//! What choosing a token needs to know about all logits of a row.

use super::CpuDevice;
use super::buffer::Shards;
use super::simd::{Simd, dispatch};

/// [`crate::Device::log_sum_exp`].
pub(super) fn log_sum_exp(
    device: &CpuDevice,
    rows: usize,
    width: usize,
    x: &[f32],
    lse: &mut [f32],
    largest: &mut [u32],
) {
    let (lse, largest) = (Shards::new(&mut lse[..rows]), Shards::new(&mut largest[..rows]));
    device.pool.for_each(rows, |row, _| {
        let x = &x[row * width..(row + 1) * width];
        let (max, sum) = dispatch!(device.isa, s => max_and_sum(s, x));
        // SAFETY: each row is one task's.
        unsafe {
            lse.range(row..row + 1)[0] = max + sum.ln();
            largest.range(row..row + 1)[0] = x.iter().position(|x| *x == max).unwrap_or(0) as u32;
        }
    });
}

/// The largest element, and the sum of e to the power of each one's distance from it.
#[inline(always)]
fn max_and_sum<S: Simd>(s: S, x: &[f32]) -> (f32, f32) {
    // Four registers, because one would wait for its own results.
    let blocks = x.chunks_exact(4 * S::LANES);
    let rest = blocks.remainder();
    let mut most = [s.splat(f32::MIN); 4];
    for block in blocks.clone() {
        for (i, most) in most.iter_mut().enumerate() {
            *most = s.max(s.load(&block[i * S::LANES..]), *most);
        }
    }
    let mut max = s.max_lane(s.max(s.max(most[0], most[1]), s.max(most[2], most[3])));
    for x in rest {
        max = max.max(*x);
    }
    let shift = s.splat(max);
    let mut sums = [s.zero(); 4];
    for block in blocks {
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = s.add(*sum, s.exp(s.sub(s.load(&block[i * S::LANES..]), shift)));
        }
    }
    let mut sum = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
    for x in rest {
        sum += (x - max).exp();
    }
    (max, sum)
}
