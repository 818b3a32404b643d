// Optimiser steps: one pass over a parameter. The arithmetic is that of the processor's kernel, operation by operation, so
// the bits are the same.
#include "common.cuh"

/// Where an element of a part is in the whole tensor; see strided.rs.
struct Place {
    u64 first, run, stride, skip;

    __device__ __forceinline__ u64 element(u64 i) const {
        u64 at = skip + i;
        // A run that is all there is.
        if (at < run) return first + at;
        return first + at / run * stride + at % run;
    }
};

/// A parameter's storage: `low` of a split master, `random` for stochastic rounding; see Param in lib.rs.
template <class E> struct Master {
    E* w;
    i16* low;
    u32 random;
    Stream stream;
    Place place;

    __device__ __forceinline__ float read(u64 i) const;
    __device__ __forceinline__ void write(u64 i, float value) const;
};

template <> __device__ __forceinline__ float Master<float>::read(u64 i) const { return w[i]; }
template <> __device__ __forceinline__ void Master<float>::write(u64 i, float value) const { w[i] = value; }

template <> __device__ __forceinline__ float Master<bf16>::read(u64 i) const {
    return low ? __uint_as_float((u32(w[i].bits) << 16) + u32(int(low[i]))) : to_f32(w[i]);
}

template <> __device__ __forceinline__ void Master<bf16>::write(u64 i, float value) const {
    u32 bits = __float_as_uint(value);
    if (low) {
        // The magnitude sits in the bits below the sign, so this rounds ties away from zero.
        w[i].bits = u16((bits + 0x8000u) >> 16);
        low[i] = i16(u16(bits));
    } else if (random) {
        u64 element = place.element(i);
        u32 up = bits + (stream.words(0, u32(element / 64), u32(element % 16)).of(u32(element)) & 0xffffu);
        // A carry must not make a number of a NaN.
        w[i].bits = u16((value != value ? bits | 0x400000u : up) >> 16);
    } else {
        w[i] = Of<bf16>::f32(value);
    }
}

/// What the low half of an f16 weight counts: 2^-25 of its power of two, or of 2^-14 where that is more.
__device__ __forceinline__ float low_unit(float w) {
    return __uint_as_float(max(__float_as_uint(w) & 0x7f800000u, 0x38800000u) - (25u << 23));
}

template <> __device__ __forceinline__ float Master<f16>::read(u64 i) const {
    float near = to_f32(w[i]);
    return low ? near + float(low[i]) * low_unit(near) : near;
}

template <> __device__ __forceinline__ void Master<f16>::write(u64 i, float value) const {
    // Below 2^-14 masters are multiples of 2^-39 (and no minus zero): a weight and its low half must follow from their sum alone.
    const float UNITS = 549755813888.0f;
    if (low && fabsf(value) < 1.0f / 16384.0f) value = rintf(value * UNITS) * (1.0f / UNITS) + 0.0f;
    f16 nearest = Of<f16>::f32(value);
    w[i] = nearest;
    if (low) {
        // A whole number, at most 2^14; of an infinity or a NaN, nothing is left that counts.
        float near = to_f32(nearest), left = (value - near) * (1.0f / low_unit(near));
        low[i] = fabsf(left) <= 32767.0f ? i16(int(left)) : i16(0);
    }
}

struct AdamW {
    float grad_scale, beta1, beta2, decay, step, root, eps;
};

template <class E> __device__ void adamw(AdamW h, Master<E> master, const float* grad, float* m, float* v, u64 len) {
    for (u64 i = first_index(); i < len; i += grid_size()) {
        float value = master.read(i), g = grad[i] * h.grad_scale, first = m[i], second = v[i];
        first += (1.0f - h.beta1) * (g - first);
        second = h.beta2 * second + (1.0f - h.beta2) * (g * g);
        m[i] = first, v[i] = second;
        master.write(i, value * h.decay - h.step * (first / (sqrtf(second) / h.root + h.eps)));
    }
}

KERNEL(adamw_f32, AdamW hyper, Master<float> master, const float* grad, float* m, float* v, u64 len) {
    adamw(hyper, master, grad, m, v, len);
}
KERNEL(adamw_bf16, AdamW hyper, Master<bf16> master, const float* grad, float* m, float* v, u64 len) {
    adamw(hyper, master, grad, m, v, len);
}
KERNEL(adamw_f16, AdamW hyper, Master<f16> master, const float* grad, float* m, float* v, u64 len) {
    adamw(hyper, master, grad, m, v, len);
}

// Gradient descent; without a buffer there is no momentum.
template <class E>
__device__ void sgd(Master<E> master, const float* grad, float* momentum, u64 len, float lr, float keep, float weight_decay,
                    float grad_scale) {
    for (u64 i = first_index(); i < len; i += grid_size()) {
        float value = master.read(i), g = grad[i] * grad_scale + weight_decay * value;
        if (momentum) {
            g = keep * momentum[i] + g;
            momentum[i] = g;
        }
        master.write(i, value - lr * g);
    }
}

#define SGD(name, E)                                                                                               \
    KERNEL(name, Master<E> master, const float* grad, float* momentum, u64 len, float lr, float keep,             \
           float weight_decay, float grad_scale) {                                                                 \
        sgd(master, grad, momentum, len, lr, keep, weight_decay, grad_scale);                                      \
    }
SGD(sgd_f32, float)
SGD(sgd_bf16, bf16)
SGD(sgd_f16, f16)

#define MASTERS(E)                                                                          \
    KERNEL(set_master_##E, const float* values, Master<E> master, u64 len) {                \
        for (u64 i = first_index(); i < len; i += grid_size()) master.write(i, values[i]);  \
    }                                                                                       \
    KERNEL(get_master_##E, Master<E> master, float* values, u64 len) {                      \
        for (u64 i = first_index(); i < len; i += grid_size()) values[i] = master.read(i);  \
    }
MASTERS(bf16)
MASTERS(f16)

// ---- sum of squares in f64: of each block's piece, and of those

__device__ double over_block_f64(double x) {
    __shared__ double sums[256];
    sums[threadIdx.x] = x;
    __syncthreads();
    for (u32 half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

// parts[block] = sum over x[block * each ..]; blocks of 256 threads.
KERNEL(squares, const float* x, u64 len, u32 each, double* parts) {
    u64 first = u64(blockIdx.x) * each, last = min(len, first + each);
    double sum = 0.0;
    for (u64 i = first + threadIdx.x; i < last; i += blockDim.x) sum += double(x[i]) * double(x[i]);
    sum = over_block_f64(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// out[0] = sum of parts, by one block of 256 threads.
KERNEL(sum_parts, const double* parts, u32 count, double* out) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = over_block_f64(sum);
    if (threadIdx.x == 0) out[0] = sum;
}
