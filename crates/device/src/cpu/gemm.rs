//! Matrix products: `C[m, n] = sum over k of A(m, k) * B(n, k)`, f32 accumulation, result handed row by row to an epilogue.
//!
//! Both operands are packed into panels: A in panels of `MR` rows, B in panels of `NR` columns, so that the inner loop
//! reads both in order. One 32-bit *unit* of a panel is an f32, or with AVX-512 BF16 a pair of bf16 that are neighbours
//! in k, which is what `vdpbf16ps` consumes. The micro-kernel keeps an MR x NR tile in registers (8 x 48 with AVX-512:
//! 24 accumulators, 3 columns, 1 broadcast) over a whole block of k.
//!
//! Every element of C is summed by one thread in one order that depends on the shape alone.

use std::arch::x86_64::*;

use half::bf16;

use super::buffer::Shards;
use super::simd::{Avx512, Isa, Portable, Simd, dispatch};
use super::{CpuDevice, Scratch};
use crate::{DType, Element};

/// One operand: element (i, k) is at `i * ld + k` when `k_contiguous`, else at `k * ld + i`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a, E> {
    pub(super) data: &'a [E],
    pub(super) ld: usize,
    pub(super) k_contiguous: bool,
}

/// What happens to finished rows of the product.
pub(super) trait Epilogue: Sync {
    /// Receives `C[row, col .. col + acc.len()]`. Calls for different (row, col) come from different threads.
    fn row<S: Simd>(&self, s: S, row: usize, col: usize, acc: &[f32]);
}

/// Elements of k in one block; packed panels of a block stay in the L2 cache.
const KC: usize = 2048;
/// Units in a packed super-block of either operand: 8 MiB, a part of the L3 cache.
const PACKED_UNITS: usize = 2 << 20;
/// Units of A that a thread works through per panel of B: 256 KiB, a part of its L2 cache.
const GROUP_UNITS: usize = 64 << 10;

/// Sizes of the register tile, and how units are made, for one instruction set and element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    mr: usize,
    nr: usize,
    /// Elements of k in a unit.
    per_unit: usize,
}

fn tile<E: Element>(isa: Isa) -> Tile {
    match isa {
        Isa::Avx512 => Tile { mr: 8, nr: 48, per_unit: if E::DTYPE == DType::Bf16 { 2 } else { 1 } },
        Isa::Avx2 => Tile { mr: 6, nr: 16, per_unit: 1 },
        Isa::Portable => Tile { mr: 4, nr: 8, per_unit: 1 },
    }
}

/// How a product is cut into blocks.
#[derive(Clone, Copy, Debug)]
struct Blocks {
    /// Rows and columns of a super-block, multiples of the tile.
    m: usize,
    n: usize,
    /// Elements of k in a block.
    k: usize,
}

fn blocks(t: Tile, m: usize, n: usize, k: usize) -> Blocks {
    // Equal blocks of k, an even number of elements each.
    let k_blocks = k.div_ceil(KC).max(1);
    let kc = k.div_ceil(k_blocks).next_multiple_of(2);
    let most = PACKED_UNITS / kc.div_ceil(t.per_unit);
    let side = |size: usize, step: usize| size.next_multiple_of(step).min((most / step).max(1) * step);
    Blocks { m: side(m, t.mr), n: side(n, t.nr), k: kc }
}

