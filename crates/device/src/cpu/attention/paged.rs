//! New tokens of many sequences over a cache of keys and values in pages of [`PAGE`] tokens (Kwon et al., 2023).
//!
//! A page holds, for each head, keys as columns, `[D][PAGE]`, and values as rows, `[PAGE][D]`. Scores then lie across
//! the lanes of a register, key by key, and so do the columns of the output: nothing is summed across lanes but a
//! query's sum of probabilities, once. Each score, each probability and each column of the output is summed in an order
//! that follows from the query's own position alone, since pages are walked from the first token on. So a query has the
//! same bits however many others are computed with it, and however a text was cut into pieces.
//!
//! Pages are read in words of 32 bits. In bf16 a word is two numbers that are neighbours in the direction of sums, `[D / 2][PAGE]`
//! and `[PAGE / 2][D]` words, as `vdpbf16ps` takes them and as they are widened with the fewest instructions; the last number
//! of an odd D lies alone behind them.

use std::arch::x86_64::*;

use half::bf16;

use super::{NOTHING, Rows, carve, carved};
use crate::cpu::amx::{ROWS, STEP, Strided, Tiles};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::{Dot, Fma, Mac, Widen};
use crate::cpu::pack::{Matrix, pack_panels};
use crate::cpu::simd::{Avx512, Isa, Simd, dispatch, prefetch_l2, with_avx512_bf16};
use crate::cpu::{CpuDevice, Scratch};
use crate::{DType, Element, PAGE, Placed};

/// Most queries of one head that walk over the pages together: so many that a page, which comes from the second-level cache or
/// farther away, is used for longer than it takes to come.
const QUERIES: usize = 24;
/// Of these so many at a time have their sums in registers.
const TILE: usize = 6;
/// Rows of a panel that has room for [`QUERIES`], of a width that panels are packed fast in and that is whole tiles.
const PANEL: usize = 32;
/// Keys and values of so many tokens and heads are appended by one thread.
const APPENDED: usize = 64;

/// Calls a function for the first of so many rows, at most [`TILE`] of them.
macro_rules! on_tile {
    ($rows:expr, $m:ident => $call:expr) => {
        on_tile!(@ $rows, $m => $call, 1 2 3 4 5)
    };
    (@ $rows:expr, $m:ident => $call:expr, $($count:literal)*) => {
        match $rows {
            $($count => {
                const $m: usize = $count;
                $call
            })*
            _ => {
                const $m: usize = TILE;
                $call
            }
        }
    };
}

