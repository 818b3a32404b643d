//! New tokens over a cache of keys and values.

use super::forward::{Head, attend};
use super::{NOTHING, Rows};
use crate::Element;
use crate::cpu::buffer::Shards;
use crate::cpu::linear::dot_widened;
use crate::cpu::simd::{Simd, dispatch};
use crate::cpu::{CpuDevice, Scratch};

/// At most this many new tokens attend one by one, over keys and values as they lie in memory; for more, packing pays.
const FEW: usize = 8;
/// Keys whose scores are turned into probabilities together.
const KEYS: usize = 64;
/// Registers of the output that are summed at once.
const REGISTERS: usize = 4;

/// [`crate::Device::attention_cached`].
pub(in crate::cpu) fn cached<E: Element>(
    device: &CpuDevice,
    heads: usize,
    width: usize,
    past: usize,
    count: usize,
    qkv: &[E],
    k_cache: &mut [E],
    v_cache: &mut [E],
    out: &mut [E],
) {
    let all = heads * width;
    for (i, row) in qkv[..count * 3 * all].chunks_exact(3 * all).enumerate() {
        let to = (past + i) * all..(past + i + 1) * all;
        k_cache[to.clone()].copy_from_slice(&row[all..2 * all]);
        v_cache[to].copy_from_slice(&row[2 * all..]);
    }
    let (k_cache, v_cache, out) = (&*k_cache, &*v_cache, Shards::new(out));
    if count > FEW {
        return attend(device, heads, width, count, past + count, |h| Head {
            width,
            past,
            q: Rows { data: &qkv[h * width..], ld: 3 * all },
            k: Rows { data: &k_cache[h * width..], ld: all },
            v: Rows { data: &v_cache[h * width..], ld: all },
            doc_start: None,
            dropout: None,
            out,
            out_start: h * width,
            out_ld: all,
            lse: None,
        });
    }
    let mut workspace = device.workspace();
    let [sums] = workspace.take([(Scratch::Attention, device.threads() * width)]);
    let sums = Shards::new(bytemuck::cast_slice_mut(sums));
    // Tokens of one head follow each other, so that its keys and values come from memory once.
    device.pool.for_each(heads * count, |task, thread| {
        let (h, i) = (task / count, task % count);
        // SAFETY: each thread has its own sums, each task its own part of the output.
        let (sums, out) = unsafe {
            let start = i * all + h * width;
            (sums.range(thread * width..(thread + 1) * width), out.range(start..start + width))
        };
        let q = &qkv[i * 3 * all + h * width..][..width];
        let rows = |x| Rows { data: x, ld: all };
        let (k, v) = (rows(&k_cache[h * width..]), rows(&v_cache[h * width..]));
        dispatch!(device.isa, s => one(s, past + i + 1, q, k, v, sums, out));
    });
}

/// One query over the first `count` keys.
#[inline(always)]
fn one<S: Simd, E: Element>(
    s: S,
    count: usize,
    q: &[E],
    k: Rows<E>,
    v: Rows<E>,
    sums: &mut [f32],
    out: &mut [E],
) {
    let width = q.len();
    let scale = 1.0 / (width as f32).sqrt();
    let (mut max, mut sum) = (NOTHING, s.zero());
    sums.fill(0.0);
    for block in (0..count).step_by(KEYS) {
        let keys = KEYS.min(count - block);
        let mut p = [f32::NEG_INFINITY; KEYS];
        let old = max;
        for (i, p) in p[..keys].iter_mut().enumerate() {
            *p = dot_widened(s, q, &k.data[(block + i) * k.ld..][..width]) * scale;
            max = max.max(*p);
        }
        let shrink = s.exp(s.splat(old - max));
        sum = s.mul(sum, shrink);
        for p in p.chunks_exact_mut(S::LANES) {
            let e = s.exp(s.sub(s.load(p), s.splat(max)));
            sum = s.add(sum, e);
            s.store(p, e);
        }
        for at in (0..width).step_by(REGISTERS * S::LANES) {
            let mut acc = [s.zero(); REGISTERS];
            for (r, acc) in acc.iter_mut().enumerate() {
                let at = (at + r * S::LANES).min(width);
                *acc = s.mul(s.load_up_to(&sums[at..]), shrink);
            }
            for (i, p) in p[..keys].iter().enumerate() {
                let v = &v.data[(block + i) * v.ld..][..width];
                for (r, acc) in acc.iter_mut().enumerate() {
                    *acc = s.fma(s.splat(*p), s.load_up_to(&v[(at + r * S::LANES).min(width)..]), *acc);
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                s.store_up_to(&mut sums[(at + r * S::LANES).min(width)..], *acc);
            }
        }
    }
    let factor = s.splat(1.0 / s.sum(sum));
    for at in (0..width).step_by(S::LANES) {
        s.store_up_to(&mut out[at..], s.mul(s.load_up_to(&sums[at..]), factor));
    }
}
