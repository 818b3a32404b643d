// Backward of causal attention on tensor cores, in bf16 or f16; as attention_backward.cu, in larger tiles.
#include "attention_mma.cuh"

// dq. A block for 64 queries of one head of one sequence.
template <class E, int D>
__device__ void attention_mma_dq(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse,
                                 const float* delta, const E* dout, E* dqkv) {
    DYNAMIC_SHARED(E, shared);
    const u32 LD = Row<D>::LD;
    E* k = shared;          // [64][LD], at first the queries
    E* v = k + TILE * LD;   // [64][LD], at first rows of dout
    Part part = s.part(TILE);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 g = lane / 4, t = lane % 4;
    u32 first = (part.tiles - 1 - part.tile) * TILE, count = min(TILE, s.seq - first);
    u64 ld = 3 * u64(s.heads) * D;
    stage16<D>(qkv, s.at(b, h, 0, first), ld, TILE, count, k);
    stage16<D>(dout, s.out(b, h, first), ld / 3, TILE, count, v);
    __syncthreads();
    u32 q[D / 16][4], go[D / 16][4];
    UNROLL for (int i = 0; i < D / 16; i++) {
        load_left(q[i], k + 16 * warp * LD + 16 * i, LD);
        load_left(go[i], v + 16 * warp * LD + 16 * i, LD);
    }
    u32 start = doc_start ? first_key(doc_start + b * s.seq + first, count) : 0;
    u32 query[2], from[2];
    float log_sum[2], own_delta[2], sums[D / 8][4];
    UNROLL for (int r = 0; r < 2; r++) {
        query[r] = first + 16 * warp + g + 8 * r;
        bool there = query[r] < s.seq;
        u64 at = u64(part.pair) * s.seq + query[r];
        from[r] = !there ? 0xffffffffu : doc_start ? doc_start[b * s.seq + query[r]] : 0;
        log_sum[r] = there ? lse[at] * LOG2E : 0.0f, own_delta[r] = there ? delta[at] : 0.0f;
    }
    UNROLL for (int n = 0; n < D / 8; n++) sums[n][0] = sums[n][1] = sums[n][2] = sums[n][3] = 0.0f;
    const float scale = s.scale * LOG2E;
    for (u32 key = start / TILE * TILE; key < first + count; key += TILE) {
        u32 keys = min(TILE, s.seq - key);
        __syncthreads();
        stage16<D>(qkv, s.at(b, h, 1, key), ld, TILE, keys, k);
        stage16<D>(qkv, s.at(b, h, 2, key), ld, TILE, keys, v);
        __syncthreads();
        float p[8][4], dp[8][4];
        UNROLL for (int j = 0; j < 8; j++) {
            UNROLL for (int c = 0; c < 4; c++) p[j][c] = dp[j][c] = 0.0f;
            UNROLL for (int i = 0; i < D / 16; i++) {
                u32 right[2];
                load_right(right, k + 8 * j * LD + 16 * i, LD);
                mma<E>(p[j], q[i], right);
                load_right(right, v + 8 * j * LD + 16 * i, LD);
                mma<E>(dp[j], go[i], right);
            }
        }
        UNROLL for (int r = 0; r < 2; r++) {
            if (dropout.on()) {
                float factors[8][2];
                mask_row(dropout, s.mask_row(dropout, b, h, query[r]), key / TILE, factors);
                UNROLL for (int j = 0; j < 8; j++) dp[j][2 * r] *= factors[j][0], dp[j][2 * r + 1] *= factors[j][1];
            }
            UNROLL for (int j = 0; j < 8; j++) {
                UNROLL for (int e = 0; e < 2; e++) {
                    u32 own = key + 8 * j + 2 * t + e;
                    // Not above 1, whatever the rounding of large scores.
                    float x = exp2f(fminf(p[j][2 * r + e] * scale - log_sum[r], 0.0f));
                    x = own <= query[r] && own >= from[r] ? x : 0.0f;
                    p[j][2 * r + e] = x * (dp[j][2 * r + e] - own_delta[r]) * s.scale;
                }
            }
        }
        add_rows<D, TILE / 16>(sums, p, k);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        if (query[r] < s.seq) {
            E* row = dqkv + s.at(b, h, 0, query[r]) + 2 * t;
            UNROLL for (int n = 0; n < D / 8; n++) put_two(row + 8 * n, sums[n][2 * r], sums[n][2 * r + 1]);
        }
    }
}

/// Queries of a tile when keys stay: fewer, because sums for keys and values take the registers.
const u32 FEW = 32;

