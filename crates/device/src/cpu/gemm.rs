//! Matrix products: `C[m, n] = sum over k of A(m, k) * B(n, k)`, f32 accumulation, result handed row by row to an epilogue.
//!
//! Both operands are packed into panels: A in panels of `MR` rows, B in panels of `NR` columns, so that the inner loop
//! reads both in order. B is packed first, by all threads; of A each thread packs as many rows as its second-level cache
//! holds, and multiplies them with all of B at once, so that packed rows never go to memory. One 32-bit *unit* of a panel
//! is an f32 (which bf16 are widened to), or where `vdpbf16ps` is used a pair of bf16 that are neighbours in k, which is
//! what it consumes. The micro-kernel keeps an MR x NR tile in registers (8 x 48 with AVX-512: 24 accumulators, 3 columns,
//! 1 broadcast) over a whole block of k.
//!
//! Every element of C is summed by one thread in one order that depends on the shape alone.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

use super::amx::{self, Tiles, Upper};
use super::buffer::Shards;
use super::pack::{Matrix, pack, pack_panels, pack_tiles};
use super::simd::{
    Avx512, Isa, Portable, Simd, dispatch, prefetch, prefetch_l2, with_avx512, with_avx512_bf16,
};
use super::soon::Soon;
use super::{CpuDevice, Scratch};
use crate::{DType, Element, f16};

/// What happens to finished rows of the product.
pub(super) trait Epilogue: Sync {
    /// Receives `C[row, col .. col + acc.len()]`. Calls for different (row, col) come from different threads.
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]);
    /// Fetches what [`Epilogue::row`] is going to write, `len` elements, while the row is computed.
    fn prefetch(&self, row: usize, col: usize, len: usize);
}

/// Units of k in one block; packed panels of a block stay in the L2 cache.
const KC: usize = 1024;
/// Units in a packed super-block of B: 8 MiB, a part of the L3 cache.
const PACKED_UNITS: usize = 2 << 20;
/// Most sums of a super-block that wait for the next block of k.
const PARTIAL_SUMS: usize = 4 << 20;
/// Tasks for each thread at least, so that threads finish together. Each packs its rows of A again.
const TASKS: usize = 2;
/// Units of k by which a panel of A, and one of B, are fetched to the first-level cache ahead of their use.
const A_AHEAD: usize = 16;
const B_AHEAD: usize = 8;

/// Sizes of the register tile, and how units are made, for one instruction set and element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) mr: usize,
    pub(super) nr: usize,
    /// Elements of k in a unit.
    pub(super) per_unit: usize,
    /// Units that panels have a multiple of. Where it is above 1, rows of A lie in tiles.
    pub(super) step: usize,
    /// Most units for which a panel of B is multiplied with all rows at hand before its next ones are.
    pub(super) block: usize,
    /// Units of A that a thread packs and works through per panel of B: a part of its L2 cache.
    group: usize,
}

impl Tile {
    /// Panels in registers of vectors.
    const fn vectors(mr: usize, nr: usize, per_unit: usize) -> Tile {
        Tile { mr, nr, per_unit, step: 1, block: usize::MAX, group: 64 << 10 }
    }

    /// Tile registers read 64 bytes a cycle, more than the second-level cache gives: a panel of B stays in the first level for
    /// 32 KiB of it, while rows of A come from the second.
    const TILES: Tile = Tile {
        mr: amx::SIDE,
        nr: amx::SIDE,
        per_unit: 2,
        step: amx::STEP,
        block: 16 * amx::STEP,
        group: 128 << 10,
    };

    /// For a product of so few rows: as many rows as there are, so that none is computed for nothing, and where one panel has
    /// all of them, no blocks of k.
    pub(super) fn for_rows(self, m: usize) -> Tile {
        let smaller: &[usize] = if self.step > 1 { &[amx::ROWS] } else { &[1, 2, 4] };
        let mr = smaller.iter().copied().find(|mr| *mr >= m).unwrap_or(self.mr).min(self.mr);
        Tile { mr, block: if m <= mr { usize::MAX } else { self.block }, ..self }
    }

