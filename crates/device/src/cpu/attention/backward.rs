//! The backward pass. With `P` the probabilities, `M` the dropout mask with its factor and `D = rowsum(dO * O)`:
//! `dV = (P * M)^T dO`, `dS = P * (M * (dO V^T) - D)`, `dQ = scale * dS K`, `dK = scale * dS^T Q`. `P` is computed
//! again from the log-sum-exps.
//!
//! A head is one task. Keys are taken a block at a time, whose gradients are then complete; those of queries grow in
//! f32 in the workspace.

use super::product::{Columns, Left, add_products, scores};
use super::{HeadDropout, Kernel, MOST_LANES, Panel, Rows, Tile, Units, carve, carved, on_tile, store_row};
use crate::cpu::amx;
use crate::cpu::buffer::Shards;
use crate::cpu::pack::pack_panels;
use crate::cpu::simd::{Avx512, Isa, Simd};
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
pub(super) struct Head<'a, E> {
    pub(super) isa: Isa,
    /// D and T.
    pub(super) width: usize,
    pub(super) seq: usize,
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    pub(super) doc_start: Option<&'a [u32]>,
    pub(super) dropout: Option<HeadDropout>,
    pub(super) out: Rows<'a, E>,
    pub(super) dout: Rows<'a, E>,
    pub(super) lse: &'a [f32],
    /// Gradients of token i's q, k and v are at `start + (3 * i + 0, 1, 2) * all`.
    pub(super) dqkv: Shards<'a, E>,
    pub(super) start: usize,
    pub(super) all: usize,
    pub(super) scratch: &'a mut [u32],
}

/// Words of workspace for each thread.
pub(super) fn words(tile: Tile, width: usize, seq: usize) -> usize {
    carved(query_sizes(tile, width, seq)) + carved(key_sizes(tile, width)) + carved(tile_sizes(tile))
}

/// Of all queries: q and dO packed for sums over the width, then for sums over queries; dQ; lse and D.
pub(super) fn query_sizes(tile: Tile, width: usize, seq: usize) -> [usize; 7] {
    let Tile { nr, per_unit, .. } = tile;
    let (seq, padded) = (seq.next_multiple_of(nr), tile.padded(width));
    let (over_width, over_queries) = (tile.units(width) * seq, padded * seq / per_unit);
    [over_width, over_width, over_queries, over_queries, padded * seq, seq, seq]
}

/// Of a block of keys: k and v packed for sums over the width, k for sums over keys; dK, dV.
pub(super) fn key_sizes(tile: Tile, width: usize) -> [usize; 5] {
    let (over_width, padded) = (tile.units(width) * KEYS, tile.padded(width));
    [over_width, over_width, padded * KEYS / tile.per_unit, padded * KEYS, padded * KEYS]
}

/// Of a square tile: scores, dP; P and dS as rows, and dS as units of keys where these differ from rows.
pub(super) fn tile_sizes(tile: Tile) -> [usize; 5] {
    let Tile { nr, per_unit, .. } = tile;
    let units = nr * nr / per_unit;
    [nr * nr, nr * nr, units, units, if per_unit > 1 { units } else { 0 }]
}

