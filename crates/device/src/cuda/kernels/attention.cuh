// What the kernels of causal attention share. Scores are made of f32 products without tensor cores: tiles of queries by 32
// keys, a key to each lane of a warp; sums over keys lie across the columns of a head, a column to each lane.
#pragma once
#include "common.cuh"

/// Queries of a tile, keys of a tile, warps of a block, queries of each warp.
const u32 QUERIES = 16, KEYS = 32, WARPS = 4, EACH = QUERIES / WARPS;

/// What a block works on: one of the tiles of head h of sequence b, which are pair b*H + h. Blocks have one number, since of the
/// others a GPU has too few, and the tiles of a pair come one after the other, since they read the same rows.
struct Part {
    u32 tile, tiles, pair, b, h;
};

/// Where heads lie in rows of q, k and v [B*T, 3*H*D], and what each position attends to.
struct Heads {
    u32 seq, heads, width;
    /// Of all heads of the layer: the number of the first of these, and how many there are.
    u32 before, among;
    float scale;

    /// First element of q (0), k (1) or v (2) of a position.
    __device__ __forceinline__ u64 at(u32 b, u32 h, u32 which, u32 t) const {
        return ((u64(b) * seq + t) * 3 + which) * heads * width + h * width;
    }
    /// First element of a position's output.
    __device__ __forceinline__ u64 out(u32 b, u32 h, u32 t) const {
        return (u64(b) * seq + t) * heads * width + h * width;
    }
    /// The part of a block whose tiles have so many rows.
    __device__ __forceinline__ Part part(u32 rows) const {
        u32 tiles = (seq + rows - 1) / rows, pair = blockIdx.x / tiles;
        return {blockIdx.x % tiles, tiles, pair, pair / heads, pair % heads};
    }
    /// Row of the dropout mask.
    __device__ __forceinline__ u64 mask_row(const Dropout& d, u32 b, u32 h, u32 t) const {
        return (d.first_row + u64(b) * seq + t) * among + before + h;
    }
};

/// Copies rows of one head to shared memory, `stride` apart; rows from `last` on become zeros.
template <class E>
__device__ __forceinline__ void stage(const E* x, u64 first, u64 ld, u32 rows, u32 last, u32 width, u32 stride, float* to) {
    for (u32 i = threadIdx.x; i < rows * width; i += blockDim.x) {
        u32 row = i / width, c = i % width;
        to[row * stride + c] = row < last ? to_f32(x[first + row * ld + c]) : 0.0f;
    }
}

/// Sum over a head's width, always in the same order: a score must come out the same wherever it is computed.
__device__ __forceinline__ float dot(const float* a, const float* b, u32 width) {
    float sum = 0.0f;
    for (u32 c = 0; c < width; c++) sum = fmaf(a[c], b[c], sum);
    return sum;
}