    /// Whether all rows of a product can be multiplied in one pass over the weights: the L2 cache holds a block of k of them.
    /// More go group by group, as in training.
    pub(super) fn are_few(&self, m: usize, k: usize) -> bool {
        m.next_multiple_of(self.mr) * self.units(k_block(*self, k)) <= 2 * self.group
    }

    /// Units of so many elements of k.
    pub(super) fn units(&self, k: usize) -> usize {
        k.div_ceil(self.per_unit).next_multiple_of(self.step)
    }

    /// Packs rows `is` and columns `ks` of A on this thread.
    pub(super) fn pack_rows<E: Element>(
        &self,
        isa: Isa,
        a: Matrix<E>,
        is: Range<usize>,
        ks: Range<usize>,
        out: &mut [u32],
    ) {
        if self.step > 1 {
            // SAFETY: a processor with tiles has AVX-512.
            unsafe { pack_tiles(a, is, ks, self.mr, out) };
        } else {
            pack_panels(isa, a, is, ks, self.mr, self.per_unit, out);
        }
    }
}

/// The tile for operands of `dtype`.
pub(super) fn tile(isa: Isa, dtype: DType) -> Tile {
    match isa {
        Isa::Amx if dtype == DType::Bf16 => Tile::TILES,
        Isa::Avx512Bf16 => Tile::vectors(8, 48, if dtype == DType::Bf16 { 2 } else { 1 }),
        Isa::Avx512 | Isa::Amx => Tile::vectors(8, 48, 1),
        Isa::Avx2 => Tile::vectors(6, 16, 1),
        Isa::Portable => Tile::vectors(4, 8, 1),
    }
}

/// Elements of k in each of several equal blocks, whole steps and an even number.
pub(super) fn k_block(t: Tile, k: usize) -> usize {
    k.div_ceil(k.div_ceil(KC * t.per_unit).max(1)).next_multiple_of(t.per_unit * t.step).next_multiple_of(2)
}

/// How a product is cut into blocks.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    /// Rows and columns of a super-block, multiples of the tile.
    m: usize,
    n: usize,
    /// Elements of k in a block.
    k: usize,
}

fn blocks(t: Tile, m: usize, n: usize, k: usize) -> Blocks {
    let kc = k_block(t, k);
    let side =
        |size: usize, step: usize, most: usize| size.next_multiple_of(step).min((most / step).max(1) * step);
    // With several blocks of k, a super-block's partial sums are bounded too.
    if kc < k {
        let n = side(n, t.nr, PACKED_UNITS / KC);
        return Blocks { m: side(m, t.mr, PARTIAL_SUMS / n), n, k: kc };
    }
    let n = side(n, t.nr, PACKED_UNITS / t.units(kc).max(1));
    Blocks { m: m.next_multiple_of(t.mr), n, k: kc }
}

/// The right operand of a product, in whatever form.
pub(super) trait Operand: Sync {
    /// Words of scratch for a super-block of that many words.
    fn scratch(&self, words: usize) -> usize {
        words
    }
    /// Prepares columns `cols` and elements `ks` in `scratch`, on all threads.
    fn prepare(&self, device: &CpuDevice, cols: Range<usize>, ks: Range<usize>, t: Tile, scratch: &mut [u32]);
    /// What was prepared, which begins with column `col` and element `k`.
    fn panels<'a>(&'a self, scratch: &'a [u32], _col: usize, _k: usize, units: usize, t: Tile) -> Panels<'a> {
        Panels { data: scratch, stride: units * t.nr, start: 0, next: units * t.nr }
    }
}

impl<E: Element> Operand for Matrix<'_, E> {
    fn prepare(
        &self,
        device: &CpuDevice,
        cols: Range<usize>,
        ks: Range<usize>,
        t: Tile,
        scratch: &mut [u32],
    ) {
        let words = cols.len().next_multiple_of(t.nr) * t.units(ks.len());
        pack(device, *self, cols, ks, t.nr, t.per_unit, &mut scratch[..words]);
    }
}

/// Computes the product and calls `epilogue` once for every part of every row.
pub(super) fn gemm<E: Element, P: Epilogue>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    a: Matrix<E>,
    b: Matrix<E>,
    epilogue: &P,
) {
    product(device, tile(device.isa, E::DTYPE), (m, n, k), a, &b, epilogue);
}

