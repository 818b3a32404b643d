//! Vectors of f32 for three instruction sets, chosen at run time.
//!
//! A kernel is written once, generic over [`Simd`], and run through [`dispatch!`], which compiles it for AVX-512
//! (with VNNI), AVX2 with FMA, and plain Rust. A token of each set can only be had where the processor
//! has the instructions, which is what makes the methods safe to call.

use std::arch::x86_64::*;
use std::ops::Range;

use half::{bf16, f16};

pub use super::isa::Isa;
use super::random::WordLanes;
use crate::{DType, Element};

/// The upper half of a word.
const UPPER: u32 = 0xffff_0000;
/// How f16 are rounded: to nearest even.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;

/// ReLU. What is no number stays none, so that it is noticed.
#[inline(always)]
pub fn relu<S: Simd>(s: S, v: S::F) -> S::F {
    s.select_gt(s.zero(), v, s.zero(), v)
}

/// Operations on one register of f32. All methods are single instructions or a few.
pub trait Simd: WordLanes {
    /// f32 numbers in a register.
    const LANES: usize;
    /// The register.
    type F: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// First `LANES` elements of `x`.
    fn load(self, x: &[f32]) -> Self::F;
    /// To the first `LANES` elements of `x`.
    fn store(self, x: &mut [f32], v: Self::F);
    /// First `LANES` elements, widened.
    fn load_bf16(self, x: &[bf16]) -> Self::F;
    /// First `LANES` elements, widened.
    fn load_f16(self, x: &[f16]) -> Self::F;
    /// First `LANES` words, whose lower halves are bf16, widened.
    fn load_low(self, pairs: &[u32]) -> Self::F;
    /// The same of upper halves.
    fn load_high(self, pairs: &[u32]) -> Self::F;
    /// To the first `LANES` elements, rounded to nearest even.
    fn store_bf16(self, x: &mut [bf16], v: Self::F);
    /// To the first `LANES` elements, rounded to nearest even.
    fn store_f16(self, x: &mut [f16], v: Self::F);
    /// `a + b`
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, fused where the processor can.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Larger of each lane.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// Smaller of each lane.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b ? x : y` in each lane.
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// `x` in lanes whose word has bit `bit`, else `y`; words are the first `LANES` of a slice.
    fn select_bit(self, words: &[u32], bit: u32, x: Self::F, y: Self::F) -> Self::F;
    /// Nearest integer.
    fn round(self, a: Self::F) -> Self::F;
    /// `a * 2^n` for integral `n` with a normal result.
    fn scale2(self, a: Self::F, n: Self::F) -> Self::F;

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    /// Lanes as an array's first elements (the rest 0).
    #[inline(always)]
    fn to_array(self, a: Self::F) -> [f32; 16] {
        let mut x = [0.0; 16];
        self.store(&mut x, a);
        x
    }