/// [`crate::Device::attention_paged`].
pub(in crate::cpu) fn paged<E: Element>(
    device: &CpuDevice,
    heads: usize,
    width: usize,
    places: Placed<'_, CpuDevice>,
    qkv: &[E],
    k_pages: &mut [E],
    v_pages: &mut [E],
    out: &mut [E],
) {
    places.check(k_pages.len(), v_pages.len(), heads * width * PAGE);
    append(device, heads, width, &places, qkv, k_pages, v_pages);
    let groups = groups(&places, QUERIES);
    let (all, padded) = (heads * width, width.next_multiple_of(16));
    let in_tiles = in_tiles(device.isa, E::DTYPE, width);
    let pairs = in_tiles || device.isa == Isa::Avx512Bf16 && E::DTYPE == DType::Bf16;
    let per_unit = if pairs { 2 } else { 1 };
    let units = width.div_ceil(per_unit);
    let words = words(width);
    let mut workspace = device.workspace();
    let [scratch] = workspace.take([(Scratch::Attention, device.threads() * words)]);
    let (scratch, out) = (Shards::new(scratch), Shards::new(out));
    let (k_pages, v_pages) =
        (bytemuck::cast_slice::<E, u32>(k_pages), bytemuck::cast_slice::<E, u32>(v_pages));
    let block = width * PAGE / in_word::<E>();
    let tasks = heads * groups.len();
    device.pool.for_each(tasks, |task, thread| {
        // The last groups of a text have the most keys, so they come first.
        let task = tasks - 1 - task;
        let (h, group) = (task / groups.len(), &groups[task % groups.len()]);
        // SAFETY: each thread has its own scratch.
        let scratch = unsafe { scratch.range(thread * words..(thread + 1) * words) };
        let [p, q, panel, sums, rest] = carve(scratch, sizes(width));
        let rows = Matrix { data: &qkv[h * width..], ld: 3 * all, k_contiguous: true };
        let queries = group.row..group.row + group.count;
        let panel = &mut panel[..PANEL * units];
        if in_tiles {
            for (i, to) in queries.zip(panel.chunks_exact_mut(units)) {
                bytemuck::cast_slice_mut(to).copy_from_slice(&rows.data[i * rows.ld..][..width]);
            }
        } else {
            pack_panels(device.isa, rows, queries, 0..width, PANEL, per_unit, panel);
            let tiles = q.chunks_exact_mut(units * TILE).take(group.count.div_ceil(TILE));
            for (tile, q) in tiles.enumerate() {
                for (q, unit) in q.as_chunks_mut::<TILE>().0.iter_mut().zip(panel.as_chunks::<PANEL>().0) {
                    q.copy_from_slice(&unit[tile * TILE..][..TILE]);
                }
            }
        }
        let pages =
            |cache| Pages { cache, numbers: group.pages, first: h * block, step: heads * block, block };
        let head = Head {
            width,
            padded,
            position: group.position,
            q: bytemuck::cast_slice(if in_tiles { panel } else { q }),
            k: pages(k_pages),
            v: pages(v_pages),
        };
        let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
        let p = bytemuck::cast_slice_mut(p).as_chunks_mut().0;
        let results = head.attend_on(device.isa, E::DTYPE, group.count, p, sums, rest);
        for (i, sum) in results[..group.count].iter().enumerate() {
            // SAFETY: each query of each head is one task's.
            let out = unsafe {
                out.range((group.row + i) * all + h * width..(group.row + i) * all + (h + 1) * width)
            };
            let factor = 1.0 / sum;
            dispatch!(device.isa, s => scale_into(s, factor, &sums[i * padded..][..width], out));
        }
    });
}

/// Whether tile registers are used, for all queries alike: their order of sums is their own.
fn in_tiles(isa: Isa, dtype: DType, width: usize) -> bool {
    isa == Isa::Amx && dtype == DType::Bf16 && width.is_multiple_of(16)
}

/// Numbers in a word of a page.
fn in_word<E: Element>() -> usize {
    size_of::<u32>() / size_of::<E>()
}

/// Neighbours in a text whose last keys are in the same page.
struct Group<'a> {
    /// Row of the first in `qkv`, its position in its text, and how many there are.
    row: usize,
    position: usize,
    count: usize,
    pages: &'a [u32],
}

/// All rows in groups of at most so many.
fn groups<'a>(places: &Placed<'a, CpuDevice>, most: usize) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'_>> = Vec::with_capacity(places.rows);
    let mut row = 0;
    while row < places.rows {
        let (pages, position) = place(places, row);
        let count = neighbours(places, row, most.min(places.rows - row));
        groups.push(Group { row, position, count, pages });
        row += count;
    }
    groups
}

/// How many rows from `row` on, of `most` that there are, follow each other in a text and lie in the same page.
fn neighbours(places: &Placed<'_, CpuDevice>, row: usize, most: usize) -> usize {
    let (pages, position) = place(places, row);
    let follows = |n: usize| {
        let (others, at) = place(places, row + n);
        std::ptr::eq(others, pages) && at == position + n
    };
    let most = most.min(PAGE - position % PAGE);
    (1..most).find(|n| !follows(*n)).unwrap_or(most)
}

/// A row's pages, behind which there may be those of others, and its position.
fn place<'a>(places: &Placed<'a, CpuDevice>, row: usize) -> (&'a [u32], usize) {
    let [first, position] = [0, 1].map(|i| places.words[2 * row + i] as usize);
    (&places.words[first..], position)
}

