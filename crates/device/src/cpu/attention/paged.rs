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
use std::ops::Range;

use half::bf16;

use super::{Exponential, NOTHING, Rows, carve, carved};
use crate::cpu::amx::{ROWS, STEP, Strided, Tiles};
use crate::cpu::buffer::Shards;
use crate::cpu::gemm::{Dot, Fma, Widen};
use crate::cpu::pack::{Matrix, pack_panels};
use crate::cpu::simd::{Avx512, Isa, Simd, dispatch, prefetch_l2, with_avx512_bf16};
use crate::cpu::soon::Soon;
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
    let [k, v] = [k_pages, v_pages].map(|pages| Shards::new(bytemuck::cast_slice_mut(pages)));
    let new = New { isa: device.isa, heads, width, qkv, k, v };
    new.append_together(device, &places);
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
    // Head after head of a text: where each has one new token, a thread goes through its pages in the order of memory.
    let of = |task: usize| {
        let text = &groups[task / heads].text;
        let at = task - heads * text.start;
        // The last groups of a text have the most keys, so they come first.
        (at / text.len(), &groups[text.end - 1 - at % text.len()])
    };
    let tasks = heads * groups.len();
    device.pool.for_neighbours(tasks, |task, thread| {
        let (h, group) = of(task);
        if group.alone() {
            new.append(h, group);
        }
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
        } else if group.count <= TILE {
            let q = &mut q.as_chunks_mut::<TILE>().0[..units];
            for (at, i) in queries.enumerate() {
                lay(&rows.data[i * rows.ld..][..width], pairs, at, q);
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
        let next = (task + 1 < tasks).then(|| {
            let (h, group) = of(task + 1);
            if group.alone() {
                new.expect(h, group);
            }
            new.pages(h, group, k).soon(0, group.position + group.count)
        });
        let head = Head {
            width,
            padded,
            position: group.position,
            count: group.count,
            q: bytemuck::cast_slice(if in_tiles { panel } else { q }),
            k: new.pages(h, group, k),
            v: new.pages(h, group, v),
            next,
        };
        let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
        let p = bytemuck::cast_slice_mut(p).as_chunks_mut().0;
        let results = head.attend_on(device.isa, E::DTYPE, p, sums, rest);
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

/// Lays a query into the `at`-th place of units of a tile.
fn lay<E: Element>(query: &[E], pairs: bool, at: usize, tile: &mut [[u32; TILE]]) {
    if pairs {
        let halves: &[u16] = bytemuck::cast_slice(query);
        for (unit, pair) in tile.iter_mut().zip(halves.chunks(2)) {
            unit[at] = pair[0] as u32 | pair.get(1).map_or(0, |half| (*half as u32) << 16);
        }
    } else {
        for (unit, number) in tile.iter_mut().zip(query) {
            unit[at] = number.to_f32().to_bits();
        }
    }
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
    /// All groups of its text.
    text: Range<usize>,
}

impl Group<'_> {
    /// Whether its text has no other rows, and they are few enough to be one group of queries: then nobody else reads their keys
    /// and values.
    fn alone(&self) -> bool {
        self.text.len() == 1 && self.count <= QUERIES
    }
}

/// All rows in groups of at most so many.
fn groups<'a>(places: &Placed<'a, CpuDevice>, most: usize) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'_>> = Vec::with_capacity(places.rows);
    let mut row = 0;
    while row < places.rows {
        let (pages, position) = place(places, row);
        let follows = |n: usize| {
            let (others, at) = place(places, row + n);
            std::ptr::eq(others, pages) && at == position + n
        };
        let rows = (1..places.rows - row).find(|n| !follows(*n)).unwrap_or(places.rows - row);
        let (first, end) = (groups.len(), row + rows);
        let mut position = position;
        while row < end {
            let count = most.min(PAGE - position % PAGE).min(end - row);
            groups.push(Group { row, position, count, pages, text: 0..0 });
            (row, position) = (row + count, position + count);
        }
        let text = first..groups.len();
        groups[first..].iter_mut().for_each(|group| group.text = text.clone());
    }
    groups
}

