//! The backward pass. With `P` the probabilities, `M` the dropout mask with its factor and `D = rowsum(dO * O)`:
//! `dV = (P * M)^T dO`, `dS = P * (M * (dO V^T) - D)`, `dQ = scale * dS K`, `dK = scale * dS^T Q`. `P` is computed
//! again from the log-sum-exps.
//!
//! A head is one task. Keys are taken a block at a time, whose gradients are then complete; those of queries grow in
//! f32 in the workspace.

use super::forward::store_turned;
use super::{HeadDropout, Kernel, MOST_LANES, Panel, Rows, Tile, Units, carve, carved, on_tile};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::micro_kernel;
use crate::cpu::pack::{Matrix, pack_panels};
use crate::cpu::simd::{Isa, Simd, dispatch};
use crate::cpu::{CpuDevice, Scratch};
use crate::rng::BLOCK;
use crate::{AttentionShape, Dropout, Element};

/// Keys of a block: whole blocks of dropout's words and whole panels of every tile.
pub(super) const KEYS: usize = 192;

/// [`crate::Device::attention_backward`].
pub(in crate::cpu) fn backward<E: Element>(
    device: &CpuDevice,
    s: AttentionShape,
    qkv: &[E],
    doc_start: Option<&[u32]>,
    dropout: Option<Dropout>,
    out: &[E],
    lse: &[f32],
    dout: &[E],
    dqkv: &mut [E],
) {
    let width = s.heads * s.width;
    let words = words(Tile::of::<E>(device.isa), s.width, s.seq);
    let mut workspace = device.workspace();
    let [scratch] = workspace.take([(Scratch::Attention, device.threads() * words)]);
    let (scratch, dqkv) = (Shards::new(scratch), Shards::new(dqkv));
    device.pool.for_each(s.batch * s.heads, |index, thread| {
        let (b, h) = (index / s.heads, index % s.heads);
        let qkv = |which: usize| Rows {
            data: &qkv[b * s.seq * 3 * width + which * width + h * s.width..],
            ld: 3 * width,
        };
        let rows = |x| Rows { data: x, ld: width };
        let head = Head {
            isa: device.isa,
            width: s.width,
            seq: s.seq,
            q: qkv(0),
            k: qkv(1),
            v: qkv(2),
            doc_start: doc_start.map(|d| &d[b * s.seq..(b + 1) * s.seq]),
            dropout: dropout.map(|d| HeadDropout::new(d, s, b, h)),
            out: rows(&out[b * s.seq * width + h * s.width..]),
            dout: rows(&dout[b * s.seq * width + h * s.width..]),
            lse: &lse[index * s.seq..(index + 1) * s.seq],
            dqkv,
            start: b * s.seq * 3 * width + h * s.width,
            all: width,
            // SAFETY: each thread has its own part.
            scratch: unsafe { scratch.range(thread * words..(thread + 1) * words) },
        };
        on_tile::<E>(device.isa, head);
    });
}

/// One head of one sequence.
struct Head<'a, E> {
    isa: Isa,
    /// D and T.
    width: usize,
    seq: usize,
    q: Rows<'a, E>,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
    doc_start: Option<&'a [u32]>,
    dropout: Option<HeadDropout>,
    out: Rows<'a, E>,
    dout: Rows<'a, E>,
    lse: &'a [f32],
    /// Gradients of token i's q, k and v are at `start + (3 * i + 0, 1, 2) * all`.
    dqkv: Shards<'a, E>,
    start: usize,
    all: usize,
    scratch: &'a mut [u32],
}

/// Words of workspace for each thread.
pub(super) fn words(tile: Tile, width: usize, seq: usize) -> usize {
    carved(query_sizes(tile, width, seq)) + carved(key_sizes(tile, width)) + carved(tile_sizes(tile, width))
}

/// Of all queries: q and dO packed for sums over the width, then for sums over queries; dQ; lse and D.
fn query_sizes(tile: Tile, width: usize, seq: usize) -> [usize; 7] {
    let Tile { mr, nr, per_unit } = tile;
    let seq = seq.next_multiple_of(nr);
    let (over_width, over_queries) =
        (width.div_ceil(per_unit) * seq, width.next_multiple_of(mr) * seq / per_unit);
    [over_width, over_width, over_queries, over_queries, width.next_multiple_of(mr) * seq, seq, seq]
}

