//! The forward pass.

use std::ops::Range;

use super::product::{Columns, Left, add_products, scores};
use super::{
    HeadDropout, Kernel, MOST_LANES, NOTHING, Panel, Rows, Tile, Units, carve, carved, on_tile, store_row,
};
use crate::cpu::amx::Tiles;
use crate::cpu::buffer::Shards;
use crate::cpu::pack::pack_panels;
use crate::cpu::simd::{Avx512, Isa, Simd};
use crate::cpu::{CpuDevice, Scratch};
use crate::{AttentionShape, Dropout, Element};

/// Keys of a tile of scores: a block of dropout's words, and few enough for the tile (12 KiB), a panel of queries and
/// its output to stay in the first-level cache.
pub(super) const KEYS: usize = 64;

/// [`crate::Device::attention`].
pub(in crate::cpu) fn forward<E: Element>(
    device: &CpuDevice,
    s: AttentionShape,
    qkv: &[E],
    doc_start: Option<&[u32]>,
    dropout: Option<Dropout>,
    out: &mut [E],
    lse: &mut [f32],
) {
    let width = s.heads * s.width;
    let (out, lse) = (Shards::new(out), Shards::new(lse));
    attend(device, s.batch * s.heads, s.width, s.seq, |index| {
        let (b, h) = (index / s.heads, index % s.heads);
        let part = |which: usize| Rows {
            data: &qkv[b * s.seq * 3 * width + which * width + h * s.width..],
            ld: 3 * width,
        };
        Head {
            width: s.width,
            q: part(0),
            k: part(1),
            v: part(2),
            doc_start: doc_start.map(|d| &d[b * s.seq..(b + 1) * s.seq]),
            dropout: dropout.map(|d| HeadDropout::new(d, s, b, h)),
            out,
            out_start: b * s.seq * width + h * s.width,
            out_ld: width,
            lse,
            lse_start: index * s.seq,
        }
    });
}

/// Attention of one head of one sequence.
pub(super) struct Head<'a, E> {
    /// D.
    pub(super) width: usize,
    pub(super) q: Rows<'a, E>,
    pub(super) k: Rows<'a, E>,
    pub(super) v: Rows<'a, E>,
    /// Of each query.
    pub(super) doc_start: Option<&'a [u32]>,
    pub(super) dropout: Option<HeadDropout>,
    /// Query i's output is at `out_start + i * out_ld`.
    pub(super) out: Shards<'a, E>,
    pub(super) out_start: usize,
    pub(super) out_ld: usize,
    /// Query i's log-sum-exp is at `lse_start + i`.
    pub(super) lse: Shards<'a, f32>,
    pub(super) lse_start: usize,
}

/// Words of workspace for each thread, for at most `keys` keys.
pub(super) fn words(tile: Tile, width: usize, keys: usize) -> usize {
    carved(sizes(tile, width, keys))
}

/// Packed queries, a tile of scores, its output, packed keys, rows of values.
pub(super) fn sizes(tile: Tile, width: usize, keys: usize) -> [usize; 5] {
    let Tile { nr, per_unit, .. } = tile;
    let keys = keys.next_multiple_of(KEYS);
    let (units, padded) = (tile.units(width), tile.padded(width));
    [units * nr, KEYS * nr, padded * nr, keys * units, padded * keys / per_unit]
}

/// Attention of `count` heads with `queries` tokens each.
fn attend<'a, E: Element>(
    device: &CpuDevice,
    count: usize,
    width: usize,
    queries: usize,
    head: impl Fn(usize) -> Head<'a, E> + Sync,
) {
    let tile = Tile::of::<E>(device.isa);
    let panels = queries.div_ceil(tile.nr);
    // A task packs the keys that it needs, so heads are cut only where there are few of them for the threads.
    let parts = (6 * device.threads()).div_ceil(count.max(1)).clamp(1, panels.max(1));
    let words = words(tile, width, queries);
    let mut workspace = device.workspace();
    let [scratch] = workspace.take([(Scratch::Attention, device.threads() * words)]);
    let scratch = Shards::new(scratch);
    device.pool.for_each(count * parts, |task, thread| {
        // Work grows with the position, so the first part of p is the sqrt(1/p)-th part of the panels.
        let edge = |part: usize| (panels as f64 * (part as f64 / parts as f64).sqrt()).round() as usize;
        let part = task % parts;
        // SAFETY: each thread has its own part.
        let scratch = unsafe { scratch.range(thread * words..(thread + 1) * words) };
        let head = head(task / parts);
        on_tile::<E>(
            device.isa,
            Task { isa: device.isa, head, queries, panels: edge(part)..edge(part + 1), scratch },
        );
    });
}