/// A row's pages, behind which there may be those of others, and its position.
fn place<'a>(places: &Placed<'a, CpuDevice>, row: usize) -> (&'a [u32], usize) {
    let [first, position] = [0, 1].map(|i| places.words[2 * row + i] as usize);
    (&places.words[first..], position)
}

/// New tokens, and the caches that their keys and values go to.
struct New<'a, E> {
    isa: Isa,
    /// H and D.
    heads: usize,
    width: usize,
    qkv: &'a [E],
    k: Shards<'a, u32>,
    v: Shards<'a, u32>,
}

impl<'a, E: Element> New<'a, E> {
    /// A head's part of the pages of a group's text.
    fn pages(&self, h: usize, group: &Group<'a>, cache: Shards<'a, u32>) -> Pages<'a> {
        let block = self.width * PAGE / in_word::<E>();
        Pages { cache, numbers: group.pages, first: h * block, step: self.heads * block, block }
    }

    /// Appends rows that several groups of queries read. Others are appended by who reads them, when they are in its caches anyway.
    fn append_together(&self, device: &CpuDevice, places: &Placed<'_, CpuDevice>) {
        // Columns of a page of keys share cache lines, so that tokens that follow each other go to one thread.
        let mut groups = groups(places, PAGE);
        groups.retain(|group| !group.alone());
        let rows: usize = groups.iter().map(|group| group.count).sum();
        let together = (APPENDED * groups.len() / rows.max(1)).max(1);
        device.pool.for_chunks(self.heads * groups.len(), together, |range| {
            for i in range {
                self.append(i / groups.len(), &groups[i % groups.len()]);
            }
        });
    }

    /// Brings what [`New::append`] will write to, in part of their cache lines, to the second-level cache. A column of keys is on as
    /// many lines as it has words.
    fn expect(&self, h: usize, group: &Group<'_>) {
        let (page, slot) = (group.position / PAGE, group.position % PAGE);
        let [keys, values] = [self.k, self.v].map(|cache| {
            let pages = self.pages(h, group, cache);
            cache.pointer(pages.start(page))
        });
        let words = self.width / in_word::<E>();
        Soon::new(keys.wrapping_add(slot), words, 1, PAGE).fetch();
        let first = slot / in_word::<E>() * self.width;
        Soon::new(values.wrapping_add(first), 1, self.width, self.width).fetch();
    }

    /// Writes keys and values of a group, of one head, to their page: a whole page as panels of products are packed, whose layout it
    /// has. To be called once for each token of each head.
    fn append(&self, h: usize, group: &Group<'_>) {
        let New { isa, heads, width, .. } = *self;
        let (all, per_word) = (heads * width, in_word::<E>());
        let rows = &self.qkv[group.row * 3 * all + h * width..];
        let [new_k, new_v] = [1, 2].map(|which| Rows { data: &rows[which * all..], ld: 3 * all });
        let (page, slot, count) = (group.position / PAGE, group.position % PAGE, group.count);
        let [keys, values] = [self.k, self.v].map(|cache| {
            // SAFETY: no text shares a page that is appended to, and of its own only this group has rows in it.
            unsafe { self.pages(h, group, cache).write(page) }
        });
        if count == PAGE && width.is_multiple_of(per_word) {
            pack_panels(isa, new_k.over_width(), 0..PAGE, 0..width, PAGE, per_word, keys);
            pack_panels(isa, new_v.over_tokens(), 0..width, 0..PAGE, width, per_word, values);
            return;
        }
        let (keys, values): (&mut [E], &mut [E]) =
            (bytemuck::cast_slice_mut(keys), bytemuck::cast_slice_mut(values));
        for d in (0..width).step_by(per_word) {
            let numbers = per_word.min(width - d);
            let keys = &mut keys[d * PAGE + slot * numbers..][..count * numbers];
            for (i, k) in keys.iter_mut().enumerate() {
                *k = new_k.data[i / numbers * new_k.ld + d + i % numbers];
            }
        }
        for n in 0..count {
            let (word, half) = ((slot + n) / per_word, (slot + n) % per_word);
            let values = &mut values[word * width * per_word..][..width * per_word];
            for (to, v) in values.chunks_exact_mut(per_word).zip(&new_v.data[n * new_v.ld..]) {
                to[half] = *v;
            }
        }
    }
}