/// Writes the new tokens' keys and values to their places.
fn append<E: Element>(
    device: &CpuDevice,
    heads: usize,
    width: usize,
    places: &Placed<'_, CpuDevice>,
    qkv: &[E],
    k_pages: &mut [E],
    v_pages: &mut [E],
) {
    let (k_pages, v_pages) = (Shards::new(k_pages), Shards::new(v_pages));
    let (all, block) = (heads * width, width * PAGE);
    // Columns of a page of keys share cache lines, so that tokens that follow each other go to one thread.
    let groups = groups(places, PAGE);
    let together = (APPENDED * groups.len() / places.rows.max(1)).max(1);
    device.pool.for_chunks(heads * groups.len(), together, |range| {
        for i in range {
            let (h, group) = (i / groups.len(), &groups[i % groups.len()]);
            let (page, slot) = (group.pages[group.position / PAGE] as usize, group.position % PAGE);
            let start = (page * heads + h) * block;
            let rows = &qkv[group.row * 3 * all + h * width..];
            let part = |which: usize| Rows { data: &rows[which * all..], ld: 3 * all };
            let new = New { isa: device.isa, width, slot, count: group.count, k: part(1), v: part(2) };
            new.append(start, k_pages, v_pages);
        }
    });
}

/// Keys and values of new tokens that follow each other, of one head.
struct New<'a, E> {
    isa: Isa,
    /// D.
    width: usize,
    /// Where in the page the first goes, and how many there are.
    slot: usize,
    count: usize,
    k: Rows<'a, E>,
    v: Rows<'a, E>,
}

impl<E: Element> New<'_, E> {
    /// Writes them to the parts of a page that begin at `start`: a whole page as panels of products are packed, whose layout it
    /// has. Each token of each head is appended once.
    fn append(&self, start: usize, k_pages: Shards<E>, v_pages: Shards<E>) {
        let New { width, slot, count, .. } = *self;
        let per_word = in_word::<E>();
        if count == PAGE && width.is_multiple_of(per_word) {
            let (ks, vs) = (self.k.over_width(), self.v.over_tokens());
            // SAFETY: this is the whole of the head's part.
            let (keys, values) = unsafe {
                (k_pages.range(start..start + width * PAGE), v_pages.range(start..start + width * PAGE))
            };
            pack_panels(self.isa, ks, 0..PAGE, 0..width, PAGE, per_word, bytemuck::cast_slice_mut(keys));
            pack_panels(self.isa, vs, 0..width, 0..PAGE, width, per_word, bytemuck::cast_slice_mut(values));
            return;
        }
        for d in (0..width).step_by(per_word) {
            let numbers = per_word.min(width - d);
            let at = start + d * PAGE + slot * numbers;
            // SAFETY: every place is written once.
            let keys = unsafe { k_pages.range(at..at + count * numbers) };
            for (i, k) in keys.iter_mut().enumerate() {
                *k = self.k.data[i / numbers * self.k.ld + d + i % numbers];
            }
        }
        for n in 0..count {
            let at = start + (slot + n) / per_word * width * per_word + (slot + n) % per_word;
            for (d, v) in self.v.data[n * self.v.ld..][..width].iter().enumerate() {
                // SAFETY: as above.
                let value = unsafe { v_pages.range(at + d * per_word..at + d * per_word + 1) };
                value[0] = *v;
            }
        }
    }
}

/// How units of queries and probabilities meet the words of a page.
trait Cached<S: Simd>: Mac<S> {
    /// Numbers in a word of a page.
    const PER_WORD: usize = Self::PER_UNIT * Self::IN_WORD;

    /// Makes units of a query's probabilities, in their place.
    #[inline(always)]
    fn narrow(_: S, _: &mut [f32; PAGE]) {}
}

impl<S: Simd> Cached<S> for Fma {}

impl<S: Simd> Cached<S> for Widen {}

impl Cached<Avx512> for Dot {
    #[inline(always)]
    fn narrow(s: Avx512, p: &mut [f32; PAGE]) {
        for at in (0..PAGE).step_by(32) {
            let (low, high) = (s.load(&p[at..]), s.load(&p[at + 16..]));
            // SAFETY: only used through `with_avx512_bf16`; the types only rename 512 bits.
            let pairs: __m512 = unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(high, low)) };
            s.store(&mut p[at / 2..], pairs);
        }
    }
}