/// [`gemm`] with any right operand, over units of `t`.
pub(super) fn product<E: Element, B: Operand, P: Epilogue>(
    device: &CpuDevice,
    t: Tile,
    (m, n, k): (usize, usize, usize),
    a: Matrix<E>,
    b: &B,
    epilogue: &P,
) {
    if m == 0 || n == 0 {
        return;
    }
    let step = blocks(t, m, n, k);
    let k_blocks = k.div_ceil(step.k).max(1);
    let units = t.units(step.k);
    let a_panels = (t.group / (units * t.mr).max(1)).max(1);
    let group = a_panels * t.mr * units;
    // Sums of a super-block, or of a thread's rows and one panel of B.
    let own = a_panels * t.mr * t.nr;
    let partial = match k_blocks {
        2.. => step.m * step.n,
        _ if units > t.block => device.threads() * own,
        _ => 0,
    };
    let mut workspace = device.workspace();
    let [packed_a, scratch, partials] = workspace.take([
        (Scratch::PackedA, device.threads() * group),
        (Scratch::PackedB, b.scratch(step.n * units)),
        (Scratch::Partials, partial),
    ]);
    let (packed_a, partials) = (Shards::new(packed_a), Shards::new(bytemuck::cast_slice_mut(partials)));
    let mut in_scratch = None;
    for n0 in (0..n).step_by(step.n) {
        let cols = n0..(n0 + step.n).min(n);
        for m0 in (0..m).step_by(step.m) {
            let rows = m0..(m0 + step.m).min(m);
            for k_block in 0..k_blocks {
                let ks = k_block * step.k..((k_block + 1) * step.k).min(k);
                let units = t.units(ks.len());
                if in_scratch != Some((n0, k_block)) {
                    b.prepare(device, cols.clone(), ks.clone(), t, scratch);
                    in_scratch = Some((n0, k_block));
                }
                let panels = b.panels(scratch, n0, ks.start, units, t);
                each_group(device, t, rows.len(), cols.len(), a_panels, |here, next, b_panels, thread| {
                    let of = |part: Range<usize>| rows.start + part.start..rows.start + part.end;
                    let (start, soon, rows) = (here.start, next.map(&of), of(here));
                    let len = rows.len().next_multiple_of(t.mr) * units;
                    // SAFETY: each thread has its own part.
                    let packed = unsafe { packed_a.range(thread * group..thread * group + len) };
                    t.pack_rows(device.isa, a, rows.clone(), ks.clone(), packed);
                    let alone = k_blocks == 1;
                    let block = Block {
                        tile: t,
                        units,
                        rows,
                        cols: cols.clone(),
                        first: k_block == 0,
                        last: k_block + 1 == k_blocks,
                        a: packed,
                        b: panels,
                        soon: soon.map(|rows| a.soon(rows, ks.clone())),
                        sums_from: if alone {
                            thread * own
                        } else {
                            start * cols.len().next_multiple_of(t.nr)
                        },
                        one_panel: alone,
                    };
                    block.run(device.isa, b_panels, partials, epilogue);
                });
            }
        }
    }
}

/// Calls `task(rows, rows that the thread is likely to have next, panels of B, thread)` on all threads: rows in groups of at most
/// `a_panels` panels of A, by all panels of B or, where there are few groups, by some. Every thread has as many tasks as every
/// other, of nearly equal sizes.
fn each_group(
    device: &CpuDevice,
    t: Tile,
    rows: usize,
    cols: usize,
    a_panels: usize,
    task: impl Fn(Range<usize>, Option<Range<usize>>, Range<usize>, usize) + Sync,
) {
    let (all_a, all_b, threads) = (rows.div_ceil(t.mr), cols.div_ceil(t.nr), device.threads());
    let groups = match all_a.div_ceil(a_panels) {
        few if few < threads => few,
        many => many.next_multiple_of(threads).min(all_a),
    };
    let parts = (TASKS * threads).div_ceil(groups);
    let parts = if groups < threads { parts.next_multiple_of(threads) } else { parts }.min(all_b);
    let part = |all: usize, i: usize, of: usize| all * i / of..all * (i + 1) / of;
    let tasks = groups * parts;
    let rows = |at: usize| {
        let panels = part(all_a, at / parts, groups);
        panels.start * t.mr..(panels.end * t.mr).min(rows)
    };
    device.pool.for_each(tasks, |at, thread| {
        let next = (at + threads < tasks).then(|| rows(at + threads));
        task(rows(at), next, part(all_b, at % parts, parts), thread);
    });
}

