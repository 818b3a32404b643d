//! Philox on vectors: the 64 random words of a block at once, and dropout masks made of them.
//!
//! The generator multiplies 32-bit words into 64-bit products ten times, so its state is kept one word to a 64-bit
//! lane, in the low half: what the multiply instruction reads. High halves hold leftovers that nothing looks at,
//! which saves all shuffling until the end. [`Stream`] defines the words; every instruction set gives the same ones.

use std::arch::x86_64::*;

use super::simd::{Avx2, Avx512, Portable, Simd};
use crate::Dropout;
use crate::rng::{BLOCK, M0, M1, Stream, W};

/// Counters that advance together in one block.
const COUNTERS: usize = BLOCK / 4;

/// Operations on a register of words, each in the low half of a 64-bit lane.
pub trait WordLanes: Copy + Send + Sync {
    /// Words in a register.
    const WORDS: usize;
    /// The register.
    type W: Copy;

    /// `first`, `first + 1`, ...
    fn count_from(self, first: u32) -> Self::W;
    /// All words `x`.
    fn splat_word(self, x: u32) -> Self::W;
    /// 64-bit product of the low halves.
    fn wide_mul(self, a: Self::W, b: Self::W) -> Self::W;
    /// `high half of p ^ a ^ b`, as a word.
    fn mix(self, p: Self::W, a: Self::W, b: Self::W) -> Self::W;
    /// Words to the first `WORDS` elements of `x`.
    fn store_words(self, x: &mut [u32], v: Self::W);
}

impl WordLanes for Portable {
    const WORDS: usize = 2;
    type W = [u64; 2];

    #[inline(always)]
    fn count_from(self, first: u32) -> [u64; 2] {
        [first as u64, first as u64 + 1]
    }
    #[inline(always)]
    fn splat_word(self, x: u32) -> [u64; 2] {
        [x as u64; 2]
    }
    #[inline(always)]
    fn wide_mul(self, a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
        std::array::from_fn(|i| (a[i] as u32 as u64) * (b[i] as u32 as u64))
    }
    #[inline(always)]
    fn mix(self, p: [u64; 2], a: [u64; 2], b: [u64; 2]) -> [u64; 2] {
        std::array::from_fn(|i| (p[i] >> 32) ^ a[i] ^ b[i])
    }
    #[inline(always)]
    fn store_words(self, x: &mut [u32], v: [u64; 2]) {
        x[..2].copy_from_slice(&v.map(|v| v as u32));
    }
}

impl WordLanes for Avx2 {
    const WORDS: usize = 4;
    type W = __m256i;

    #[inline(always)]
    fn count_from(self, first: u32) -> __m256i {
        // SAFETY: a token exists only where the processor has these instructions.
        unsafe { _mm256_add_epi64(self.splat_word(first), _mm256_set_epi64x(3, 2, 1, 0)) }
    }
    #[inline(always)]
    fn splat_word(self, x: u32) -> __m256i {
        // SAFETY: the token.
        unsafe { _mm256_set1_epi64x(x as i64) }
    }
    #[inline(always)]
    fn wide_mul(self, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the token.
        unsafe { _mm256_mul_epu32(a, b) }
    }
    #[inline(always)]
    fn mix(self, p: __m256i, a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: the token.
        unsafe { _mm256_xor_si256(_mm256_srli_epi64::<32>(p), _mm256_xor_si256(a, b)) }
    }
    #[inline(always)]
    fn store_words(self, x: &mut [u32], v: __m256i) {
        let x = &mut x[..4];
        // SAFETY: four elements; the token.
        unsafe {
            let words = _mm256_permutevar8x32_epi32(v, _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0));
            _mm_storeu_si128(x.as_mut_ptr().cast(), _mm256_castsi256_si128(words));
        }
    }
}

impl WordLanes for Avx512 {
    const WORDS: usize = 8;
    type W = __m512i;

    #[inline(always)]
    fn count_from(self, first: u32) -> __m512i {
        // SAFETY: a token exists only where the processor has these instructions.
        unsafe { _mm512_add_epi64(self.splat_word(first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0)) }
    }
    #[inline(always)]
    fn splat_word(self, x: u32) -> __m512i {
        // SAFETY: the token.
        unsafe { _mm512_set1_epi64(x as i64) }
    }
    #[inline(always)]
    fn wide_mul(self, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token.
        unsafe { _mm512_mul_epu32(a, b) }
    }
    #[inline(always)]
    fn mix(self, p: __m512i, a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the token. 0x96 is the truth table of the exclusive or of three.
        unsafe { _mm512_ternarylogic_epi64::<0x96>(_mm512_srli_epi64::<32>(p), a, b) }
    }
    #[inline(always)]
    fn store_words(self, x: &mut [u32], v: __m512i) {
        let x = &mut x[..8];
        // SAFETY: eight elements; the token.
        unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), _mm512_cvtepi64_epi32(v)) }
    }
}

