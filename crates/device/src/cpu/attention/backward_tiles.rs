//! The backward pass with tile registers. A square of scores is as for vectors, keys' rows across queries; its rows are left
//! operands of the gradients of keys and values as they are, and pairs of its rows the right operand of the gradient of
//! queries, which is summed transposed, the head's columns as rows.

use super::backward::{Head, KEYS, Tiles as Square, dot, key_sizes, query_sizes, store, tile_sizes};
use super::forward_tiles::{NV, store_transposed};
use super::{MOST_LANES, Panel, Tile, carve, carved};
use crate::cpu::amx::{SIDE, STEP, Tiles};
use crate::cpu::gemm::Dot;
use crate::cpu::pack::{pack_panels, pack_tiles};
use crate::cpu::simd::Avx512;
use crate::rng::BLOCK;
use crate::{Element, bf16};

impl<E: Element> Head<'_, E> {
    /// [`super::Kernel::run_on_tiles`].
    #[inline(always)]
    pub(super) fn differentiate(self, s: Avx512, tiles: &Tiles) {
        let Head { isa, width, seq, scratch, .. } = self;
        let tile = Tile::of::<E>(isa);
        let (units, padded) = (tile.units(width), tile.padded(width));
        let scale = 1.0 / (width as f32).sqrt();
        let factor = self.dropout.map_or(1.0, |d| d.factor());

        let (queries, rest) = scratch.split_at_mut(carved(query_sizes(tile, width, seq)));
        let (keys, squares) = rest.split_at_mut(carved(key_sizes(tile, width)));
        let [q, g, q_rows, g_rows, dq, lse, delta] = carve(queries, query_sizes(tile, width, seq));
        let [k, v, k_columns, dk, dv] = carve(keys, key_sizes(tile, width));
        let [score, dp, p, ds, ds_units] = carve(squares, tile_sizes(tile));
        let [dq, lse, delta, dk, dv, score, dp, ds_units] =
            [dq, lse, delta, dk, dv, score, dp, ds_units].map(bytemuck::cast_slice_mut);
        let [p, ds]: [&mut [bf16]; 2] = [p, ds].map(bytemuck::cast_slice_mut);

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
        for (x, over_width, over_queries) in
            [(self.q, &mut *q, &mut *q_rows), (self.dout, &mut *g, &mut *g_rows)]
        {
            pack_panels(isa, x.over_width(), 0..seq, 0..width, SIDE, 2, over_width);
            pack_panels(isa, x.over_tokens(), 0..width, 0..seq, SIDE, 2, over_queries);
        }
        let query_units = seq.next_multiple_of(SIDE) / 2;

        for block in (0..seq).step_by(KEYS) {
            let block_end = (block + KEYS).min(seq);
            let steps = (block_end - block).div_ceil(SIDE);
            // Rows of keys that there are not meet probabilities of 0, and must not be what is no number.
            if !(block_end - block).is_multiple_of(SIDE) {
                k.fill(0);
                v.fill(0);
            }
            // SAFETY: a processor with tiles has AVX-512.
            unsafe {
                for (x, to) in [(self.k, &mut *k), (self.v, &mut *v)] {
                    let to = &mut to[..steps * SIDE * units];
                    pack_tiles(x.over_width(), block..block_end, 0..width, SIDE, to);
                }
                let to = &mut k_columns[..padded * steps * STEP];
                pack_tiles(self.k.over_tokens(), 0..width, block..block_end, SIDE, to);
            }
            dk.fill(0.0);
            dv.fill(0.0);
            for start in (block..seq).step_by(SIDE) {
                let panel = Panel::new(start..(start + SIDE).min(seq), self.doc_start);
                let queries = panel.queries.clone();
                if panel.low >= block_end {
                    continue;
                }
                let (q, g) = (&q[start * units..][..SIDE * units], &g[start * units..][..SIDE * units]);
                let mut bits = [0; KEYS / 32 * MOST_LANES];
                if let Some(d) = &self.dropout {
                    for (i, bits) in bits.chunks_exact_mut(2 * SIDE).take(KEYS / BLOCK).enumerate() {
                        d.bits(s, queries.clone(), block / BLOCK + i, SIDE, bits);
                    }
                }
                let end = block_end.min(queries.end);
                let first = (panel.low.max(block) - block) / SIDE * SIDE;
                for at in (first..end - block).step_by(SIDE) {
                    let rows = at * units..(at + SIDE) * units;
                    tiles.multiply(&k[rows.clone()], q, false, score, &[]);
                    tiles.multiply(&v[rows], g, false, dp, &[]);
                    if block + at + SIDE > queries.start + 1 || block + at < panel.high {
                        panel.mask::<_, NV>(s, score, block + at, 0..SIDE);
                    }
                    let square = Square {
                        lse: &lse[start..],
                        delta: &delta[start..],
                        kept: self.dropout.is_some().then_some((&bits[..], factor)),
                        scores: score,
                        dp,
                        p,
                        ds,
                    };
                    square.differentiate::<_, Dot, NV>(s, SIDE, at, scale, ds_units);
                    for c in 0..padded / SIDE {
                        let part = |i: usize| (i / SIDE * padded / SIDE + c) * SIDE * SIDE;
                        let over_queries = (c * query_units + start / 2) * SIDE
                            ..(c * query_units + (start + SIDE) / 2) * SIDE;
                        for (x, factors, sums) in [(&*p, &*g_rows, &mut *dv), (&*ds, &*q_rows, &mut *dk)] {
                            let x = bytemuck::cast_slice(x);
                            tiles.multiply(
                                x,
                                &factors[over_queries.clone()],
                                true,
                                &mut sums[part(at)..],
                                &[],
                            );
                        }
                        let k = &k_columns[(c * steps + at / SIDE) * SIDE * STEP..][..SIDE * STEP];
                        tiles.multiply(k, bytemuck::cast_slice(ds_units), true, &mut dq[part(start)..], &[]);
                    }
                }
            }
            for (which, sums, factor) in [(1, &*dk, scale), (2, &*dv, factor)] {
                for c in (0..width).step_by(SIDE) {
                    let start = self.start + block * 3 * self.all + which * self.all + c;
                    let panels =
                        sums.chunks_exact(SIDE * padded).map(|panel| &panel[c * SIDE..][..SIDE * SIDE]);
                    let rows = panels.flat_map(|square| square.chunks_exact(SIDE)).take(block_end - block);
                    store(s, rows, SIDE.min(width - c), factor, self.dqkv, start, 3 * self.all);
                }
            }
        }
        for (panel, sums) in dq.chunks_exact(SIDE * padded).enumerate() {
            let start = panel * SIDE;
            store_transposed(s, sums, width, SIDE.min(seq - start), &[scale; SIDE], |i| {
                let start = self.start + (start + i) * 3 * self.all;
                // SAFETY: every token of every head has its own part.
                unsafe { self.dqkv.range(start..start + width) }
            });
        }
    }
}
