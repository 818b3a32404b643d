// Backward of causal attention (Dao et al., 2022; Dao, 2023): probabilities are computed again from the log-sum-exp. One
// kernel walks over keys for the gradients of queries, one over queries for those of keys and values; nothing is added by
// two blocks, so the same run has the same bits.
#include "attention.cuh"

// delta[b, h, t] = sum of dout * out; a warp for each.
template <class E> __device__ void attention_delta(const E* out, const E* dout, Heads s, float* delta, u64 count) {
    u64 index = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (index >= count) return;
    u32 t = u32(index % s.seq), head = u32(index / s.seq), lane = threadIdx.x % 32;
    u64 at = s.out(head / s.heads, head % s.heads, t);
    float sum = 0.0f;
    for (u32 c = lane; c < s.width; c += 32) sum = fmaf(to_f32(out[at + c]), to_f32(dout[at + c]), sum);
    sum = over_warp<Sum>(sum);
    if (lane == 0) delta[index] = sum;
}

KERNEL(attention_delta_f32, const float* out, const float* dout, Heads s, float* delta, u64 count) {
    attention_delta(out, dout, s, delta, count);
}
KERNEL(attention_delta_bf16, const bf16* out, const bf16* dout, Heads s, float* delta, u64 count) {
    attention_delta(out, dout, s, delta, count);
}
KERNEL(attention_delta_f16, const f16* out, const f16* dout, Heads s, float* delta, u64 count) {
    attention_delta(out, dout, s, delta, count);
}

/// A query's row in the backward pass.
struct Query {
    float lse, delta;
    u32 t, from;
    u64 mask_row;
    bool there;
};

__device__ __forceinline__ Query query_of(Heads s, const Dropout& d, const u32* doc_start, const float* lse,
                                          const float* delta, u32 head, u32 t) {
    Query q;
    u32 b = head / s.heads;
    q.t = t, q.there = t < s.seq;
    u64 at = u64(head) * s.seq + t;
    q.lse = q.there ? lse[at] : 0.0f, q.delta = q.there ? delta[at] : 0.0f;
    q.from = q.there && doc_start ? doc_start[b * s.seq + t] : 0;
    q.mask_row = s.mask_row(d, b, head % s.heads, t);
    return q;
}

/// Probability after dropout, and the gradient of the score, of one query and one key whose rows are at hand.
__device__ __forceinline__ float2 gradients(Heads s, const Dropout& dropout, const Query& query, u32 key, const float* q,
                                            const float* k, const float* dout, const float* v) {
    if (!query.there || key > query.t || key < query.from) return make_float2(0.0f, 0.0f);
    // Not above 1, whatever the rounding of large scores.
    float p = expf(fminf(dot(q, k, s.width) * s.scale - query.lse, 0.0f));
    float factor = dropout.on() ? dropout.factor(dropout.stream.word(query.mask_row, key)) : 1.0f;
    float ds = p * (dot(dout, v, s.width) * factor - query.delta) * s.scale;
    return make_float2(p * factor, ds);
}

// dq. Blocks as in attention.cu.
template <class E, int C>
__device__ void attention_dq(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse,
                             const float* delta, const E* dout, E* dqkv) {
    DYNAMIC_SHARED(float, shared);
    u32 width = s.width, stride = width + 1;
    float* q = shared;                     // [QUERIES][width]
    float* g = q + QUERIES * width;        // [QUERIES][width], rows of dout
    float* k = g + QUERIES * width;        // [KEYS][stride]
    float* v = k + KEYS * stride;          // [KEYS][stride]
    float* ds = v + KEYS * stride;         // [QUERIES][KEYS]
    Part part = s.part(QUERIES);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 first = (part.tiles - 1 - part.tile) * QUERIES, count = min(QUERIES, s.seq - first);
    u64 ld = 3 * u64(s.heads) * width;
    stage(qkv, s.at(b, h, 0, first), ld, QUERIES, count, width, width, q);
    stage(dout, s.out(b, h, first), ld / 3, QUERIES, count, width, width, g);
    u32 start = 0;
    if (doc_start) {
        start = s.seq;
        for (u32 i = 0; i < count; i++) start = min(start, doc_start[b * s.seq + first + i]);
    }
    Query queries[EACH];
    float sums[EACH][C];
    for (u32 i = 0; i < EACH; i++) {
        queries[i] = query_of(s, dropout, doc_start, lse, delta, part.pair, first + warp * EACH + i);
        for (int c = 0; c < C; c++) sums[i][c] = 0.0f;
    }
    for (u32 key = start / KEYS * KEYS; key < first + count; key += KEYS) {
        u32 keys = min(KEYS, s.seq - key);
        __syncthreads();
        stage(qkv, s.at(b, h, 1, key), ld, KEYS, keys, width, stride, k);
        stage(qkv, s.at(b, h, 2, key), ld, KEYS, keys, width, stride, v);
        __syncthreads();
        for (u32 i = 0; i < EACH; i++) {
            u32 row = warp * EACH + i;
            ds[row * KEYS + lane] =
                gradients(s, dropout, queries[i], key + lane, q + row * width, k + lane * stride, g + row * width, v + lane * stride).y;
        }
        __syncwarp();
        for (u32 j = 0; j < keys; j++) {
            for (int c = 0; c < C; c++) {
                u32 column = lane + 32 * c;
                float x = column < width ? k[j * stride + column] : 0.0f;
                for (u32 i = 0; i < EACH; i++) sums[i][c] = fmaf(ds[(warp * EACH + i) * KEYS + j], x, sums[i][c]);
            }
        }
        __syncwarp();
    }
    for (u32 i = 0; i < EACH; i++) {
        for (int c = 0; c < C; c++) {
            u32 column = lane + 32 * c;
            if (queries[i].there && column < width) {
                dqkv[s.at(b, h, 0, queries[i].t) + column] = Of<E>::f32(sums[i][c]);
            }
        }
    }
}

