// Operations that treat every element alike: bound by memory, so one pass each.
#include "common.cuh"

template <class T> __device__ void fill(T* dst, T value, u64 len) {
    for (u64 i = first_index(); i < len; i += grid_size()) dst[i] = value;
}

KERNEL(fill_2, u16* dst, u32 value, u64 len) { fill<u16>(dst, u16(value), len); }
KERNEL(fill_4, u32* dst, u32 value, u64 len) { fill<u32>(dst, value, len); }

template <class S, class T> __device__ void cast(const S* src, T* dst, u64 len) {
    for (u64 i = 4 * first_index(); i < len; i += 4 * grid_size()) {
        float x[4];
        load4(src + i, len - i, x);
        store4(dst + i, len - i, x);
    }
}

KERNEL(cast_f32_bf16, const float* src, bf16* dst, u64 len) { cast(src, dst, len); }
KERNEL(cast_bf16_f32, const bf16* src, float* dst, u64 len) { cast(src, dst, len); }
KERNEL(cast_f32_f16, const float* src, f16* dst, u64 len) { cast(src, dst, len); }
KERNEL(cast_f16_f32, const f16* src, float* dst, u64 len) { cast(src, dst, len); }

// dst += src
KERNEL(add, const float* src, float* dst, u64 len) {
    for (u64 i = 4 * first_index(); i < len; i += 4 * grid_size()) {
        float x[4], sum[4];
        load4(src + i, len - i, x);
        load4(dst + i, len - i, sum);
        for (int j = 0; j < 4; j++) sum[j] += x[j];
        store4(dst + i, len - i, sum);
    }
}

// Zeroes dx where the ReLU that made `output` let nothing through.
template <class E, class O> __device__ void relu_backward(const E* output, O* dx, u64 len) {
    for (u64 i = 4 * first_index(); i < len; i += 4 * grid_size()) {
        float y[4], d[4];
        load4(output + i, len - i, y);
        load4(dx + i, len - i, d);
        for (int j = 0; j < 4; j++) d[j] = y[j] > 0.0f ? d[j] : 0.0f;
        store4(dx + i, len - i, d);
    }
}

KERNEL(relu_backward_f32_f32, const float* output, float* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_f32_bf16, const float* output, bf16* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_bf16_f32, const bf16* output, float* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_bf16_bf16, const bf16* output, bf16* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_f32_f16, const float* output, f16* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_f16_f32, const f16* output, float* dx, u64 len) { relu_backward(output, dx, len); }
KERNEL(relu_backward_f16_f16, const f16* output, f16* dx, u64 len) { relu_backward(output, dx, len); }

// y = act(product + bias); a block for each row of n.
template <class O> __device__ void finish_linear(const float* product, const float* bias, u32 relu, O* y, u32 n) {
    u64 row = u64(blockIdx.x) * n;
    for (u32 c = 4 * threadIdx.x; c < n; c += 4 * blockDim.x) {
        float x[4], b[4];
        load4(product + row + c, n - c, x);
        if (bias) {
            load4(bias + c, n - c, b);
            for (int j = 0; j < 4; j++) x[j] += b[j];
        }
        if (relu) {
            for (int j = 0; j < 4; j++) x[j] = positive(x[j]);
        }
        store4(y + row + c, n - c, x);
    }
}

KERNEL(finish_linear_f32, const float* product, const float* bias, u32 relu, float* y, u32 n) {
    finish_linear(product, bias, relu, y, n);
}
KERNEL(finish_linear_bf16, const float* product, const float* bias, u32 relu, bf16* y, u32 n) {
    finish_linear(product, bias, relu, y, n);
}
KERNEL(finish_linear_f16, const float* product, const float* bias, u32 relu, f16* y, u32 n) {
    finish_linear(product, bias, relu, y, n);
}
