// What the kernels of attention with tensor cores share: halves of type E, heads of width D, tiles of 64 rows of queries by
// 64 keys, 16 rows to each of 4 warps.
#pragma once
#include "attention.cuh"
#include "mma.cuh"

/// Rows of a block's tile, and numbers from a row to the next in shared memory: rows then begin in different banks.
const u32 TILE = 64;
template <int D> struct Row {
    static const u32 LD = D + 8;
};

const float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

/// Copies `rows` rows of a head to shared memory, 16 bytes at a time; rows from `last` on become zeros.
template <int D, class E>
__device__ __forceinline__ void stage16(const E* x, u64 first, u64 ld, u32 rows, u32 last, E* to) {
    for (u32 i = threadIdx.x; i < rows * (D / 8); i += blockDim.x) {
        u32 row = i / (D / 8), c = i % (D / 8) * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (row < last) v = *reinterpret_cast<const uint4*>(x + first + row * ld + c);
        *reinterpret_cast<uint4*>(to + row * Row<D>::LD + c) = v;
    }
}

/// The first key that any of `count` queries from `first` on attends to.
__device__ __forceinline__ u32 first_key(const u32* doc_start, u32 count) {
    u32 start = 0xffffffffu;
    for (u32 i = threadIdx.x % 32; i < count; i += 32) start = min(start, doc_start[i]);
    for (int distance = 16; distance > 0; distance /= 2) start = min(start, __shfl_xor_sync(ALL_LANES, start, distance));
    return start;
}

/// Factors of dropout for a row of sums over 64 keys: element (j, e) of the row is key 64*block + 8j + 2t + e.
__device__ __forceinline__ void mask_row(const Dropout& d, u64 row, u32 block, float factors[8][2]) {
    u32 t = threadIdx.x % 4;
    UNROLL for (int half = 0; half < 2; half++) {
        UNROLL for (int e = 0; e < 2; e++) {
            Words words = d.stream.words(row, block, 8 * half + 2 * t + e);
            UNROLL for (int w = 0; w < 4; w++) factors[2 * w + half][e] = d.factor(words.w[w]);
        }
    }
}

/// Sums over keys of a tile as the left factor of the next product, keys 16i ..
template <class E> __device__ __forceinline__ void as_left(u32* left, const float (*sums)[4], int i) {
    left[0] = two<E>(sums[2 * i][0], sums[2 * i][1]), left[1] = two<E>(sums[2 * i][2], sums[2 * i][3]);
    left[2] = two<E>(sums[2 * i + 1][0], sums[2 * i + 1][1]), left[3] = two<E>(sums[2 * i + 1][2], sums[2 * i + 1][3]);
}

/// sums += tile * rows: what is summed over are the tile's columns, and `16 * STEPS` rows of a head in shared memory.
template <int D, int STEPS, class E>
__device__ __forceinline__ void add_rows(float (*sums)[4], const float (*tile)[4], const E* rows) {
    UNROLL for (int i = 0; i < STEPS; i++) {
        u32 left[4], right[2];
        as_left<E>(left, tile, i);
        UNROLL for (int n = 0; n < D / 8; n++) {
            load_right_turned(right, rows + 16 * i * Row<D>::LD + 8 * n, Row<D>::LD);
            mma<E>(sums[n], left, right);
        }
    }
}

/// Two neighbouring numbers of a row.
template <class E> __device__ __forceinline__ void put_two(E* to, float low, float high) {
    *reinterpret_cast<u32*>(to) = two<E>(low, high);
}