/// Workspace of the largest product over `rows` rows whose widest side is `widest`.
pub(super) fn workspace_bytes<E: Element>(device: &CpuDevice, rows: usize, widest: usize) -> usize {
    let t = tile(device.isa, E::DTYPE);
    let longest = rows.max(widest);
    let packed = (widest.next_multiple_of(t.nr) * KC).min(PACKED_UNITS);
    let sums = longest.next_multiple_of(t.mr) * widest.next_multiple_of(t.nr);
    let partials = if longest > KC * t.per_unit { sums.min(PARTIAL_SUMS) } else { 0 };
    // Sums of the rows of a group where it has the shortest k of those that are cut into blocks.
    let own = if t.block < KC { t.group / t.block * t.nr } else { 0 };
    4 * (device.threads() * t.group + packed + partials.max(device.threads() * own))
}

/// Panels of B over one block of k: that of panel `p` begins at `p * stride + start`. What is used after it begins `next` later.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) data: &'a [u32],
    pub(super) stride: usize,
    pub(super) start: usize,
    pub(super) next: usize,
}

/// Packed operands: some rows of A, and a super-block of B.
pub(super) struct Block<'a> {
    pub(super) tile: Tile,
    /// Units of A.
    pub(super) units: usize,
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    /// First and last block of k: start from 0, or finish with the epilogue.
    pub(super) first: bool,
    pub(super) last: bool,
    pub(super) a: &'a [u32],
    pub(super) b: Panels<'a>,
    /// What is packed after this.
    pub(super) soon: Option<Soon>,
    /// Where the sums of these rows begin among those that wait for the next block of k, and whether there is only room for
    /// those of one panel of B.
    pub(super) sums_from: usize,
    pub(super) one_panel: bool,
}