    /// Sum of the lanes, by halves.
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let x = self.to_array(a);
        let mut h: [f32; 8] = std::array::from_fn(|i| x[i] + x[i + 8]);
        for n in [4, 2, 1] {
            for i in 0..n {
                h[i] += h[i + n];
            }
        }
        h[0]
    }

    /// Largest lane.
    #[inline(always)]
    fn max_lane(self, a: Self::F) -> f32 {
        self.to_array(a)[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }

    /// Elements of any compute type, widened to f32.
    #[inline(always)]
    fn load_as<E: Element>(self, x: &[E]) -> Self::F {
        match E::DTYPE {
            DType::Bf16 => self.load_bf16(bytemuck::cast_slice(x)),
            DType::F16 => self.load_f16(bytemuck::cast_slice(x)),
            DType::F32 => self.load(bytemuck::cast_slice(x)),
            _ => self.load_part(&std::array::from_fn::<f32, 16, _>(|i| x.get(i).map_or(0.0, |v| v.to_f32()))),
        }
    }

    /// To elements of any compute type.
    #[inline(always)]
    fn store_as<E: Element>(self, x: &mut [E], v: Self::F) {
        match E::DTYPE {
            DType::Bf16 => self.store_bf16(bytemuck::cast_slice_mut(x), v),
            DType::F16 => self.store_f16(bytemuck::cast_slice_mut(x), v),
            DType::F32 => self.store(bytemuck::cast_slice_mut(x), v),
            _ => self.store_part(x, v),
        }
    }

    /// Two registers, to the first `2 * LANES` elements of any compute type: past the caches where [`streams`] says so.
    /// What other threads may read then follows from the pool's end of a job.
    #[inline(always)]
    fn stream_two<E: Element>(self, x: &mut [E], [a, b]: [Self::F; 2]) {
        let (low, high) = x.split_at_mut(Self::LANES);
        self.store_as(low, a);
        self.store_as(high, b);
    }

    /// Writes `f(its range, vector)` of each vector of sums to `y`, of one length. A row of a tile of two registers may go
    /// past the caches.
    #[inline(always)]
    fn write_row<E: Element>(
        self,
        sums: &[f32],
        y: &mut [E],
        mut f: impl FnMut(Range<usize>, Self::F) -> Self::F,
    ) {
        let lanes = Self::LANES;
        if sums.len() == 2 * lanes {
            let low = f(0..lanes, self.load(sums));
            let high = f(lanes..2 * lanes, self.load(&sums[lanes..]));
            self.stream_two(y, [low, high]);
            return;
        }
        for at in (0..sums.len()).step_by(lanes) {
            let part = at..(at + lanes).min(sums.len());
            let v = f(part.clone(), self.load_up_to(&sums[part.clone()]));
            self.store_up_to(&mut y[part], v);
        }
    }

    /// At most `LANES` elements; missing lanes are 0.
    #[inline(always)]
    fn load_part<E: Element>(self, x: &[E]) -> Self::F {
        let mut full = [0.0; 16];
        for (f, v) in full[..Self::LANES].iter_mut().zip(x) {
            *f = v.to_f32();
        }
        self.load(&full)
    }

    /// To at most `LANES` elements.
    #[inline(always)]
    fn store_part<E: Element>(self, x: &mut [E], v: Self::F) {
        for (x, v) in x.iter_mut().zip(self.to_array(v)) {
            *x = E::from_f32(v);
        }
    }

    /// First `LANES` elements, or all of a shorter slice (missing lanes 0): one loop for whole registers and the rest.
    #[inline(always)]
    fn load_up_to<E: Element>(self, x: &[E]) -> Self::F {
        if x.len() >= Self::LANES { self.load_as(x) } else { self.load_part(x) }
    }

    /// To the first `LANES` elements, or all of a shorter slice.
    #[inline(always)]
    fn store_up_to<E: Element>(self, x: &mut [E], v: Self::F) {
        if x.len() >= Self::LANES { self.store_as(x, v) } else { self.store_part(x, v) }
    }

    /// e^x, within 2 ulp; 0 below -87.3, finite up to 88.3. After Cephes' expf: 2^n times [`Simd::exp_of_rest`].
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let low = self.splat(-87.33);
        let clamped = self.min(self.max(x, low), self.splat(88.37));
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        self.select_gt(x, low, self.scale2(self.exp_of_rest(clamped, n), n), self.zero())
    }

    /// `e^(x - n ln 2)` where that is between -ln2/2 and ln2/2: a polynomial through the five Chebyshev nodes of the
    /// part beyond `1 + r`, within 1e-8. ln 2 comes in two parts, of which the first has few bits.
    #[inline(always)]
    fn exp_of_rest(self, x: Self::F, n: Self::F) -> Self::F {
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.392_632_6e-3);
        for c in [8.363_293e-3, 4.166_655e-2, 1.666_657_6e-1, 0.5, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        p
    }
}

/// Plain Rust; four lanes, which every compiler turns into SSE2 or NEON.
#[derive(Clone, Copy)]
pub struct Portable;

macro_rules! lanewise {
    ($($name:ident($($arg:ident),*) = $e:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: [f32; 4]),*) -> [f32; 4] {
            std::array::from_fn(|i| { $(let $arg = $arg[i];)* $e })
        })*
    };
}

