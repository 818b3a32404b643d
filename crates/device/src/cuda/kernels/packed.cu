// Products with weight matrices that are only read, for decoding: a warp for each output column, which reads a row of the
// matrix once and meets up to R rows of activations with it. Lane l takes every 32nd chunk of k, and the lanes' sums are
// added as a tree, so an element of the product has the same bits whatever the number of rows.
//
// Matrices are [n, k], row after row: f32, bf16, or codes and then the groups' numbers (see packed.rs). Activations that
// meet codes are rounded to 8 bits, a group at a time, as on the processor:
// sum over k of x w = sum over groups of sx (sw sum(qx qw) + mw sum(qx)).
#include "common.cuh"

const u32 GROUP = 64, WARPS = 4;

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

/// What happens to an element of the product on its way.
template <class O> struct Finish {
    const float* bias;
    const float* residual;
    O* y;
    u32 relu;

    __device__ __forceinline__ void put(u32 row, u32 column, u32 n, float value) const {
        if (bias) value += bias[column];
        if (relu) value = fmaxf(value, 0.0f);
        u64 at = u64(row) * n + column;
        if (residual) value = residual[at] + value;
        y[at] = Of<O>::f32(value);
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
            if (first + r >= m) break;
            load4(x + u64(first + r) * k + c, k - c, b);
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
    PACKED(packed_##w_name##_f32_bf16_8, W, float, bf16, 8)   \
    PACKED(packed_##w_name##_bf16_f32_1, W, bf16, float, 1)   \
    PACKED(packed_##w_name##_bf16_f32_8, W, bf16, float, 8)   \
    PACKED(packed_##w_name##_bf16_bf16_1, W, bf16, bf16, 1)   \
    PACKED(packed_##w_name##_bf16_bf16_8, W, bf16, bf16, 8)
PACKED_FLOAT(f32, float)
PACKED_FLOAT(bf16, bf16)

/// Rows of activations in 8 bits: codes [m, groups, GROUP], and of each group its scale, and its scale times the sum of
/// its codes.
struct Rounded {
    const i8* codes;
    const float* scales;
    const float* zeros;
};

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

__device__ __forceinline__ int dot16(uint4 a, uint4 b) {
    return __dp4a(int(a.x), int(b.x), __dp4a(int(a.y), int(b.y), __dp4a(int(a.z), int(b.z), __dp4a(int(a.w), int(b.w), 0))));
}

// Eight bits: a code stands for scale * (code - 128). A chunk is 16 codes, a quarter of a group.
template <class O, int R>
__device__ void packed_int8(const u8* codes, const bf16* scales, Rounded x, u32 m, u32 n, u32 groups, Finish<O> finish) {
    u32 lane = threadIdx.x % 32, column = blockIdx.x * WARPS + threadIdx.x / 32, first = blockIdx.y * R;
    if (column >= n) return;
    const uint4* row = reinterpret_cast<const uint4*>(codes + u64(column) * groups * GROUP);
    const uint4* others = reinterpret_cast<const uint4*>(x.codes);
    float sums[R];
    for (int r = 0; r < R; r++) sums[r] = 0.0f;
    for (u32 chunk = lane; chunk < 4 * groups; chunk += 32) {
        uint4 w = row[chunk];
        w.x ^= 0x80808080u, w.y ^= 0x80808080u, w.z ^= 0x80808080u, w.w ^= 0x80808080u;
        float scale = to_f32(scales[u64(column) * groups + chunk / 4]);
        for (int r = 0; r < R; r++) {
            if (first + r >= m) break;
            u64 at = u64(first + r) * groups;
            sums[r] = fmaf(float(dot16(w, others[4 * at + chunk])), scale * x.scales[at + chunk / 4], sums[r]);
        }
    }
    finish_rows<R>(sums, first, m, column, n, finish);
}

// Four and three bits: a code stands for scale * code + minimum. A chunk is a unit of 32 codes, half of a group, whose words lie
// as places.rs says: its steps, four codes in the bytes of a word, are put into a and b, and one code can be had by itself.
struct FourBits {
    static const u32 BYTES = 16;
    static __device__ __forceinline__ void unpack(const u8* unit, uint4& a, uint4& b) {
        uint4 w = *reinterpret_cast<const uint4*>(unit);
        const u32 LOW = 0x0f0f0f0fu;
        a = make_uint4(w.x & LOW, w.x >> 4 & LOW, w.y & LOW, w.y >> 4 & LOW);
        b = make_uint4(w.z & LOW, w.z >> 4 & LOW, w.w & LOW, w.w >> 4 & LOW);
    }
    static __device__ __forceinline__ u32 code(const u8* unit, u32 step, u32 byte) {
        return unit[step / 2 * 4 + byte] >> step % 2 * 4 & 15;
    }
};
struct ThreeBits {
    static const u32 BYTES = 12;
    static __device__ __forceinline__ void unpack(const u8* unit, uint4& a, uint4& b) {
        const u32* w = reinterpret_cast<const u32*>(unit);
        u32 x = w[0], y = w[1], z = w[2];
        const u32 LOW = 0x07070707u, TWO = 0x03030303u, ONE = 0x04040404u;
        a = make_uint4(x & LOW, x >> 3 & LOW, y & LOW, y >> 3 & LOW);
        b = make_uint4(z & LOW, z >> 3 & LOW, (x >> 6 & TWO) | (y >> 4 & ONE), (z >> 6 & TWO) | (y >> 5 & ONE));
    }
    static __device__ __forceinline__ u32 code(const u8* unit, u32 step, u32 byte) {
        if (step < 6) return unit[step / 2 * 4 + byte] >> step % 2 * 3 & 7;
        u32 lower = unit[(step - 6) * 8 + byte] >> 6, highest = unit[4 + byte] >> (step - 2) & 4;
        return lower | highest;
    }
};

template <class Bits, class O, int R>
__device__ void packed_units(const u8* codes, const bf16* scales, const bf16* minima, Rounded x, u32 m, u32 n, u32 groups,
                             Finish<O> finish) {
    u32 lane = threadIdx.x % 32, column = blockIdx.x * WARPS + threadIdx.x / 32, first = blockIdx.y * R;
    if (column >= n) return;
    const u8* row = codes + u64(column) * groups * (2 * Bits::BYTES);
    const uint4* others = reinterpret_cast<const uint4*>(x.codes);
    float sums[R];
    for (int r = 0; r < R; r++) sums[r] = 0.0f;
    for (u32 chunk = lane; chunk < 2 * groups; chunk += 32) {
        uint4 a, b;
        Bits::unpack(row + chunk * Bits::BYTES, a, b);
        u64 group = u64(column) * groups + chunk / 2;
        float scale = to_f32(scales[group]), minimum = chunk % 2 == 0 ? to_f32(minima[group]) : 0.0f;
        for (int r = 0; r < R; r++) {
            if (first + r >= m) break;
            u64 at = u64(first + r) * groups;
            int sum = dot16(a, others[4 * at + 2 * chunk]) + dot16(b, others[4 * at + 2 * chunk + 1]);
            sums[r] = fmaf(minimum, x.zeros[at + chunk / 2], sums[r]);
            sums[r] = fmaf(float(sum), scale * x.scales[at + chunk / 2], sums[r]);
        }
    }
    finish_rows<R>(sums, first, m, column, n, finish);
}

#define PACKED_CODES(o_name, O, R)                                                                                      \
    KERNEL(packed_int8_##o_name##_##R, const u8* codes, const bf16* scales, const bf16*, Rounded x, u32 m, u32 n,       \
           u32 groups, Finish<O> finish) {                                                                              \
        packed_int8<O, R>(codes, scales, x, m, n, groups, finish);                                                      \
    }                                                                                                                   \
    KERNEL(packed_int4_##o_name##_##R, const u8* codes, const bf16* scales, const bf16* minima, Rounded x, u32 m, u32 n, \
           u32 groups, Finish<O> finish) {                                                                              \
        packed_units<FourBits, O, R>(codes, scales, minima, x, m, n, groups, finish);                                   \
    }                                                                                                                   \
    KERNEL(packed_int3_##o_name##_##R, const u8* codes, const bf16* scales, const bf16* minima, Rounded x, u32 m, u32 n, \
           u32 groups, Finish<O> finish) {                                                                              \
        packed_units<ThreeBits, O, R>(codes, scales, minima, x, m, n, groups, finish);                                  \
    }
PACKED_CODES(f32, float, 1)
PACKED_CODES(f32, float, 8)
PACKED_CODES(bf16, bf16, 1)
PACKED_CODES(bf16, bf16, 8)

// Rows of a packed matrix as f32, plus rows of a second table; a block for each.

/// A row's elements, by format.
struct RowF32 {
    const float* w;
    __device__ __forceinline__ float at(u64 row, u32 k, u32 c) const { return w[row * k + c]; }
};
struct RowBf16 {
    const bf16* w;
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
        u32 code = Bits::code(codes + (2 * row * groups + c / 32) * Bits::BYTES, c % 32 / 4, c % 4);
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
PACKED_EMBED(packed_embed_bf16, RowBf16{reinterpret_cast<const bf16*>(codes)})
PACKED_EMBED(packed_embed_int8, RowInt8{codes, scales})
PACKED_EMBED(packed_embed_int4, RowUnits<FourBits>{codes, scales, minima})
PACKED_EMBED(packed_embed_int3, RowUnits<ThreeBits>{codes, scales, minima})
