//! Causal attention in tiles with an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022; Dao, 2023).
//!
//! Scores are computed transposed: a row of a tile is a key, its columns are queries, which lie across the lanes of a
//! register. The softmax is then free of sums across lanes, and the products behind it read the tile as it is, by rows
//! where they sum over queries and by columns where they sum over keys: results have the head's columns across lanes,
//! as they lie in memory, and nothing is turned around but queries, keys and values, once, for the scores.
//!
//! A panel of queries is as wide as the scores' register tile; what happens to it does not depend on how panels are
//! dealt to threads.

mod backward;
mod backward_tiles;
mod forward;
mod forward_tiles;
mod paged;
mod product;

use std::arch::x86_64::*;
use std::ops::Range;

pub(super) use backward::backward;
pub(super) use forward::forward;
pub(super) use paged::paged;

use super::amx::{self, Tiles};
use super::gemm::{Dot, Fma, Mac};
use super::pack::Matrix;
use super::simd::{Avx512, Isa, Portable, Simd, with_avx2, with_avx512, with_avx512_bf16};
use super::{CpuDevice, random};
use crate::rng::BLOCK;
use crate::{AttentionShape, DType, Dropout, Element, bf16};

/// Most columns of a register tile: queries whose running maxima, sums and so on fit arrays.
const MOST_LANES: usize = 48;
/// Score that stands for none yet: it is below all others, and unlike an infinity it can be subtracted from itself.
const NOTHING: f32 = f32::MIN;

/// Sizes that follow from the register tile of one instruction set and element type.
#[derive(Clone, Copy)]
struct Tile {
    /// Queries of a panel.
    nr: usize,
    /// What the head's columns come in multiples of: numbers in a register, or columns of tiles.
    columns: usize,
    /// Numbers in a unit of packed panels.
    per_unit: usize,
    /// What units over the width of the head come in multiples of.
    step: usize,
}

impl Tile {
    fn of<E: Element>(isa: Isa) -> Self {
        match isa {
            Isa::Portable => Tile { nr: 8, columns: 4, per_unit: 1, step: 1 },
            Isa::Avx2 => Tile { nr: 24, columns: 8, per_unit: 1, step: 1 },
            Isa::Avx512Bf16 if E::DTYPE == DType::Bf16 => Tile { nr: 48, columns: 16, per_unit: 2, step: 1 },
            Isa::Amx if E::DTYPE == DType::Bf16 => {
                Tile { nr: amx::SIDE, columns: amx::SIDE, per_unit: 2, step: amx::STEP }
            }
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => Tile { nr: 48, columns: 16, per_unit: 1, step: 1 },
        }
    }

    /// Units of a head's width.
    fn units(self, width: usize) -> usize {
        width.div_ceil(self.per_unit).next_multiple_of(self.step)
    }

    /// Columns of a head of such a width in memory.
    fn padded(self, width: usize) -> usize {
        width.next_multiple_of(self.columns)
    }
}

/// A task, written once for every register tile.
trait Kernel {
    /// Runs with tiles of `MR` keys and `NV` registers of queries for scores, and of `R` rows and two registers of the head's
    /// columns for sums over tokens. `NV` registers are whole tiles of `R` rows.
    fn run<S: Simd, M: Units<S>, const MR: usize, const NV: usize, const R: usize>(self, s: S);

    /// The same in bf16 with tile registers.
    fn run_on_tiles(self, s: Avx512, tiles: &Tiles);
}

/// Runs a kernel with the register tile of [`Tile::of`].
fn on_tile<E: Element>(isa: Isa, kernel: impl Kernel) {
    match isa {
        Isa::Portable => kernel.run::<_, Fma, 4, 2, 4>(Portable),
        // SAFETY: an `Isa` value is only made for a processor that has it.
        Isa::Avx2 => unsafe {
            with_avx2(
                #[inline(always)]
                |s| kernel.run::<_, Fma, 4, 3, 6>(s),
            )
        },
        // SAFETY: as above; a processor with tiles has all of AVX-512.
        Isa::Amx if E::DTYPE == DType::Bf16 => unsafe {
            let tiles = Tiles::new();
            with_avx512_bf16(
                #[inline(always)]
                |s| kernel.run_on_tiles(s, &tiles),
            )
        },
        // SAFETY: as above.
        Isa::Avx512Bf16 if E::DTYPE == DType::Bf16 => unsafe {
            with_avx512_bf16(
                #[inline(always)]
                |s| kernel.run::<_, Dot, 8, 3, 12>(s),
            )
        },
        // SAFETY: as above.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe {
            with_avx512(
                #[inline(always)]
                |s| kernel.run::<_, Fma, 8, 3, 12>(s),
            )
        },
    }
}

