//! Rows rounded to groups of few bits, all columns of a panel at a time.

use super::groups::{Bits, NR};
use crate::cpu::pack::{Matrix, pack_panels};
use crate::cpu::simd::{Isa, Simd, dispatch};
use crate::places::{UNIT, places};
use crate::quantise::{self, GROUP, bits_of, inverse_of, nearest};

/// Rounds rows and packs them into a panel.
pub(super) fn pack(isa: Isa, bits: Bits, rows: &[f32], k: usize, out: &mut [u32]) {
    let x = Matrix { data: rows, ld: k, k_contiguous: true };
    // The group of all columns, columns beside each other; beyond the end of a row stays zero.
    let mut w = [[0.0f32; NR]; GROUP];
    for (g, out) in out.chunks_exact_mut(bits.stride()).enumerate() {
        let ks = g * GROUP..((g + 1) * GROUP).min(k);
        let len = ks.len();
        w[len..].fill([0.0; NR]);
        let words = bytemuck::cast_slice_mut(w[..len].as_flattened_mut());
        pack_panels(isa, x, 0..rows.len() / k, ks, NR, 1, words);
        dispatch!(isa, s => round(s, bits, &w, len, out));
    }
}

/// Plain loops, compiled for the instruction set of the token.
#[inline(always)]
fn round<S: Simd>(_: S, bits: Bits, w: &[[f32; NR]; GROUP], len: usize, out: &mut [u32]) {
    let groups = quantise::choose(bits.format(), &w[..len]);
    let (words, numbers) = out.split_at_mut(bits.words());
    let numbers: &mut [half::bf16] = bytemuck::cast_slice_mut(numbers);
    let (mut inverse, mut min) = ([0.0f32; NR], [0.0f32; NR]);
    for l in 0..NR {
        inverse[l] = inverse_of(groups[l].scale.to_f32());
        min[l] = groups[l].min.to_f32();
        numbers[l] = groups[l].scale;
        if bits.minima() {
            numbers[NR + l] = groups[l].min;
        }
    }
    for (w, out) in w.chunks_exact(UNIT).zip(words.chunks_exact_mut(bits.count() * NR)) {
        let mut words = [[0u32; NR]; 8];
        for (step, w) in w.as_chunks::<4>().0.iter().enumerate() {
            let mut codes = [0u32; NR];
            for (w, shift) in w.iter().zip([0, 8, 16, 24]) {
                for l in 0..NR {
                    codes[l] |= bits_of(nearest(bits.format(), w[l], inverse[l], min[l])) << shift;
                }
            }
            for place in places(bits.count(), step) {
                for l in 0..NR {
                    words[place.word][l] |= (codes[l] & place.mask) << place.shift;
                }
            }
        }
        out.copy_from_slice(words[..bits.count()].as_flattened());
    }
}
