// What all kernels share: number types, random words, sums over a warp or a block.
//
// Kernels are compiled by NVRTC, without any header of CUDA's, and without contraction of a*b + c (it is written fmaf where
// it is meant), so that what is defined to the bit has the bits of the processor's kernels. The tests compile the same
// files for the processor; what a GPU offers is then emulated by emulate.h.
#pragma once

#ifdef FERROPT_EMULATION
#include "emulate.h"
#define UNROLL
#define UNROLL_BY(times)
#else
// Before a loop whose index picks from arrays that have to be registers; and before one whose loads are to be asked for together.
#define UNROLL _Pragma("unroll")
#define PRAGMA(text) _Pragma(#text)
#define UNROLL_BY(times) PRAGMA(unroll times)
#define KERNEL(name, ...) extern "C" __global__ void name(__VA_ARGS__)
// With blocks of so many threads, which must not take more registers than there are: only above 256 are they short.
#define KERNEL_OF(threads, name, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(16) unsigned char shared_all[]; \
    type* name = reinterpret_cast<type*>(shared_all)
#endif

typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

/// Target that takes no part in the loss; id without an embedding.
const u32 IGNORE = 0xffffffffu;
const u32 ALL_LANES = 0xffffffffu;
/// Minus infinity: the score of what takes no part.
#define NEVER __uint_as_float(0xff800000u)
/// Score that stands for none yet: below all others, and unlike an infinity it can be subtracted from itself.
const float NOTHING = -3.402823466e38f;

// ---- halves: bf16, and IEEE's f16