impl Simd for Portable {
    const LANES: usize = 4;
    type F = [f32; 4];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; 4]
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::F {
        [x[0], x[1], x[2], x[3]]
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: Self::F) {
        x[..4].copy_from_slice(&v);
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> Self::F {
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> Self::F {
        std::array::from_fn(|i| x[i].to_f32())
    }
    #[inline(always)]
    fn load_low(self, pairs: &[u32]) -> Self::F {
        std::array::from_fn(|i| f32::from_bits(pairs[i] << 16))
    }
    #[inline(always)]
    fn load_high(self, pairs: &[u32]) -> Self::F {
        std::array::from_fn(|i| f32::from_bits(pairs[i] & UPPER))
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: Self::F) {
        for (x, v) in x[..4].iter_mut().zip(v) {
            *x = bf16::from_f32(v);
        }
    }
    #[inline(always)]
    fn store_f16(self, x: &mut [f16], v: Self::F) {
        for (x, v) in x[..4].iter_mut().zip(v) {
            *x = f16::from_f32(v);
        }
    }
    #[inline(always)]
    fn select_bit(self, words: &[u32], bit: u32, x: Self::F, y: Self::F) -> Self::F {
        std::array::from_fn(|i| if words[i] >> bit & 1 != 0 { x[i] } else { y[i] })
    }
    lanewise! {
        add(a, b) = a + b;
        sub(a, b) = a - b;
        mul(a, b) = a * b;
        // A fused product without hardware support would be a library call.
        fma(a, b, c) = a * b + c;
        max(a, b) = if a > b { a } else { b };
        min(a, b) = if a < b { a } else { b };
        select_gt(a, b, x, y) = if a > b { x } else { y };
        // Adding and taking away 1.5 * 2^23 rounds to nearest even without SSE4's instruction.
        round(a) = (a + 12_582_912.0) - 12_582_912.0;
        scale2(a, n) = f32::from_bits((a.to_bits() as i32 + ((n as i32) << 23)) as u32);
    }
}

/// AVX2 with FMA and F16C; eight lanes.
#[derive(Clone, Copy)]
pub struct Avx2(());

/// AVX-512; sixteen lanes.
#[derive(Clone, Copy)]
pub struct Avx512(());

/// Methods that are one intrinsic each.
macro_rules! intrinsics {
    ($reg:ty: $($name:ident($($arg:ident),*) = $e:expr;)*) => {
        $(#[inline(always)]
        fn $name(self, $($arg: $reg),*) -> $reg {
            // SAFETY: a token exists only where the processor has these instructions.
            unsafe { $e }
        })*
    };
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: a token exists only where the processor has these instructions.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m256 {
        let x = &x[..8];
        // SAFETY: eight elements; the token.
        unsafe { _mm256_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: __m256) {
        let x = &mut x[..8];
        // SAFETY: eight elements; the token.
        unsafe { _mm256_storeu_ps(x.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> __m256 {
        let x = &x[..8];
        // SAFETY: eight elements of 16 bits; the token.
        unsafe {
            let halves = _mm_loadu_si128(x.as_ptr().cast());
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    fn load_low(self, pairs: &[u32]) -> __m256 {
        let pairs = &pairs[..8];
        // SAFETY: eight elements of 32 bits; the token.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_loadu_si256(pairs.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_high(self, pairs: &[u32]) -> __m256 {
        let pairs = &pairs[..8];
        // SAFETY: eight elements of 32 bits; the token.
        unsafe {
            let upper = _mm256_set1_epi32(UPPER as i32);
            _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256(pairs.as_ptr().cast()), upper))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: __m256) {
        let x = &mut x[..8];
        // SAFETY: eight elements of 16 bits; the token.
        unsafe {
            let bits = _mm256_castps_si256(v);
            // Nearest even: add 0x7fff plus the lowest kept bit, then drop 16 bits. NaN keeps its top bits, quieted.
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x40_0000));
            let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(v, v));
            let high = _mm256_srli_epi32::<16>(_mm256_blendv_epi8(rounded, quiet, nan));
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(high, high));
            _mm_storeu_si128(x.as_mut_ptr().cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> __m256 {
        let x = &x[..8];
        // SAFETY: eight elements of 16 bits; the token.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, x: &mut [f16], v: __m256) {
        let x = &mut x[..8];
        // SAFETY: eight elements of 16 bits; the token.
        unsafe { _mm_storeu_si128(x.as_mut_ptr().cast(), _mm256_cvtps_ph::<NEAREST>(v)) }
    }
    #[inline(always)]
    fn select_bit(self, words: &[u32], bit: u32, x: __m256, y: __m256) -> __m256 {
        let words = &words[..8];
        // SAFETY: eight elements; the token.
        unsafe {
            let bit = _mm256_set1_epi32((1u32 << bit) as i32);
            let set = _mm256_and_si256(_mm256_loadu_si256(words.as_ptr().cast()), bit);
            _mm256_blendv_ps(y, x, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)))
        }
    }
    intrinsics! { __m256:
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
        max(a, b) = _mm256_max_ps(a, b);
        min(a, b) = _mm256_min_ps(a, b);
        select_gt(a, b, x, y) = _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b));
        round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale2(a, n) = _mm256_castsi256_ps(_mm256_add_epi32(
            _mm256_castps_si256(a),
            _mm256_slli_epi32::<23>(_mm256_cvtps_epi32(n)),
        ));
    }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    type F = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: a token exists only where the processor has these instructions.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    fn load(self, x: &[f32]) -> __m512 {
        let x = &x[..16];
        // SAFETY: sixteen elements; the token.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, x: &mut [f32], v: __m512) {
        let x = &mut x[..16];
        // SAFETY: sixteen elements; the token.
        unsafe { _mm512_storeu_ps(x.as_mut_ptr(), v) }
    }
    #[inline(always)]
    fn load_bf16(self, x: &[bf16]) -> __m512 {
        let x = &x[..16];
        // SAFETY: sixteen elements of 16 bits; the token.
        unsafe {
            let halves = _mm256_loadu_si256(x.as_ptr().cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
    #[inline(always)]
    fn load_low(self, pairs: &[u32]) -> __m512 {
        let pairs = &pairs[..16];
        // SAFETY: sixteen elements of 32 bits; the token.
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_loadu_epi32(pairs.as_ptr().cast()))) }
    }
    #[inline(always)]
    fn load_high(self, pairs: &[u32]) -> __m512 {
        let pairs = &pairs[..16];
        // SAFETY: sixteen elements of 32 bits; the token.
        unsafe {
            let upper = _mm512_set1_epi32(UPPER as i32);
            _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_epi32(pairs.as_ptr().cast()), upper))
        }
    }
    #[inline(always)]
    fn store_bf16(self, x: &mut [bf16], v: __m512) {
        let x = &mut x[..16];
        // SAFETY: sixteen elements of 16 bits; the token.
        unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), self.round_bf16(v)) }
    }
    #[inline(always)]
    fn load_f16(self, x: &[f16]) -> __m512 {
        let x = &x[..16];
        // SAFETY: sixteen elements of 16 bits; the token.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }
    #[inline(always)]
    fn store_f16(self, x: &mut [f16], v: __m512) {
        let x = &mut x[..16];
        // SAFETY: sixteen elements of 16 bits; the token.
        unsafe { _mm256_storeu_si256(x.as_mut_ptr().cast(), _mm512_cvtps_ph::<NEAREST>(v)) }
    }
    #[inline(always)]
    fn load_part<E: Element>(self, x: &[E]) -> __m512 {
        let n = x.len().min(16);
        let mask = ((1u32 << n) - 1) as u16;
        // SAFETY: only the lanes in the mask, all within `x`, are read; the token.
        unsafe {
            match E::DTYPE {
                DType::F32 => _mm512_maskz_loadu_ps(mask, x.as_ptr().cast()),
                DType::Bf16 => {
                    let halves = _mm256_maskz_loadu_epi16(mask, x.as_ptr().cast());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
                }
                DType::F16 => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x.as_ptr().cast())),
                _ => {
                    let full: [f32; 16] = std::array::from_fn(|i| x.get(i).map_or(0.0, |v| v.to_f32()));
                    self.load(&full)
                }
            }
        }
    }
    #[inline(always)]
    fn store_part<E: Element>(self, x: &mut [E], v: __m512) {
        let n = x.len().min(16);
        let mask = ((1u32 << n) - 1) as u16;
        // SAFETY: only the lanes in the mask, all within `x`, are written; the token.
        unsafe {
            match E::DTYPE {
                DType::F32 => _mm512_mask_storeu_ps(x.as_mut_ptr().cast(), mask, v),
                DType::Bf16 => _mm256_mask_storeu_epi16(x.as_mut_ptr().cast(), mask, self.round_bf16(v)),
                DType::F16 => {
                    _mm256_mask_storeu_epi16(x.as_mut_ptr().cast(), mask, _mm512_cvtps_ph::<NEAREST>(v));
                }
                _ => {
                    for (x, v) in x.iter_mut().zip(self.to_array(v)) {
                        *x = E::from_f32(v);
                    }
                }
            }
        }
    }
    #[inline(always)]
    fn stream_two<E: Element>(self, x: &mut [E], [a, b]: [__m512; 2]) {
        let x = &mut x[..32];
        let (whole_lines, to) = (streams(x.as_ptr(), 32), x.as_mut_ptr());
        // SAFETY: 32 elements; streamed ones begin with a cache line; the token.
        unsafe {
            match E::DTYPE {
                DType::Bf16 if whole_lines => _mm512_stream_si512(to.cast(), self.round_two_bf16(a, b)),
                DType::Bf16 => _mm512_storeu_si512(to.cast(), self.round_two_bf16(a, b)),
                DType::F32 if whole_lines => {
                    _mm512_stream_ps(to.cast(), a);
                    _mm512_stream_ps(to.cast::<f32>().add(16), b);
                }
                _ => {
                    self.store_as(&mut x[..16], a);
                    self.store_as(&mut x[16..], b);
                }
            }
        }
    }
    #[inline(always)]
    fn exp(self, x: __m512) -> __m512 {
        // Rounds to an integer when added, and leaves it when taken away again.
        let magic = self.splat(12_582_912.0);
        // SAFETY: the token.
        unsafe {
            let x = _mm512_min_ps(self.splat(88.37), x);
            let n = self.sub(self.fma(x, self.splat(std::f32::consts::LOG2_E), magic), magic);
            // The exponent takes any n, so that below the limit only the result must be cleared.
            let above = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, self.splat(-87.33));
            _mm512_maskz_scalef_ps(above, self.exp_of_rest(x, n), n)
        }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: the token.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        // SAFETY: the token.
        unsafe { _mm512_reduce_max_ps(a) }
    }
    #[inline(always)]
    fn select_bit(self, words: &[u32], bit: u32, x: __m512, y: __m512) -> __m512 {
        let words = &words[..16];
        // SAFETY: sixteen elements; the token.
        unsafe {
            let bit = _mm512_set1_epi32((1u32 << bit) as i32);
            let set = _mm512_test_epi32_mask(_mm512_loadu_si512(words.as_ptr().cast()), bit);
            _mm512_mask_blend_ps(set, y, x)
        }
    }
    intrinsics! { __m512:
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        select_gt(a, b, x, y) = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x);
        round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale2(a, n) = _mm512_scalef_ps(a, n);
    }
}