/// Computes the product and calls `epilogue` once for every part of every row.
pub(super) fn gemm<E: Element, P: Epilogue>(
    device: &CpuDevice,
    (m, n, k): (usize, usize, usize),
    a: Matrix<E>,
    b: Matrix<E>,
    epilogue: &P,
) {
    if m == 0 || n == 0 {
        return;
    }
    let t = tile::<E>(device.isa);
    let step = blocks(t, m, n, k);
    let k_blocks = k.div_ceil(step.k).max(1);
    let units = step.k.div_ceil(t.per_unit);
    let partial = if k_blocks > 1 { step.m * step.n } else { 0 };
    let mut workspace = device.workspace();
    let [packed_a, packed_b, partials] = workspace.take([
        (Scratch::PackedA, step.m * units),
        (Scratch::PackedB, step.n * units),
        (Scratch::Partials, partial),
    ]);
    let (mut in_a, mut in_b) = (None, None);
    for n0 in (0..n).step_by(step.n) {
        let n1 = (n0 + step.n).min(n);
        for m0 in (0..m).step_by(step.m) {
            let m1 = (m0 + step.m).min(m);
            for k_block in 0..k_blocks {
                let ks = k_block * step.k..((k_block + 1) * step.k).min(k);
                let units = ks.len().div_ceil(t.per_unit);
                if in_b != Some((n0, k_block)) {
                    pack(device, b, n0..n1, ks.clone(), t.nr, t.per_unit, packed_b);
                    in_b = Some((n0, k_block));
                }
                if in_a != Some((m0, k_block)) {
                    pack(device, a, m0..m1, ks.clone(), t.mr, t.per_unit, packed_a);
                    in_a = Some((m0, k_block));
                }
                let block = Block {
                    tile: t,
                    units,
                    rows: m0..m1,
                    cols: n0..n1,
                    first: k_block == 0,
                    last: k_block + 1 == k_blocks,
                    a: packed_a,
                    b: packed_b,
                };
                block.run(device, Shards::new(bytemuck::cast_slice_mut(partials)), epilogue);
            }
        }
    }
}

/// Workspace of the largest product over `rows` rows whose widest side is `widest`.
pub(super) fn workspace_bytes<E: Element>(device: &CpuDevice, rows: usize, widest: usize) -> usize {
    let t = tile::<E>(device.isa);
    let at_most = |side: usize| (side.max(1) * KC.div_ceil(t.per_unit)).min(PACKED_UNITS);
    4 * (at_most(rows.max(widest)) + at_most(widest) + rows * widest.min(PACKED_UNITS / KC))
}

/// One super-block of packed operands.
struct Block<'a> {
    tile: Tile,
    /// Units of k.
    units: usize,
    rows: std::ops::Range<usize>,
    cols: std::ops::Range<usize>,
    /// First and last block of k: start from 0, or finish with the epilogue.
    first: bool,
    last: bool,
    a: &'a [u32],
    b: &'a [u32],
}

impl Block<'_> {
    /// Multiplies on all threads. A task is a group of A panels that fits the L2 cache by a few B panels.
    fn run<P: Epilogue>(&self, device: &CpuDevice, partials: Shards<f32>, epilogue: &P) {
        let Tile { mr, nr, per_unit } = self.tile;
        let (a_panels, b_panels) = (self.rows.len().div_ceil(mr), self.cols.len().div_ceil(nr));
        let group = (GROUP_UNITS / (self.units * mr)).clamp(1, a_panels);
        let groups = a_panels.div_ceil(group);
        let group = a_panels.div_ceil(groups);
        // Small enough that threads finish together, large enough that a task is not all overhead.
        let span = (b_panels * groups / (16 * device.threads())).clamp(1, 4);
        let spans = b_panels.div_ceil(span);
        device.pool.for_each(groups * spans, |task, _| {
            let a = task / spans * group..((task / spans + 1) * group).min(a_panels);
            let b = task % spans * span..((task % spans + 1) * span).min(b_panels);
            match (device.isa, per_unit) {
                // SAFETY: per_unit is 2 only with AVX-512 BF16.
                (Isa::Avx512, 2) => unsafe {
                    super::simd::with_avx512(
                        #[inline(always)]
                        |s| self.task::<_, Dot, _, 8, 3>(s, a, b, partials, epilogue),
                    )
                },
                (Isa::Avx512, _) => {
                    dispatch!(Isa::Avx512, s => self.task::<_, Fma, _, 8, 3>(s, a, b, partials, epilogue))
                }
                (Isa::Avx2, _) => {
                    dispatch!(Isa::Avx2, s => self.task::<_, Fma, _, 6, 2>(s, a, b, partials, epilogue))
                }
                (Isa::Portable, _) => self.task::<_, Fma, _, 4, 2>(Portable, a, b, partials, epilogue),
            }
        });
    }

    #[inline(always)]
    fn task<S: Simd, M: Mac<S>, P: Epilogue, const MR: usize, const NV: usize>(
        &self,
        s: S,
        a_panels: std::ops::Range<usize>,
        b_panels: std::ops::Range<usize>,
        partials: Shards<f32>,
        epilogue: &P,
    ) {
        let nr = NV * S::LANES;
        let mut out = [0.0f32; 8 * 48];
        let b_count = self.cols.len().div_ceil(nr);
        for bp in b_panels {
            let b = &self.b[bp * nr * self.units..(bp + 1) * nr * self.units];
            for ap in a_panels.clone() {
                let a = &self.a[ap * MR * self.units..(ap + 1) * MR * self.units];
                let keep = (ap * b_count + bp) * MR * nr;
                let start = if self.first {
                    None
                } else {
                    // SAFETY: every (ap, bp) belongs to one task.
                    Some(unsafe { &*partials.range(keep..keep + MR * nr) })
                };
                micro_kernel::<S, M, MR, NV>(s, a, b, start, &mut out);
                if !self.last {
                    // SAFETY: as above; `start` is no longer in use.
                    unsafe { partials.range(keep..keep + MR * nr) }.copy_from_slice(&out[..MR * nr]);
                    continue;
                }
                let (row, col) = (self.rows.start + ap * MR, self.cols.start + bp * nr);
                let width = nr.min(self.cols.end - col);
                for i in 0..MR.min(self.rows.end - row) {
                    epilogue.row(s, row + i, col, &out[i * nr..i * nr + width]);
                }
            }
        }
    }
}

