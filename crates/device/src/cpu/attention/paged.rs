//! New tokens of many sequences over a cache of keys and values in pages of [`PAGE`] tokens (Kwon et al., 2023).
//!
//! A page holds, for each head, keys as columns, `[D][PAGE]`, and values as rows, `[PAGE][D]`. Scores then lie across
//! the lanes of a register, key by key, and so do the columns of the output: nothing is summed across lanes but a
//! query's sum of probabilities, once. Each score, each probability and each column of the output is summed in an order
//! that follows from the query's own position alone, since pages are walked from the first token on. So a query has the
//! same bits however many others are computed with it, and however a text was cut into pieces.

use super::NOTHING;
use crate::cpu::buffer::Shards;
use crate::cpu::simd::{Simd, dispatch, prefetch_l2};
use crate::cpu::{CpuDevice, Scratch};
use crate::{Element, PAGE, Placed};

/// Most queries of one head that walk over the pages together: so many that a page, which comes from the second-level cache or
/// farther away, is used for longer than it takes to come.
const QUERIES: usize = 24;
/// Of these so many at a time have their sums in registers.
const TILE: usize = 6;
/// Keys and values of so many tokens and heads are appended by one thread.
const APPENDED: usize = 64;
/// And so many at most are written together: as many as have their keys in the first-level cache.
const TOGETHER: usize = 16;

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
    let groups = groups(&places);
    let (all, block, padded) = (heads * width, width * PAGE, width.next_multiple_of(16));
    let words = words(width);
    let mut workspace = device.workspace();
    let [scratch] = workspace.take([(Scratch::Attention, device.threads() * words)]);
    let (scratch, out) = (Shards::new(bytemuck::cast_slice_mut::<u32, f32>(scratch)), Shards::new(out));
    let (k_pages, v_pages) = (&*k_pages, &*v_pages);
    let tasks = heads * groups.len();
    device.pool.for_each(tasks, |task, thread| {
        // The last groups of a text have the most keys, so they come first.
        let task = tasks - 1 - task;
        let (h, group) = (task / groups.len(), &groups[task % groups.len()]);
        // SAFETY: each thread has its own scratch.
        let scratch = unsafe { scratch.range(thread * words..(thread + 1) * words) };
        let (p, scratch) = scratch.split_at_mut(QUERIES * PAGE);
        let (q, sums) = scratch.split_at_mut(QUERIES * width);
        for i in 0..group.count {
            let row = &qkv[(group.row + i) * 3 * all + h * width..][..width];
            let q = q[i / TILE * TILE * width + i % TILE..].iter_mut().step_by(TILE);
            q.zip(row).for_each(|(q, x)| *q = x.to_f32());
        }
        let pages =
            |cache| Pages { cache, numbers: group.pages, first: h * block, step: heads * block, block };
        let head = Head { width, padded, position: group.position, q, k: pages(k_pages), v: pages(v_pages) };
        let p = p.as_chunks_mut().0;
        let results = dispatch!(device.isa, s => head.attend(s, group.count, p, sums));
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

/// Queries that walk together: neighbours in a text whose last keys are in the same page.
struct Group<'a> {
    /// Row of the first in `qkv`, its position in its text, and how many there are.
    row: usize,
    position: usize,
    count: usize,
    pages: &'a [u32],
}

fn groups<'a>(places: &Placed<'a, CpuDevice>) -> Vec<Group<'a>> {
    let mut groups: Vec<Group<'_>> = Vec::with_capacity(places.rows);
    let mut row = 0;
    while row < places.rows {
        let (pages, position) = place(places, row);
        let count = neighbours(places, row, QUERIES.min(places.rows - row));
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
    let (all, block) = (heads * width, width * PAGE);
    let (k_pages, v_pages) = (Shards::new(k_pages), Shards::new(v_pages));
    // Columns of a page of keys share cache lines, so that tokens that follow each other go to one thread.
    device.pool.for_chunks(heads * places.rows, APPENDED, |range| {
        let mut i = range.start;
        while i < range.end {
            let (h, row) = (i / places.rows, i % places.rows);
            let (pages, position) = place(places, row);
            let slot = position % PAGE;
            let most = TOGETHER.min(range.end - i).min(places.rows - row);
            let count = neighbours(places, row, most);
            let start = (pages[position / PAGE] as usize * heads + h) * block;
            let rows: [&[E]; TOGETHER] = std::array::from_fn(|n| {
                &qkv[(row + n.min(count - 1)) * 3 * all + h * width..][..2 * all + width]
            });
            for d in 0..width {
                let at = start + d * PAGE + slot;
                // SAFETY: every place is written once.
                let keys = unsafe { k_pages.range(at..at + count) };
                keys.iter_mut().zip(&rows).for_each(|(k, row)| *k = row[all + d]);
            }
            for (n, row) in rows[..count].iter().enumerate() {
                let at = start + (slot + n) * width;
                // SAFETY: as above.
                unsafe { v_pages.range(at..at + width) }.copy_from_slice(&row[2 * all..]);
            }
            i += count;
        }
    });
}

