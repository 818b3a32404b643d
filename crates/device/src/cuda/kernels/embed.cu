// Rows of tables by number: token and position embeddings.
#include "common.cuh"

// A block for each row.
template <class E, class O>
__device__ void embed(const u32* ids, const E* table, const u32* ids2, const E* table2, O* out, u32 width) {
    u64 row = blockIdx.x;
    u32 id = ids[row];
    const E* first = table + u64(id) * width;
    const E* second = ids2 ? table2 + u64(ids2[row]) * width : nullptr;
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float x[4] = {0.0f, 0.0f, 0.0f, 0.0f}, y[4];
        if (id != IGNORE) {
            load4(first + c, width - c, x);
            if (second) {
                load4(second + c, width - c, y);
                for (int j = 0; j < 4; j++) x[j] += y[j];
            }
        }
        store4(out + row * width + c, width - c, x);
    }
}

#define EMBED(name, E, O)                                                                                          \
    KERNEL(name, const u32* ids, const E* table, const u32* ids2, const E* table2, O* out, u32 width) {            \
        embed(ids, table, ids2, table2, out, width);                                                               \
    }
EMBED(embed_f32_f32, float, float)
EMBED(embed_f32_bf16, float, bf16)
EMBED(embed_bf16_f32, bf16, float)
EMBED(embed_bf16_bf16, bf16, bf16)
EMBED(embed_f32_f16, float, f16)
EMBED(embed_f16_f32, f16, float)
EMBED(embed_f16_f16, f16, f16)

// dtable[ids[i]] += dout[i], in the order of i. A block for each i; the one whose id is met for the first time adds all
// rows of that id, one after the other: the bits do not depend on which block runs when.
template <class G> __device__ void embed_backward(const u32* ids, const G* dout, float* dtable, u32 count, u32 width) {
    const u32 WARPS = 8;
    // Ids that a thread compares before all hear what any has found.
    const u32 EACH = 4;
    __shared__ u32 found[WARPS], rows[32 * WARPS];
    u32 id = ids[blockIdx.x], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (id == IGNORE) return;
    for (u32 start = 0; start < blockIdx.x; start += EACH * blockDim.x) {
        bool met = false;
        UNROLL for (u32 j = 0; j < EACH; j++) {
            u32 i = start + j * blockDim.x + threadIdx.x;
            met |= i < blockIdx.x && ids[i] == id;
        }
        if (__syncthreads_or(met)) return;
    }
    float* sums = dtable + u64(id) * width;
    for (u32 start = blockIdx.x; start < count; start += blockDim.x) {
        u32 i = start + threadIdx.x;
        bool same = i < count && ids[i] == id;
        u32 lanes = __ballot_sync(ALL_LANES, same);
        if (lane == 0) found[warp] = lanes;
        __syncthreads();
        u32 number = __popc(lanes & ((1u << lane) - 1)), all = 0;
        for (u32 w = 0; w < WARPS; w++) {
            if (w == warp) number += all;
            all += __popc(found[w]);
        }
        if (same) rows[number] = i;
        __syncthreads();
        // Each column is one thread's from first to last.
        for (u32 c = threadIdx.x; c < width && all > 0; c += blockDim.x) {
            float sum = sums[c];
            UNROLL_BY(8) for (u32 r = 0; r < all; r++) sum += to_f32(dout[u64(rows[r]) * width + c]);
            sums[c] = sum;
        }
        __syncthreads();
    }
}

KERNEL(embed_backward_f32, const u32* ids, const float* dout, float* dtable, u32 count, u32 width) {
    embed_backward(ids, dout, dtable, count, width);
}
KERNEL(embed_backward_bf16, const u32* ids, const bf16* dout, float* dtable, u32 count, u32 width) {
    embed_backward(ids, dout, dtable, count, width);
}
KERNEL(embed_backward_f16, const u32* ids, const f16* dout, float* dtable, u32 count, u32 width) {
    embed_backward(ids, dout, dtable, count, width);
}