impl Avx512 {
    /// `2^x` below 2^126 within a share of 7e-6, for what becomes a bf16: 0 below 2^-150. `1 + r q(r)`, where q goes through
    /// four Chebyshev nodes.
    #[inline(always)]
    pub(super) fn exp2_for_halves(self, x: __m512) -> __m512 {
        let magic = self.splat(12_582_912.0);
        // Of numbers that are no numbers the second comes out.
        let x = self.max(self.splat(-200.0), x);
        let n = self.sub(self.add(x, magic), magic);
        let r = self.sub(x, n);
        let mut p = self.splat(9.656_71e-3);
        for c in [5.583_828_3e-2, 2.402_253e-1, 6.931_367_3e-1, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        self.scale2(p, n)
    }

    /// Rounded to bf16, nearest even. Not by the instruction for it, which not every processor with AVX-512 has, and
    /// which makes denormal numbers zero.
    #[inline(always)]
    fn round_bf16(self, v: __m512) -> __m256i {
        // SAFETY: the token.
        unsafe {
            let bits = _mm512_castps_si512(v);
            // Add 0x7fff plus the lowest kept bit, then drop 16 bits. NaN keeps its top bits, quieted.
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v);
            let high = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x40_0000));
            _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(high))
        }
    }

    /// The same bits of two registers, in half of the instructions.
    #[inline(always)]
    fn round_two_bf16(self, a: __m512, b: __m512) -> __m512i {
        // SAFETY: the token.
        unsafe {
            if _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, b) != 0 {
                let low = _mm512_castsi256_si512(self.round_bf16(a));
                return _mm512_inserti64x4::<1>(low, self.round_bf16(b));
            }
            let (lowest, one) = (_mm512_set1_epi32(0x1_0000), _mm512_set1_epi32(1));
            let half = _mm512_set1_epi32(0x7fff);
            let mut sums = [a, b].map(|v| _mm512_castps_si512(v));
            for bits in &mut sums {
                let odd = _mm512_test_epi32_mask(*bits, lowest);
                let sum = _mm512_add_epi32(*bits, half);
                *bits = _mm512_mask_add_epi32(sum, odd, sum, one);
            }
            let upper_halves = _mm512_loadu_si512(UPPER_HALVES.as_ptr().cast());
            _mm512_permutex2var_epi16(sums[0], upper_halves, sums[1])
        }
    }
}