/// Of a block of keys: k and v packed for sums over the width, k for sums over keys; dK, dV; units of dS.
fn key_sizes(tile: Tile, width: usize) -> [usize; 6] {
    let Tile { mr, nr, per_unit } = tile;
    let over_width = width.div_ceil(per_unit) * KEYS;
    let rows = width.next_multiple_of(mr);
    [over_width, over_width, rows * KEYS / per_unit, rows * KEYS, rows * KEYS, nr * KEYS / per_unit]
}

/// Of a square tile: scores, dP; P and dS as rows, then turned; rows on their way out.
fn tile_sizes(tile: Tile, width: usize) -> [usize; 7] {
    let Tile { nr, per_unit, .. } = tile;
    let units = nr * nr / per_unit;
    [nr * nr, nr * nr, units, units, units, units, nr * width.next_multiple_of(16)]
}

impl<E: Element> Kernel for Head<'_, E> {
    #[inline(always)]
    fn run<S: Simd, M: Units<S>, const MR: usize, const NV: usize>(self, s: S) {
        let Head { isa, width, seq, scratch, .. } = self;
        let nr = NV * S::LANES;
        let per_unit = M::PER_UNIT;
        let tile = Tile { mr: MR, nr, per_unit };
        let (units, rows) = (width.div_ceil(per_unit), width.next_multiple_of(MR));
        let scale = 1.0 / (width as f32).sqrt();
        let factor = self.dropout.map_or(1.0, |d| d.factor());

        let (queries, rest) = scratch.split_at_mut(carved(query_sizes(tile, width, seq)));
        let (keys, tiles) = rest.split_at_mut(carved(key_sizes(tile, width)));
        let [q, g, q_turned, g_turned, dq, lse, delta] = carve(queries, query_sizes(tile, width, seq));
        let [k, v, k_turned, dk, dv, ds] = carve(keys, key_sizes(tile, width));
        let [scores, dp, p_rows, ds_rows, p_turned, ds_turned, out_rows] =
            carve(tiles, tile_sizes(tile, width));
        let [dq, lse, delta, dk, dv, ds, scores, dp, out_rows]: [&mut [f32]; 9] =
            [dq, lse, delta, dk, dv, ds, scores, dp, out_rows].map(bytemuck::cast_slice_mut);
        let [p_rows, ds_rows]: [&mut [M::Value]; 2] = [p_rows, ds_rows].map(bytemuck::cast_slice_mut);

        dq.fill(0.0);
        lse[..seq].copy_from_slice(self.lse);
        // Lanes beyond the last query have q and dO of 0, so that all they need is to be finite.
        lse[seq..].fill(0.0);
        delta[seq..].fill(0.0);
        for (i, delta) in delta[..seq].iter_mut().enumerate() {
            let out = &self.out.data[i * self.out.ld..][..width];
            let dout = &self.dout.data[i * self.dout.ld..][..width];
            *delta = dispatch!(isa, s => dot(s, out, dout));
        }
        for (panel, start) in (0..seq).step_by(nr).enumerate() {
            let queries = start..(start + nr).min(seq);
            for (x, over_width, over_queries) in
                [(self.q, &mut *q, &mut *q_turned), (self.dout, &mut *g, &mut *g_turned)]
            {
                let to = &mut over_width[panel * units * nr..][..units * nr];
                pack_panels(isa, x.over_width(), queries.clone(), 0..width, nr, per_unit, to);
                let to =
                    &mut over_queries[start / per_unit * rows..][..queries.len().div_ceil(per_unit) * rows];
                pack_panels(isa, x.over_tokens(), 0..width, queries.clone(), MR, per_unit, to);
            }
        }

        for block in (0..seq).step_by(KEYS) {
            let block_end = (block + KEYS).min(seq);
            let len = (block_end - block).next_multiple_of(MR) * units;
            pack_panels(isa, self.k.over_width(), block..block_end, 0..width, MR, per_unit, &mut k[..len]);
            pack_panels(isa, self.v.over_width(), block..block_end, 0..width, MR, per_unit, &mut v[..len]);
            let block_units = (block_end - block).div_ceil(per_unit);
            let k_turned = &mut k_turned[..block_units * rows];
            pack_panels(isa, self.k.over_tokens(), 0..width, block..block_end, MR, per_unit, k_turned);
            dk.fill(0.0);
            dv.fill(0.0);
            for start in (block / nr * nr..seq).step_by(nr) {
                let panel = Panel::new(start..(start + nr).min(seq), self.doc_start);
                let queries = panel.queries.clone();
                if panel.low >= block_end {
                    continue;
                }
                let (q, g) = (&q[start * units..][..nr * units], &g[start * units..][..nr * units]);
                let query_units = queries.len().div_ceil(per_unit);
                let q_turned = &q_turned[start / per_unit * rows..][..query_units * rows];
                let g_turned = &g_turned[start / per_unit * rows..][..query_units * rows];
                let mut bits = [0; KEYS / 32 * MOST_LANES];
                if let Some(d) = &self.dropout {
                    for (i, bits) in bits.chunks_exact_mut(2 * nr).take(KEYS / BLOCK).enumerate() {
                        d.bits(s, queries.clone(), block / BLOCK + i, nr, bits);
                    }
                }
                let end = block_end.min(queries.end);
                let first = (panel.low.max(block) - block) / nr * nr;
                for at in (first..end - block).step_by(nr) {
                    let keys = nr.min(end - block - at);
                    for row in (0..keys).step_by(MR) {
                        let a = (at + row) * units..(at + row + MR) * units;
                        let tile = row * nr..(row + MR) * nr;
                        micro_kernel::<S, M, u32, MR, NV>(
                            s,
                            &k[a.clone()],
                            q,
                            &[],
                            false,
                            &mut scores[tile.clone()],
                        );
                        micro_kernel::<S, M, u32, MR, NV>(s, &v[a], g, &[], false, &mut dp[tile]);
                    }
                    let pairs = keys.next_multiple_of(2);
                    if block + at + pairs > queries.start + 1 || block + at < panel.high {
                        panel.mask::<S, NV>(s, scores, block + at, 0..pairs);
                    }
                    let square = Tiles {
                        lse: &lse[start..],
                        delta: &delta[start..],
                        kept: self.dropout.is_some().then_some((&bits[..], factor)),
                        scores,
                        dp,
                        p: p_rows,
                        ds: ds_rows,
                    };
                    square.differentiate::<S, M, NV>(s, pairs, at, scale, &mut ds[at / per_unit * nr..]);
                    for (x, turned, factors, sums) in [
                        (&*p_rows, &mut *p_turned, g_turned, &mut *dv),
                        (&*ds_rows, &mut *ds_turned, q_turned, &mut *dk),
                    ] {
                        let x = Matrix { data: x, ld: nr, k_contiguous: true };
                        pack_panels(isa, x, 0..keys, 0..nr, nr, per_unit, turned);
                        let sums = &mut sums[at * rows..][..rows * nr];
                        for (a, sums) in
                            factors.chunks_exact(MR * query_units).zip(sums.chunks_exact_mut(MR * nr))
                        {
                            micro_kernel::<S, M, u32, MR, NV>(s, a, turned, &[], true, sums);
                        }
                    }
                }
                let ds: &[u32] = bytemuck::cast_slice(&ds[first / per_unit * nr..]);
                let dq = &mut dq[start * rows..][..rows * nr];
                let (from, to) = (first / per_unit, (end - block).div_ceil(per_unit));
                for (a, sums) in k_turned.chunks_exact(MR * block_units).zip(dq.chunks_exact_mut(MR * nr)) {
                    micro_kernel::<S, M, u32, MR, NV>(s, &a[from * MR..to * MR], ds, &[], true, sums);
                }
            }
            for (which, sums, factor) in [(1, &mut *dk, scale), (2, &mut *dv, factor)] {
                for start in (block..block_end).step_by(nr) {
                    let count = nr.min(block_end - start);
                    let sums = &mut sums[(start - block) * rows..][..rows * nr];
                    let to = self.start + start * 3 * self.all + which * self.all;
                    store(isa, s, sums, nr, width, count, factor, self.dqkv, to, 3 * self.all, out_rows);
                }
            }
        }
        for start in (0..seq).step_by(nr) {
            let sums = &mut dq[start * rows..][..rows * nr];
            let to = self.start + start * 3 * self.all;
            let count = nr.min(seq - start);
            store(isa, s, sums, nr, width, count, scale, self.dqkv, to, 3 * self.all, out_rows);
        }
    }
}

