// Products with packed matrices on tensor cores: bf16, and codes of few bits in whole numbers.
//
// An element of a product is summed in one order that k alone decides, so that a row has the same bits whatever the number of
// rows: k is cut into PARTS, each part's steps are summed in order, and then the parts. Within a step four neighbouring lanes
// read a row's numbers, 16 bytes each, and keep them: a product of tensor cores does not care which numbers of k are at its
// first place, if they are the same of both factors.
//
// Rows of the matrix are the left factor, 16 at a time; rows of activations are the right one, 8 at a time. Element e of a
// thread's sums is of column g + 8 (e / 2) and row 2t + e % 2, (g, t) being (lane / 4, lane % 4).
#include "mma.cuh"
#include "packed.cuh"

const u32 PARTS = 8, COLUMNS = 16, ROWS = 8;

/// The first step of a part.
__device__ __forceinline__ u32 first_of(u32 part, u32 steps) { return u32(u64(steps) * part / PARTS); }

/// Eight numbers of a row of k from `at` on. Where `whole`, all rows begin at multiples of 16 bytes.
__device__ __forceinline__ uint4 load_eight(const bf16* row, u32 at, u32 k, bool whole) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (whole) {
        if (at < k) v = *reinterpret_cast<const uint4*>(row + at);
    } else {
        u32* words[4] = {&v.x, &v.y, &v.z, &v.w};
        UNROLL for (u32 i = 0; i < 8; i++) {
            if (at + i < k) *words[i / 2] |= u32(row[at + i].bits) << 16 * (i % 2);
        }
    }
    return v;
}

__device__ __forceinline__ void clear(float* sums) { sums[0] = sums[1] = sums[2] = sums[3] = 0.0f; }

__device__ __forceinline__ void multiply(float* sums, const u32* left, const u32* right) { mma<bf16>(sums, left, right); }
__device__ __forceinline__ void multiply(int* sums, const u32* left, const u32* right) { mma_codes(sums, left, right); }

/// sums += 16 columns times 8 rows over a step of k, of bf16 or in whole numbers of codes; of each thread its numbers of columns
/// g and g + 8, and of row g.
template <class Sum> __device__ __forceinline__ void multiply_step(Sum* sums, const uint4* w, uint4 x) {
    u32 low[4] = {w[0].x, w[1].x, w[0].y, w[1].y}, high[4] = {w[0].z, w[1].z, w[0].w, w[1].w};
    u32 x_low[2] = {x.x, x.y}, x_high[2] = {x.z, x.w};
    multiply(sums, low, x_low);
    multiply(sums, high, x_high);
}

// ---- some rows: a block for 16 columns and R times 8 rows, a part of k for each warp

/// Weights and activations of bf16. A step is 32 numbers.
struct Halves {
    static const u32 STEP = 32;
    const bf16* w;
    const bf16* x;
    u32 k;

    typedef uint4 Weights[2];
    __device__ __forceinline__ u32 steps() const { return (k + STEP - 1) / STEP; }
    __device__ __forceinline__ void load(u32 step, const u32* columns, Weights& to) const {
        u32 at = STEP * step + threadIdx.x % 4 * 8;
        for (int i = 0; i < 2; i++) to[i] = load_eight(w + u64(columns[i]) * k, at, k, k % 8 == 0);
    }
    template <int R>
    __device__ __forceinline__ void add(u32 step, u32 first, u32 m, const Weights& weights, float (*sums)[4]) const {
        u32 at = STEP * step + threadIdx.x % 4 * 8, g = threadIdx.x % 32 / 4;
        UNROLL for (int r = 0; r < R; r++) {
            u32 row = min(first + ROWS * r + g, m - 1);
            multiply_step(sums[r], weights, load_eight(x + u64(row) * k, at, k, k % 8 == 0));
        }
    }
};