/// The words of columns `64*block ..` of a row.
#[inline(always)]
pub(super) fn words<S: WordLanes>(s: S, stream: &Stream, row: u64, block: usize) -> [u32; BLOCK] {
    let [first, c1, c2, c3] = stream.counter(row, block as u32);
    let (c1, c2, c3) = (s.splat_word(c1), s.splat_word(c2), s.splat_word(c3));
    let (m0, m1) = (s.splat_word(M0), s.splat_word(M1));
    let mut words = [0; BLOCK];
    // Two registers at a time hide the multiply's latency and still fit 16 registers.
    for lane in (0..COUNTERS).step_by(2 * S::WORDS) {
        let first = first + lane as u32;
        let mut pair =
            [[s.count_from(first), c1, c2, c3], [s.count_from(first + S::WORDS as u32), c1, c2, c3]];
        let mut key = stream.key();
        for _ in 0..10 {
            let (k0, k1) = (s.splat_word(key[0]), s.splat_word(key[1]));
            for c in &mut pair {
                let (p0, p1) = (s.wide_mul(c[0], m0), s.wide_mul(c[2], m1));
                *c = [s.mix(p1, c[1], k0), p1, s.mix(p0, c[3], k1), p0];
            }
            key = [key[0].wrapping_add(W[0]), key[1].wrapping_add(W[1])];
        }
        for (i, c) in pair.into_iter().enumerate() {
            for (w, v) in c.into_iter().enumerate() {
                s.store_words(&mut words[COUNTERS * w + lane + i * S::WORDS..], v);
            }
        }
    }
    words
}

/// Factors (0 or `1/(1-p)`) of columns `first_column ..` of a row, which counts from the start of the global batch:
/// the caller has added `first_row`. `first_column` is a multiple of 64.
#[inline(always)]
pub(super) fn mask_row<S: Simd>(s: S, d: &Dropout, row: u64, first_column: usize, out: &mut [f32]) {
    debug_assert!(
        first_column.is_multiple_of(BLOCK),
        "masks start at blocks of {BLOCK}, not at {first_column}"
    );
    let block = first_column / BLOCK;
    let (blocks, rest) = out.as_chunks_mut();
    for (i, out) in blocks.iter_mut().enumerate() {
        mask_block(s, d, row, block + i, out);
    }
    if !rest.is_empty() {
        let mut last = [0.0; BLOCK];
        mask_block(s, d, row, block + blocks.len(), &mut last);
        rest.copy_from_slice(&last[..rest.len()]);
    }
}

/// Which of columns `64 * block ..` of a row are kept: a bit each, lowest first. The row is as in [`mask_row`].
#[inline(always)]
pub(super) fn kept<S: Simd>(s: S, d: &Dropout, row: u64, block: usize) -> [u32; 2] {
    let threshold = d.threshold();
    let words = words(s, &d.stream, row, block);
    let mut kept = [0; 2];
    for (kept, words) in kept.iter_mut().zip(words.as_chunks::<32>().0) {
        for (i, word) in words.iter().enumerate() {
            *kept |= ((*word >= threshold) as u32) << i;
        }
    }
    kept
}

#[inline(always)]
fn mask_block<S: Simd>(s: S, d: &Dropout, row: u64, block: usize, out: &mut [f32; BLOCK]) {
    let threshold = d.threshold();
    let keep = d.keep();
    let words = words(s, &d.stream, row, block);
    for (out, word) in out.iter_mut().zip(&words) {
        *out = if *word >= threshold { keep } else { 0.0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::{Isa, dispatch};
    use crate::rng::Purpose;

    #[test]
    fn words_are_those_of_the_definition() {
        for isa in Isa::available() {
            for (seed, row, block) in
                [(0, 0, 0), (!0, u64::MAX >> 20, 0xfff_ffff), (0x1234_5678_9abc, 1 << 33, 77)]
            {
                let stream = Stream::new(seed, Purpose::DropoutAttention, 11, 1_000_003);
                let got = dispatch!(isa, s => words(s, &stream, row, block));
                for (i, word) in got.into_iter().enumerate() {
                    assert_eq!(
                        word,
                        stream.word(row, block * BLOCK + i),
                        "{isa:?} row {row} block {block} word {i}"
                    );
                }
            }
        }
    }

    #[test]
    fn masks_are_those_of_the_definition() {
        let stream = Stream::new(5, Purpose::DropoutFeedForward, 2, 9);
        for isa in Isa::available() {
            for p in [0.0, 1e-4, 0.1, 0.5, 0.999_999_9] {
                let d = Dropout { p, stream, first_row: 0 };
                for len in [0, 1, 63, 64, 65, 1000] {
                    let mut mask = vec![f32::NAN; len];
                    dispatch!(isa, s => mask_row(s, &d, 12, 128, &mut mask));
                    for (i, m) in mask.into_iter().enumerate() {
                        let kept = stream.word(12, 128 + i) as f64 >= p as f64 * 4_294_967_296.0;
                        assert_eq!(m, if kept { 1.0 / (1.0 - p) } else { 0.0 }, "{isa:?} p {p} column {i}");
                    }
                }
                let mut mask = [f32::NAN; BLOCK];
                let bits = dispatch!(isa, s => {
                    mask_row(s, &d, 12, 128, &mut mask);
                    kept(s, &d, 12, 2)
                });
                for (i, m) in mask.into_iter().enumerate() {
                    assert_eq!(bits[i / 32] >> (i % 32) & 1 != 0, m != 0.0, "{isa:?} p {p} bit {i}");
                }
            }
        }
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let d = Dropout { p: 0.1, stream: Stream::new(1, Purpose::DropoutAttentionOut, 0, 1), first_row: 0 };
        let mut mask = vec![0.0; 1 << 16];
        dispatch!(Isa::detect(), s => mask_row(s, &d, 3, 0, &mut mask));
        let mean = mask.iter().map(|m| *m as f64).sum::<f64>() / mask.len() as f64;
        // Standard deviation of the mean: sqrt(p / (1-p) / 65536) = 0.0013.
        assert!((mean - 1.0).abs() < 0.0065, "mean {mean}");
    }
}