/// Where the upper halves of the words of two registers are.
const UPPER_HALVES: [u16; 32] = {
    let mut places = [0; 32];
    let mut i = 0;
    while i < 32 {
        places[i] = 2 * i as u16 + 1;
        i += 1;
    }
    places
};

/// Whether so many elements, which a tile's row begins at `x`, are written past the caches: by AVX-512, where they are
/// whole lines. A line that is stored to is read first, and pushes out what the tiles' loop is about to use.
#[inline(always)]
pub(super) fn streams<E: Element>(x: *const E, len: usize) -> bool {
    len == 32 && x.addr().is_multiple_of(64) && matches!(E::DTYPE, DType::Bf16 | DType::F32)
}

/// Asks for the cache line of an address, which need not be valid.
#[inline(always)]
pub(super) fn prefetch<T>(x: *const T) {
    // SAFETY: every x86-64 processor has this hint, and it touches nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(x.cast()) }
}

/// The same, into the second-level cache.
#[inline(always)]
pub(super) fn prefetch_l2<T>(x: *const T) {
    // SAFETY: as above.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(x.cast()) }
}

/// Calls a closure inside a function compiled for AVX2, into which it is inlined.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn with_avx2<R>(f: impl FnOnce(Avx2) -> R) -> R {
    f(Avx2(()))
}