/// One head's part of the pages of a text.
#[derive(Clone, Copy)]
struct Pages<'a> {
    /// Words.
    cache: &'a [u32],
    numbers: &'a [u32],
    /// Where page 0 has this head's part, words from one page to the next, and in a part.
    first: usize,
    step: usize,
    block: usize,
}

impl<'a> Pages<'a> {
    #[inline(always)]
    fn part(&self, page: usize) -> &'a [u32] {
        &self.cache[self.first + self.numbers[page] as usize * self.step..][..self.block]
    }
}

/// A group's queries of one head.
struct Head<'a> {
    /// D, and the distance of rows of sums.
    width: usize,
    padded: usize,
    /// Of the first query.
    position: usize,
    /// Queries, `[tile][unit of D][TILE]`, or for tile registers as they are, `[PANEL][unit of D]`.
    q: &'a [f32],
    k: Pages<'a>,
    v: Pages<'a>,
}

impl Head<'_> {
    /// Leaves the sum of weighted values of each of `count` queries in `sums`, and returns the sums of the weights. `p` is room
    /// for probabilities, a page's for each query, and `rest` for the part of a page's values that is seen. Not generic, so that
    /// it is compiled once.
    fn attend_on(
        &self,
        isa: Isa,
        dtype: DType,
        count: usize,
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        rest: &mut [u32],
    ) -> [f32; QUERIES] {
        match isa {
            // SAFETY: the processor has AVX-512 BF16 and tiles.
            _ if in_tiles(isa, dtype, self.width) => unsafe {
                let tiles = Tiles::square(count.min(ROWS), self.width / 2 % STEP);
                with_avx512_bf16(
                    #[inline(always)]
                    |s| self.attend_in_tiles(s, &tiles, count, p, sums, rest),
                )
            },
            // SAFETY: the processor has AVX-512 BF16.
            Isa::Avx512Bf16 if dtype == DType::Bf16 => unsafe {
                with_avx512_bf16(
                    #[inline(always)]
                    |s| self.attend::<_, Dot>(s, count, p, sums, rest),
                )
            },
            _ if dtype == DType::Bf16 => {
                dispatch!(isa, s => self.attend::<_, Widen>(s, count, p, sums, rest))
            }
            _ => dispatch!(isa, s => self.attend::<_, Fma>(s, count, p, sums, rest)),
        }
    }

    #[inline(always)]
    fn attend<S: Simd, M: Cached<S>>(
        &self,
        s: S,
        count: usize,
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        rest: &mut [u32],
    ) -> [f32; QUERIES] {
        let Head { width, padded, position, .. } = *self;
        let scale = s.splat(1.0 / (width as f32).sqrt());
        let units = width.div_ceil(M::PER_UNIT);
        let (mut max, mut shrink) = ([NOTHING; QUERIES], [1.0; QUERIES]);
        let mut weight = [s.zero(); QUERIES];
        sums[..count * padded].fill(0.0);
        let last = position / PAGE;
        for page in 0..=last {
            // While keys are read, the page's values are fetched, and meanwhile the next page's keys: pages lie anywhere, so
            // that the processor cannot guess where reading goes on.
            let (k, v) = (self.k.part(page), self.v.part(page));
            let next = if page < last { self.k.part(page + 1) } else { k };
            for first in (0..count).step_by(TILE) {
                let (q, p) = (&self.q[first * units..], &mut p[first..count]);
                let ahead = if first == 0 { v } else { k };
                on_tile!(p.len(), R => scores::<S, M, R>(s, width, q, k, ahead, p));
                if !width.is_multiple_of(M::PER_WORD) {
                    let (q, k) = (&q[(units - 1) * TILE..], &k[width / M::PER_WORD * PAGE..]);
                    add_last::<S, M>(s, &q[..TILE], k, p);
                }
            }
            // Keys of this page that a query sees: of the last, each sees one more than the one before.
            let seen = |i: usize| if page == last { position % PAGE + 1 + i } else { PAGE };
            for (i, p) in p[..count].iter_mut().enumerate() {
                shrink[i] = soften(s, p, seen(i), scale, &mut max[i], &mut weight[i]);
                M::narrow(s, p);
            }
            for first in (0..count).step_by(TILE) {
                // What all queries of the tile see: whole words of what the first does.
                let whole = seen(first) / M::PER_WORD;
                let (p, shrink, sums) =
                    (&p[first..count], &shrink[first..count], &mut sums[first * padded..]);
                let ahead = if first == 0 { next } else { v };
                let words = &v[..whole * width];
                on_tile!(p.len(), R => {
                    values::<S, M, R>(s, width, padded, p, 0, shrink, words, ahead, sums)
                });
                if page < last {
                    continue;
                }
                // A query never touches a later token's value, whatever that is.
                for (i, p) in p.iter().take(TILE).enumerate() {
                    let (p, sums) = (std::slice::from_ref(p), &mut sums[i * padded..]);
                    let (words, left) = (seen(first + i) / M::PER_WORD, seen(first + i) % M::PER_WORD);
                    if words > whole {
                        let v = &v[whole * width..words * width];
                        values::<S, M, 1>(s, width, padded, p, whole, &[1.0], v, v, sums);
                    }
                    if left > 0 {
                        for (half, word) in rest.iter_mut().zip(&v[words * width..][..width]) {
                            *half = word & 0xffff;
                        }
                        values::<S, M, 1>(s, width, padded, p, words, &[1.0], &rest[..width], v, sums);
                    }
                }
            }
        }
        let mut total = [1.0; QUERIES];
        for (total, weight) in total.iter_mut().zip(weight).take(count) {
            *total = s.sum(weight);
        }
        total
    }
}

