//! Matrices of random numbers.

use super::Packed;
use crate::cpu::CpuDevice;
use crate::cpu::buffer::Shards;
use crate::cpu::random::{WordLanes, words};
use crate::cpu::simd::{Isa, dispatch};
use crate::quantise::{GROUP, code_bits};
use crate::rng::{BLOCK, Stream};
use crate::{RandomWeights, WeightFormat};

impl Packed {
    pub(in crate::cpu) fn random(
        device: &CpuDevice,
        format: WeightFormat,
        n: usize,
        k: usize,
        random: RandomWeights,
    ) -> anyhow::Result<Packed> {
        let (isa, stream, step) = (device.isa, random.stream, random.step());
        let (Some(bits), Some(group)) = (code_bits(format), random.group(format)) else {
            return Packed::new(device, format, n, k, &|rows, out| {
                for (row, out) in rows.zip(out.chunks_exact_mut(k)) {
                    fill(isa, &stream, row, out, |word| RandomWeights::number(step, word));
                }
                Ok(())
            });
        };
        Packed::from_codes(device, format, n, k, &mut |rows, to| {
            to.groups.fill(group);
            let width = k.div_ceil(GROUP) * GROUP;
            let codes = Shards::new(to.codes);
            device.pool.for_each(rows.len(), |i, _| {
                // SAFETY: rows are disjoint.
                let out = unsafe { codes.range(i * width..(i + 1) * width) };
                fill(isa, &stream, rows.start + i, out, |word| RandomWeights::code(bits, word));
            });
            Ok(())
        })
    }
}

/// What the words of a row stand for.
fn fill<T>(isa: Isa, stream: &Stream, row: usize, out: &mut [T], number: impl Fn(u32) -> T + Copy) {
    dispatch!(isa, s => fill_with(s, stream, row, out, number));
}

#[inline(always)]
fn fill_with<S: WordLanes, T>(s: S, stream: &Stream, row: usize, out: &mut [T], number: impl Fn(u32) -> T) {
    for (block, out) in out.chunks_mut(BLOCK).enumerate() {
        for (out, word) in out.iter_mut().zip(words(s, stream, row as u64, block)) {
            *out = number(word);
        }
    }
}
