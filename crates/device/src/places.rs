//! Where codes lie in the words that products read.
//!
//! A product multiplies four elements of k at once, one in each byte of a word: a step. A unit of 32 codes, 8 steps, takes as
//! many words as a code has bits:
//!
//! - 8 bits: a step is a word;
//! - 4 bits: a word holds two steps, the first in the lower halves of its bytes;
//! - 3 bits: each of three words holds two steps as well, in bits 0 to 2 and 3 to 5 of its bytes. That leaves two bits in every
//!   byte, six in the three words, which are the last two steps: step 6 has its lower bits in word 0 and its highest in bit 6 of
//!   word 1, step 7 its lower bits in word 2 and its highest in bit 7 of word 1.
//!
//! What a step of 3 bits costs to unpack, of registers full of such words, decides that: six of eight steps are a shift (or
//! none) and a mask, as with 4 bits, and only two are put together from two words. That is 17 instructions for a unit, where
//! planes of two bits and one bit would need a shift and a mask for each plane and something that joins them: 29. Codes one
//! behind the other across bytes would not lie in the bytes that are multiplied.

/// Codes of a unit.
pub(crate) const UNIT: usize = 32;
/// Steps of a unit.
pub(crate) const UNIT_STEPS: usize = UNIT / 4;

/// Where bits of a step's codes lie, a code in each byte: `codes & mask` is `word >> shift & mask`.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Number of the word in the unit.
    pub(crate) word: usize,
    /// The bits, in all four bytes.
    pub(crate) mask: u32,
    /// How far above their own place they lie.
    pub(crate) shift: u32,
}

/// Places of a unit's step `step`, for codes of 8, 4 or 3 bits.
#[inline(always)]
pub(crate) fn places(bits: usize, step: usize) -> impl Iterator<Item = Place> {
    let place =
        |word, mask: u32, shift: usize| Some(Place { word, mask: mask * 0x0101_0101, shift: shift as u32 });
    let places = match (bits, step) {
        (8, _) => [place(step, 255, 0), None],
        (4, _) => [place(step / 2, 15, step % 2 * 4), None],
        (_, 0..6) => [place(step / 2, 7, step % 2 * 3), None],
        _ => [place(2 * (step - 6), 3, 6), place(1, 4, step - 2)],
    };
    places.into_iter().flatten()
}

/// Hands a unit's codes to `add` as bits of its words, each with the word's number.
#[inline(always)]
pub(crate) fn put(bits: usize, codes: &[u8; UNIT], mut add: impl FnMut(usize, u32)) {
    for (step, codes) in codes.as_chunks().0.iter().enumerate() {
        let codes = u32::from_le_bytes(*codes);
        places(bits, step).for_each(|p| add(p.word, (codes & p.mask) << p.shift));
    }
}

/// A unit's codes, out of its words.
#[inline(always)]
pub(crate) fn take(bits: usize, word: impl Fn(usize) -> u32) -> [u8; UNIT] {
    let mut codes = [0; UNIT];
    for (step, codes) in codes.as_chunks_mut().0.iter_mut().enumerate() {
        *codes =
            places(bits, step).fold(0, |codes, p| codes | word(p.word) >> p.shift & p.mask).to_le_bytes();
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_unit_is_one_of_one_code() {
        for bits in [8, 4, 3] {
            let mut words = vec![0u32; bits];
            put(bits, &[255; UNIT], |i, bits| {
                assert_eq!(words[i] & bits, 0, "{bits} bits, word {i}");
                words[i] |= bits;
            });
            assert!(words.iter().all(|word| *word == u32::MAX), "{bits}: {words:x?}");
        }
    }

    #[test]
    fn codes_come_back() {
        for bits in [8, 4, 3] {
            let codes: [u8; UNIT] = std::array::from_fn(|j| (j * 37 + 11) as u8 & (255 >> (8 - bits)));
            let mut words = vec![0; bits];
            put(bits, &codes, |i, bits| words[i] |= bits);
            assert_eq!(take(bits, |i| words[i]), codes, "{bits} bits");
        }
    }
}