/// How units of queries and probabilities meet the words of a page.
trait Cached<S: Simd>: Exponential<S> {
    /// Numbers in a word of a page.
    const PER_WORD: usize = Self::PER_UNIT * Self::IN_WORD;

    /// Makes units of a query's probabilities, in their place.
    #[inline(always)]
    fn narrow(_: S, _: &mut [f32; PAGE]) {}
}

impl<S: Simd> Cached<S> for Fma {}

impl<S: Simd> Exponential<S> for Widen {}

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
    cache: Shards<'a, u32>,
    numbers: &'a [u32],
    /// Where page 0 has this head's part, words from one page to the next, and in a part.
    first: usize,
    step: usize,
    block: usize,
}

impl<'a> Pages<'a> {
    #[inline(always)]
    fn start(&self, page: usize) -> usize {
        self.first + self.numbers[page] as usize * self.step
    }

    /// Keys of a page of a text of so many tokens, `[word of D][PAGE]`.
    #[inline(always)]
    fn soon(&self, page: usize, tokens: usize) -> Soon {
        let keys = self.cache.pointer(self.start(page));
        Soon::new(keys, self.block / PAGE, PAGE.min(tokens - page * PAGE), PAGE)
    }

    /// # Safety
    /// Nothing is written to the page's part while it is alive.
    #[inline(always)]
    unsafe fn read(&self, page: usize) -> &'a [u32] {
        let start = self.start(page);
        // SAFETY: as the caller promises.
        unsafe { self.cache.read(start..start + self.block) }
    }

    /// # Safety
    /// Nobody else reads the page's part, or writes to it, while it is alive.
    unsafe fn write(&self, page: usize) -> &'a mut [u32] {
        let start = self.start(page);
        // SAFETY: as the caller promises.
        unsafe { self.cache.range(start..start + self.block) }
    }
}

/// A group's queries of one head.
struct Head<'a> {
    /// D, and the distance of rows of sums.
    width: usize,
    padded: usize,
    /// Of the first query, and how many there are.
    position: usize,
    count: usize,
    /// Queries, `[tile][unit of D][TILE]`, or for tile registers as they are, `[PANEL][unit of D]`.
    q: &'a [f32],
    k: Pages<'a>,
    v: Pages<'a>,
    /// What this thread probably does next.
    next: Option<Soon>,
}

