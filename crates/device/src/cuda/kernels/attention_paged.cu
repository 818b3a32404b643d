// New tokens of many sequences over a cache of keys and values in pages of PAGE tokens (Kwon et al., 2023). What a query
// gets depends on its own position alone: its warps take the pages in turns from the first on, and are put together in their
// order, so a token has the same bits whatever else is in the call and however its text was cut.
#include "common.cuh"

const u32 PAGE = 64, WARPS = 8;

/// Of each row: where its sequence's pages begin in `places`, and its position. Rows come first there, pages behind them.
struct Row {
    u32 pages, position;
};
__device__ __forceinline__ Row row_of_block(const u32* places) { return {places[2 * blockIdx.x], places[2 * blockIdx.x + 1]}; }

// Page p of the keys is [H][D][PAGE], of the values [H][PAGE][D]. A block for each new token; threads walk over k and v.
template <class E>
__device__ void append(const E* qkv, const u32* places, u32 heads, u32 width, E* k_pages, E* v_pages) {
    Row row = row_of_block(places);
    u64 all = u64(heads) * width, page = places[row.pages + row.position / PAGE];
    u32 slot = row.position % PAGE;
    const E* k = qkv + (u64(blockIdx.x) * 3 + 1) * all;
    for (u32 i = threadIdx.x; i < all; i += blockDim.x) {
        u32 h = i / width, d = i % width;
        u64 block = (page * heads + h) * width * PAGE;
        k_pages[block + d * PAGE + slot] = k[i];
        v_pages[block + slot * width + d] = k[all + i];
    }
}

#define APPEND(name, E)                                                                                                  \
    KERNEL(name, const E* qkv, const u32* places, u32 heads, u32 width, E* k_pages, E* v_pages) {        \
        append(qkv, places, heads, width, k_pages, v_pages);                                                        \
    }
APPEND(append_f32, float)
APPEND(append_bf16, bf16)

// A block of WARPS warps for each new token (x) and head (y); C is the columns of a head for each lane, rounded up.
template <class E, int C>
__device__ void attend(const E* qkv, const u32* places, u32 heads, u32 width, float scale, const E* k_pages,
                       const E* v_pages, E* out) {
    __shared__ float q[32 * C], p[WARPS][PAGE], mosts[WARPS], weights[WARPS], all_sums[WARPS][32 * C];
    Row row = row_of_block(places);
    u32 h = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u64 all = u64(heads) * width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) q[c] = to_f32(qkv[u64(blockIdx.x) * 3 * all + h * width + c]);
    __syncthreads();
    float most = NOTHING, weight = 0.0f, sums[C];
    for (int c = 0; c < C; c++) sums[c] = 0.0f;
    for (u32 number = warp; number <= row.position / PAGE; number += WARPS) {
        u64 block = (u64(places[row.pages + number]) * heads + h) * width * PAGE;
        const E* k = k_pages + block;
        const E* v = v_pages + block;
        // Later places may hold anything.
        u32 seen = min(PAGE, row.position - number * PAGE + 1);
        // A lane has two neighbouring keys, and asks for many columns before it needs the first.
        float score[2] = {0.0f, 0.0f}, two[2];
        UNROLL_BY(16) for (u32 c = 0; c < width; c++) {
            load2(k + c * PAGE + 2 * lane, two);
            for (u32 i = 0; i < 2; i++) score[i] = fmaf(q[c], two[i], score[i]);
        }
        for (u32 i = 0; i < 2; i++) score[i] = 2 * lane + i < seen ? score[i] * scale : NEVER;
        float now = fmaxf(most, over_warp<Largest>(fmaxf(score[0], score[1])));
        float shrink = expf(most - now);
        most = now;
        weight *= shrink;
        __syncwarp();
        for (u32 i = 0; i < 2; i++) {
            float e = expf(score[i] - now);
            weight += e;
            p[warp][2 * lane + i] = e;
        }
        __syncwarp();
        for (int c = 0; c < C; c++) sums[c] *= shrink;
        UNROLL_BY(8) for (u32 key = 0; key < seen; key++) {
            for (int c = 0; c < C; c++) {
                u32 column = lane + 32 * c;
                if (column < width) sums[c] = fmaf(p[warp][key], to_f32(v[key * width + column]), sums[c]);
            }
        }
    }
    weight = over_warp<Sum>(weight);
    if (lane == 0) mosts[warp] = most, weights[warp] = weight;
    for (int c = 0; c < C; c++) all_sums[warp][lane + 32 * c] = sums[c];
    __syncthreads();
    for (u32 w = 1; w < WARPS; w++) most = w == 1 ? fmaxf(mosts[0], mosts[1]) : fmaxf(most, mosts[w]);
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
        float total = 0.0f, sum = 0.0f;
        for (u32 w = 0; w < WARPS; w++) {
            float factor = expf(mosts[w] - most);
            total = fmaf(weights[w], factor, total);
            sum = fmaf(all_sums[w][c], factor, sum);
        }
        out[u64(blockIdx.x) * all + h * width + c] = Of<E>::f32(sum / total);
    }
}

#define ATTEND(name, E, C)                                                                                            \
    KERNEL(name, const E* qkv, const u32* places, u32 heads, u32 width, float scale, const E* k_pages, \
           const E* v_pages, E* out) {                                                                                 \
        attend<E, C>(qkv, places, heads, width, scale, k_pages, v_pages, out);                                    \
    }
ATTEND(attend_f32_64, float, 2)
ATTEND(attend_f32_128, float, 4)
ATTEND(attend_f32_256, float, 8)
ATTEND(attend_bf16_64, bf16, 2)
ATTEND(attend_bf16_128, bf16, 4)
ATTEND(attend_bf16_256, bf16, 8)
