// Layer norm (Ba, Kiros, Hinton, 2016), rows in f32; a block for each row.
#include "common.cuh"

const float EPS = 1e-5f;

template <class E>
__device__ void layer_norm(const float* x, const float* gamma, const float* beta, E* y, float* y_f32, float* mean,
                           float* rstd, u32 width) {
    __shared__ float shared[32];
    u64 row = blockIdx.x;
    x += row * width, y += row * width;
    float sum = 0.0f;
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float v[4];
        load4(x + c, width - c, v);
        sum += (v[0] + v[1]) + (v[2] + v[3]);
    }
    float m = over_block<Sum>(sum, shared) / float(width);
    // A second pass: the difference of large squares would lose all digits of a small variance.
    sum = 0.0f;
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float v[4];
        load4(x + c, width - c, v);
        for (int j = 0; j < 4 && c + j < width; j++) sum = fmaf(v[j] - m, v[j] - m, sum);
    }
    float r = 1.0f / sqrtf(over_block<Sum>(sum, shared) / float(width) + EPS);
    for (u32 c = 4 * threadIdx.x; c < width; c += 4 * blockDim.x) {
        float v[4], g[4], b[4];
        load4(x + c, width - c, v);
        load4(gamma + c, width - c, g);
        load4(beta + c, width - c, b);
        for (int j = 0; j < 4; j++) v[j] = fmaf((v[j] - m) * r, g[j], b[j]);
        store4(y + c, width - c, v);
        if (y_f32) store4(y_f32 + row * width + c, width - c, v);
    }
    if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;
}

#define LAYER_NORM(name, E)                                                                                          \
    KERNEL(name, const float* x, const float* gamma, const float* beta, E* y, float* y_f32, float* mean, float* rstd, \
           u32 width) {                                                                                               \
        layer_norm(x, gamma, beta, y, y_f32, mean, rstd, width);                                                      \
    }
LAYER_NORM(layer_norm_f32, float)
LAYER_NORM(layer_norm_bf16, bf16)
LAYER_NORM(layer_norm_f16, f16)

// With n the normalised row and g = dy * gamma: dx = rstd * (g - mean(g) - n * mean(g * n)). A block takes `rows_each`
// rows, one after the other, and leaves its sums of dy * n and dy in parts[block][2][width]; each column is one thread's.
template <class G>
__device__ void layer_norm_backward(const G* dy, const float* x, const float* mean, const float* rstd, const float* gamma,
                                    float* dx, u32 accumulate, float* parts, u32 rows, u32 width, u32 rows_each) {
    __shared__ float shared[32];
    DYNAMIC_SHARED(float, dgamma);
    float* dbeta = dgamma + width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) dgamma[c] = dbeta[c] = 0.0f;
    u32 first = blockIdx.x * rows_each, last = min(rows, first + rows_each);
    for (u32 row = first; row < last; row++) {
        u64 at = u64(row) * width;
        float m = mean[row], r = rstd[row], sum_g = 0.0f, sum_gn = 0.0f;
        for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
            float n = (x[at + c] - m) * r, d = to_f32(dy[at + c]), g = d * gamma[c];
            sum_g += g;
            sum_gn = fmaf(g, n, sum_gn);
            dgamma[c] = fmaf(d, n, dgamma[c]);
            dbeta[c] += d;
        }
        float mean_g = over_block<Sum>(sum_g, shared) / float(width);
        float mean_gn = over_block<Sum>(sum_gn, shared) / float(width);
        for (u32 c = threadIdx.x; c < width; c += blockDim.x) {
            float n = (x[at + c] - m) * r, g = to_f32(dy[at + c]) * gamma[c];
            float centred = g - mean_g - n * mean_gn;
            dx[at + c] = accumulate ? fmaf(r, centred, dx[at + c]) : r * centred;
        }
    }
    float* part = parts + u64(blockIdx.x) * 2 * width;
    for (u32 c = threadIdx.x; c < width; c += blockDim.x) part[c] = dgamma[c], part[width + c] = dbeta[c];
}

#define LAYER_NORM_BACKWARD(name, G)                                                                                   \
    KERNEL(name, const G* dy, const float* x, const float* mean, const float* rstd, const float* gamma, float* dx,     \
           u32 accumulate, float* parts, u32 rows, u32 width, u32 rows_each) {                                         \
        layer_norm_backward(dy, x, mean, rstd, gamma, dx, accumulate, parts, rows, width, rows_each);                  \
    }
LAYER_NORM_BACKWARD(layer_norm_backward_f32, float)
LAYER_NORM_BACKWARD(layer_norm_backward_bf16, bf16)
LAYER_NORM_BACKWARD(layer_norm_backward_f16, f16)