/// Some panels of queries of one head.
pub(super) struct Task<'a, 'b, E> {
    pub(super) isa: Isa,
    pub(super) head: Head<'a, E>,
    /// Of the whole head.
    pub(super) queries: usize,
    pub(super) panels: Range<usize>,
    pub(super) scratch: &'b mut [u32],
}

impl<E: Element> Kernel for Task<'_, '_, E> {
    #[inline(always)]
    fn run<S: Simd, M: Units<S>, const MR: usize, const NV: usize, const R: usize>(self, s: S) {
        let Task { isa, head, queries, panels, scratch } = self;
        let nr = NV * S::LANES;
        let per_unit = M::PER_UNIT;
        let queries = panels.start * nr..(panels.end * nr).min(queries);
        if queries.is_empty() {
            return;
        }
        let tile = Tile::of::<E>(isa);
        let (units, padded) = (tile.units(head.width), tile.padded(head.width));
        let keys_end = queries.end;
        let first = head.doc_start.map_or(0, |d| d[queries.clone()].iter().copied().min().unwrap_or(0));
        let first = first as usize / KEYS * KEYS;
        let [q, score, out, k, v] = carve(scratch, sizes(tile, head.width, keys_end - first));
        let k = &mut k[..(keys_end - first).next_multiple_of(MR) * units];
        pack_panels(isa, head.k.over_width(), first..keys_end, 0..head.width, MR, per_unit, k);
        let key_units = (keys_end - first).div_ceil(per_unit);
        let v = &mut v[..padded * key_units];
        pack_panels(isa, head.v.over_tokens(), 0..head.width, first..keys_end, S::LANES, per_unit, v);
        let v = Columns { data: &*v, units: key_units };
        let score: &mut [f32] = bytemuck::cast_slice_mut(score);
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        let scale = 1.0 / (head.width as f32).sqrt();
        for panel in panels {
            let in_panel = panel * nr..((panel + 1) * nr).min(queries.end);
            pack_panels(isa, head.q.over_width(), in_panel.clone(), 0..head.width, nr, per_unit, q);
            let panel = Panel::new(in_panel, head.doc_start);
            let mut state = State::new();
            out.fill(0.0);
            let end = panel.queries.end;
            for block in (panel.low / KEYS * KEYS..end).step_by(KEYS) {
                // Rows of the tile that are needed, to whole panels at the start and to pairs at the end.
                let from = panel.low.saturating_sub(block) / MR * MR;
                let keys = KEYS.min(end - block);
                let to = keys.next_multiple_of(2);
                for at in (from..keys).step_by(MR) {
                    let k = &k[(block - first + at) * units..][..MR * units];
                    // Registers of queries that all come before these keys.
                    let skip = (block + at).saturating_sub(panel.queries.start) / S::LANES;
                    let to = &mut score[at * nr..(at + MR) * nr];
                    scores::<S, M, MR, NV>(s, units, k, q, skip, f32::NEG_INFINITY, to);
                }
                if block + to > panel.queries.start + 1 || block + from < panel.high {
                    panel.mask::<S, NV>(s, score, block, from..to);
                }
                let mut bits = [0; 2 * MOST_LANES];
                if let Some(d) = &head.dropout {
                    d.bits(s, panel.queries.clone(), block / KEYS, nr, &mut bits);
                }
                let kept = head.dropout.is_some().then_some(&bits[..]);
                if state.update::<S, M, NV>(s, score, from..to, scale, kept) {
                    for (row, shrink) in out.chunks_exact_mut(padded).zip(&state.shrink) {
                        for row in row.chunks_exact_mut(S::LANES) {
                            s.store(row, s.mul(s.load(row), s.splat(*shrink)));
                        }
                    }
                }
                let p = Left { data: bytemuck::cast_slice(score), row: 1, unit: nr };
                let start = panel.queries.start;
                // Keys up to the last that one of `R` queries attends to.
                let range = |query: usize| {
                    let to = keys.min((start + query + R).saturating_sub(block)).max(from);
                    from / per_unit..to.div_ceil(per_unit)
                };
                let (count, first) = (panel.queries.len(), (block - first) / per_unit);
                add_products::<S, M, R>(s, count, range, p, v, first, out, padded);
            }
            finish(s, &head, &panel, &state, scale, out, padded);
        }
    }