/// Exponentials, no more exact than what becomes of them.
trait Exponential<S: Simd>: Mac<S> {
    /// What exponents are multiplied by for [`Exponential::exp`], as well as by anything else.
    const FACTOR: f32 = 1.0;

    /// `e^(x / FACTOR)` of a number that is hardly above 0.
    #[inline(always)]
    fn exp(s: S, x: S::F) -> S::F {
        s.exp(x)
    }
}

impl<S: Simd> Exponential<S> for Fma {}

impl Exponential<Avx512> for Dot {
    const FACTOR: f32 = std::f32::consts::LOG2_E;

    #[inline(always)]
    fn exp(s: Avx512, x: __m512) -> __m512 {
        s.exp2_for_halves(x)
    }
}

/// How a multiply-accumulate's units are made of f32 numbers.
trait Units<S: Simd>: Exponential<S> {
    /// Type of these numbers.
    type Value: Element;
    /// Stores rows `2i` and `2i + 1` of a tile whose rows are `nr` wide as the rows of units that they make; `out`
    /// starts where unit row `2i / PER_UNIT` does.
    fn put(s: S, even: S::F, odd: S::F, out: &mut [f32], nr: usize);
    /// Stores numbers of a row.
    fn put_row(s: S, row: S::F, out: &mut [Self::Value]);
}

impl<S: Simd> Units<S> for Fma {
    type Value = f32;

    #[inline(always)]
    fn put(s: S, even: S::F, odd: S::F, out: &mut [f32], nr: usize) {
        s.store(out, even);
        s.store(&mut out[nr..], odd);
    }

    #[inline(always)]
    fn put_row(s: S, row: S::F, out: &mut [f32]) {
        s.store(out, row);
    }
}

impl Units<Avx512> for Dot {
    type Value = bf16;

    #[inline(always)]
    fn put(s: Avx512, even: __m512, odd: __m512, out: &mut [f32], _: usize) {
        // SAFETY: only used through `with_avx512_bf16`; the types only rename 512 bits.
        let pairs = unsafe {
            let halves: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(odd, even));
            let low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64::<1>(halves));
            _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32::<16>(high)))
        };
        s.store(out, pairs);
    }

    #[inline(always)]
    fn put_row(_: Avx512, row: __m512, out: &mut [bf16]) {
        // SAFETY: only used through `with_avx512_bf16`; the slice has 16 elements, and the types only rename 256 bits.
        unsafe {
            let halves: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(row));
            _mm256_storeu_si256(out[..16].as_mut_ptr().cast(), halves);
        }
    }
}

/// Rows of one head: row `i` of `data` starts at `i * ld` and its first elements are the head's.
#[derive(Clone, Copy)]
struct Rows<'a, E> {
    data: &'a [E],
    ld: usize,
}

impl<'a, E> Rows<'a, E> {
    /// As an operand whose products are summed over the width of the head.
    fn over_width(self) -> Matrix<'a, E> {
        Matrix { data: self.data, ld: self.ld, k_contiguous: true }
    }

    /// As an operand whose rows are the columns of the head and whose products are summed over tokens.
    fn over_tokens(self) -> Matrix<'a, E> {
        Matrix { data: self.data, ld: self.ld, k_contiguous: false }
    }
}

/// Dropout of one head of one sequence.
#[derive(Clone, Copy)]
struct HeadDropout {
    dropout: Dropout,
    /// Row of the sequence's first token, and number of rows from one token to the next.
    first: u64,
    heads: u64,
}

impl HeadDropout {
    fn new(dropout: Dropout, s: AttentionShape, batch: usize, head: usize) -> Self {
        let (before, heads) = (s.among.0 as u64, s.among.1 as u64);
        let first = (dropout.first_row + (batch * s.seq) as u64) * heads + before + head as u64;
        HeadDropout { dropout, first, heads }
    }

    /// What a kept probability is multiplied by.
    fn factor(&self) -> f32 {
        self.dropout.keep()
    }