impl Head<'_> {
    /// [`Head::attend`] in tile registers: scores and results lie as there, queries as rows.
    #[inline(always)]
    fn attend_in_tiles(
        &self,
        s: Avx512,
        tiles: &Tiles,
        count: usize,
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        seen_values: &mut [u32],
    ) -> [f32; QUERIES] {
        let Head { width, padded, position, .. } = *self;
        let scale = s.splat(1.0 / (width as f32).sqrt());
        let units = width / 2;
        let q: &[u32] = bytemuck::cast_slice(self.q);
        let (mut max, mut weight) = ([NOTHING; QUERIES], [s.zero(); QUERIES]);
        sums[..count * padded].fill(0.0);
        let last = position / PAGE;
        for page in 0..=last {
            let (k, mut v) = (self.k.part(page), self.v.part(page));
            fetch_ahead(v, 0, v.len());
            for first in (0..count).step_by(ROWS) {
                let q = Strided { data: &q[first * units..], row: units };
                for key in (0..PAGE).step_by(16) {
                    let k = Strided { data: &k[key..], row: PAGE };
                    let out = &mut p[first..].as_flattened_mut()[key..];
                    tiles.multiply_square(units, q, k, false, out, PAGE);
                }
            }
            let seen = |i: usize| if page == last { position % PAGE + 1 + i } else { PAGE };
            for (i, p) in p[..count].iter_mut().enumerate() {
                let shrink = soften(s, p, seen(i), scale, &mut max[i], &mut weight[i]);
                Dot::narrow(s, p);
                if shrink != 1.0 {
                    for sum in sums[i * padded..(i + 1) * padded].chunks_exact_mut(16) {
                        let shrunk = s.mul(s.load(sum), s.splat(shrink));
                        s.store(sum, shrunk);
                    }
                }
            }
            // What a page holds behind the last query's own token is anything, and must not meet probabilities, even those of
            // 0. Between the first query's token and the last one's there are numbers.
            let all = seen(count - 1);
            let words = all.div_ceil(2).next_multiple_of(STEP);
            if page == last {
                let to = &mut seen_values[..words * width];
                let whole = all / 2 * width;
                to[..whole].copy_from_slice(&v[..whole]);
                to[whole..].fill(0);
                if all % 2 == 1 {
                    for (to, word) in to[whole..].iter_mut().zip(&v[whole..whole + width]) {
                        *to = word & 0xffff;
                    }
                }
                v = to;
            } else {
                let next = self.k.part(page + 1);
                fetch_ahead(next, 0, next.len());
            }
            for first in (0..count).step_by(ROWS) {
                let p: &[u32] = bytemuck::cast_slice(p[first..].as_flattened());
                for column in (0..width).step_by(16) {
                    let v = Strided { data: &v[column..], row: width };
                    let p = Strided { data: p, row: PAGE };
                    let out = &mut sums[first * padded + column..];
                    tiles.multiply_square(words, p, v, true, out, padded);
                }
            }
        }
        let mut total = [1.0; QUERIES];
        for (total, weight) in total.iter_mut().zip(weight).take(count) {
            *total = s.sum(weight);
        }
        total
    }
}