impl Block<'_> {
    /// Multiplies all rows with some panels of B.
    fn run<P: Epilogue>(&self, isa: Isa, b: Range<usize>, partials: Shards<f32>, epilogue: &P) {
        let a = 0..self.panels().0;
        match isa {
            // SAFETY: the processor has AVX-512 and tiles.
            Isa::Amx if self.tile.step > 1 => unsafe {
                let tiles = Tiles::new();
                with_avx512(
                    #[inline(always)]
                    |s| self.task(s, &tiles, a, b, partials, epilogue),
                )
            },
            // SAFETY: the processor has AVX-512 BF16.
            Isa::Avx512Bf16 if self.tile.per_unit == 2 => unsafe {
                with_avx512_bf16(
                    #[inline(always)]
                    |s| self.task(s, &Vectors::<Dot, 8, 3>::NEW, a, b, partials, epilogue),
                )
            },
            // SAFETY: the processor has AVX-512.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe {
                with_avx512(
                    #[inline(always)]
                    |s| self.task(s, &Vectors::<Fma, 8, 3>::NEW, a, b, partials, epilogue),
                )
            },
            Isa::Avx2 => {
                dispatch!(Isa::Avx2, s => self.task(s, &Vectors::<Fma, 6, 2>::NEW, a, b, partials, epilogue))
            }
            Isa::Portable => self.task(Portable, &Vectors::<Fma, 4, 2>::NEW, a, b, partials, epilogue),
        }
    }

    /// Panels of A and of B.
    pub(super) fn panels(&self) -> (usize, usize) {
        (self.rows.len().div_ceil(self.tile.mr), self.cols.len().div_ceil(self.tile.nr))
    }

    #[inline(always)]
    pub(super) fn task<S: Simd, I: Inner<S>, P: Epilogue>(
        &self,
        s: S,
        inner: &I,
        a_panels: Range<usize>,
        b_panels: Range<usize>,
        partials: Shards<f32>,
        epilogue: &P,
    ) {
        let (mr, nr, units) = (I::MR, I::NR, self.units);
        let in_block =
            units.div_ceil(units.div_ceil(self.tile.block).max(1)).next_multiple_of(self.tile.step);
        let mut out = I::SUMS;
        let out = out.as_mut();
        let a_count = self.rows.len().div_ceil(mr);
        let all = self.b.data;
        let (first_panel, panels) = (b_panels.start, b_panels.len() * a_panels.len());
        for bp in b_panels {
            let start = bp * self.b.stride + self.b.start;
            for from in (0..units.max(1)).step_by(in_block.max(1)) {
                let count = in_block.min(units - from);
                let (first, last) = (self.first && from == 0, self.last && from + count == units);
                let word = start + from / I::IN_WORD * nr;
                let b = &all[word..word + count.div_ceil(I::IN_WORD) * nr];
                let next = if from + count < units { word + b.len() } else { start + self.b.next };
                for ap in a_panels.clone() {
                    if let (0, Some(soon)) = (from, &self.soon) {
                        let part = (bp - first_panel) * a_panels.len() + ap - a_panels.start;
                        soon.fetch_part(part, panels);
                    }
                    let a = &self.a[(ap * units + from) * mr..][..count * mr];
                    // What comes next of B is brought to the L2 cache while this is in use, a share with each panel of A.
                    let share = b.len().div_ceil(a_panels.len());
                    let at = (next + (ap - a_panels.start) * share).min(all.len());
                    let next = &all[at..(at + share).min(all.len())];
                    // What earlier blocks of k gave.
                    let keep =
                        self.sums_from + (if self.one_panel { ap } else { bp * a_count + ap }) * mr * nr;
                    let keep = keep..keep + mr * nr;
                    if in_block >= units && !(first && last) {
                        partials.prefetch(keep.end, mr * nr);
                    }
                    if !last {
                        // SAFETY: every (ap, bp) belongs to one task.
                        let sums = unsafe { partials.range(keep) };
                        inner.multiply(s, a, b, next, !first, sums);
                        continue;
                    }
                    let sums = match first {
                        true => &mut *out,
                        // SAFETY: as above.
                        false => unsafe { partials.range(keep) },
                    };
                    let (row, col) = (self.rows.start + ap * mr, self.cols.start + bp * nr);
                    let (height, width) = (mr.min(self.rows.end - row), nr.min(self.cols.end - col));
                    for i in 0..height {
                        epilogue.prefetch(row + i, col, width);
                    }
                    inner.multiply(s, a, b, next, !first, sums);
                    for i in 0..height {
                        epilogue.row(s, row + i, col, &sums[i * nr..i * nr + width]);
                    }
                }
            }
        }
    }
}

/// Calls `task(panels of A, panels of B, thread)` on all threads: at most `group` A panels, which should fit the L2 cache, by
/// a few B panels.
pub(super) fn each_task(
    device: &CpuDevice,
    (a_panels, b_panels): (usize, usize),
    group: usize,
    task: impl Fn(Range<usize>, Range<usize>, usize) + Sync,
) {
    let groups = a_panels.div_ceil(group.clamp(1, a_panels));
    let group = a_panels.div_ceil(groups);
    let span = span(device, b_panels * groups);
    let spans = b_panels.div_ceil(span);
    device.pool.for_neighbours(groups * spans, |at, thread| {
        let a = at / spans * group..((at / spans + 1) * group).min(a_panels);
        let b = at % spans * span..((at % spans + 1) * span).min(b_panels);
        task(a, b, thread);
    });
}

/// B panels of a task of [`each_task`]: few enough that threads finish together, enough that a task is not all overhead.
fn span(device: &CpuDevice, panels: usize) -> usize {
    (panels / (16 * device.threads())).clamp(1, 4)
}

/// The B panel that a thread begins with in [`each_task`], of so many, where all panels of A are in one group.
pub(super) fn first_panel(device: &CpuDevice, b_panels: usize, thread: usize) -> usize {
    let span = span(device, b_panels);
    device.pool.share(b_panels.div_ceil(span), thread).start * span
}

