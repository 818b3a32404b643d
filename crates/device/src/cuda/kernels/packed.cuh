// What the products with packed matrices share. Matrices are [n, k], row after row: f32, bf16, or codes and then the groups'
// numbers (see packed.rs). Activations that meet codes are rounded to 8 bits, a group at a time, as on the processor:
// sum over k of x w = sum over groups of sx (sw sum(qx qw) + mw sum(qx)).
#pragma once
#include "common.cuh"

const u32 GROUP = 64;

/// What happens to an element of the product on its way.
template <class O> struct Finish {
    const float* bias;
    const float* residual;
    O* y;
    u32 relu;

    __device__ __forceinline__ void put(u32 row, u32 column, u32 n, float value) const {
        if (bias) value += bias[column];
        if (relu) value = positive(value);
        u64 at = u64(row) * n + column;
        if (residual) value = residual[at] + value;
        y[at] = Of<O>::f32(value);
    }
};

/// Rows of activations in 8 bits: codes [m, groups, GROUP], and of each group its scale, and its scale times the sum of
/// its codes.
struct Rounded {
    const i8* codes;
    const float* scales;
    const float* zeros;
};

/// Codes of 8 bits: a code stands for scale * (code - 128). `load` gives each of four neighbouring lanes 16 of a group. `put`
/// writes a unit's codes of one byte of each word, those of its steps.
struct EightBits {
    static const bool MINIMA = false;
    static const u32 BITS = 8, UNIT_BYTES = 32, GROUP_BYTES = 64;
    static __device__ __forceinline__ void put(u8* byte, const u32* codes) {
        UNROLL
        for (u32 step = 0; step < 8; step++) byte[4 * step] = u8(codes[step]);
    }
    static __device__ __forceinline__ uint4 load(const u8* group) {
        uint4 w = reinterpret_cast<const uint4*>(group)[threadIdx.x % 4];
        return make_uint4(w.x ^ 0x80808080u, w.y ^ 0x80808080u, w.z ^ 0x80808080u, w.w ^ 0x80808080u);
    }
};

/// Of 4 and 3 bits: a code stands for scale * code + minimum. Two lanes share a unit of 32 codes, whose words lie as places.rs
/// says: each has four of its steps, four codes in the bytes of a word. `code` is one of them by itself.
struct FourBits {
    static const bool MINIMA = true;
    static const u32 BITS = 4, UNIT_BYTES = 16, GROUP_BYTES = 32;
    static __device__ __forceinline__ void put(u8* byte, const u32* codes) {
        UNROLL
        for (u32 word = 0; word < 4; word++) byte[4 * word] = u8(codes[2 * word] | codes[2 * word + 1] << 4);
    }
    static __device__ __forceinline__ uint4 load(const u8* group) {
        uint2 w = reinterpret_cast<const uint2*>(group)[threadIdx.x % 4];
        const u32 LOW = 0x0f0f0f0fu;
        return make_uint4(w.x & LOW, w.x >> 4 & LOW, w.y & LOW, w.y >> 4 & LOW);
    }
    static __device__ __forceinline__ u32 code(const u8* unit, u32 step, u32 byte) {
        return unit[step / 2 * 4 + byte] >> step % 2 * 4 & 15;
    }
};
struct ThreeBits {
    static const bool MINIMA = true;
    static const u32 BITS = 3, UNIT_BYTES = 12, GROUP_BYTES = 24;
    static __device__ __forceinline__ void put(u8* byte, const u32* codes) {
        u32 a = codes[6], b = codes[7];
        byte[0] = u8(codes[0] | codes[1] << 3 | (a & 3) << 6);
        byte[4] = u8(codes[2] | codes[3] << 3 | (a & 4) << 4 | (b & 4) << 5);
        byte[8] = u8(codes[4] | codes[5] << 3 | (b & 3) << 6);
    }
    static __device__ __forceinline__ uint4 load(const u8* group) {
        const u32* w = reinterpret_cast<const u32*>(group) + threadIdx.x % 4 / 2 * 3;
        u32 x = w[0], y = w[1], z = w[2];
        const u32 LOW = 0x07070707u, TWO = 0x03030303u, ONE = 0x04040404u;
        if (threadIdx.x % 2 == 0) return make_uint4(x & LOW, x >> 3 & LOW, y & LOW, y >> 3 & LOW);
        return make_uint4(z & LOW, z >> 3 & LOW, (x >> 6 & TWO) | (y >> 4 & ONE), (z >> 6 & TWO) | (y >> 5 & ONE));
    }
    static __device__ __forceinline__ u32 code(const u8* unit, u32 step, u32 byte) {
        if (step < 6) return unit[step / 2 * 4 + byte] >> step % 2 * 3 & 7;
        u32 lower = unit[(step - 6) * 8 + byte] >> 6, highest = unit[4 + byte] >> (step - 2) & 4;
        return lower | highest;
    }
};