/// One head's part of the pages of a text.
#[derive(Clone, Copy)]
struct Pages<'a, E> {
    cache: &'a [E],
    numbers: &'a [u32],
    /// Where page 0 has this head's part, elements from one page to the next, and in a part.
    first: usize,
    step: usize,
    block: usize,
}

impl<'a, E> Pages<'a, E> {
    #[inline(always)]
    fn part(&self, page: usize) -> &'a [E] {
        &self.cache[self.first + self.numbers[page] as usize * self.step..][..self.block]
    }
}

/// A group's queries of one head.
struct Head<'a, E> {
    /// D, and the distance of rows of sums.
    width: usize,
    padded: usize,
    /// Of the first query.
    position: usize,
    /// Queries, `[tile][D][TILE]`.
    q: &'a [f32],
    k: Pages<'a, E>,
    v: Pages<'a, E>,
}

impl<E: Element> Head<'_, E> {
    /// Leaves the sum of weighted values of each of `count` queries in `sums`, and returns the sums of the weights. `p` is room
    /// for probabilities, a page's for each query.
    #[inline(always)]
    fn attend<S: Simd>(&self, s: S, count: usize, p: &mut [[f32; PAGE]], sums: &mut [f32]) -> [f32; QUERIES] {
        let Head { width, padded, position, .. } = *self;
        let scale = s.splat(1.0 / (width as f32).sqrt());
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
                let (q, p) = (&self.q[first * width..], &mut p[first..count]);
                let ahead = if first == 0 { v } else { k };
                on_tile!(p.len(), M => scores::<S, E, M>(s, q, k, ahead, p));
            }
            // Keys of this page that the first query sees; each of the others sees one more.
            let shared = if page == last { position % PAGE + 1 } else { PAGE };
            for (i, p) in p[..count].iter_mut().enumerate() {
                let seen = if page == last { shared + i } else { PAGE };
                let old = max[i];
                for p in &mut p[seen..] {
                    *p = f32::NEG_INFINITY;
                }
                let mut most = s.splat(old);
                for p in p.chunks_exact_mut(S::LANES) {
                    let score = s.mul(s.load(p), scale);
                    most = s.max(score, most);
                    s.store(p, score);
                }
                max[i] = s.max_lane(most);
                shrink[i] = 1.0;
                if max[i] != old {
                    let factor = s.exp(s.splat(old - max[i]));
                    shrink[i] = s.to_array(factor)[0];
                    weight[i] = s.mul(weight[i], factor);
                }
                for p in p.chunks_exact_mut(S::LANES) {
                    let e = s.exp(s.sub(s.load(p), s.splat(max[i])));
                    weight[i] = s.add(weight[i], e);
                    s.store(p, e);
                }
            }
            let seen = &v[..shared * width];
            for first in (0..count).step_by(TILE) {
                let (p, shrink, sums) =
                    (&p[first..count], &shrink[first..count], &mut sums[first * padded..]);
                let ahead = if first == 0 { next } else { seen };
                on_tile!(p.len(), M => values::<S, E, M>(s, width, padded, p, shrink, seen, ahead, sums));
            }
            if page == last {
                // A query never touches a later token's value, whatever that is.
                for (i, p) in p[..count].iter().enumerate().skip(1) {
                    let own = [std::array::from_fn(|key| p[(shared + key).min(PAGE - 1)])];
                    let v = &v[shared * width..(shared + i) * width];
                    values::<S, E, 1>(s, width, padded, &own, &[1.0], v, v, &mut sums[i * padded..]);
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

/// To be called before `count` elements from `at` on are read: fetches what is as far into `next`.
#[inline(always)]
fn fetch_ahead<E>(next: &[E], at: usize, count: usize) {
    for i in (0..count).step_by(64 / size_of::<E>()) {
        prefetch_l2(next.as_ptr().wrapping_add(at + i));
    }
}

/// `p = q * k`: rows of queries by columns of keys, each summed over the width in order. `next` is read soon.
#[inline(always)]
fn scores<S: Simd, E: Element, const M: usize>(s: S, q: &[f32], k: &[E], next: &[E], p: &mut [[f32; PAGE]]) {
    // As many registers of keys as there is room for beside the sums.
    if S::LANES == 16 {
        scores_of::<S, E, M, 4>(s, q, k, next, p);
    } else {
        scores_of::<S, E, M, 2>(s, q, k, next, p);
    }
}

#[inline(always)]
fn scores_of<S: Simd, E: Element, const M: usize, const NV: usize>(
    s: S,
    q: &[f32],
    k: &[E],
    next: &[E],
    p: &mut [[f32; PAGE]],
) {
    let (rows, q) = (k.as_chunks::<PAGE>().0, q.as_chunks::<TILE>().0);
    for at in (0..PAGE).step_by(NV * S::LANES) {
        let mut acc = [[s.zero(); NV]; M];
        for (d, (row, q)) in rows.iter().zip(q).enumerate() {
            fetch_ahead(next, d * PAGE + at, NV * S::LANES);
            let mut keys = [s.zero(); NV];
            for (v, key) in keys.iter_mut().enumerate() {
                *key = s.load_as(&row[at + v * S::LANES..]);
            }
            for (acc, q) in acc.iter_mut().zip(q) {
                let x = s.splat(*q);
                for (acc, key) in acc.iter_mut().zip(&keys) {
                    *acc = s.fma(x, *key, *acc);
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

/// `sums = shrink * sums + p * v` of the first `M` rows, each column summed over keys in order. `v` has as many rows as keys take
/// part; `next` is read soon.
#[inline(always)]
fn values<S: Simd, E: Element, const M: usize>(
    s: S,
    width: usize,
    padded: usize,
    p: &[[f32; PAGE]],
    shrink: &[f32],
    v: &[E],
    next: &[E],
    sums: &mut [f32],
) {
    let Some(p) = p.first_chunk::<M>() else { return };
    let mut at = 0;
    while at + 4 * S::LANES <= width {
        columns::<S, E, M, 4>(s, width, padded, at, p, shrink, v, next, sums);
        at += 4 * S::LANES;
    }
    while at < width {
        columns::<S, E, M, 1>(s, width, padded, at, p, shrink, v, next, sums);
        at += S::LANES;
    }
}

/// [`values`] of `NV` registers of columns from `at` on; a single one may not be full.
#[inline(always)]
fn columns<S: Simd, E: Element, const M: usize, const NV: usize>(
    s: S,
    width: usize,
    padded: usize,
    at: usize,
    p: &[[f32; PAGE]; M],
    shrink: &[f32],
    v: &[E],
    next: &[E],
    sums: &mut [f32],
) {
    let mut acc = [[s.zero(); NV]; M];
    for (i, acc) in acc.iter_mut().enumerate() {
        for (r, acc) in acc.iter_mut().enumerate() {
            *acc = s.mul(s.load(&sums[i * padded + at + r * S::LANES..]), s.splat(shrink[i]));
        }
    }
    for (key, values) in (0..PAGE).zip(v.chunks_exact(width)) {
        fetch_ahead(next, key * width + at, NV * S::LANES);
        let mut row = [s.zero(); NV];
        if NV == 1 {
            row[0] = s.load_up_to(&values[at..]);
        } else {
            let values = &values[at..at + NV * S::LANES];
            for (r, row) in row.iter_mut().enumerate() {
                *row = s.load_as(&values[r * S::LANES..]);
            }
        }
        for (acc, p) in acc.iter_mut().zip(p) {
            let x = s.splat(p[key]);
            for (acc, row) in acc.iter_mut().zip(&row) {
                *acc = s.fma(x, *row, *acc);
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
    QUERIES * (PAGE + width + width.next_multiple_of(16))
}