/// Codes with a scale, and below 8 bits a minimum, for each group, which is a step.
template <class Bits> struct Codes {
    const u8* codes;
    const bf16* scales;
    const bf16* minima;
    Rounded x;
    u32 groups;

    struct Weights {
        uint4 codes[2];
        float scale[2], minimum[2];
    };
    __device__ __forceinline__ u32 steps() const { return groups; }
    __device__ __forceinline__ void load(u32 step, const u32* columns, Weights& to) const {
        for (int i = 0; i < 2; i++) {
            u64 group = u64(columns[i]) * groups + step;
            to.codes[i] = Bits::load(codes + group * Bits::GROUP_BYTES);
            to.scale[i] = to_f32(scales[group]);
            if (Bits::MINIMA) to.minimum[i] = to_f32(minima[group]);
        }
    }
    template <int R>
    __device__ __forceinline__ void add(u32 step, u32 first, u32 m, const Weights& weights, float (*sums)[4]) const {
        u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        UNROLL for (int r = 0; r < R; r++) {
            u32 base = first + ROWS * r;
            u64 own = u64(min(base + g, m - 1)) * groups + step;
            int whole[4] = {0, 0, 0, 0};
            multiply_step(whole, weights.codes, reinterpret_cast<const uint4*>(x.codes + own * GROUP)[t]);
            for (int e = 0; e < 4; e++) {
                u64 row = u64(min(base + 2 * t + e % 2, m - 1)) * groups + step;
                if (Bits::MINIMA) sums[r][e] = fmaf(weights.minimum[e / 2], x.zeros[row], sums[r][e]);
                sums[r][e] = fmaf(float(whole[e]), weights.scale[e / 2] * x.scales[row], sums[r][e]);
            }
        }
    }
};

template <int R, class Factors, class O>
__device__ void some_rows(Factors factors, u32 m, u32 n, Finish<O> finish) {
    // Steps whose weights are on their way at once.
    const u32 AHEAD = 4;
    __shared__ float all[PARTS][R * 4 * 32];
    u32 lane = threadIdx.x % 32, part = threadIdx.x / 32, column = blockIdx.x * COLUMNS, first = blockIdx.y * R * ROWS;
    u32 columns[2] = {min(column + lane / 4, n - 1), min(column + lane / 4 + 8, n - 1)};
    float sums[R][4];
    UNROLL for (int r = 0; r < R; r++) clear(sums[r]);
    u32 end = first_of(part + 1, factors.steps());
    for (u32 step = first_of(part, factors.steps()); step < end; step += AHEAD) {
        typename Factors::Weights weights[AHEAD];
        UNROLL for (u32 i = 0; i < AHEAD; i++) {
            if (step + i < end) factors.load(step + i, columns, weights[i]);
        }
        UNROLL for (u32 i = 0; i < AHEAD; i++) {
            if (step + i < end) factors.template add<R>(step + i, first, m, weights[i], sums);
        }
    }
    UNROLL for (int r = 0; r < R; r++) {
        for (int e = 0; e < 4; e++) all[part][(4 * r + e) * 32 + lane] = sums[r][e];
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < R * ROWS * COLUMNS; i += blockDim.x) {
        u32 c = i % COLUMNS, row = i / COLUMNS;
        u32 e = c / 8 * 2 + row % 2, at = (4 * (row / ROWS) + e) * 32 + c % 8 * 4 + row % ROWS / 2;
        float total = 0.0f;
        for (u32 p = 0; p < PARTS; p++) total += all[p][at];
        if (column + c < n && first + row < m) finish.put(first + row, column + c, n, total);
    }
}

#define SOME_CODES(bits, Bits, o_name, O, R)                                                                                    \
    KERNEL(packed_##bits##_##o_name##_##R, const u8* codes, const bf16* scales, const bf16* minima, Rounded x, u32 m, u32 n,    \
           u32 groups, Finish<O> finish) {                                                                                      \
        some_rows<R>(Codes<Bits>{codes, scales, minima, x, groups}, m, n, finish);                                              \
    }
#define SOME_ROWS(o_name, O, R)                                                                                                 \
    KERNEL(packed_bf16_bf16_##o_name##_##R, const bf16* w, const bf16* x, u32 m, u32 n, u32 k, Finish<O> finish) {              \
        some_rows<R>(Halves{w, x, k}, m, n, finish);                                                                            \
    }                                                                                                                           \
    SOME_CODES(int8, EightBits, o_name, O, R)                                                                                   \
    SOME_CODES(int4, FourBits, o_name, O, R)                                                                                    \
    SOME_CODES(int3, ThreeBits, o_name, O, R)