/// Calls a closure inside a function compiled for AVX-512, into which it is inlined.
///
/// # Safety
/// The processor has AVX-512 F, BW, DQ, VL and VNNI, and FMA.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")]
pub unsafe fn with_avx512<R>(f: impl FnOnce(Avx512) -> R) -> R {
    f(Avx512(()))
}

/// [`with_avx512`] for the few kernels that multiply bf16 by the instruction for it.
///
/// # Safety
/// The processor has what [`with_avx512`] needs, and AVX-512 BF16.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")]
pub unsafe fn with_avx512_bf16<R>(f: impl FnOnce(Avx512) -> R) -> R {
    f(Avx512(()))
}

/// `dispatch!(isa, s => body)` runs `body` with `s` the token of `isa`, compiled for that instruction set.
/// Functions and closures that use `s` must be `#[inline(always)]`, and no iterator adaptor may call them: what is not
/// inlined is compiled without the instructions, and every one of them becomes a call.
macro_rules! dispatch {
    ($isa:expr, $s:ident => $body:expr) => {
        match $isa {
            $crate::cpu::simd::Isa::Portable => {
                let $s = $crate::cpu::simd::Portable;
                $body
            }
            // SAFETY: an `Isa` value is only made for a processor that has it.
            $crate::cpu::simd::Isa::Avx2 => unsafe {
                $crate::cpu::simd::with_avx2(
                    #[inline(always)]
                    |$s| $body,
                )
            },
            // SAFETY: as above; all others have AVX-512.
            _ => unsafe {
                $crate::cpu::simd::with_avx512(
                    #[inline(always)]
                    |$s| $body,
                )
            },
        }
    };
}
pub(crate) use dispatch;

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn exp_all<S: Simd>(s: S, x: &[f32], y: &mut [f32]) {
        for (x, y) in x.chunks_exact(S::LANES).zip(y.chunks_exact_mut(S::LANES)) {
            s.store(y, s.exp(s.load(x)));
        }
    }

    #[test]
    fn exp2_is_accurate_enough_for_halves() {
        let x: Vec<f32> = (0..16000).map(|i| -149.0 + i as f32 * 0.01).collect();
        let of = |x: &[f32]| {
            let mut y = vec![f32::NAN; x.len()];
            if Isa::detect() >= Isa::Avx512 {
                // SAFETY: the processor has AVX-512.
                unsafe {
                    with_avx512(
                        #[inline(always)]
                        |s| {
                            for (x, y) in x.chunks_exact(16).zip(y.chunks_exact_mut(16)) {
                                s.store(y, s.exp2_for_halves(s.load(x)));
                            }
                        },
                    )
                }
            } else {
                println!("skipped: no AVX-512");
                y = x.iter().map(|x| x.exp2()).collect();
            }
            y
        };
        for (x, y) in x.iter().zip(of(&x)) {
            let exact = (*x as f64).exp2();
            // Denormal numbers have fewer bits.
            assert!((y as f64 - exact).abs() <= 7.5e-6 * exact + 2e-45, "2^{x} = {y}, not {exact}");
        }
        let mut odd = [0.0; 16];
        odd[..5].copy_from_slice(&[f32::NEG_INFINITY, -1e30, f32::MIN, -151.0, f32::NAN]);
        let odd = of(&odd);
        assert_eq!(odd[..4], [0.0; 4]);
        assert!(odd[4].is_nan());
        assert_eq!(odd[5], 1.0);
    }

    #[test]
    fn exp_is_accurate_everywhere() {
        let x: Vec<f32> = (0..16000).map(|i| -87.0 + i as f32 * 0.0109).collect();
        for isa in Isa::available() {
            let mut y = vec![0.0; x.len()];
            dispatch!(isa, s => exp_all(s, &x, &mut y));
            for (x, y) in x.iter().zip(&y) {
                let exact = (*x as f64).exp();
                assert!(((*y as f64 - exact) / exact).abs() < 3e-7, "{isa:?}: exp({x}) = {y}, not {exact}");
            }
            let special = [
                f32::NEG_INFINITY,
                -200.0,
                -88.0,
                0.0,
                1e-30,
                -1e-30,
                1.0,
                88.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
                0.0,
            ];
            let mut y = [0.0; 16];
            dispatch!(isa, s => exp_all(s, &special, &mut y));
            assert_eq!(y[..6], [0.0, 0.0, 0.0, 1.0, 1.0, 1.0], "{isa:?}");
        }
    }

    #[inline(always)]
    fn round_trip<S: Simd, E: Element>(s: S, x: &[f32], y: &mut [E]) {
        for (x, y) in x.chunks(S::LANES).zip(y.chunks_mut(S::LANES)) {
            if x.len() == S::LANES { s.store_as(y, s.load_as(x)) } else { s.store_part(y, s.load_part(x)) }
        }
    }

    #[test]
    fn halves_are_rounded_to_nearest_even_on_every_path() {
        let x: Vec<f32> = (0..1003u32)
            .map(|i| f32::from_bits(0x3f80_0000 + i * 0x1357 + (i % 3) * 0x8000))
            .chain([
                f32::INFINITY,
                f32::NEG_INFINITY,
                0.0,
                -0.0,
                f32::MAX,
                3.0,
                1.0 + 1.0 / 256.0,
                1.0 + 3.0 / 256.0,
            ])
            .collect();
        for isa in Isa::available() {
            let mut y = vec![bf16::ZERO; x.len()];
            dispatch!(isa, s => round_trip(s, &x, &mut y));
            for (x, y) in x.iter().zip(&y) {
                assert_eq!(y.to_bits(), bf16::from_f32(*x).to_bits(), "{isa:?}: {x}");
            }
            // Every f16 and what lies around halfway to the next one.
            let near: Vec<f32> = (0..=0xffffu16)
                .map(|bits| f16::from_bits(bits).to_f32())
                .filter(|x| !x.is_nan())
                .flat_map(|x| [x, x * (1.0 + 1.0 / 2048.0), x * (1.0 + 1.000_1 / 2048.0)])
                .chain([65_519.996, 65_520.0, 1e30, 2.9e-8, 3.0e-8])
                .collect();
            let mut y = vec![f16::ZERO; near.len()];
            dispatch!(isa, s => round_trip(s, &near, &mut y));
            for (x, y) in near.iter().zip(&y) {
                assert_eq!(y.to_bits(), f16::from_f32(*x).to_bits(), "{isa:?}: {x}");
            }
            let mut y = [f16::ZERO; 1];
            dispatch!(isa, s => round_trip(s, &[f32::NAN], &mut y));
            assert!(y[0].is_nan(), "{isa:?}");
        }
    }
}