    #[inline(always)]
    fn run_on_tiles(self, s: Avx512, tiles: &Tiles) {
        self.attend(s, tiles);
    }
}

/// The online softmax of a panel of queries.
pub(super) struct State {
    /// Largest score so far, before scaling.
    pub(super) max: [f32; MOST_LANES],
    /// Sum of exponentials, relative to it.
    pub(super) sum: [f32; MOST_LANES],
    /// What the last update multiplied earlier exponentials by.
    pub(super) shrink: [f32; MOST_LANES],
}

impl State {
    #[inline(always)]
    pub(super) fn new() -> Self {
        State { max: [NOTHING; MOST_LANES], sum: [0.0; MOST_LANES], shrink: [1.0; MOST_LANES] }
    }

    /// Replaces rows of scores by units of their exponentials relative to the largest score so far, without those
    /// that dropout zeroes. True if earlier results must be multiplied by `shrink`.
    #[inline(always)]
    pub(super) fn update<S: Simd, M: Units<S>, const NV: usize>(
        &mut self,
        s: S,
        scores: &mut [f32],
        rows: Range<usize>,
        scale: f32,
        kept: Option<&[u32]>,
    ) -> bool {
        let nr = NV * S::LANES;
        let scale = s.splat(scale * M::FACTOR);
        let mut max = [s.zero(); NV];
        for v in 0..NV {
            max[v] = s.load(&self.max[v * S::LANES..]);
        }
        for row in scores[rows.start * nr..rows.end * nr].chunks_exact(nr) {
            for v in 0..NV {
                max[v] = s.max(max[v], s.load(&row[v * S::LANES..]));
            }
        }
        let mut changed = false;
        let mut sum = [s.zero(); NV];
        for v in 0..NV {
            let at = v * S::LANES;
            let old = s.load(&self.max[at..]);
            let shrink = M::exp(s, s.mul(s.sub(old, max[v]), scale));
            changed |= s.to_array(old) != s.to_array(max[v]);
            s.store(&mut self.max[at..], max[v]);
            s.store(&mut self.shrink[at..], shrink);
            sum[v] = s.mul(s.load(&self.sum[at..]), shrink);
        }
        for row in rows.step_by(2) {
            for v in 0..NV {
                let at = row * nr + v * S::LANES;
                let mut even = M::exp(s, s.mul(s.sub(s.load(&scores[at..]), max[v]), scale));
                let mut odd = M::exp(s, s.mul(s.sub(s.load(&scores[at + nr..]), max[v]), scale));
                sum[v] = s.add(sum[v], s.add(even, odd));
                if let Some(bits) = kept {
                    let bits = &bits[row / 32 * nr + v * S::LANES..];
                    even = s.select_bit(bits, row as u32 % 32, even, s.zero());
                    odd = s.select_bit(bits, row as u32 % 32 + 1, odd, s.zero());
                }
                // Units take no more room than the rows that they are made of, which are not looked at again.
                M::put(s, even, odd, &mut scores[row / M::PER_UNIT * nr + v * S::LANES..], nr);
            }
        }
        for v in 0..NV {
            s.store(&mut self.sum[v * S::LANES..], sum[v]);
        }
        changed
    }
}

/// Divides the output of a panel by the sums and stores it, with log-sum-exps.
#[inline(always)]
fn finish<E: Element, S: Simd>(
    s: S,
    head: &Head<E>,
    panel: &Panel,
    state: &State,
    scale: f32,
    out: &[f32],
    padded: usize,
) {
    let factor = head.dropout.map_or(1.0, |d| d.factor());
    let count = panel.queries.len();
    let start = head.lse_start + panel.queries.start;
    // SAFETY: every query of every head has its own part.
    let lse = unsafe { head.lse.range(start..start + count) };
    for (i, (row, lse)) in out.chunks_exact(padded).zip(lse).enumerate() {
        let start = head.out_start + (panel.queries.start + i) * head.out_ld;
        // SAFETY: as above.
        let to = unsafe { head.out.range(start..start + head.width) };
        store_row(s, row, head.width, factor / state.sum[i], to);
        *lse = state.max[i] * scale + state.sum[i].ln();
    }
}
