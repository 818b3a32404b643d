// Causal attention with an online softmax (Milakov and Gimelshein, 2018; Dao et al., 2022): no matrix of T by T.
#include "attention.cuh"

// A block for QUERIES queries of one head of one sequence; C is the columns of a head for each lane, rounded up.
template <class E, int C>
__device__ void attention(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, E* out, float* lse) {
    DYNAMIC_SHARED(float, shared);
    u32 width = s.width, stride = width + 1;
    float* q = shared;                 // [QUERIES][width]
    float* k = q + QUERIES * width;    // [KEYS][stride]
    float* v = k + KEYS * stride;      // [KEYS][width]
    float* p = v + KEYS * width;       // [QUERIES][KEYS]
    Part part = s.part(QUERIES);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // The last queries have the most keys, so they come first.
    u32 first = (part.tiles - 1 - part.tile) * QUERIES, count = min(QUERIES, s.seq - first);
    u64 ld = 3 * u64(s.heads) * width;
    stage(qkv, s.at(b, h, 0, first), ld, QUERIES, count, width, width, q);
    u32 start = 0;
    if (doc_start) {
        start = s.seq;
        for (u32 i = 0; i < count; i++) start = min(start, doc_start[b * s.seq + first + i]);
    }
    float most[EACH], weight[EACH], sums[EACH][C];
    u32 from[EACH];
    for (u32 i = 0; i < EACH; i++) {
        u32 t = first + warp * EACH + i;
        most[i] = NOTHING, weight[i] = 0.0f;
        from[i] = doc_start && t < s.seq ? doc_start[b * s.seq + t] : 0;
        for (int c = 0; c < C; c++) sums[i][c] = 0.0f;
    }
    for (u32 key = start / KEYS * KEYS; key < first + count; key += KEYS) {
        u32 keys = min(KEYS, s.seq - key);
        __syncthreads();
        stage(qkv, s.at(b, h, 1, key), ld, KEYS, keys, width, stride, k);
        stage(qkv, s.at(b, h, 2, key), ld, KEYS, keys, width, width, v);
        __syncthreads();
        for (u32 i = 0; i < EACH; i++) {
            u32 row = warp * EACH + i, t = first + row, own = key + lane;
            float score = own <= t && own >= from[i] && own < s.seq ? dot(q + row * width, k + lane * stride, width) * s.scale : NEVER;
            float now = fmaxf(most[i], over_warp<Largest>(score));
            float shrink = expf(most[i] - now), e = expf(score - now);
            most[i] = now;
            weight[i] = weight[i] * shrink + e;
            if (dropout.on() && t < s.seq) e *= dropout.factor(dropout.stream.word(s.mask_row(dropout, b, h, t), own));
            p[row * KEYS + lane] = e;
            for (int c = 0; c < C; c++) sums[i][c] *= shrink;
        }
        __syncwarp();
        for (u32 j = 0; j < keys; j++) {
            for (int c = 0; c < C; c++) {
                u32 column = lane + 32 * c;
                float x = column < width ? v[j * width + column] : 0.0f;
                for (u32 i = 0; i < EACH; i++) sums[i][c] = fmaf(p[(warp * EACH + i) * KEYS + j], x, sums[i][c]);
            }
        }
        __syncwarp();
    }
    for (u32 i = 0; i < EACH; i++) {
        u32 t = first + warp * EACH + i;
        float total = over_warp<Sum>(weight[i]);
        if (t >= s.seq) continue;
        float factor = 1.0f / total;
        for (int c = 0; c < C; c++) {
            u32 column = lane + 32 * c;
            if (column < width) out[s.out(b, h, t) + column] = Of<E>::f32(sums[i][c] * factor);
        }
        if (lane == 0) lse[u64(part.pair) * s.seq + t] = most[i] + logf(total);
    }
}

#define ATTENTION(name, E, C)                                                                                      \
    KERNEL(name, const E* qkv, const u32* doc_start, Heads s, Dropout dropout, E* out, float* lse) {               \
        attention<E, C>(qkv, doc_start, s, dropout, out, lse);                                                     \
    }
ATTENTION(attention_f32_64, float, 2)
ATTENTION(attention_f32_128, float, 4)
ATTENTION(attention_f32_256, float, 8)
ATTENTION(attention_bf16_64, bf16, 2)
ATTENTION(attention_bf16_128, bf16, 4)
ATTENTION(attention_bf16_256, bf16, 8)
ATTENTION(attention_f16_64, f16, 2)
ATTENTION(attention_f16_128, f16, 4)
ATTENTION(attention_f16_256, f16, 8)