// dk and dv. A block for KEYS keys of one head of one sequence; each warp adds up the rows of KEYS / WARPS of them.
template <class E, int C>
__device__ void attention_dkv(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse,
                              const float* delta, const E* dout, E* dqkv) {
    DYNAMIC_SHARED(float, shared);
    const u32 OWN = KEYS / WARPS;
    u32 width = s.width, stride = width + 1;
    float* k = shared;                     // [KEYS][stride]
    float* v = k + KEYS * stride;          // [KEYS][stride]
    float* q = v + KEYS * stride;          // [QUERIES][width]
    float* g = q + QUERIES * width;        // [QUERIES][width], rows of dout
    float* p = g + QUERIES * width;        // [QUERIES][KEYS]
    float* ds = p + QUERIES * KEYS;        // [QUERIES][KEYS]
    Part part = s.part(KEYS);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The first keys have the most queries.
    u32 key = part.tile * KEYS, keys = min(KEYS, s.seq - key);
    u64 ld = 3 * u64(s.heads) * width;
    stage(qkv, s.at(b, h, 1, key), ld, KEYS, keys, width, stride, k);
    stage(qkv, s.at(b, h, 2, key), ld, KEYS, keys, width, stride, v);
    float dk[OWN][C], dv[OWN][C];
    for (u32 i = 0; i < OWN; i++) {
        for (int c = 0; c < C; c++) dk[i][c] = dv[i][c] = 0.0f;
    }
    for (u32 first = key / QUERIES * QUERIES; first < s.seq; first += QUERIES) {
        u32 count = min(QUERIES, s.seq - first);
        __syncthreads();
        stage(qkv, s.at(b, h, 0, first), ld, QUERIES, count, width, width, q);
        stage(dout, s.out(b, h, first), ld / 3, QUERIES, count, width, width, g);
        __syncthreads();
        for (u32 i = 0; i < EACH; i++) {
            u32 row = warp * EACH + i;
            Query query = query_of(s, dropout, doc_start, lse, delta, part.pair, first + row);
            float2 both = gradients(s, dropout, query, key + lane, q + row * width, k + lane * stride, g + row * width, v + lane * stride);
            p[row * KEYS + lane] = both.x, ds[row * KEYS + lane] = both.y;
        }
        __syncthreads();
        for (u32 j = 0; j < count; j++) {
            for (int c = 0; c < C; c++) {
                u32 column = lane + 32 * c;
                float x = column < width ? q[j * width + column] : 0.0f, y = column < width ? g[j * width + column] : 0.0f;
                for (u32 i = 0; i < OWN; i++) {
                    u32 own = j * KEYS + warp * OWN + i;
                    dk[i][c] = fmaf(ds[own], x, dk[i][c]);
                    dv[i][c] = fmaf(p[own], y, dv[i][c]);
                }
            }
        }
    }
    for (u32 i = 0; i < OWN; i++) {
        u32 t = key + warp * OWN + i;
        for (int c = 0; c < C; c++) {
            u32 column = lane + 32 * c;
            if (t < s.seq && column < width) {
                dqkv[s.at(b, h, 1, t) + column] = Of<E>::f32(dk[i][c]);
                dqkv[s.at(b, h, 2, t) + column] = Of<E>::f32(dv[i][c]);
            }
        }
    }
}

#define BACKWARD(kernel, name, E, C)                                                                                 \
    KERNEL(name, const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse, const float* delta, \
           const E* dout, E* dqkv) {                                                                                 \
        kernel<E, C>(qkv, doc_start, s, dropout, lse, delta, dout, dqkv);                                            \
    }
BACKWARD(attention_dq, attention_dq_f32_64, float, 2)
BACKWARD(attention_dq, attention_dq_f32_128, float, 4)
BACKWARD(attention_dq, attention_dq_f32_256, float, 8)
BACKWARD(attention_dq, attention_dq_bf16_64, bf16, 2)
BACKWARD(attention_dq, attention_dq_bf16_128, bf16, 4)
BACKWARD(attention_dq, attention_dq_bf16_256, bf16, 8)
BACKWARD(attention_dq, attention_dq_f16_64, f16, 2)
BACKWARD(attention_dq, attention_dq_f16_128, f16, 4)
BACKWARD(attention_dq, attention_dq_f16_256, f16, 8)
BACKWARD(attention_dkv, attention_dkv_f32_64, float, 2)
BACKWARD(attention_dkv, attention_dkv_f32_128, float, 4)
BACKWARD(attention_dkv, attention_dkv_f32_256, float, 8)
BACKWARD(attention_dkv, attention_dkv_bf16_64, bf16, 2)
BACKWARD(attention_dkv, attention_dkv_bf16_128, bf16, 4)
BACKWARD(attention_dkv, attention_dkv_bf16_256, bf16, 8)
BACKWARD(attention_dkv, attention_dkv_f16_64, f16, 2)
BACKWARD(attention_dkv, attention_dkv_f16_128, f16, 4)
BACKWARD(attention_dkv, attention_dkv_f16_256, f16, 8)