/// Multiply-accumulate of one unit.
pub(super) trait Mac<S: Simd>: Copy {
    /// Numbers in a unit.
    const PER_UNIT: usize = 1;
    /// Units of B in a word of its panels.
    const IN_WORD: usize = 1;

    /// Unit `which` of the columns from `first` on, `LANES` of them, in a panel's words of all columns.
    #[inline(always)]
    fn load(s: S, words: &[u32], first: usize, _which: usize) -> S::F {
        s.load(bytemuck::cast_slice(&words[first..]))
    }

    /// `c + a * b`, each lane's unit on its own.
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F;
}

/// Units are f32.
#[derive(Clone, Copy)]
pub(super) struct Fma;

impl<S: Simd> Mac<S> for Fma {
    #[inline(always)]
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
        s.fma(a, b, c)
    }
}

/// Units of A are f32, those of B are bf16, two in a word, which are widened when they are loaded: one instruction each, where
/// bf16 that lie on their own would take two.
#[derive(Clone, Copy)]
pub(super) struct Widen;

impl<S: Simd> Mac<S> for Widen {
    const IN_WORD: usize = 2;

    #[inline(always)]
    fn load(s: S, words: &[u32], first: usize, which: usize) -> S::F {
        let words = &words[first..];
        if which == 0 { s.load_low(words) } else { s.load_high(words) }
    }

    #[inline(always)]
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
        s.fma(a, b, c)
    }
}

/// Units of A are f32, those of B are f16, which are widened when they are loaded. In the words of all columns there is first one
/// unit of all columns and then the other.
#[derive(Clone, Copy)]
pub(super) struct WidenF16;

impl<S: Simd> Mac<S> for WidenF16 {
    const IN_WORD: usize = 2;

    #[inline(always)]
    fn load(s: S, words: &[u32], first: usize, which: usize) -> S::F {
        let halves: &[f16] = bytemuck::cast_slice(words);
        s.load_f16(&halves[which * words.len() + first..])
    }

    #[inline(always)]
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
        s.fma(a, b, c)
    }
}

/// Units are pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Dot;

impl Mac<Avx512> for Dot {
    const PER_UNIT: usize = 2;

    #[inline(always)]
    fn mac(_: Avx512, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: only used through `with_avx512_bf16`; the types only rename 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                c,
                std::mem::transmute::<__m512, __m512bh>(a),
                std::mem::transmute::<__m512, __m512bh>(b),
            )
        }
    }
}

/// Multiplies a panel of A with one of B.
pub(super) trait Inner<S: Simd> {
    /// Rows and columns of the result.
    const MR: usize;
    const NR: usize;
    /// Units of B in a word of its panels.
    const IN_WORD: usize;
    /// Room for a result.
    type Sums: AsMut<[f32]>;
    const SUMS: Self::Sums;

    /// `out[MR, NR] = a * b`, or with `add` `out += a * b`. Meanwhile `next` is brought to the second-level cache.
    fn multiply(&self, s: S, a: &[u32], b: &[u32], next: &[u32], add: bool, out: &mut [f32]);
}

/// `MR` rows and `NV` registers of columns of vectors.
pub(super) struct Vectors<M, const MR: usize, const NV: usize>(PhantomData<M>);

impl<M, const MR: usize, const NV: usize> Vectors<M, MR, NV> {
    pub(super) const NEW: Self = Vectors(PhantomData);
}

impl<S: Simd, M: Mac<S>, const MR: usize, const NV: usize> Inner<S> for Vectors<M, MR, NV> {
    const MR: usize = MR;
    const NR: usize = NV * S::LANES;
    const IN_WORD: usize = M::IN_WORD;
    type Sums = [f32; 8 * 48];
    const SUMS: Self::Sums = [0.0; 8 * 48];

    #[inline(always)]
    fn multiply(&self, s: S, a: &[u32], b: &[u32], next: &[u32], add: bool, out: &mut [f32]) {
        micro_kernel::<S, M, MR, NV>(s, a, b, next, add, out);
    }
}

/// As many sums as the tile registers hold, each row on cache lines of its own.
#[repr(align(64))]
pub(super) struct TileSums([f32; amx::SIDE * amx::SIDE]);

