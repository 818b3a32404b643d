//! Random weight matrices, each element of which follows from its place: see [`crate::Device::pack_random`].

use half::bf16;

use crate::WeightFormat;
use crate::quantise::{Group, code_bits};
use crate::rng::Stream;

/// Evenly distributed numbers around 0: they are made as fast as they are written, where normal ones take a logarithm and
/// a root each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandomWeights {
    /// Element (row, column) is made of its word.
    pub stream: Stream,
    /// Standard deviation.
    pub std: f32,
}

impl RandomWeights {
    /// What the words, taken as whole numbers around 0, are multiplied with.
    pub(crate) fn step(&self) -> f32 {
        self.width() / (1u64 << 32) as f32
    }

    /// The number that a word stands for in formats without codes.
    #[inline(always)]
    pub(crate) fn number(step: f32, word: u32) -> f32 {
        word.cast_signed() as f32 * step
    }

    /// The code that a word stands for: its upper bits.
    #[inline(always)]
    pub(crate) fn code(bits: usize, word: u32) -> u8 {
        (word >> (32 - bits)) as u8
    }

    /// The group of all codes of a format, if it is one of codes: as wide as the numbers.
    pub(crate) fn group(&self, format: WeightFormat) -> Option<Group> {
        let codes = (1u32 << code_bits(format)?) as f32;
        let scale = bf16::from_f32(self.width() / codes);
        Some(Group { scale, min: bf16::from_f32(scale.to_f32() * (1.0 - codes) / 2.0) })
    }

    /// Of the range that the numbers are of.
    fn width(&self) -> f32 {
        12f32.sqrt() * self.std
    }
}