impl Head<'_> {
    /// Leaves the sum of weighted values of each query in `sums`, and returns the sums of the weights. `p` is room
    /// for probabilities, a page's for each query, and `rest` for the part of a page's values that is seen. Not generic, so that
    /// it is compiled once.
    fn attend_on(
        &self,
        isa: Isa,
        dtype: DType,
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        rest: &mut [u32],
    ) -> [f32; QUERIES] {
        match isa {
            // SAFETY: the processor has AVX-512 BF16 and tiles.
            _ if in_tiles(isa, dtype, self.width) => unsafe {
                let tiles = Tiles::square(self.count.min(ROWS), self.width / 2 % STEP);
                with_avx512_bf16(
                    #[inline(always)]
                    |s| self.attend_in_tiles(s, &tiles, p, sums, rest),
                )
            },
            // SAFETY: the processor has AVX-512 BF16.
            Isa::Avx512Bf16 if dtype == DType::Bf16 => unsafe {
                with_avx512_bf16(
                    #[inline(always)]
                    |s| self.attend::<_, Dot>(s, p, sums, rest),
                )
            },
            _ if dtype == DType::Bf16 => {
                dispatch!(isa, s => self.attend::<_, Widen>(s, p, sums, rest))
            }
            _ => dispatch!(isa, s => self.attend::<_, Fma>(s, p, sums, rest)),
        }
    }

    /// Keys of a page that query `i` sees: of the last page each sees one more than the one before.
    #[inline(always)]
    fn seen(&self, page: usize, i: usize) -> usize {
        PAGE.min(self.position + 1 + i - page * PAGE)
    }

    /// Keys and values of a page.
    #[inline(always)]
    fn page(&self, page: usize) -> (&[u32], &[u32]) {
        // SAFETY: what these queries see was appended before, by this thread or in a task that is over, and nothing else is
        // appended to their pages.
        unsafe { (self.k.read(page), self.v.read(page)) }
    }

    #[inline(always)]
    fn attend<S: Simd, M: Cached<S>>(
        &self,
        s: S,
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        rest: &mut [u32],
    ) -> [f32; QUERIES] {
        let Head { width, padded, position, count, .. } = *self;
        let scale = 1.0 / (width as f32).sqrt();
        let units = width.div_ceil(M::PER_UNIT);
        let (mut max, mut shrink) = ([NOTHING; QUERIES], [1.0; QUERIES]);
        let mut weight = [s.zero(); QUERIES];
        sums[..count * padded].fill(0.0);
        let last = position / PAGE;
        for page in 0..=last {
            // While keys are read, the page's values are fetched, and meanwhile the next page's keys: pages lie anywhere, so
            // that the processor cannot guess where reading goes on.
            let (k, v) = self.page(page);
            let seen = |i| self.seen(page, i);
            let words = seen(count - 1).div_ceil(M::PER_WORD) * width;
            for first in (0..count).step_by(TILE) {
                let (q, p) = (&self.q[first * units..], &mut p[first..count]);
                let ahead = if first == 0 { &v[..words] } else { &[] };
                on_tile!(p.len(), R => scores::<S, M, R>(s, width, q, k, ahead, p));
                if !width.is_multiple_of(M::PER_WORD) {
                    let (q, k) = (&q[(units - 1) * TILE..], &k[width / M::PER_WORD * PAGE..]);
                    add_last::<S, M>(s, &q[..TILE], k, p);
                }
            }
            for (i, p) in p[..count].iter_mut().enumerate() {
                shrink[i] = soften::<S, M>(s, p, seen(i), scale, &mut max[i], &mut weight[i]);
                M::narrow(s, p);
            }
            let next = if page < last { self.page(page + 1).0 } else { &[] };
            if let (true, Some(next)) = (page == last, self.next) {
                next.fetch();
            }
            for first in (0..count).step_by(TILE) {
                // What all queries of the tile see: whole words of what the first does.
                let whole = seen(first) / M::PER_WORD;
                let (p, shrink, sums) =
                    (&p[first..count], &shrink[first..count], &mut sums[first * padded..]);
                let ahead = if first == 0 { next } else { &[] };
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
                        values::<S, M, 1>(s, width, padded, p, whole, &[1.0], v, &[], sums);
                    }
                    if left > 0 {
                        for (half, word) in rest.iter_mut().zip(&v[words * width..][..width]) {
                            *half = word & 0xffff;
                        }
                        values::<S, M, 1>(s, width, padded, p, words, &[1.0], &rest[..width], &[], sums);
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
        p: &mut [[f32; PAGE]],
        sums: &mut [f32],
        rest: &mut [u32],
    ) -> [f32; QUERIES] {
        let Head { width, padded, position, count, .. } = *self;
        let scale = 1.0 / (width as f32).sqrt();
        let units = width / 2;
        let q: &[u32] = bytemuck::cast_slice(self.q);
        let (mut max, mut weight) = ([NOTHING; QUERIES], [s.zero(); QUERIES]);
        sums[..count * padded].fill(0.0);
        let last = position / PAGE;
        for page in 0..=last {
            let (k, v) = self.page(page);
            let seen = |i| self.seen(page, i);
            // Of keys, and words of values, that any query sees.
            let keys = seen(count - 1);
            let words = keys.div_ceil(2);
            fetch_ahead(v, 0, words * width);
            for first in (0..count).step_by(ROWS) {
                let q = Strided { data: &q[first * units..], row: units };
                for key in (0..keys).step_by(16) {
                    let k = Strided { data: &k[key..], row: PAGE };
                    let out = &mut p[first..].as_flattened_mut()[key..];
                    tiles.multiply_square(units, q, k, false, out, PAGE);
                }
            }
            for (i, p) in p[..count].iter_mut().enumerate() {
                let shrink = soften::<Avx512, Dot>(s, p, seen(i), scale, &mut max[i], &mut weight[i]);
                Dot::narrow(s, p);
                if shrink != 1.0 {
                    for sum in sums[i * padded..(i + 1) * padded].chunks_exact_mut(16) {
                        let shrunk = s.mul(s.load(sum), s.splat(shrink));
                        s.store(sum, shrunk);
                    }
                }
            }
            let next = if page < last { Some(self.k.soon(page + 1, position + count)) } else { self.next };
            if let Some(next) = next {
                next.fetch();
            }
            // What a page holds behind the last query's own token is anything, and must not meet probabilities, even those of
            // 0: a step that is not full is copied. Between the first query's token and the last one's there are numbers.
            let whole = keys / 2 / STEP * STEP;
            let rest = &mut rest[..STEP * width];
            if whole < words {
                let (seen, behind) = rest.split_at_mut((words - whole) * width);
                seen.copy_from_slice(&v[whole * width..words * width]);
                if keys % 2 == 1 {
                    let last = seen.len() - width;
                    seen[last..].iter_mut().for_each(|word| *word &= 0xffff);
                }
                behind.fill(0);
            }
            for first in (0..count).step_by(ROWS) {
                let p: &[u32] = bytemuck::cast_slice(p[first..].as_flattened());
                for column in (0..width).step_by(16) {
                    let out = &mut sums[first * padded + column..];
                    if whole > 0 {
                        let p = Strided { data: p, row: PAGE };
                        let v = Strided { data: &v[column..], row: width };
                        tiles.multiply_square(whole, p, v, true, out, padded);
                    }
                    if whole < words {
                        let p = Strided { data: &p[whole..], row: PAGE };
                        let rest = Strided { data: &rest[column..], row: width };
                        tiles.multiply_square(STEP, p, rest, true, out, padded);
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

/// Turns a query's scores of a page, of which it sees the first `seen`, into exponentials relative to its largest score so far,
/// and adds them to `weight`. Returns what earlier ones are to be multiplied by.
#[inline(always)]
fn soften<S: Simd, M: Exponential<S>>(
    s: S,
    p: &mut [f32; PAGE],
    seen: usize,
    scale: f32,
    max: &mut f32,
    weight: &mut S::F,
) -> f32 {
    let (old, scale) = (*max, s.splat(scale * M::FACTOR));
    for p in &mut p[seen..] {
        *p = f32::NEG_INFINITY;
    }
    let mut most = s.splat(old);
    for p in p.chunks_exact(S::LANES) {
        most = s.max(s.load(p), most);
    }
    *max = s.max_lane(most);
    let mut shrink = 1.0;
    if *max != old {
        let factor = M::exp(s, s.mul(s.splat(old - *max), scale));
        shrink = s.to_array(factor)[0];
        *weight = s.mul(*weight, factor);
    }
    for p in p.chunks_exact_mut(S::LANES) {
        let e = M::exp(s, s.mul(s.sub(s.load(p), s.splat(*max)), scale));
        *weight = s.add(*weight, e);
        s.store(p, e);
    }
    shrink
}

/// To be called before `count` words from `at` on are read: fetches what is as far into `next`, if it is as long.
#[inline(always)]
fn fetch_ahead(next: &[u32], at: usize, count: usize) {
    // The number of steps stays a constant where `count` is one.
    if at < next.len() {
        for i in (0..count).step_by(16) {
            prefetch_l2(next.as_ptr().wrapping_add(at + i));
        }
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
                    *key = M::load(s, row, v * S::LANES, which);
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
                *register = M::load(s, row, r * S::LANES, which);
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

/// Probabilities, queries in tiles and as they are packed, sums, and the last that is seen of values.
fn sizes(width: usize) -> [usize; 5] {
    let padded = width.next_multiple_of(16);
    [PANEL * PAGE, QUERIES * width, PANEL * padded, PANEL * padded, STEP * padded]
}