impl AsMut<[f32]> for TileSums {
    #[inline(always)]
    fn as_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

impl Inner<Avx512> for Upper<'_> {
    const MR: usize = amx::ROWS;
    const NR: usize = amx::SIDE;
    const IN_WORD: usize = 1;
    type Sums = TileSums;
    const SUMS: Self::Sums = TileSums([0.0; amx::SIDE * amx::SIDE]);

    #[inline(always)]
    fn multiply(&self, _: Avx512, a: &[u32], b: &[u32], next: &[u32], add: bool, out: &mut [f32]) {
        Upper::multiply(self, a, b, add, out, next);
    }
}

impl Inner<Avx512> for Tiles {
    const MR: usize = amx::SIDE;
    const NR: usize = amx::SIDE;
    const IN_WORD: usize = 1;
    type Sums = TileSums;
    const SUMS: Self::Sums = TileSums([0.0; amx::SIDE * amx::SIDE]);

    #[inline(always)]
    fn multiply(&self, _: Avx512, a: &[u32], b: &[u32], next: &[u32], add: bool, out: &mut [f32]) {
        Tiles::multiply(self, a, b, add, out, next);
    }
}

/// `out[MR, NV * LANES] = a * b`, or with `add` `out += a * b`, over packed panels `a` [units, MR] and
/// `b` [units / M::IN_WORD, NV * LANES]. Meanwhile `next` is brought to the second-level cache.
#[inline(always)]
fn micro_kernel<S: Simd, M: Mac<S>, const MR: usize, const NV: usize>(
    s: S,
    a: &[u32],
    b: &[u32],
    next: &[u32],
    add: bool,
    out: &mut [f32],
) {
    let nr = NV * S::LANES;
    let (mut next, next_step) = match next {
        [] => (b.as_ptr(), 0),
        _ => (next.as_ptr(), next.len().div_ceil((b.len() / nr).max(1))),
    };
    let a: &[f32] = bytemuck::cast_slice(a);
    let mut acc = [[s.zero(); NV]; MR];
    if add {
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v = s.load(&out[i * nr + j * S::LANES..]);
            }
        }
    }
    // With few panels of A a share is several cache lines a step.
    let lines = (4 * next_step).div_ceil(64);
    let units = a.chunks_exact(M::IN_WORD * MR);
    let rest = units.remainder();
    for (a, b) in units.zip(b.chunks_exact(nr)) {
        prefetch_l2(next);
        if lines > 1 {
            prefetch_l2(next.wrapping_byte_add(64));
        }
        if lines > 2 {
            prefetch_l2(next.wrapping_byte_add(128));
        }
        prefetch(a.as_ptr().wrapping_add(A_AHEAD * MR));
        // The processor would fetch them too, but not early enough where two streams come from the second-level cache.
        for at in (0..nr).step_by(16) {
            prefetch(b.as_ptr().wrapping_add(B_AHEAD * nr + at));
        }
        next = next.wrapping_add(next_step);
        for which in 0..M::IN_WORD {
            unit::<S, M, MR, NV>(s, &a[which * MR..], b, which, &mut acc);
        }
    }
    if M::IN_WORD > 1 && !rest.is_empty() {
        unit::<S, M, MR, NV>(s, rest, &b[b.len() - nr..], 0, &mut acc);
    }
    for (i, row) in acc.iter().enumerate() {
        for (j, v) in row.iter().enumerate() {
            s.store(&mut out[i * nr + j * S::LANES..], *v);
        }
    }
}