// dk and dv. A block for 64 keys of one head of one sequence. Scores are turned around: a row for each key.
template <class E, int D>
__device__ void attention_mma_dkv(const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse,
                                  const float* delta, const E* dout, E* dqkv) {
    DYNAMIC_SHARED(E, shared);
    const u32 LD = Row<D>::LD;
    __shared__ float log_sums[FEW], deltas[FEW];
    __shared__ u32 froms[FEW];
    // Of each query, which of keys c, c + 16, c + 32 and c + 48 dropout keeps: random words come four at a time.
    __shared__ u8 kept[FEW][16];
    E* k = shared;           // [64][LD]
    E* v = k + TILE * LD;    // [64][LD]
    E* q = v + TILE * LD;    // [32][LD]
    E* go = q + FEW * LD;    // [32][LD], rows of dout
    Part part = s.part(TILE);
    u32 b = part.b, h = part.h, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 g = lane / 4, t = lane % 4, key = part.tile * TILE, keys = min(TILE, s.seq - key);
    u64 ld = 3 * u64(s.heads) * D;
    stage16<D>(qkv, s.at(b, h, 1, key), ld, TILE, keys, k);
    stage16<D>(qkv, s.at(b, h, 2, key), ld, TILE, keys, v);
    float dk[D / 8][4], dv[D / 8][4];
    UNROLL for (int n = 0; n < D / 8; n++) {
        UNROLL for (int c = 0; c < 4; c++) dk[n][c] = dv[n][c] = 0.0f;
    }
    const float scale = s.scale * LOG2E;
    for (u32 first = key; first < s.seq; first += FEW) {
        u32 count = min(FEW, s.seq - first);
        __syncthreads();
        stage16<D>(qkv, s.at(b, h, 0, first), ld, FEW, count, q);
        stage16<D>(dout, s.out(b, h, first), ld / 3, FEW, count, go);
        if (threadIdx.x < FEW) {
            u32 query = first + threadIdx.x;
            bool there = query < s.seq;
            u64 at = u64(part.pair) * s.seq + query;
            log_sums[threadIdx.x] = there ? lse[at] * LOG2E : 0.0f;
            deltas[threadIdx.x] = there ? delta[at] : 0.0f;
            froms[threadIdx.x] = !there ? 0xffffffffu : doc_start ? doc_start[b * s.seq + query] : 0;
        }
        if (dropout.on()) {
            for (u32 i = threadIdx.x; i < FEW * 16; i += blockDim.x) {
                Words words = dropout.stream.words(s.mask_row(dropout, b, h, first + i / 16), key / TILE, i % 16);
                u32 bits = 0;
                UNROLL for (u32 w = 0; w < 4; w++) bits |= u32(dropout.keeps(words.w[w])) << w;
                kept[i / 16][i % 16] = u8(bits);
            }
        }
        __syncthreads();
        float p[FEW / 8][4], dp[FEW / 8][4];
        UNROLL for (u32 j = 0; j < FEW / 8; j++) {
            UNROLL for (int c = 0; c < 4; c++) p[j][c] = dp[j][c] = 0.0f;
        }
        UNROLL for (int i = 0; i < D / 16; i++) {
            u32 left_k[4], left_v[4], right[2];
            load_left(left_k, k + 16 * warp * LD + 16 * i, LD);
            load_left(left_v, v + 16 * warp * LD + 16 * i, LD);
            UNROLL for (u32 j = 0; j < FEW / 8; j++) {
                load_right(right, q + 8 * j * LD + 16 * i, LD);
                mma<E>(p[j], left_k, right);
                load_right(right, go + 8 * j * LD + 16 * i, LD);
                mma<E>(dp[j], left_v, right);
            }
        }
        UNROLL for (u32 j = 0; j < FEW / 8; j++) {
            UNROLL for (int e = 0; e < 2; e++) {
                u32 column = 8 * j + 2 * t + e, query = first + column;
                UNROLL for (int r = 0; r < 2; r++) {
                    u32 own = key + 16 * warp + g + 8 * r;
                    bool sees = own <= query && own >= froms[column];
                    float x = sees ? exp2f(fminf(p[j][2 * r + e] * scale - log_sums[column], 0.0f)) : 0.0f, factor = 1.0f;
                    if (dropout.on() && sees) {
                        factor = kept[column][g + 8 * r] >> warp & 1 ? dropout.keep : 0.0f;
                    }
                    p[j][2 * r + e] = x * factor;
                    dp[j][2 * r + e] = x * (dp[j][2 * r + e] * factor - deltas[column]) * s.scale;
                }
            }
        }
        add_rows<D, FEW / 16>(dv, p, go);
        add_rows<D, FEW / 16>(dk, dp, q);
    }
    UNROLL for (int r = 0; r < 2; r++) {
        u32 own = key + 16 * warp + g + 8 * r;
        if (own < s.seq) {
            E* to_k = dqkv + s.at(b, h, 1, own) + 2 * t;
            E* to_v = dqkv + s.at(b, h, 2, own) + 2 * t;
            UNROLL for (int n = 0; n < D / 8; n++) {
                put_two(to_k + 8 * n, dk[n][2 * r], dk[n][2 * r + 1]);
                put_two(to_v + 8 * n, dv[n][2 * r], dv[n][2 * r + 1]);
            }
        }
    }
}

#define BACKWARD(kernel, E, D)                                                                                        \
    KERNEL(kernel##_##E##_##D, const E* qkv, const u32* doc_start, Heads s, Dropout dropout, const float* lse,        \
           const float* delta, const E* dout, E* dqkv) {                                                              \
        kernel<E, D>(qkv, doc_start, s, dropout, lse, delta, dout, dqkv);                                             \
    }
BACKWARD(attention_mma_dq, bf16, 64)
BACKWARD(attention_mma_dq, bf16, 80)
BACKWARD(attention_mma_dq, bf16, 128)
BACKWARD(attention_mma_dq, f16, 64)
BACKWARD(attention_mma_dq, f16, 80)
BACKWARD(attention_mma_dq, f16, 128)
BACKWARD(attention_mma_dkv, bf16, 64)
BACKWARD(attention_mma_dkv, bf16, 80)
BACKWARD(attention_mma_dkv, bf16, 128)
BACKWARD(attention_mma_dkv, f16, 64)
BACKWARD(attention_mma_dkv, f16, 80)
BACKWARD(attention_mma_dkv, f16, 128)