/// Multiply-accumulate of one unit.
pub(super) trait Mac<S: Simd>: Copy {
    /// `c + a * b`, each lane's unit on its own.
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F;
}

/// Units are f32.
#[derive(Clone, Copy)]
pub(super) struct Fma;

impl<S: Simd> Mac<S> for Fma {
    #[inline(always)]
    fn mac(s: S, a: S::F, b: S::F, c: S::F) -> S::F {
        s.fma(a, b, c)
    }
}

/// Units are pairs of bf16.
#[derive(Clone, Copy)]
pub(super) struct Dot;

impl Mac<Avx512> for Dot {
    #[inline(always)]
    fn mac(_: Avx512, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: the token says that the processor has AVX-512 BF16; the types only rename 512 bits.
        unsafe { _mm512_dpbf16_ps(c, std::mem::transmute::<__m512, __m512bh>(a), std::mem::transmute::<__m512, __m512bh>(b)) }
    }
}

/// `out[MR, NV * LANES] = start + a * b` over packed panels `a` [units, MR] and `b` [units, NV * LANES].
#[inline(always)]
pub(super) fn micro_kernel<S: Simd, M: Mac<S>, const MR: usize, const NV: usize>(
    s: S,
    a: &[u32],
    b: &[u32],
    start: Option<&[f32]>,
    out: &mut [f32],
) {
    let nr = NV * S::LANES;
    let a: &[f32] = bytemuck::cast_slice(a);
    let b: &[f32] = bytemuck::cast_slice(b);
    let mut acc = [[s.zero(); NV]; MR];
    if let Some(start) = start {
        for (i, row) in acc.iter_mut().enumerate() {
            for (j, v) in row.iter_mut().enumerate() {
                *v = s.load(&start[i * nr + j * S::LANES..]);
            }
        }
    }
    for (a, b) in a.chunks_exact(MR).zip(b.chunks_exact(nr)) {
        let b: [S::F; NV] = std::array::from_fn(|j| s.load(&b[j * S::LANES..]));
        for (i, row) in acc.iter_mut().enumerate() {
            let a = s.splat(a[i]);
            for (v, b) in row.iter_mut().zip(b) {
                *v = M::mac(s, a, b, *v);
            }
        }
    }
    for (i, row) in acc.iter().enumerate() {
        for (j, v) in row.iter().enumerate() {
            s.store(&mut out[i * nr + j * S::LANES..], *v);
        }
    }
}