    /// Which probabilities are kept, of queries `queries` and the 64 keys of `block`: bit `i` of word `w * nr + j`
    /// is for key `64 * block + 32 * w + i` and the j-th query.
    #[inline(always)]
    fn bits<S: Simd>(&self, s: S, queries: Range<usize>, block: usize, nr: usize, out: &mut [u32]) {
        for (j, query) in queries.enumerate() {
            let row = self.first + query as u64 * self.heads;
            let [low, high] = random::kept(s, &self.dropout, row, block);
            out[j] = low;
            out[nr + j] = high;
        }
    }
}

/// Where the queries of a panel are and what they may attend to.
struct Panel {
    /// The panel's queries.
    queries: Range<usize>,
    /// Position of each lane's query and the first key that it attends to.
    position: [f32; MOST_LANES],
    start: [f32; MOST_LANES],
    /// Smallest and largest first key.
    low: usize,
    high: usize,
}

impl Panel {
    /// `doc_start` is of each query.
    fn new(queries: Range<usize>, doc_start: Option<&[u32]>) -> Self {
        let mut position = [0.0; MOST_LANES];
        let mut start = [0.0; MOST_LANES];
        for (i, p) in position.iter_mut().enumerate() {
            // Exact below 2^24.
            *p = (queries.start + i) as f32;
        }
        let (mut low, mut high) = (0, 0);
        if let Some(doc_start) = doc_start {
            let doc_start = &doc_start[queries.clone()];
            low = doc_start.iter().copied().min().unwrap_or(0) as usize;
            high = doc_start.iter().copied().max().unwrap_or(0) as usize;
            for (s, d) in start.iter_mut().zip(doc_start) {
                *s = *d as f32;
            }
        }
        Panel { queries, position, start, low, high }
    }

    /// Sets scores of keys `first_key ..` (rows `rows` of a tile that starts at `first_key`) to -infinity where a query
    /// does not attend to the key.
    #[inline(always)]
    fn mask<S: Simd, const NV: usize>(&self, s: S, scores: &mut [f32], first_key: usize, rows: Range<usize>) {
        let nr = NV * S::LANES;
        let never = s.splat(f32::NEG_INFINITY);
        for row in rows {
            let key = s.splat((first_key + row) as f32);
            for v in 0..NV {
                let scores = &mut scores[row * nr + v * S::LANES..];
                let score = s.load(scores);
                let score = s.select_gt(key, s.load(&self.position[v * S::LANES..]), never, score);
                let score = s.select_gt(s.load(&self.start[v * S::LANES..]), key, never, score);
                s.store(scores, score);
            }
        }
    }
}

/// Stores `factor` times the first `width` numbers of `row`, which is of whole registers.
#[inline(always)]
fn store_row<E: Element, S: Simd>(s: S, row: &[f32], width: usize, factor: f32, to: &mut [E]) {
    for at in (0..width).step_by(S::LANES) {
        s.store_up_to(&mut to[at..], s.mul(s.load(&row[at..]), s.splat(factor)));
    }
}

/// Cuts memory into pieces of the given numbers of words, each starting on a cache line.
fn carve<const N: usize>(mut words: &mut [u32], sizes: [usize; N]) -> [&mut [u32]; N] {
    sizes.map(|size| {
        let (piece, rest) = std::mem::take(&mut words).split_at_mut(size.next_multiple_of(LINE));
        words = rest;
        &mut piece[..size]
    })
}

/// Words that [`carve`] takes.
fn carved<const N: usize>(sizes: [usize; N]) -> usize {
    sizes.iter().map(|size| size.next_multiple_of(LINE)).sum()
}

/// Words of a cache line.
const LINE: usize = 16;

/// Bytes of workspace, of all threads, for a pass over sequences of shape `s`.
pub(super) fn workspace_bytes<E: Element>(device: &CpuDevice, s: AttentionShape) -> usize {
    let tile = Tile::of::<E>(device.isa);
    let most = forward::words(tile, s.width, s.seq)
        .max(backward::words(tile, s.width, s.seq))
        .max(paged::words(s.width));
    4 * device.threads() * most
}

const _: () = assert!(
    forward::KEYS == BLOCK && backward::KEYS.is_multiple_of(BLOCK) && BLOCK.is_multiple_of(amx::SIDE)
);