impl<E: Element> Kernel for Head<'_, E> {
    #[inline(always)]
    fn run<S: Simd, M: Units<S>, const MR: usize, const NV: usize, const R: usize>(self, s: S) {
        let Head { isa, width, seq, scratch, .. } = self;
        let nr = NV * S::LANES;
        let per_unit = M::PER_UNIT;
        let tile = Tile::of::<E>(isa);
        let (units, padded) = (tile.units(width), tile.padded(width));
        let scale = 1.0 / (width as f32).sqrt();
        let factor = self.dropout.map_or(1.0, |d| d.factor());

        let (queries, rest) = scratch.split_at_mut(carved(query_sizes(tile, width, seq)));
        let (keys, tiles) = rest.split_at_mut(carved(key_sizes(tile, width)));
        let [q, g, q_rows, g_rows, dq, lse, delta] = carve(queries, query_sizes(tile, width, seq));
        let [k, v, k_rows, dk, dv] = carve(keys, key_sizes(tile, width));
        let [score, dp, p, ds, ds_units] = carve(tiles, tile_sizes(tile));
        let [dq, lse, delta, dk, dv, score, dp, ds_units] =
            [dq, lse, delta, dk, dv, score, dp, ds_units].map(bytemuck::cast_slice_mut);
        let [p, ds]: [&mut [M::Value]; 2] = [p, ds].map(bytemuck::cast_slice_mut);

        dq.fill(0.0);
        lse[..seq].copy_from_slice(self.lse);
        // Lanes beyond the last query have q and dO of 0, so that all they need is to be finite.
        lse[seq..].fill(0.0);
        delta[seq..].fill(0.0);
        for (i, delta) in delta[..seq].iter_mut().enumerate() {
            let out = &self.out.data[i * self.out.ld..][..width];
            let dout = &self.dout.data[i * self.dout.ld..][..width];
            *delta = dot(s, out, dout);
        }
        for (x, to) in [(self.q, &mut *q), (self.dout, &mut *g)] {
            pack_panels(isa, x.over_width(), 0..seq, 0..width, nr, per_unit, to);
        }
        let query_units = seq.div_ceil(per_unit);
        for (x, to) in [(self.q, &mut *q_rows), (self.dout, &mut *g_rows)] {
            let to = &mut to[..padded * query_units];
            pack_panels(isa, x.over_tokens(), 0..width, 0..seq, S::LANES, per_unit, to);
        }
        let [q_rows, g_rows] = [q_rows, g_rows].map(|data| Columns { data: &*data, units: query_units });

        for block in (0..seq).step_by(KEYS) {
            let block_end = (block + KEYS).min(seq);
            let len = (block_end - block).next_multiple_of(MR) * units;
            pack_panels(isa, self.k.over_width(), block..block_end, 0..width, MR, per_unit, &mut k[..len]);
            pack_panels(isa, self.v.over_width(), block..block_end, 0..width, MR, per_unit, &mut v[..len]);
            let key_units = (block_end - block).div_ceil(per_unit);
            let to = &mut k_rows[..padded * key_units];
            pack_panels(isa, self.k.over_tokens(), 0..width, block..block_end, S::LANES, per_unit, to);
            let k_rows = Columns { data: &*k_rows, units: key_units };
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
                let dq = &mut dq[start * padded..][..nr * padded];
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
                        let to = row * nr..(row + MR) * nr;
                        // Registers of queries that all come before these keys.
                        let skip = (block + at + row).saturating_sub(start) / S::LANES;
                        let never = f32::NEG_INFINITY;
                        scores::<S, M, MR, NV>(
                            s,
                            units,
                            &k[a.clone()],
                            q,
                            skip,
                            never,
                            &mut score[to.clone()],
                        );
                        scores::<S, M, MR, NV>(s, units, &v[a], g, skip, 0.0, &mut dp[to]);
                    }
                    let pairs = keys.next_multiple_of(2);
                    if block + at + pairs > queries.start + 1 || block + at < panel.high {
                        panel.mask::<S, NV>(s, score, block + at, 0..pairs);
                    }
                    let square = Tiles {
                        lse: &lse[start..],
                        delta: &delta[start..],
                        kept: self.dropout.is_some().then_some((&bits[..], factor)),
                        scores: score,
                        dp,
                        p,
                        ds,
                    };
                    square.differentiate::<S, M, NV>(s, pairs, at, scale, ds_units);
                    // On the diagonal, keys meet later queries only.
                    let diagonal = block + at == start;
                    let later =
                        |key: usize| if diagonal { key / per_unit..query_units } else { 0..query_units };
                    for (x, factors, sums) in [(&*p, g_rows, &mut *dv), (&*ds, q_rows, &mut *dk)] {
                        let sums = &mut sums[at * padded..][..nr * padded];
                        let x = Left { data: bytemuck::cast_slice(x), row: nr / per_unit, unit: 1 };
                        let first = start / per_unit;
                        add_products::<S, M, R>(s, keys, later, x, factors, first, sums, padded);
                    }
                    let earlier = |query: usize| {
                        0..(if diagonal { keys.min(query + R) } else { keys }).div_ceil(per_unit)
                    };
                    let data = if per_unit > 1 {
                        bytemuck::cast_slice(&*ds_units)
                    } else {
                        bytemuck::cast_slice(&*ds)
                    };
                    let ds = Left { data, row: 1, unit: nr };
                    let count = queries.len();
                    add_products::<S, M, R>(s, count, earlier, ds, k_rows, at / per_unit, dq, padded);
                }
            }
            for (which, sums, factor) in [(1, &*dk, scale), (2, &*dv, factor)] {
                let start = self.start + block * 3 * self.all + which * self.all;
                let sums = sums.chunks_exact(padded).take(block_end - block);
                store(s, sums, width, factor, self.dqkv, start, 3 * self.all);
            }
        }
        store(s, dq.chunks_exact(padded).take(seq), width, scale, self.dqkv, self.start, 3 * self.all);
    }

    #[inline(always)]
    fn run_on_tiles(self, s: Avx512, tiles: &amx::Tiles) {
        self.differentiate(s, tiles);
    }
}