/// Packs rows `is` and columns `ks` of `x` into panels of `width` rows, on all threads: `[panel][unit][width]`, zeros
/// where the matrix ends.
fn pack<E: Element>(
    device: &CpuDevice,
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    out: &mut [u32],
) {
    let units = ks.len().div_ceil(per_unit);
    let panels = is.len().div_ceil(width);
    // Two panels a task where a 16-row transposition serves two of them.
    let together = if width == 8 { 2 } else { 1 };
    let tasks = panels.div_ceil(together);
    let shards = Shards::new(out);
    device.pool.for_each(tasks, |task, _| {
        let first = task * together;
        let here = together.min(panels - first);
        // SAFETY: each task writes its own panels.
        let out = unsafe { shards.range(first * width * units..(first + here) * width * units) };
        let i0 = is.start + first * width;
        let i1 = (i0 + here * width).min(is.end);
        pack_panels(device.isa, x, i0..i1, ks.clone(), width, per_unit, out);
    });
}

/// Packs one or more neighbouring panels on this thread.
pub(super) fn pack_panels<E: Element>(
    isa: Isa,
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    out: &mut [u32],
) {
    if isa == Isa::Avx512 && width.is_multiple_of(8) && (per_unit == 2 || E::DTYPE == DType::F32) {
        // SAFETY: the processor has AVX-512; indices are checked inside.
        return unsafe {
            match (x.k_contiguous, E::DTYPE) {
                (true, _) => pack_transposed_avx512(x, is, ks, width, out),
                (false, DType::Bf16) => pack_pairs_avx512(
                    Matrix { data: bytemuck::cast_slice(x.data), ld: x.ld, k_contiguous: false },
                    is,
                    ks,
                    width,
                    out,
                ),
                (false, _) => pack_rows(x, is, ks, width, per_unit, out),
            }
        };
    }
    pack_rows(x, is, ks, width, per_unit, out);
}

/// The plain way, for any element and layout; also defines what the fast ways do.
fn pack_rows<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    per_unit: usize,
    out: &mut [u32],
) {
    let units = ks.len().div_ceil(per_unit);
    let at = |i: usize, k: usize| if x.k_contiguous { x.data[i * x.ld + k] } else { x.data[k * x.ld + i] };
    for (panel, out) in out.chunks_exact_mut(width * units).enumerate() {
        let i0 = is.start + panel * width;
        let rows = width.min(is.end.saturating_sub(i0));
        for (unit, out) in out.chunks_exact_mut(width).enumerate() {
            let k = ks.start + unit * per_unit;
            if per_unit == 1 && !x.k_contiguous {
                let row = &x.data[k * x.ld + i0..k * x.ld + i0 + rows];
                for (o, v) in out.iter_mut().zip(row) {
                    *o = v.to_f32().to_bits();
                }
            } else {
                for (i, o) in out[..rows].iter_mut().enumerate() {
                    *o = if per_unit == 1 {
                        at(i0 + i, k).to_f32().to_bits()
                    } else {
                        let bits = |k: usize| if k < ks.end { pair_bits(at(i0 + i, k)) } else { 0 };
                        bits(k) | bits(k + 1) << 16
                    };
                }
            }
            out[rows..].fill(0);
        }
    }
}

/// The 16 bits of a bf16, as a number.
fn pair_bits<E: Element>(x: E) -> u32 {
    bf16::from_f32(x.to_f32()).to_bits() as u32
}