/// Multiplies one unit of `MR` rows with unit `which` of the words of a panel.
#[inline(always)]
fn unit<S: Simd, M: Mac<S>, const MR: usize, const NV: usize>(
    s: S,
    a: &[f32],
    b: &[u32],
    which: usize,
    acc: &mut [[S::F; NV]; MR],
) {
    // A closure would not always be inlined, and then it lacks the instructions.
    let mut columns = [s.zero(); NV];
    for (j, column) in columns.iter_mut().enumerate() {
        *column = M::load(s, b, j * S::LANES, which);
    }
    for (row, a) in acc.iter_mut().zip(a) {
        let a = s.splat(*a);
        for (v, b) in row.iter_mut().zip(columns) {
            *v = M::mac(s, a, b, *v);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::cpu::CpuOptions;
    use crate::rng::{Purpose, Stream};

    fn random<E: Element>(len: usize, what: usize) -> Vec<E> {
        let s = Stream::new(1, Purpose::Init, what, 0);
        (0..len).map(|i| E::from_f32(s.uniform((i / 1024) as u64, i % 1024) - 0.5)).collect()
    }

    struct Collect<'a>(Shards<'a, f32>, usize);
    impl Epilogue for Collect<'_> {
        fn row<S: Simd>(&self, _: S, row: usize, col: usize, acc: &[f32]) {
            let start = row * self.1 + col;
            // SAFETY: every part of every row comes once.
            for (o, v) in unsafe { self.0.range(start..start + acc.len()) }.iter_mut().zip(acc) {
                assert!(o.is_nan(), "element written twice");
                *o = *v;
            }
        }
        fn prefetch(&self, _: usize, _: usize, _: usize) {}
    }

    fn product<E: Element>(
        device: &CpuDevice,
        (m, n, k): (usize, usize, usize),
        ac: bool,
        bc: bool,
    ) -> Vec<f32> {
        let (a, b) = (random::<E>(m * k, 1), random::<E>(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        gemm(
            device,
            (m, n, k),
            Matrix { data: &a, ld: if ac { k } else { m }, k_contiguous: ac },
            Matrix { data: &b, ld: if bc { k } else { n }, k_contiguous: bc },
            &Collect(Shards::new(&mut c), n),
        );
        c
    }

    fn check<E: Element>(device: &CpuDevice, (m, n, k): (usize, usize, usize), ac: bool, bc: bool) {
        let c = product::<E>(device, (m, n, k), ac, bc);
        let (a, b) = (random::<E>(m * k, 1), random::<E>(n * k, 2));
        for i in (0..m).step_by(1 + m / 40) {
            for j in (0..n).step_by(1 + n / 40) {
                let mut exact = 0.0;
                for l in 0..k {
                    let a = if ac { a[i * k + l] } else { a[l * m + i] };
                    let b = if bc { b[j * k + l] } else { b[l * n + j] };
                    exact += a.to_f32() as f64 * b.to_f32() as f64;
                }
                // Products of halves in [-0.5, 0.5], summed in f32.
                let bound = 1e-6 * (k as f64).max(4.0);
                let got = c[i * n + j] as f64;
                assert!(
                    (got - exact).abs() < bound,
                    "{:?} {m}x{n}x{k} {ac} {bc} ({i},{j}): {got} {exact}",
                    device.isa
                );
            }
        }
    }

    #[test]
    fn products_of_every_layout_match_the_definition() {
        for isa in Isa::available() {
            let device = CpuDevice::new(CpuOptions { threads: Some(2), isa: Some(isa), pin: false }).unwrap();
            for shape in [
                (1, 1, 1),
                (8, 48, 2),
                (7, 47, 33),
                (13, 100, 64),
                (50, 31, 17),
                (100, 200, 5000),
                (16, 49, 4097),
            ] {
                for (ac, bc) in [(true, true), (true, false), (false, false), (false, true)] {
                    check::<f32>(&device, shape, ac, bc);
                    check::<bf16>(&device, shape, ac, bc);
                }
            }
        }
    }

    #[test]
    fn super_blocks_on_every_side() {
        let device = CpuDevice::new(CpuOptions { threads: Some(2), ..Default::default() }).unwrap();
        check::<bf16>(&device, (40, 9000, 600), true, true);
        check::<bf16>(&device, (9000, 100, 600), false, false);
        check::<bf16>(&device, (4500, 4700, 1100), true, false);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for isa in Isa::available() {
            let run = |threads| {
                let device =
                    CpuDevice::new(CpuOptions { threads: Some(threads), isa: Some(isa), pin: false })
                        .unwrap();
                (
                    product::<bf16>(&device, (100, 150, 2500), true, false),
                    product::<f32>(&device, (61, 83, 70), true, true),
                )
            };
            let one = run(1);
            assert!(one == run(2) && one == run(3));
        }
    }
}
