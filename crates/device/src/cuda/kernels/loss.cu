// Cross-entropy of a chunk of rows of logits, and what choosing a token needs to know of them. A block for each row.
#include "common.cuh"

// The largest element, and the sum of e to the power of each one's distance from it: what has been seen so far.
struct Seen {
    float most, sum;

    __device__ __forceinline__ void add(float x) {
        if (x > most) {
            sum = sum * expf(most - x) + 1.0f;
            most = x;
        } else if (x > NEVER) {
            sum += expf(x - most);
        }
    }
};

template <class E> __device__ float2 look_at_row(const E* x, u32 width, float* shared) {
    Seen seen = {NOTHING, 0.0f};
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float v[4];
        load4(x + c, width - c, v);
        for (int j = 0; j < 4 && c + j < width; j++) seen.add(v[j]);
    }
    float most = over_block<Largest>(seen.most, shared);
    float sum = over_block<Sum>(seen.sum * expf(seen.most - most), shared);
    return make_float2(most, sum);
}

// Log-sum-exp of each row, and the logit of its target: 0 where that is no column of these (`first` is the id of the first).
template <class E>
__device__ void loss_look(const E* logits, const u32* targets, u32 first, u32 vocab, float* log_sums, float* target_logits) {
    __shared__ float shared[32];
    u32 row = blockIdx.x, target = targets[row];
    if (target == IGNORE) {
        if (threadIdx.x == 0) log_sums[row] = target_logits[row] = 0.0f;
        return;
    }
    logits += u64(row) * vocab;
    float2 seen = look_at_row(logits, vocab, shared);
    if (threadIdx.x == 0) {
        log_sums[row] = seen.x + logf(seen.y);
        // Below `first` it wraps around to something large.
        target_logits[row] = target - first < vocab ? to_f32(logits[target - first]) : 0.0f;
    }
}

KERNEL(loss_look_f32, const float* logits, const u32* targets, u32 first, u32 vocab, float* log_sums, float* target_logits) {
    loss_look(logits, targets, first, vocab, log_sums, target_logits);
}
KERNEL(loss_look_bf16, const bf16* logits, const u32* targets, u32 first, u32 vocab, float* log_sums, float* target_logits) {
    loss_look(logits, targets, first, vocab, log_sums, target_logits);
}
KERNEL(loss_look_f16, const f16* logits, const u32* targets, u32 first, u32 vocab, float* log_sums, float* target_logits) {
    loss_look(logits, targets, first, vocab, log_sums, target_logits);
}

// The loss, and with `backward` the gradient of `scale` times it in the logits' place.
template <class E>
__device__ void loss_finish(E* logits, const u32* targets, u32 first, u32 vocab, const float* log_sums,
                            const float* target_logits, float* losses, u32 backward, float scale) {
    u32 row = blockIdx.x, target = targets[row];
    float log_sum = log_sums[row], target_logit = target_logits[row];
    bool ignored = target == IGNORE;
    if (threadIdx.x == 0) losses[row] = ignored ? 0.0f : log_sum - target_logit;
    if (!backward) return;
    logits += u64(row) * vocab;
    for (u32 c = 4 * threadIdx.x; c < vocab; c += 4 * blockDim.x) {
        float v[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (!ignored) {
            load4(logits + c, vocab - c, v);
            for (int j = 0; j < 4; j++) {
                v[j] = expf(v[j] - log_sum);
                if (c + j == target - first) v[j] -= 1.0f;
                v[j] *= scale;
            }
        }
        store4(logits + c, vocab - c, v);
    }
}

#define LOSS_FINISH(name, E)                                                                                          \
    KERNEL(name, E* logits, const u32* targets, u32 first, u32 vocab, const float* log_sums, const float* target_logits, \
           float* losses, u32 backward, float scale) {                                                                 \
        loss_finish(logits, targets, first, vocab, log_sums, target_logits, losses, backward, scale);                  \
    }
LOSS_FINISH(loss_finish_f32, float)
LOSS_FINISH(loss_finish_bf16, bf16)
LOSS_FINISH(loss_finish_f16, f16)

// Log-sum-exp of each row of x, and the place of its largest element, the first of equal ones.
KERNEL(log_sum_exp, const float* x, float* lse, u32* largest, u32 width) {
    __shared__ float shared[32];
    __shared__ u32 places[32];
    x += u64(blockIdx.x) * width;
    float2 seen = look_at_row(x, width, shared);
    u32 place = 0xffffffffu, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (u32 c = threadIdx.x; c < width && place == 0xffffffffu; c += blockDim.x) {
        if (x[c] == seen.x) place = c;
    }
    for (int distance = 16; distance > 0; distance /= 2) place = min(place, __shfl_xor_sync(ALL_LANES, place, distance));
    if (lane == 0) places[warp] = place;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (u32 w = 1; w < blockDim.x / 32; w++) place = min(place, places[w]);
        lse[blockIdx.x] = seen.x + logf(seen.y);
        largest[blockIdx.x] = place == 0xffffffffu ? 0 : place;
    }
}