/// Turns a query's scores of a page, of which it sees the first `seen`, into exponentials relative to its largest score so far,
/// and adds them to `weight`. Returns what earlier ones are to be multiplied by.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    p: &mut [f32; PAGE],
    seen: usize,
    scale: S::F,
    max: &mut f32,
    weight: &mut S::F,
) -> f32 {
    let old = *max;
    for p in &mut p[seen..] {
        *p = f32::NEG_INFINITY;
    }
    let mut most = s.splat(old);
    for p in p.chunks_exact_mut(S::LANES) {
        let score = s.mul(s.load(p), scale);
        most = s.max(score, most);
        s.store(p, score);
    }
    *max = s.max_lane(most);
    let mut shrink = 1.0;
    if *max != old {
        let factor = s.exp(s.splat(old - *max));
        shrink = s.to_array(factor)[0];
        *weight = s.mul(*weight, factor);
    }
    for p in p.chunks_exact_mut(S::LANES) {
        let e = s.exp(s.sub(s.load(p), s.splat(*max)));
        *weight = s.add(*weight, e);
        s.store(p, e);
    }
    shrink
}

/// To be called before `count` words from `at` on are read: fetches what is as far into `next`.
#[inline(always)]
fn fetch_ahead(next: &[u32], at: usize, count: usize) {
    for i in (0..count).step_by(16) {
        prefetch_l2(next.as_ptr().wrapping_add(at + i));
    }
}

/// `p = q * k`: rows of queries by columns of keys, each summed over the width in order. `next` is read soon.
#[inline(always)]
fn scores<S: Simd, M: Cached<S>, const R: usize>(
    s: S,
    width: usize,
    q: &[f32],
    k: &[u32],
    next: &[u32],
    p: &mut [[f32; PAGE]],
) {
    // As many registers of keys as there is room for beside the sums.
    if S::LANES == 16 {
        scores_of::<S, M, R, 4>(s, width, q, k, next, p);
    } else {
        scores_of::<S, M, R, 2>(s, width, q, k, next, p);
    }
}

#[inline(always)]
fn scores_of<S: Simd, M: Cached<S>, const R: usize, const NV: usize>(
    s: S,
    width: usize,
    q: &[f32],
    k: &[u32],
    next: &[u32],
    p: &mut [[f32; PAGE]],
) {
    let (rows, q) = (k[..width / M::PER_WORD * PAGE].as_chunks::<PAGE>().0, q.as_chunks::<TILE>().0);
    for at in (0..PAGE).step_by(NV * S::LANES) {
        let mut acc = [[s.zero(); NV]; R];
        for (i, (row, q)) in rows.iter().zip(q.chunks_exact(M::IN_WORD)).enumerate() {
            fetch_ahead(next, i * PAGE + at, NV * S::LANES);
            let row = &row[at..at + NV * S::LANES];
            for (which, q) in q.iter().enumerate() {
                let mut keys = [s.zero(); NV];
                for (v, key) in keys.iter_mut().enumerate() {
                    *key = M::load(s, &row[v * S::LANES..], which);
                }
                for (acc, q) in acc.iter_mut().zip(q) {
                    let q = s.splat(*q);
                    for (acc, key) in acc.iter_mut().zip(&keys) {
                        *acc = M::mac(s, q, *key, *acc);
                    }
                }
            }
        }
        for (acc, p) in acc.iter().zip(p.iter_mut()) {
            for (v, acc) in acc.iter().enumerate() {
                s.store(&mut p[at + v * S::LANES..], *acc);
            }
        }
    }
}