/// A square tile: rows are keys, columns are queries.
struct Tiles<'a, V> {
    /// Of each query.
    lse: &'a [f32],
    delta: &'a [f32],
    /// Bits of the keys of a block that dropout keeps, and what it multiplies them by.
    kept: Option<(&'a [u32], f32)>,
    scores: &'a [f32],
    dp: &'a [f32],
    /// Receive probabilities after dropout, and gradients of scores.
    p: &'a mut [V],
    ds: &'a mut [V],
}

impl<V: Element> Tiles<'_, V> {
    /// Fills `p`, `ds`, and `units` with the units that rows of `ds` make. Row 0 is key `first` of the block.
    #[inline(always)]
    fn differentiate<S: Simd, M: Units<S>, const NV: usize>(
        self,
        s: S,
        rows: usize,
        first: usize,
        scale: f32,
        units: &mut [f32],
    ) {
        let nr = NV * S::LANES;
        for row in (0..rows).step_by(2) {
            for lane in (0..nr).step_by(S::LANES) {
                let (lse, delta) = (s.load(&self.lse[lane..]), s.load(&self.delta[lane..]));
                let mut pair = [s.zero(); 2];
                for i in 0..2 {
                    let at = (row + i) * nr + lane;
                    // Not fused: the difference of large numbers must be 0 where they are equal.
                    let score = s.mul(s.load(&self.scores[at..]), s.splat(scale));
                    let p = s.exp(s.sub(score, lse));
                    let (mut p_kept, mut dp) = (p, s.load(&self.dp[at..]));
                    if let Some((bits, factor)) = self.kept {
                        let (word, bit) = ((first + row + i) / 32, ((first + row + i) % 32) as u32);
                        let bits = &bits[word * nr + lane..];
                        p_kept = s.select_bit(bits, bit, p, s.zero());
                        dp = s.select_bit(bits, bit, s.mul(dp, s.splat(factor)), s.zero());
                    }
                    let ds = s.mul(p, s.sub(dp, delta));
                    s.store_as(&mut self.p[at..], p_kept);
                    s.store_as(&mut self.ds[at..], ds);
                    pair[i] = ds;
                }
                M::put(s, pair[0], pair[1], &mut units[row / M::PER_UNIT * nr + lane..], nr);
            }
        }
    }
}

