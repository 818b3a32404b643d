// Choosing a token of a row of logits at random: what draw.rs does, to the bit. A block for each token to choose.
#include "common.cuh"

// How a token is chosen.
struct Draw {
    Stream blocks, tokens;
    u64 place;
    u32 row, without, top_k;
    float scale, top_p, min_p;
};

struct Total {
    static __device__ __forceinline__ u64 start() { return 0; }
    static __device__ __forceinline__ u64 join(u64 a, u64 b) { return a + b; }
};
struct Least {
    static __device__ __forceinline__ u64 start() { return ~u64(0); }
    static __device__ __forceinline__ u64 join(u64 a, u64 b) { return min(a, b); }
};

// As in draw.rs.
__device__ __forceinline__ float exp_up_to_0(float x) {
    const float ROUND = 12582912.0f;
    float shifted = x * 1.44269504f + ROUND, whole = shifted - ROUND;
    float rest = (x - whole * 0.6933594f) + whole * 2.1219444e-4f;
    float power = 1.0f / 5040.0f;
    power = power * rest + 1.0f / 720.0f;
    power = power * rest + 1.0f / 120.0f;
    power = power * rest + 1.0f / 24.0f;
    power = power * rest + 1.0f / 6.0f;
    power = power * rest + 0.5f;
    power = power * rest + 1.0f;
    power = power * rest + 1.0f;
    float result = power * __uint_as_float((__float_as_uint(shifted) << 23) + (127u << 23));
    return x > -87.0f ? result : 0.0f;
}

// ---- noise, as in draw/race.rs

__device__ __forceinline__ float log_of_ratio(float s) {
    float square = s * s, sum = 1.0f / 11.0f;
    sum = sum * square + 1.0f / 9.0f;
    sum = sum * square + 1.0f / 7.0f;
    sum = sum * square + 1.0f / 5.0f;
    sum = sum * square + 1.0f / 3.0f;
    sum = sum * square + 1.0f;
    return 2.0f * s * sum;
}

__device__ __forceinline__ float minus_log_of_rest(float u) {
    if (u < 0.25f) return log_of_ratio(u / (2.0f - u));
    int bits = int(__float_as_uint(1.0f - u)), exponent = (bits - 0x3f3504f3) >> 23;
    float number = __uint_as_float(u32(bits) - (u32(exponent) << 23));
    return float(exponent) * -0.69314718f + log_of_ratio((1.0f - number) / (1.0f + number));
}

__device__ __forceinline__ float exponential(u32 word, float unit) {
    float u = (float(word) + 0.5f) * unit;
    return minus_log_of_rest(u < 1.0f - 1.1920929e-7f ? u : 1.0f - 1.1920929e-7f);
}

// The random number of a token.
__device__ __forceinline__ float noise(const Draw& draw, u32 id) {
    const u32 BLOCK = 64;
    u32 word = draw.blocks.word(draw.place, id / BLOCK);
    float least = exponential(word / BLOCK, 1.0f / 67108864.0f) / float(BLOCK);
    if (id % BLOCK == word % BLOCK) return least;
    return least + exponential(draw.tokens.word(draw.place, id), 1.0f / 4294967296.0f);
}

// ---- which tokens are kept

// Weights by their bits, which are ordered as they are.
struct Weights {
    const float* all;
    u32 count;
    u64* shared;

    // What all whose bits are at least `least` measure.
    template <class Measure> __device__ u64 from(u32 least) const {
        u64 sum = 0;
        for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
            if (__float_as_uint(all[i]) >= least) sum += Measure::of(all[i]);
        }
        return over_block<Total>(sum, shared);
    }
    // How many ids up to `last` have these bits.
    __device__ u64 equal(u32 bits, u32 last) const {
        u64 sum = 0;
        for (u32 i = threadIdx.x; i < count && i <= last; i += blockDim.x) sum += __float_as_uint(all[i]) == bits;
        return over_block<Total>(sum, shared);
    }
};

