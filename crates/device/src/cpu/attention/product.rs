//! Products of tiles that lie in the first-level cache. Operands are walked with strides, so that a tile of
//! probabilities is multiplied by rows and by columns from the place where the softmax left it.

use std::ops::Range;

use crate::cpu::gemm::Mac;
use crate::cpu::simd::Simd;

/// A left operand: unit `k` of row `i` is word `i * row + k * unit`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) data: &'a [u32],
    pub(super) row: usize,
    pub(super) unit: usize,
}

/// A right operand: register `j` of unit `k` begins at word `k * unit + j * register`.
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub(super) data: &'a [u32],
    pub(super) unit: usize,
    pub(super) register: usize,
}

/// `out[R, V * LANES] = a * b`, or with `add` `out += a * b`, over `units` units of k. Rows of `out` are `ld` apart.
#[inline(always)]
pub(super) fn multiply<S: Simd, M: Mac<S>, const R: usize, const V: usize>(
    s: S,
    units: usize,
    a: Left,
    b: Right,
    add: bool,
    out: &mut [f32],
    ld: usize,
) {
    let last = units.saturating_sub(1);
    assert!(units == 0 || (R - 1) * a.row + last * a.unit < a.data.len(), "the left operand ends early");
    let b_end = last * b.unit + (V - 1) * b.register + S::LANES;
    assert!(units == 0 || b_end <= b.data.len(), "the right operand ends early");
    let b_words: &[f32] = bytemuck::cast_slice(b.data);
    let mut acc = [[s.zero(); V]; R];
    if add {
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v = s.load(&out[i * ld + j * S::LANES..]);
            }
        }
    }
    for k in 0..units {
        // A closure would not always be inlined, and then it lacks the instructions.
        let mut registers = [s.zero(); V];
        for (j, register) in registers.iter_mut().enumerate() {
            let at = k * b.unit + j * b.register;
            // SAFETY: `at + LANES` is at most `b_end`.
            *register = s.load(unsafe { b_words.get_unchecked(at..at + S::LANES) });
        }
        for (i, row) in acc.iter_mut().enumerate() {
            // SAFETY: at most the index of the last row's last unit, which was compared with the length.
            let a = s.splat(f32::from_bits(unsafe { *a.data.get_unchecked(i * a.row + k * a.unit) }));
            for (v, b) in row.iter_mut().zip(registers) {
                *v = M::mac(s, a, b, *v);
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        for (j, v) in row.iter().enumerate() {
            s.store(&mut out[i * ld + j * S::LANES..], *v);
        }
    }
}

/// Sums over the width of the head: `out[MR, NV * LANES] = a * b` of packed panels, without the first `skip` registers of
/// each row, whose queries do not attend to these keys: they are filled with `instead`.
#[inline(always)]
pub(super) fn scores<S: Simd, M: Mac<S>, const MR: usize, const NV: usize>(
    s: S,
    units: usize,
    a: &[u32],
    b: &[u32],
    skip: usize,
    instead: f32,
    out: &mut [f32],
) {
    let nr = NV * S::LANES;
    let a = Left { data: a, row: 1, unit: MR };
    for row in out.chunks_exact_mut(nr) {
        row[..skip * S::LANES].fill(instead);
    }
    let b = Right { data: &b[skip * S::LANES..], unit: nr, register: S::LANES };
    let out = &mut out[skip * S::LANES..];
    match NV - skip {
        1 => multiply::<S, M, MR, 1>(s, units, a, b, false, out, nr),
        2 => multiply::<S, M, MR, 2>(s, units, a, b, false, out, nr),
        _ => multiply::<S, M, MR, NV>(s, units, a, b, false, out, nr),
    }
}

/// Rows of a head, one register wide each: register `c` of unit `k` begins at word `(c * units + k) * LANES`.
#[derive(Clone, Copy)]
pub(super) struct Columns<'a> {
    pub(super) data: &'a [u32],
    pub(super) units: usize,
}

/// Sums over tokens: `out += a * b` for rows `0 .. rows` in steps of `R` (the last may go beyond) and all columns of the
/// head. Units `range(first row)` of `a` meet those of `b` that are `first` further on. `out` has rows of `padded`
/// columns, whole registers.
#[inline(always)]
pub(super) fn add_products<S: Simd, M: Mac<S>, const R: usize>(
    s: S,
    rows: usize,
    range: impl Fn(usize) -> Range<usize>,
    a: Left,
    b: Columns,
    first: usize,
    out: &mut [f32],
    padded: usize,
) {
    let registers = padded / S::LANES;
    for c in (0..registers).step_by(2) {
        for row in (0..rows).step_by(R) {
            let units = range(row);
            let a = Left { data: &a.data[row * a.row + units.start * a.unit..], ..a };
            let start = (c * b.units + first + units.start) * S::LANES;
            let b = Right { data: &b.data[start..], unit: S::LANES, register: b.units * S::LANES };
            let out = &mut out[row * padded + c * S::LANES..];
            if c + 1 < registers {
                multiply::<S, M, R, 2>(s, units.len(), a, b, true, out, padded);
            } else {
                multiply::<S, M, R, 1>(s, units.len(), a, b, true, out, padded);
            }
        }
    }
}