/// Stores `factor` times column i of `sums` [width, nr] at `start + i * ld` of `to`, for the first `count` columns.
#[inline(always)]
fn store<E: Element, S: Simd>(
    isa: Isa,
    s: S,
    sums: &mut [f32],
    nr: usize,
    width: usize,
    count: usize,
    factor: f32,
    to: Shards<E>,
    start: usize,
    ld: usize,
    rows: &mut [f32],
) {
    for sum in sums.chunks_exact_mut(S::LANES) {
        s.store(sum, s.mul(s.load(sum), s.splat(factor)));
    }
    store_turned(isa, s, sums, nr, width, count, rows, |i| {
        let start = start + i * ld;
        // SAFETY: every token of every head has its own part.
        unsafe { to.range(start..start + width) }
    });
}

/// Sum of products, in four registers.
#[inline(always)]
fn dot<S: Simd, E: Element>(s: S, a: &[E], b: &[E]) -> f32 {
    let mut sums = [s.zero(); 4];
    for (a, b) in a.chunks(4 * S::LANES).zip(b.chunks(4 * S::LANES)) {
        for (i, (a, b)) in a.chunks(S::LANES).zip(b.chunks(S::LANES)).enumerate() {
            sums[i] = s.fma(s.load_up_to(a), s.load_up_to(b), sums[i]);
        }
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