/// Packs a k-contiguous matrix: units are 32-bit words of its rows, so panels are transposed 16 x 16 words at a time.
///
/// # Safety
/// The processor has AVX-512 F, BW; `width` is a multiple of 8 and `E` is f32 or bf16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_transposed_avx512<E: Element>(
    x: Matrix<E>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    out: &mut [u32],
) {
    let per_unit = 4 / size_of::<E>();
    let units = ks.len().div_ceil(per_unit);
    let rows = out.len() / units;
    for r0 in (0..rows).step_by(16) {
        for u0 in (0..units).step_by(16) {
            let k0 = ks.start + u0 * per_unit;
            let halves = (ks.end - k0).min(16 * per_unit) * size_of::<E>() / 2;
            let mask = if halves == 32 { !0u32 } else { (1u32 << halves) - 1 };
            let mut t = [_mm512_setzero_si512(); 16];
            for (r, v) in t.iter_mut().enumerate() {
                let i = is.start + r0 + r;
                if i < is.end && r0 + r < rows {
                    let row = &x.data[i * x.ld + k0..i * x.ld + (k0 + 16 * per_unit).min(ks.end)];
                    // SAFETY: the mask covers the elements of `row` and no more.
                    *v = unsafe { _mm512_maskz_loadu_epi16(mask, row.as_ptr().cast()) };
                }
            }
            transpose(&mut t);
            for (u, v) in t.iter().take(units - u0).enumerate() {
                let unit = u0 + u;
                if width.is_multiple_of(16) {
                    let (panel, within) = (r0 / width, r0 % width);
                    let o = panel * width * units + unit * width + within;
                    // SAFETY: the slice has 16 elements.
                    unsafe { _mm512_storeu_si512(out[o..o + 16].as_mut_ptr().cast(), *v) };
                } else {
                    // Panels of 8 rows: each half goes to its own.
                    for (half, v) in [_mm512_castsi512_si256(*v), _mm512_extracti64x4_epi64::<1>(*v)].into_iter().enumerate() {
                        let r = r0 + 8 * half;
                        if r >= rows {
                            continue;
                        }
                        let o = r / width * width * units + unit * width + r % width;
                        // SAFETY: the slice has 8 elements.
                        unsafe { _mm256_storeu_si256(out[o..o + 8].as_mut_ptr().cast(), v) };
                    }
                }
            }
        }
    }
}