struct bf16 {
    u16 bits;
};
struct f16 {
    u16 bits;
};

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ __forceinline__ float to_f32(f16 x) {
#ifdef FERROPT_EMULATION
    return emulation::widen_f16(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T> struct Of;
template <> struct Of<float> {
    static __device__ __forceinline__ float f32(float x) { return x; }
};
template <> struct Of<bf16> {
    /// Nearest, ties to even.
    static __device__ __forceinline__ bf16 f32(float x) {
        bf16 y;
#ifdef FERROPT_EMULATION
        u32 bits = __float_as_uint(x);
        y.bits = x != x ? u16(bits >> 16 | 0x40) : u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
        return y;
    }
};
template <> struct Of<f16> {
    /// Nearest, ties to even; infinite from 65,520 on.
    static __device__ __forceinline__ f16 f32(float x) {
        f16 y;
#ifdef FERROPT_EMULATION
        y.bits = emulation::narrow_f16(x);
#else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#endif
        return y;
    }
};

// ---- four neighbouring elements

/// Of halves.
template <class T> struct Four {
    typedef uint2 Vector;
    static __device__ __forceinline__ float half_of(u32 bits) {
        T x;
        x.bits = u16(bits);
        return to_f32(x);
    }
    static __device__ __forceinline__ void open(Vector v, float* x) {
        x[0] = half_of(v.x), x[1] = half_of(v.x >> 16), x[2] = half_of(v.y), x[3] = half_of(v.y >> 16);
    }
    static __device__ __forceinline__ Vector close(const float* x) {
        u32 a = Of<T>::f32(x[0]).bits, b = Of<T>::f32(x[1]).bits;
        u32 c = Of<T>::f32(x[2]).bits, d = Of<T>::f32(x[3]).bits;
        return make_uint2(a | b << 16, c | d << 16);
    }
};
template <> struct Four<float> {
    typedef float4 Vector;
    static __device__ __forceinline__ void open(Vector v, float* x) { x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w; }
    static __device__ __forceinline__ Vector close(const float* x) { return make_float4(x[0], x[1], x[2], x[3]); }
};
template <class T> __device__ __forceinline__ bool fits_four(const T* p, u64 left) {
    return left >= 4 && (u64(p) & (4 * sizeof(T) - 1)) == 0;
}

/// Up to four elements from `p` on, `left` being how many there are; 0 where there is none.
template <class T> __device__ __forceinline__ void load4(const T* p, u64 left, float* x) {
    if (fits_four(p, left)) {
        Four<T>::open(*reinterpret_cast<const typename Four<T>::Vector*>(p), x);
    } else {
        for (int i = 0; i < 4; i++) x[i] = u64(i) < left ? to_f32(p[i]) : 0.0f;
    }
}

/// The same, the other way.
template <class T> __device__ __forceinline__ void store4(T* p, u64 left, const float* x) {
    if (fits_four(p, left)) {
        *reinterpret_cast<typename Four<T>::Vector*>(p) = Four<T>::close(x);
    } else {
        for (int i = 0; i < 4 && u64(i) < left; i++) p[i] = Of<T>::f32(x[i]);
    }
}

/// Two elements at an address of whole pairs.
__device__ __forceinline__ void load2(const float* p, float* x) {
    float2 v = *reinterpret_cast<const float2*>(p);
    x[0] = v.x, x[1] = v.y;
}
__device__ __forceinline__ void load2(const bf16* p, float* x) {
    u32 both = *reinterpret_cast<const u32*>(p);
    x[0] = __uint_as_float(both << 16), x[1] = __uint_as_float(both & 0xffff0000u);
}

/// ReLU. What is no number stays none, so that it is noticed.
__device__ __forceinline__ float positive(float x) { return x < 0.0f ? 0.0f : x; }

/// This thread's number in a grid of one dimension, and how many threads that has.
__device__ __forceinline__ u64 first_index() { return u64(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ u64 grid_size() { return u64(gridDim.x) * blockDim.x; }

// ---- random words: Philox4x32-10, as in rng.rs

struct Words {
    u32 w[4];

    /// The word of a column: an array indexed by a variable would lie in memory.
    __device__ __forceinline__ u32 of(u32 column) const {
        u32 which = column % 64 / 16;
        return which == 0 ? w[0] : which == 1 ? w[1] : which == 2 ? w[2] : w[3];
    }
};

__device__ __forceinline__ Words philox(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
    for (int round = 0; round < 10; round++) {
        u32 h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
        u32 h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
        c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    Words words = {{c0, c1, c2, c3}};
    return words;
}

/// A stream of random words, addressed by (row, column).
struct Stream {
    u64 seed;
    u32 what, step;

    /// Words of columns `64*block + lane`, and 16, 32 and 48 further.
    __device__ __forceinline__ Words words(u64 row, u32 block, u32 lane) const {
        u32 high = u32(row >> 32);
        return philox((block << 4) + lane, u32(row), what, step ^ (high << 20 | high >> 12), u32(seed), u32(seed >> 32));
    }
    __device__ __forceinline__ u32 word(u64 row, u32 column) const {
        return words(row, column / 64, column % 16).of(column);
    }
};

/// Dropout of one place: words below the threshold drop, what is kept is multiplied. A threshold of 0 keeps everything.
struct Dropout {
    Stream stream;
    u64 first_row;
    u32 threshold;
    float keep;

    __device__ __forceinline__ bool keeps(u32 word) const { return word >= threshold; }
    __device__ __forceinline__ float factor(u32 word) const { return keeps(word) ? keep : 0.0f; }
    __device__ __forceinline__ bool on() const { return threshold != 0; }
};

// ---- sums over a warp and over a block

struct Sum {
    static __device__ __forceinline__ float start() { return 0.0f; }
    static __device__ __forceinline__ float join(float a, float b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ float start() { return NEVER; }
    static __device__ __forceinline__ float join(float a, float b) { return fmaxf(a, b); }
};

/// What all lanes of a warp make together; each gets it.
template <class Op, class T> __device__ __forceinline__ T over_warp(T x) {
    for (int distance = 16; distance > 0; distance /= 2) x = Op::join(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

/// What all threads of a block of one dimension make together; each gets it. `shared` has room for 32 numbers, and may be
/// used again at once.
template <class Op, class T> __device__ __forceinline__ T over_block(T x, T* shared) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    x = over_warp<Op>(x);
    __syncthreads();
    if (lane == 0) shared[warp] = x;
    __syncthreads();
    return over_warp<Op>(lane < warps ? shared[lane] : Op::start());
}