struct Count {
    static __device__ __forceinline__ u64 of(float) { return 1; }
};
struct Mass {
    static __device__ __forceinline__ u64 of(float weight) { return u64(weight * 1099511627776.0f); }
};

// The last token that is kept, likeliest first and equal ones by id.
struct Last {
    u32 bits, id;
    __device__ __forceinline__ bool keeps(float weight, u32 i) const {
        u32 own = __float_as_uint(weight);
        return own > bits || (own == bits && i <= id);
    }
};

// The first token, likeliest first, up to which all measure `needed` together.
template <class Measure> __device__ Last last_kept(const Weights& weights, u64 needed) {
    // All from `bits` on measure as much, all from `above` on do not.
    u32 bits = 0, above = __float_as_uint(1.0f) + 1;
    u64 before = 0;
    while (above - bits > 1) {
        u32 middle = bits + (above - bits) / 2;
        u64 sum = weights.from<Measure>(middle);
        if (sum >= needed) {
            bits = middle;
        } else {
            above = middle, before = sum;
        }
    }
    // Of equal ones so many.
    u64 each = Measure::of(__uint_as_float(bits));
    u64 wanted = (needed - before + each - 1) / each;
    u32 id = weights.count - 1, low = 0;
    if (weights.equal(bits, id) > wanted) {
        while (low < id) {
            u32 middle = low + (id - low) / 2;
            if (weights.equal(bits, middle) >= wanted) {
                id = middle;
            } else {
                low = middle + 1;
            }
        }
    }
    Last last = {bits, id};
    return last;
}

// `weights` has room for `known` numbers of each draw.
KERNEL_OF(1024, draw, const float* logits, u32 width, u32 known, const Draw* draws, float* weights, u32* ids) {
    __shared__ u64 shared[32];
    Draw draw = draws[blockIdx.x];
    const float* x = logits + u64(draw.row) * width;
    weights += u64(blockIdx.x) * known;

    float most = NEVER;
    for (u32 i = threadIdx.x; i < known; i += blockDim.x) {
        if (i != draw.without && x[i] > most) most = x[i];
    }
    most = over_block<Largest>(most, reinterpret_cast<float*>(shared));
    int certain = 0;
    for (u32 i = threadIdx.x; i < known; i += blockDim.x) {
        float weight = i == draw.without ? 0.0f : exp_up_to_0((x[i] - most) * draw.scale);
        weights[i] = weight;
        certain |= weight == 1.0f;
    }
    u64 best = ~u64(0);
    if (!__syncthreads_or(certain)) {
        // Logits that are not finite.
        for (u32 i = threadIdx.x; i < known; i += blockDim.x) {
            if (i != draw.without && x[i] == most) best = min(best, u64(i));
        }
        best = over_block<Least>(best, shared);
        if (threadIdx.x == 0) ids[blockIdx.x] = best == ~u64(0) ? 0 : u32(best);
        return;
    }

    Weights all = {weights, known, shared};
    Last last = {0, known - 1};
    if (draw.top_k < known) last = last_kept<Count>(all, draw.top_k);
    if (draw.top_p < 1.0f) {
        u64 mass = 0;
        for (u32 i = threadIdx.x; i < known; i += blockDim.x) {
            if (last.keeps(weights[i], i)) mass += Mass::of(weights[i]);
        }
        mass = over_block<Total>(mass, shared);
        u64 needed = u64(ceil(double(draw.top_p) * double(mass)));
        last = last_kept<Mass>(all, needed == 0 ? 1 : needed);
    }

    // The first to arrive, the lowest id of equal ones.
    for (u32 i = threadIdx.x; i < known; i += blockDim.x) {
        float weight = weights[i];
        if (weight > 0.0f && weight >= draw.min_p && last.keeps(weight, i)) {
            float arrival = noise(draw, i) / weight;
            best = min(best, u64(__float_as_uint(arrival)) << 32 | i);
        }
    }
    best = over_block<Least>(best, shared);
    if (threadIdx.x == 0) ids[blockIdx.x] = u32(best);
}
