//! The forward pass with tile registers: scores lie as for vectors, a key's row across queries, so that the softmax is the
//! same; the output is summed transposed, the head's columns as rows and queries as columns, since probabilities lie as
//! pairs of keys, as the right operand has to.

use std::arch::x86_64::*;

use super::forward::{Head, KEYS, State, Task, sizes};
use super::{MOST_LANES, Panel, Tile, carve};
use crate::Element;
use crate::cpu::amx::{SIDE, STEP, Tiles};
use crate::cpu::gemm::Dot;
use crate::cpu::pack::{pack_panels, pack_tiles, transpose};
use crate::cpu::simd::{Avx512, Simd};

impl<E: Element> Task<'_, '_, E> {
    /// [`super::Kernel::run_on_tiles`].
    #[inline(always)]
    pub(super) fn attend(self, s: Avx512, tiles: &Tiles) {
        let Task { isa, head, queries, panels, scratch } = self;
        let queries = panels.start * SIDE..(panels.end * SIDE).min(queries);
        if queries.is_empty() {
            return;
        }
        let tile = Tile::of::<E>(isa);
        let units = tile.units(head.width);
        let keys_end = queries.end;
        let first = head.doc_start.map_or(0, |d| d[queries.clone()].iter().copied().min().unwrap_or(0));
        let first = first as usize / KEYS * KEYS;
        let all = keys_end - first;
        let [q, score, out, k, v] = carve(scratch, sizes(tile, head.width, all));
        let steps = all.div_ceil(SIDE);
        // SAFETY: a processor with tiles has AVX-512.
        unsafe {
            let k = &mut k[..steps * SIDE * units];
            pack_tiles(head.k.over_width(), first..keys_end, 0..head.width, SIDE, k);
            let v = &mut v[..tile.padded(head.width) * steps * STEP];
            pack_tiles(head.v.over_tokens(), 0..head.width, first..keys_end, SIDE, v);
        }
        let score: &mut [f32] = bytemuck::cast_slice_mut(score);
        let out: &mut [f32] = bytemuck::cast_slice_mut(out);
        let scale = 1.0 / (head.width as f32).sqrt();
        for panel in panels {
            let in_panel = panel * SIDE..((panel + 1) * SIDE).min(queries.end);
            pack_panels(isa, head.q.over_width(), in_panel.clone(), 0..head.width, SIDE, 2, q);
            let panel = Panel::new(in_panel, head.doc_start);
            let mut state = State::new();
            out.fill(0.0);
            let end = panel.queries.end;
            for block in (panel.low / KEYS * KEYS..end).step_by(KEYS) {
                let from = panel.low.saturating_sub(block) / SIDE * SIDE;
                let to = KEYS.min((end - block).next_multiple_of(SIDE));
                for at in (from..to).step_by(SIDE) {
                    let k = &k[(block - first + at) * units..][..SIDE * units];
                    tiles.multiply(k, q, false, &mut score[at * SIDE..], &[]);
                }
                // Rows of keys that there are not have any numbers, and come after all queries.
                if block + to > panel.queries.start + 1 || block + from < panel.high {
                    panel.mask::<_, NV>(s, score, block, from..to);
                }
                let mut bits = [0; 2 * MOST_LANES];
                if let Some(d) = &head.dropout {
                    d.bits(s, panel.queries.clone(), block / KEYS, SIDE, &mut bits);
                }
                let kept = head.dropout.is_some().then_some(&bits[..]);
                if state.update::<_, Dot, NV>(s, score, from..to, scale, kept) {
                    for row in out.as_chunks_mut::<SIDE>().0 {
                        for (part, shrink) in row.chunks_exact_mut(16).zip(state.shrink.chunks_exact(16)) {
                            let shrunk = s.mul(s.load(part), s.load(shrink));
                            s.store(part, shrunk);
                        }
                    }
                }
                let p: &[u32] = bytemuck::cast_slice(&score[from / 2 * SIDE..to / 2 * SIDE]);
                let step = (block - first + from) / SIDE;
                for (columns, out) in out.as_chunks_mut::<{ SIDE * SIDE }>().0.iter_mut().enumerate() {
                    let v = &v[(columns * steps + step) * SIDE * STEP..][..(to - from) * STEP];
                    tiles.multiply(v, p, true, out, &[]);
                }
            }
            finish(s, &head, &panel, &state, scale, out);
        }
    }
}

/// Registers of a row of scores.
pub(super) const NV: usize = SIDE / 16;

/// Divides the output of a panel, `[column][query]`, by the sums and stores it, with log-sum-exps.
#[inline(always)]
fn finish<E: Element>(s: Avx512, head: &Head<E>, panel: &Panel, state: &State, scale: f32, out: &[f32]) {
    let factor = head.dropout.map_or(1.0, |d| d.factor());
    let count = panel.queries.len();
    let start = head.lse_start + panel.queries.start;
    // SAFETY: every query of every head has its own part.
    let lse = unsafe { head.lse.range(start..start + count) };
    let mut factors = [0.0; SIDE];
    for (i, lse) in lse.iter_mut().enumerate() {
        *lse = state.max[i] * scale + state.sum[i].ln();
        factors[i] = factor / state.sum[i];
    }
    store_transposed(s, out, head.width, count, &factors, |i| {
        let start = head.out_start + (panel.queries.start + i) * head.out_ld;
        // SAFETY: as above.
        unsafe { head.out.range(start..start + head.width) }
    });
}

/// Stores sums `[column][SIDE]` of the first `count` of so many tokens, times a factor of each, to rows of `width` columns.
#[inline(always)]
pub(super) fn store_transposed<'a, E: Element>(
    s: Avx512,
    sums: &[f32],
    width: usize,
    count: usize,
    factors: &[f32; SIDE],
    mut row: impl FnMut(usize) -> &'a mut [E],
) {
    for first in (0..count).step_by(16) {
        let factor = s.load(&factors[first..]);
        for column in (0..width).step_by(16) {
            // SAFETY: a processor with tiles has AVX-512.
            let mut words = unsafe { [_mm512_setzero_si512(); 16] };
            for (i, words) in words.iter_mut().enumerate().take(width - column) {
                let sums = s.load(&sums[(column + i) * SIDE + first..]);
                // SAFETY: as above.
                *words = unsafe { _mm512_castps_si512(s.mul(sums, factor)) };
            }
            // SAFETY: as above.
            unsafe { transpose(&mut words) };
            for (i, words) in words.iter().enumerate().take(count - first) {
                // SAFETY: as above.
                s.store_up_to(&mut row(first + i)[column..], unsafe { _mm512_castsi512_ps(*words) });
            }
        }
    }
}