/// Transposes 16 x 16 words.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(t: &mut [__m512i; 16]) {
    let mut a = *t;
    for i in (0..16).step_by(2) {
        a[i] = _mm512_unpacklo_epi32(t[i], t[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(t[i], t[i + 1]);
    }
    let mut b = a;
    for i in (0..16).step_by(4) {
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    // b[4g + j] holds, in 128-bit lane l, words 4l + j of rows 4g ..= 4g + 3.
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(b[j], b[4 + j]);
        let high = _mm512_shuffle_i32x4::<0xdd>(b[j], b[4 + j]);
        let low2 = _mm512_shuffle_i32x4::<0x88>(b[8 + j], b[12 + j]);
        let high2 = _mm512_shuffle_i32x4::<0xdd>(b[8 + j], b[12 + j]);
        t[j] = _mm512_shuffle_i32x4::<0x88>(low, low2);
        t[4 + j] = _mm512_shuffle_i32x4::<0x88>(high, high2);
        t[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, low2);
        t[12 + j] = _mm512_shuffle_i32x4::<0xdd>(high, high2);
    }
}

/// Packs a k-strided bf16 matrix: rows k and k + 1 are interleaved.
///
/// # Safety
/// The processor has AVX-512 F, BW; `width` is a multiple of 8.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_pairs_avx512(
    x: Matrix<bf16>,
    is: std::ops::Range<usize>,
    ks: std::ops::Range<usize>,
    width: usize,
    out: &mut [u32],
) {
    let units = ks.len().div_ceil(2);
    let step = if width.is_multiple_of(16) { 16 } else { 8 };
    for (panel, out) in out.chunks_exact_mut(width * units).enumerate() {
        let i0 = is.start + panel * width;
        for (unit, out) in out.chunks_exact_mut(width).enumerate() {
            let k = ks.start + 2 * unit;
            for (part, out) in out.chunks_exact_mut(step).enumerate() {
                let i = i0 + part * step;
                let count = step.min(is.end.saturating_sub(i));
                let mask = ((1u32 << count) - 1) as u16;
                let load = |k: usize| {
                    if k >= ks.end || count == 0 {
                        return _mm512_setzero_si512();
                    }
                    let row = &x.data[k * x.ld + i..k * x.ld + i + count];
                    // SAFETY: the mask covers the elements of `row` and no more.
                    _mm512_cvtepu16_epi32(unsafe { _mm256_maskz_loadu_epi16(mask, row.as_ptr().cast()) })
                };
                let pair = _mm512_or_si512(load(k), _mm512_slli_epi32::<16>(load(k + 1)));
                // SAFETY: `out` has `step` elements.
                unsafe {
                    if step == 16 {
                        _mm512_storeu_si512(out.as_mut_ptr().cast(), pair);
                    } else {
                        _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_castsi512_si256(pair));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::CpuOptions;
    use crate::rng::{Purpose, Stream};

    fn random<E: Element>(len: usize, what: usize) -> Vec<E> {
        let s = Stream::new(1, Purpose::Init, what, 0);
        (0..len).map(|i| E::from_f32(s.uniform((i / 1024) as u64, i % 1024) - 0.5)).collect()
    }

    struct Collect<'a>(Shards<'a, f32>, usize);
    impl Epilogue for Collect<'_> {
        fn row<S: Simd>(&self, _: S, row: usize, col: usize, acc: &[f32]) {
            let start = row * self.1 + col;
            // SAFETY: every part of every row comes once.
            for (o, v) in unsafe { self.0.range(start..start + acc.len()) }.iter_mut().zip(acc) {
                assert!(o.is_nan(), "element written twice");
                *o = *v;
            }
        }
    }

    fn product<E: Element>(device: &CpuDevice, (m, n, k): (usize, usize, usize), ac: bool, bc: bool) -> Vec<f32> {
        let (a, b) = (random::<E>(m * k, 1), random::<E>(n * k, 2));
        let mut c = vec![f32::NAN; m * n];
        gemm(
            device,
            (m, n, k),
            Matrix { data: &a, ld: if ac { k } else { m }, k_contiguous: ac },
            Matrix { data: &b, ld: if bc { k } else { n }, k_contiguous: bc },
            &Collect(Shards::new(&mut c), n),
        );
        c
    }

    fn check<E: Element>(device: &CpuDevice, (m, n, k): (usize, usize, usize), ac: bool, bc: bool) {
        let c = product::<E>(device, (m, n, k), ac, bc);
        let (a, b) = (random::<E>(m * k, 1), random::<E>(n * k, 2));
        for i in (0..m).step_by(1 + m / 40) {
            for j in (0..n).step_by(1 + n / 40) {
                let mut exact = 0.0;
                for l in 0..k {
                    let a = if ac { a[i * k + l] } else { a[l * m + i] };
                    let b = if bc { b[j * k + l] } else { b[l * n + j] };
                    exact += a.to_f32() as f64 * b.to_f32() as f64;
                }
                // Products of halves in [-0.5, 0.5], summed in f32.
                let bound = 1e-6 * (k as f64).max(4.0);
                let got = c[i * n + j] as f64;
                assert!((got - exact).abs() < bound, "{:?} {m}x{n}x{k} {ac} {bc} ({i},{j}): {got} {exact}", device.isa);
            }
        }
    }

    #[test]
    fn products_of_every_layout_match_the_definition() {
        for isa in Isa::available() {
            let device = CpuDevice::new(CpuOptions { threads: Some(2), isa: Some(isa), pin: false }).unwrap();
            for shape in [(1, 1, 1), (8, 48, 2), (7, 47, 33), (13, 100, 64), (50, 31, 17), (100, 200, 5000), (16, 49, 4097)] {
                for (ac, bc) in [(true, true), (true, false), (false, false), (false, true)] {
                    check::<f32>(&device, shape, ac, bc);
                    check::<bf16>(&device, shape, ac, bc);
                }
            }
        }
    }

    #[test]
    fn super_blocks_on_every_side() {
        let device = CpuDevice::new(CpuOptions { threads: Some(2), ..Default::default() }).unwrap();
        check::<bf16>(&device, (40, 9000, 600), true, true);
        check::<bf16>(&device, (9000, 100, 600), false, false);
        check::<bf16>(&device, (4500, 4700, 1100), true, false);
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        for isa in Isa::available() {
            let run = |threads| {
                let device = CpuDevice::new(CpuOptions { threads: Some(threads), isa: Some(isa), pin: false }).unwrap();
                (product::<bf16>(&device, (100, 150, 2500), true, false), product::<f32>(&device, (61, 83, 70), true, true))
            };
            let one = run(1);
            assert!(one == run(2) && one == run(3));
        }
    }
}