SOME_ROWS(f32, float, 1)
SOME_ROWS(f32, float, 4)
SOME_ROWS(bf16, bf16, 1)
SOME_ROWS(bf16, bf16, 4)

// ---- many rows of bf16: a block for 128 columns and as many rows, whose numbers pass through shared memory

const u32 SIDE = 128, STAGES = 3;

/// Begins to bring a step of 128 rows, from `first` on, to shared memory.
__device__ __forceinline__ void stage_step(const bf16* rows, u32 first, u32 count, u32 step, u32 k, bf16* to) {
    for (u32 i = threadIdx.x; i < SIDE * 4; i += blockDim.x) {
        const bf16* row = rows + u64(min(first + i / 4, count - 1)) * k;
        u32 at = Halves::STEP * step + i % 4 * 8;
        if (k % 8 == 0 && at < k) {
            copy_16(to + 8 * i, row + at);
        } else {
            *reinterpret_cast<uint4*>(to + 8 * i) = load_eight(row, at, k, k % 8 == 0);
        }
    }
}

/// The part of row `row` that a thread of this lane multiplies.
__device__ __forceinline__ uint4 staged(const bf16* rows, u32 row) {
    return *reinterpret_cast<const uint4*>(rows + Halves::STEP * row + threadIdx.x % 4 * 8);
}

// Two warps beside each other have 64 columns each, four below each other 32 rows each.
template <class O>
__device__ void many_rows(const bf16* w, const bf16* x, u32 m, u32 n, u32 k, Finish<O> finish) {
    __shared__ uint4 memory[STAGES][2][SIDE * 4];
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
    u32 own_column = warp % 2 * 64, own_row = warp / 2 * 32, column = blockIdx.x * SIDE, first = blockIdx.y * SIDE;
    u32 steps = Halves{w, x, k}.steps();
    auto stage = [&](u32 step) {
        if (step < steps) {
            bf16* to = reinterpret_cast<bf16*>(memory[step % STAGES][0]);
            stage_step(w, column, n, step, k, to);
            stage_step(x, first, m, step, k, to + SIDE * Halves::STEP);
        }
        copies_end();
    };
    float totals[16][4], sums[16][4];
    UNROLL for (int i = 0; i < 16; i++) clear(totals[i]);
    for (u32 step = 0; step + 1 < STAGES; step++) stage(step);
    for (u32 part = 0; part < PARTS; part++) {
        UNROLL for (int i = 0; i < 16; i++) clear(sums[i]);
        for (u32 step = first_of(part, steps); step < first_of(part + 1, steps); step++) {
            // All but the newest are there; and what is overwritten next, all have read.
            wait_for_copies<STAGES - 2>();
            __syncthreads();
            stage(step + STAGES - 1);
            const bf16* from = reinterpret_cast<const bf16*>(memory[step % STAGES][0]);
            uint4 right[4];
            UNROLL for (int j = 0; j < 4; j++) right[j] = staged(from + SIDE * Halves::STEP, own_row + ROWS * j + g);
            UNROLL for (int i = 0; i < 4; i++) {
                uint4 left[2] = {staged(from, own_column + COLUMNS * i + g), staged(from, own_column + COLUMNS * i + g + 8)};
                UNROLL for (int j = 0; j < 4; j++) multiply_step(sums[4 * i + j], left, right[j]);
            }
        }
        UNROLL for (int i = 0; i < 16; i++) {
            UNROLL for (int e = 0; e < 4; e++) totals[i][e] += sums[i][e];
        }
    }
    UNROLL for (int i = 0; i < 4; i++) {
        UNROLL for (int j = 0; j < 4; j++) {
            UNROLL for (u32 e = 0; e < 4; e++) {
                u32 c = column + own_column + COLUMNS * i + g + e / 2 * 8, row = first + own_row + ROWS * j + 2 * t + e % 2;
                if (c < n && row < m) finish.put(row, c, n, totals[4 * i + j][e]);
            }
        }
    }
}

#define MANY_ROWS(o_name, O)                                                                                            \
    KERNEL_OF(256, packed_bf16_bf16_##o_name##_many, const bf16* w, const bf16* x, u32 m, u32 n, u32 k, Finish<O> finish) { \
        many_rows(w, x, m, n, k, finish);                                                                               \
    }
MANY_ROWS(f32, float)
MANY_ROWS(bf16, bf16)