/// A square tile: rows are keys, columns are queries.
pub(super) struct Tiles<'a, V> {
    /// Of each query.
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    /// Bits of the keys of a block that dropout keeps, and what it multiplies them by.
    pub(super) kept: Option<(&'a [u32], f32)>,
    pub(super) scores: &'a [f32],
    pub(super) dp: &'a [f32],
    /// Receive probabilities after dropout, and gradients of scores.
    pub(super) p: &'a mut [V],
    pub(super) ds: &'a mut [V],
}

impl<V> Tiles<'_, V> {
    /// Fills `p`, `ds`, and where a unit is more than a number, `units` with those that rows of `ds` make. Row 0 is key
    /// `first` of the block.
    #[inline(always)]
    pub(super) fn differentiate<S: Simd, M: Units<S, Value = V>, const NV: usize>(
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
                    let p = M::exp(s, s.mul(s.sub(score, lse), s.splat(M::FACTOR)));
                    let (mut p_kept, mut dp) = (p, s.load(&self.dp[at..]));
                    if let Some((bits, factor)) = self.kept {
                        let (word, bit) = ((first + row + i) / 32, ((first + row + i) % 32) as u32);
                        let bits = &bits[word * nr + lane..];
                        p_kept = s.select_bit(bits, bit, p, s.zero());
                        dp = s.select_bit(bits, bit, s.mul(dp, s.splat(factor)), s.zero());
                    }
                    let ds = s.mul(p, s.sub(dp, delta));
                    M::put_row(s, p_kept, &mut self.p[at..]);
                    M::put_row(s, ds, &mut self.ds[at..]);
                    pair[i] = ds;
                }
                if M::PER_UNIT > 1 {
                    M::put(s, pair[0], pair[1], &mut units[row / M::PER_UNIT * nr + lane..], nr);
                }
            }
        }
    }
}

/// Stores `factor` times the first `width` numbers of row i of `rows` at `start + i * ld` of `to`.
#[inline(always)]
pub(super) fn store<'a, E: Element, S: Simd>(
    s: S,
    rows: impl Iterator<Item = &'a [f32]>,
    width: usize,
    factor: f32,
    to: Shards<E>,
    start: usize,
    ld: usize,
) {
    for (i, row) in rows.enumerate() {
        let start = start + i * ld;
        // SAFETY: every token of every head has its own part.
        let to = unsafe { to.range(start..start + width) };
        store_row(s, row, width, factor, to);
    }
}

/// Sum of products, in four registers.
#[inline(always)]
pub(super) fn dot<S: Simd, E: Element>(s: S, a: &[E], b: &[E]) -> f32 {
    let mut sums = [s.zero(); 4];
    for (a, b) in a.chunks(4 * S::LANES).zip(b.chunks(4 * S::LANES)) {
        for (i, (a, b)) in a.chunks(S::LANES).zip(b.chunks(S::LANES)).enumerate() {
            sums[i] = s.fma(s.load_up_to(a), s.load_up_to(b), sums[i]);
        }
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])))
}
