// Causal attention on tensor cores (Dao, 2023), in bf16 or f16.
#include "attention_mma.cuh"

// A block for 64 queries of one head of one sequence.
template <class E, int D>
__device__ void attention_mma(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, E* out, float* lse) {
    DYNAMIC_SHARED(E, shared);
    const u32 LD = Row<D>::LD;
    E* k = shared;          // [64][LD], at first the queries
    E* v = k + TILE * LD;   // [64][LD]
    Part part = s.part(TILE);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 g = lane / 4, t = lane % 4;
    // The last queries have the most keys, so they come first.
    u32 first = (part.tiles - 1 - part.tile) * TILE, count = min(TILE, s.seq - first);
    u64 ld = 3 * u64(s.heads) * D;
    stage16<D>(qkv, s.at(b, h, 0, first), ld, TILE, count, k);
    __syncthreads();
    u32 q[D / 16][4];
    UNROLL for (int i = 0; i < D / 16; i++) load_left(q[i], k + 16 * warp * LD + 16 * i, LD);
    u32 start = doc_start ? first_key(doc_start + b * s.seq + first, count) : 0;
    u32 query[2], from[2];
    float most[2] = {NOTHING, NOTHING}, weight[2] = {0.0f, 0.0f}, sums[D / 8][4];
    UNROLL for (int r = 0; r < 2; r++) {
        query[r] = first + 16 * warp + g + 8 * r;
        from[r] = doc_start && query[r] < s.seq ? doc_start[b * s.seq + query[r]] : 0;
    }
    UNROLL for (int n = 0; n < D / 8; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    const float scale = s.scale * LOG2E;
    for (u32 key = start / TILE * TILE; key < first + count; key += TILE) {
        u32 keys = min(TILE, s.seq - key);
        __syncthreads();
        stage16<D>(qkv, s.at(b, h, 1, key), ld, TILE, keys, k);
        stage16<D>(qkv, s.at(b, h, 2, key), ld, TILE, keys, v);
        __syncthreads();
        float p[8][4];
        UNROLL for (int j = 0; j < 8; j++) {
            p[j][0] = p[j][1] = p[j][2] = p[j][3] = 0.0f;
            UNROLL for (int i = 0; i < D / 16; i++) {
                u32 right[2];
                load_right(right, k + 8 * j * LD + 16 * i, LD);
                mma<E>(p[j], q[i], right);
            }
        }
        UNROLL for (int r = 0; r < 2; r++) {
            float now = most[r];
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    u32 own = key + 8 * j + 2 * t + e;
                    float* x = &p[j][2 * r + e];
                    *x = own <= query[r] && own >= from[r] ? *x * scale : NEVER;
                    now = fmaxf(now, *x);
                }
            }
            now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 1));
            now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, 2));
            float shrink = exp2f(most[r] - now);
            most[r] = now;
            weight[r] *= shrink;
            UNROLL for (int n = 0; n < D / 8; n++) sums[n][2 * r] *= shrink, sums[n][2 * r + 1] *= shrink;
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    p[j][2 * r + e] = exp2f(p[j][2 * r + e] - now);
                    weight[r] += p[j][2 * r + e];
                }
            }
            if (dropout.on()) {
                float factors[8][2];
                mask_row(dropout, s.mask_row(dropout, b, h, query[r]), key / TILE, factors);
                UNROLL for (int j = 0; j < 8; j++) p[j][2 * r] *= factors[j][0], p[j][2 * r + 1] *= factors[j][1];
            }
        }
        add_rows<D, TILE / 16>(sums, p, v);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        float total = weight[r] + __shfl_xor_sync(ALL_LANES, weight[r], 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (query[r] < s.seq) {
            float factor = 1.0f / total;
            E* row = out + s.out(b, h, query[r]) + 2 * t;
            UNROLL for (int n = 0; n < D / 8; n++) put_two(row + 8 * n, sums[n][2 * r] * factor, sums[n][2 * r + 1] * factor);
            if (t == 0) lse[u64(part.pair) * s.seq + query[r]] = (most[r] + log2f(total)) * LN2;
        }
    }
}

#define ATTENTION(E, D)                                                                                           \
    KERNEL(attention_mma_##E##_##D, const E* qkv, const u32* doc_start, Heads s, Dropout dropout, E* out, float* lse) { \
        attention_mma<E, D>(qkv, doc_start, s, dropout, out, lse);                                                \
    }
ATTENTION(bf16, 64)
ATTENTION(bf16, 80)
ATTENTION(bf16, 128)
ATTENTION(f16, 64)
ATTENTION(f16, 80)
ATTENTION(f16, 128)
