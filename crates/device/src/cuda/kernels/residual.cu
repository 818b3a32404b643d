// Ends of residual branches. A block for each row; a thread takes columns 16 apart, which share a counter of the generator.
#include "common.cuh"

// out = residual + dropout(branch + bias)
template <class E>
__device__ void residual(const E* branch, const float* bias, Dropout d, const float* before, float* out, u32 width) {
    u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < (width + 63) / 64 * 16; i += blockDim.x) {
        u32 block = i / 16, lane = i % 16;
        Words words = {{0, 0, 0, 0}};
        if (d.on()) words = d.stream.words(d.first_row + row, block, lane);
        for (int w = 0; w < 4; w++) {
            u32 c = 64 * block + 16 * w + lane;
            if (c < width) {
                float x = to_f32(branch[row * width + c]);
                if (bias) x += bias[c];
                if (d.on()) x *= d.factor(words.w[w]);
                out[row * width + c] = before[row * width + c] + x;
            }
        }
    }
}

#define RESIDUAL(name, E)                                                                                            \
    KERNEL(name, const E* branch, const float* bias, Dropout dropout, const float* before, float* out, u32 width) {  \
        residual(branch, bias, dropout, before, out, width);                                                         \
    }
RESIDUAL(residual_f32, float)
RESIDUAL(residual_bf16, bf16)
RESIDUAL(residual_f16, f16)

// dy = dropout(dres)
template <class E> __device__ void residual_backward(const float* dres, Dropout d, E* dy, u32 width) {
    u64 row = blockIdx.x;
    for (u32 i = threadIdx.x; i < (width + 63) / 64 * 16; i += blockDim.x) {
        u32 block = i / 16, lane = i % 16;
        Words words = d.stream.words(d.first_row + row, block, lane);
        for (int w = 0; w < 4; w++) {
            u32 c = 64 * block + 16 * w + lane;
            if (c < width) dy[row * width + c] = Of<E>::f32(dres[row * width + c] * d.factor(words.w[w]));
        }
    }
}

KERNEL(residual_backward_f32, const float* dres, Dropout dropout, float* dy, u32 width) {
    residual_backward(dres, dropout, dy, width);
}
KERNEL(residual_backward_bf16, const float* dres, Dropout dropout, bf16* dy, u32 width) {
    residual_backward(dres, dropout, dy, width);
}
KERNEL(residual_backward_f16, const float* dres, Dropout dropout, f16* dy, u32 width) {
    residual_backward(dres, dropout, dy, width);
}