/// Adds the products with the last number of an odd width, which has no neighbour.
#[inline(always)]
fn add_last<S: Simd, M: Cached<S>>(s: S, q: &[f32], keys: &[u32], p: &mut [[f32; PAGE]]) {
    let keys: &[bf16] = bytemuck::cast_slice(keys);
    for (p, q) in p.iter_mut().zip(q) {
        // Keys are widened, which is the upper half of a pair; of a pair without a neighbour q is the lower one.
        let q = s.splat(f32::from_bits(q.to_bits() << (16 * (M::PER_UNIT - 1))));
        for (p, keys) in p.chunks_exact_mut(S::LANES).zip(keys.chunks_exact(S::LANES)) {
            let sum = M::mac(s, q, s.load_bf16(keys), s.load(p));
            s.store(p, sum);
        }
    }
}

/// `sums = shrink * sums + p * v` of the first `R` rows, each column summed over keys in order. `v` has as many rows of words
/// as take part, and begins with word `first` of the page; `next` is read soon.
#[inline(always)]
fn values<S: Simd, M: Cached<S>, const R: usize>(
    s: S,
    width: usize,
    padded: usize,
    p: &[[f32; PAGE]],
    first: usize,
    shrink: &[f32],
    v: &[u32],
    next: &[u32],
    sums: &mut [f32],
) {
    let Some(p) = p.first_chunk::<R>() else { return };
    let mut at = 0;
    while at + 4 * S::LANES <= width {
        columns::<S, M, R, 4>(s, width, padded, at, p, first, shrink, v, next, sums);
        at += 4 * S::LANES;
    }
    while at < width {
        columns::<S, M, R, 1>(s, width, padded, at, p, first, shrink, v, next, sums);
        at += S::LANES;
    }
}

/// [`values`] of `NV` registers of columns from `at` on; a single one may not be full.
#[inline(always)]
fn columns<S: Simd, M: Cached<S>, const R: usize, const NV: usize>(
    s: S,
    width: usize,
    padded: usize,
    at: usize,
    p: &[[f32; PAGE]; R],
    first: usize,
    shrink: &[f32],
    v: &[u32],
    next: &[u32],
    sums: &mut [f32],
) {
    let mut acc = [[s.zero(); NV]; R];
    for (i, acc) in acc.iter_mut().enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = s.mul(s.load(&sums[i * padded + at + r * S::LANES..]), s.splat(shrink[i]));
        }
    }
    for (word, row) in (first..PAGE / M::PER_WORD).zip(v.chunks_exact(width)) {
        fetch_ahead(next, word * width + at, NV * S::LANES);
        let mut part = [0; 16];
        let row = if NV == 1 && row.len() < at + S::LANES {
            part[..row.len() - at].copy_from_slice(&row[at..]);
            &part[..S::LANES]
        } else {
            &row[at..at + NV * S::LANES]
        };
        for which in 0..M::IN_WORD {
            let mut registers = [s.zero(); NV];
            for (r, register) in registers.iter_mut().enumerate() {
                *register = M::load(s, &row[r * S::LANES..], which);
            }
            for (acc, p) in acc.iter_mut().zip(p) {
                let p = s.splat(p[word * M::IN_WORD + which]);
                for (acc, register) in acc.iter_mut().zip(&registers) {
                    *acc = M::mac(s, p, *register, *acc);
                }
            }
        }
    }
    for (i, acc) in acc.iter().enumerate() {
        for (r, acc) in acc.iter().enumerate() {
            s.store(&mut sums[i * padded + at + r * S::LANES..], *acc);
        }
    }
}

#[inline(always)]
fn scale_into<S: Simd, E: Element>(s: S, factor: f32, from: &[f32], to: &mut [E]) {
    for (from, to) in from.chunks(S::LANES).zip(to.chunks_mut(S::LANES)) {
        s.store_up_to(to, s.mul(s.load_up_to(from), s.splat(factor)));
    }
}

/// Words of workspace for each thread.
pub(super) fn words(width: usize) -> usize {
    carved(sizes(width))
}

/// Probabilities, queries in tiles and as they are packed, sums, and what is seen of a page's values.
fn sizes(width: usize) -> [usize; 5] {
    let padded = width.next_multiple_of(16);
    [PANEL * PAGE, QUERIES * width, PANEL * padded, PANEL * padded, PAGE / 2 * padded]
}
