// What of packed matrices is not for tensor cores: products of f32, rounding of activations, rows for embeddings, and random
// matrices.
//
// Products: a warp for each output column, which reads a row of the matrix once and meets up to R rows of activations with it.
// Lane l takes every 32nd chunk of k, and the lanes' sums are added as a tree, so an element of the product has the same bits
// whatever the number of rows.
#include "packed.cuh"

const u32 WARPS = 4;

/// Sums of R numbers over the lanes of a warp. Lane 32/R * r gets that of number r.
template <int R> struct Reduce;
template <> struct Reduce<1> {
    static __device__ __forceinline__ float sum(const float* x) { return over_warp<Sum>(x[0]); }
};
template <> struct Reduce<8> {
    static __device__ __forceinline__ float sum(const float* x) {
        u32 lane = threadIdx.x % 32;
        float four[4], two[2];
        // Each lane keeps half of the numbers and gives away its part of the others.
        bool high = (lane & 16) != 0;
        for (int i = 0; i < 4; i++) {
            four[i] = (high ? x[i + 4] : x[i]) + __shfl_xor_sync(ALL_LANES, high ? x[i] : x[i + 4], 16);
        }
        high = (lane & 8) != 0;
        for (int i = 0; i < 2; i++) {
            two[i] = (high ? four[i + 2] : four[i]) + __shfl_xor_sync(ALL_LANES, high ? four[i] : four[i + 2], 8);
        }
        high = (lane & 4) != 0;
        float one = (high ? two[1] : two[0]) + __shfl_xor_sync(ALL_LANES, high ? two[0] : two[1], 4);
        one += __shfl_xor_sync(ALL_LANES, one, 2);
        return one + __shfl_xor_sync(ALL_LANES, one, 1);
    }
};

/// Writes the sums of a warp's lanes: of its column, and rows `first` and the R - 1 after it.
template <int R, class O>
__device__ __forceinline__ void finish_rows(const float* sums, u32 first, u32 m, u32 column, u32 n, Finish<O> finish) {
    float sum = Reduce<R>::sum(sums);
    u32 lane = threadIdx.x % 32, row = first + lane / (32 / R);
    if (lane % (32 / R) == 0 && row < m) finish.put(row, column, n, sum);
}

// Grid (columns / WARPS, rows / R).
template <class W, class E, class O, int R>
__device__ void packed(const W* w, const E* x, u32 m, u32 n, u32 k, Finish<O> finish) {
    u32 lane = threadIdx.x % 32, column = blockIdx.x * WARPS + threadIdx.x / 32, first = blockIdx.y * R;
    if (column >= n) return;
    const W* row = w + u64(column) * k;
    float sums[R];
    for (int r = 0; r < R; r++) sums[r] = 0.0f;
    for (u32 c = 4 * lane; c < k; c += 128) {
        float a[4], b[4];
        load4(row + c, k - c, a);
        for (int r = 0; r < R; r++) {
            load4(x + u64(min(first + r, m - 1)) * k + c, k - c, b);
            for (int j = 0; j < 4; j++) sums[r] = fmaf(a[j], b[j], sums[r]);
        }
    }
    finish_rows<R>(sums, first, m, column, n, finish);
}

#define PACKED(name, W, E, O, R) \
    KERNEL(name, const W* w, const E* x, u32 m, u32 n, u32 k, Finish<O> finish) { packed<W, E, O, R>(w, x, m, n, k, finish); }
