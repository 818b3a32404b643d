//! Products of many rows with panels of single bf16.
//!
//! Widening a register of bf16 takes two instructions on the ports that multiply-adds need, 6 beside 24 in each step of
//! k for a tile of rows. So a piece of a panel is widened once, into the L1 cache, and then multiplied with many tiles of
//! rows; their sums go on where the piece before left them, in the order of k, which gives them the bits that a tile alone
//! has in [`super::float`].

use std::ops::Range;

use half::bf16;

use super::Finish;
use super::float::Panels;
use crate::Element;
use crate::cpu::buffer::Shards;
use crate::cpu::elementwise::convert;
use crate::cpu::gemm::{Epilogue, Fma, Tile, micro_kernel};
use crate::cpu::pack::{Matrix, pack};
use crate::cpu::simd::{Simd, dispatch};
use crate::cpu::{CpuDevice, Scratch};

/// Elements of k in a piece.
const PIECE: usize = 128;
/// Bytes of rows that a thread multiplies with panel after panel: a part of its L2 cache.
const NEAR: usize = 512 << 10;
/// Tiles of rows that are worth a piece's widening.
const WORTH: usize = 4;
/// Where fewer are near with the whole of k: elements of k that are taken at a time, and panels that take turns in them.
const DEEP: usize = 1024;
const SPAN: usize = 4;
/// Words of packed rows at a time: 8 MiB, a part of the L3 cache.
const PACKED: usize = 2 << 20;

/// `x[m, k] * w^T`.
pub(super) fn multiply<E: Element>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    x: Matrix<E>,
    w: &Panels<bf16>,
    finish: &Finish,
) {
    let Tile { mr, nr, .. } = w.tile;
    let fits = NEAR / (4 * mr * k);
    let (depth, group, span) =
        if fits >= WORTH { (k, fits, 1) } else { (DEEP.min(k), NEAR / (4 * mr * DEEP), SPAN) };
    let most = (PACKED / (k * mr) / group * group).max(group).min(m.div_ceil(mr));
    let (group, threads) = (group.min(most), device.threads());
    let mut workspace = device.workspace();
    let [packed, pieces, sums] = workspace.take([
        (Scratch::PackedA, most * mr * k),
        (Scratch::PackedB, threads * PIECE * nr),
        (Scratch::Partials, threads * group * span * mr * nr),
    ]);
    let (pieces, sums) =
        (Shards::new(bytemuck::cast_slice_mut(pieces)), Shards::new(bytemuck::cast_slice_mut(sums)));
    for first in (0..m).step_by(most * mr) {
        let rows = first..(first + most * mr).min(m);
        pack(device, x, rows.clone(), 0..k, mr, 1, packed);
        let product = Product { x: packed, w: w.data(), rows, n, k, depth, span, finish };
        let (tiles, panels) = (product.rows.len().div_ceil(mr), n.div_ceil(nr));
        let spans = panels.div_ceil(span);
        device.pool.for_neighbours(tiles.div_ceil(group) * spans, |task, thread| {
            let tiles = task / spans * group..((task / spans + 1) * group).min(tiles);
            let panels = task % spans * span..((task % spans + 1) * span).min(panels);
            let own = |words: usize| thread * words..(thread + 1) * words;
            // SAFETY: each thread has its own piece and sums.
            let (piece, sums) =
                unsafe { (pieces.range(own(PIECE * nr)), sums.range(own(group * span * mr * nr))) };
            match mr {
                8 => dispatch!(device.isa, s => product.task::<_, 8, 3>(s, tiles, panels, piece, sums)),
                6 => dispatch!(device.isa, s => product.task::<_, 6, 2>(s, tiles, panels, piece, sums)),
                _ => dispatch!(device.isa, s => product.task::<_, 4, 2>(s, tiles, panels, piece, sums)),
            }
        });
    }
}

struct Product<'a> {
    /// Packed rows `[tile][k][MR]`, and panels `[panel][k][NR]`.
    x: &'a [u32],
    w: &'a [bf16],
    /// Which rows of the product.
    rows: Range<usize>,
    n: usize,
    k: usize,
    /// Elements of k before the next panel's turn, and panels in a task.
    depth: usize,
    span: usize,
    finish: &'a Finish<'a>,
}

impl Product<'_> {
    #[inline(always)]
    fn task<S: Simd, const MR: usize, const NV: usize>(
        &self,
        s: S,
        tiles: Range<usize>,
        panels: Range<usize>,
        piece: &mut [f32],
        sums: &mut [f32],
    ) {
        let (k, nr) = (self.k, NV * S::LANES);
        for k0 in (0..k).step_by(self.depth) {
            let k1 = (k0 + self.depth).min(k);
            for panel in panels.clone() {
                for p0 in (k0..k1).step_by(PIECE) {
                    let p1 = (p0 + PIECE).min(k1);
                    let wide = &mut piece[..(p1 - p0) * nr];
                    convert(s, &self.w[(panel * k + p0) * nr..(panel * k + p1) * nr], wide);
                    // The piece that comes next is fetched meanwhile, a share with each tile.
                    let next = if p1 == k1 { (panel + 1) * k + k0 % k } else { panel * k + p1 };
                    let next =
                        &self.w[(next * nr).min(self.w.len())..((next + PIECE) * nr).min(self.w.len())];
                    let share = next.len().div_ceil(tiles.len()).next_multiple_of(2);
                    for (i, tile) in tiles.clone().enumerate() {
                        let x = &self.x[(tile * k + p0) * MR..(tile * k + p1) * MR];
                        let at = (i * self.span + panel - panels.start) * MR * nr;
                        let sums = &mut sums[at..at + MR * nr];
                        let next = &next[(i * share).min(next.len())..((i + 1) * share).min(next.len())];
                        if p1 == k {
                            self.each_row::<MR>(tile, |_, row| self.finish.prefetch(row, panel * nr, nr));
                        }
                        micro_kernel::<S, Fma, u32, MR, NV>(
                            s,
                            x,
                            bytemuck::cast_slice(wide),
                            bytemuck::cast_slice(next),
                            p0 > 0,
                            sums,
                        );
                        if p1 == k {
                            let width = nr.min(self.n - panel * nr);
                            self.each_row::<MR>(
                                tile,
                                #[inline(always)]
                                |i, row| self.finish.row(s, row, panel * nr, &sums[i * nr..][..width]),
                            );
                        }
                    }
                }
            }
        }
    }

    /// Rows of a tile: which it is there, and which of the product.
    #[inline(always)]
    fn each_row<const MR: usize>(&self, tile: usize, mut f: impl FnMut(usize, usize)) {
        let first = self.rows.start + tile * MR;
        for i in 0..MR.min(self.rows.end - first) {
            f(i, first + i);
        }
    }
}