#define PACKED_FLOAT(w_name, W)                              \
    PACKED(packed_##w_name##_f32_f32_1, W, float, float, 1)   \
    PACKED(packed_##w_name##_f32_f32_8, W, float, float, 8)   \
    PACKED(packed_##w_name##_f32_bf16_1, W, float, bf16, 1)   \
    PACKED(packed_##w_name##_f32_bf16_8, W, float, bf16, 8)
#define PACKED_HALVES(w_name, W)                             \
    PACKED(packed_##w_name##_bf16_f32_1, W, bf16, float, 1)   \
    PACKED(packed_##w_name##_bf16_f32_8, W, bf16, float, 8)   \
    PACKED(packed_##w_name##_bf16_bf16_1, W, bf16, bf16, 1)   \
    PACKED(packed_##w_name##_bf16_bf16_8, W, bf16, bf16, 8)
PACKED_FLOAT(f32, float)
PACKED_FLOAT(f16, f16)
PACKED_FLOAT(bf16, bf16)
PACKED_HALVES(f32, float)
PACKED_HALVES(f16, f16)

// A warp for each group of each row.
template <class E> __device__ void round_rows(const E* x, u32 m, u32 k, i8* codes, float* scales, float* zeros) {
    u32 groups = (k + GROUP - 1) / GROUP, lane = threadIdx.x % 32;
    u64 index = (u64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    if (index >= u64(m) * groups) return;
    u64 row = index / groups;
    u32 first = u32(index % groups) * GROUP;
    float v[2];
    for (u32 j = 0; j < 2; j++) {
        u32 c = first + 2 * lane + j;
        v[j] = c < k ? to_f32(x[row * k + c]) : 0.0f;
    }
    float scale = over_warp<Largest>(fmaxf(fabsf(v[0]), fabsf(v[1]))) / 127.0f;
    float inverse = scale > 0.0f ? 1.0f / scale : 0.0f, sum = 0.0f;
    for (u32 j = 0; j < 2; j++) {
        // The nearest integer, ties to even, in the lowest bits.
        i8 code = i8(__float_as_uint(v[j] * inverse + 12582912.0f) & 0xffu);
        codes[index * GROUP + 2 * lane + j] = code;
        sum += float(code);
    }
    sum = over_warp<Sum>(sum);
    if (lane == 0) scales[index] = scale, zeros[index] = scale * sum;
}

KERNEL(round_rows_f32, const float* x, u32 m, u32 k, i8* codes, float* scales, float* zeros) {
    round_rows(x, m, k, codes, scales, zeros);
}
KERNEL(round_rows_bf16, const bf16* x, u32 m, u32 k, i8* codes, float* scales, float* zeros) {
    round_rows(x, m, k, codes, scales, zeros);
}

// Rows of a packed matrix as f32, plus rows of a second table; a block for each.

/// A row's elements, by format.
struct RowF32 {
    const float* w;
    __device__ __forceinline__ float at(u64 row, u32 k, u32 c) const { return w[row * k + c]; }
};
template <class W> struct RowHalves {
    const W* w;
    __device__ __forceinline__ float at(u64 row, u32 k, u32 c) const { return to_f32(w[row * k + c]); }
};
struct RowInt8 {
    const u8* codes;
    const bf16* scales;
    __device__ __forceinline__ float at(u64 row, u32 k, u32 c) const {
        u64 groups = (k + GROUP - 1) / GROUP;
        return to_f32(scales[row * groups + c / GROUP]) * (float(codes[row * groups * GROUP + c]) - 128.0f);
    }
};
template <class Bits> struct RowUnits {
    const u8* codes;
    const bf16* scales;
    const bf16* minima;
    __device__ __forceinline__ float at(u64 row, u32 k, u32 c) const {
        u64 groups = (k + GROUP - 1) / GROUP, group = row * groups + c / GROUP;
        u32 code = Bits::code(codes + (2 * row * groups + c / 32) * Bits::UNIT_BYTES, c % 32 / 4, c % 4);
        return to_f32(scales[group]) * float(code) + to_f32(minima[group]);
    }
};

template <class M>
__device__ void packed_embed(M matrix, const u32* ids, const u32* ids2, const float* table2, float* out, u32 k) {
    u64 row = blockIdx.x, id = ids[row];
    for (u32 c = threadIdx.x; c < k; c += blockDim.x) {
        float x = matrix.at(id, k, c);
        out[row * k + c] = ids2 ? x + table2[u64(ids2[row]) * k + c] : x;
    }
}

#define PACKED_EMBED(name, ...)                                                                                        \
    KERNEL(name, const u8* codes, const bf16* scales, const bf16* minima, const u32* ids, const u32* ids2,             \
           const float* table2, float* out, u32 k) {                                                                   \
        packed_embed(__VA_ARGS__, ids, ids2, table2, out, k);                                                          \
    }
PACKED_EMBED(packed_embed_f32, RowF32{reinterpret_cast<const float*>(codes)})
PACKED_EMBED(packed_embed_f16, RowHalves<f16>{reinterpret_cast<const f16*>(codes)})
PACKED_EMBED(packed_embed_bf16, RowHalves<bf16>{reinterpret_cast<const bf16*>(codes)})
PACKED_EMBED(packed_embed_int8, RowInt8{codes, scales})
PACKED_EMBED(packed_embed_int4, RowUnits<FourBits>{codes, scales, minima})
PACKED_EMBED(packed_embed_int3, RowUnits<ThreeBits>{codes, scales, minima})

// Random matrices; random_weights.rs says what a word stands for. The columns that one step of the generator has words of are 16 apart.

/// A thread for each byte of a word, in each group: of every step's four columns one.
template <class Bits> __device__ void random_codes(u8* codes, u64 rows, u32 k, Stream stream) {
    u64 groups = (k + GROUP - 1) / GROUP;
    for (u64 i = first_index(); i < 4 * rows * groups; i += grid_size()) {
        u64 group = i / 4;
        u32 byte = u32(i % 4), first = u32(group % groups) * GROUP, of_steps[16];
        UNROLL
        for (u32 step = 0; step < 4; step++) {
            u32 lane = 4 * step + byte;
            Words words = stream.words(group / groups, first / 64, lane);
            UNROLL
            for (u32 w = 0; w < 4; w++) {
                of_steps[4 * w + step] = first + 16 * w + lane < k ? words.w[w] >> (32 - Bits::BITS) : 0;
            }
        }
        u8* to = codes + group * Bits::GROUP_BYTES + byte;
        Bits::put(to, of_steps);
        Bits::put(to + Bits::UNIT_BYTES, of_steps + 8);
    }
}

KERNEL(random_int8, u8* codes, u64 rows, u32 k, Stream stream) { random_codes<EightBits>(codes, rows, k, stream); }
KERNEL(random_int4, u8* codes, u64 rows, u32 k, Stream stream) { random_codes<FourBits>(codes, rows, k, stream); }
KERNEL(random_int3, u8* codes, u64 rows, u32 k, Stream stream) { random_codes<ThreeBits>(codes, rows, k, stream); }

/// A thread for each step of the generator.
template <class W> __device__ void random_numbers(W* out, u64 rows, u32 k, Stream stream, float scale) {
    u64 lanes = 16 * u64((k + 63) / 64);
    for (u64 i = first_index(); i < rows * lanes; i += grid_size()) {
        u64 row = i / lanes;
        u32 block = u32(i % lanes / 16), lane = u32(i % 16);
        Words words = stream.words(row, block, lane);
        UNROLL
        for (u32 w = 0; w < 4; w++) {
            u32 column = 64 * block + 16 * w + lane;
            if (column < k) out[row * k + column] = Of<W>::f32(float(int(words.w[w])) * scale);
        }
    }
}

KERNEL(random_f32, float* out, u64 rows, u32 k, Stream stream, float scale) { random_numbers(out, rows, k, stream, scale); }
KERNEL(random_f16, f16* out, u64 rows, u32 k, Stream stream, float scale) { random_numbers(out, rows, k, stream, scale); }
KERNEL(random_bf16, bf16* out, u64 rows, u32 k, Stream stream, float scale) { random_numbers(out, rows, k, stream, scale); }
