// Sums over rows, in an order that the sizes alone decide: first of pieces of the rows, then of those sums.
#include "common.cuh"

const u32 LANES = 8;

// parts[piece][n] = sum of rows piece*rows_each .. of x [rows, n]. Blocks of (32, LANES) threads, each of which adds four
// columns of every LANES-th row; grid (columns / 128, pieces).
template <class E> __device__ void column_sums(const E* x, float* parts, u32 rows, u32 n, u32 rows_each) {
    __shared__ float sums[LANES][32][4];
    u32 c = blockIdx.x * 128 + 4 * threadIdx.x, first = blockIdx.y * rows_each, last = min(rows, first + rows_each);
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f}, v[4];
    if (c < n) {
        for (u32 row = first + threadIdx.y; row < last; row += LANES) {
            load4(x + u64(row) * n + c, n - c, v);
            for (int j = 0; j < 4; j++) sum[j] += v[j];
        }
    }
    for (int j = 0; j < 4; j++) sums[threadIdx.y][threadIdx.x][j] = sum[j];
    __syncthreads();
    if (threadIdx.y == 0 && c < n) {
        for (u32 lane = 1; lane < LANES; lane++) {
            for (int j = 0; j < 4; j++) sum[j] += sums[lane][threadIdx.x][j];
        }
        store4(parts + u64(blockIdx.y) * n + c, n - c, sum);
    }
}

KERNEL(column_sums_f32, const float* x, float* parts, u32 rows, u32 n, u32 rows_each) {
    column_sums(x, parts, rows, n, rows_each);
}
KERNEL(column_sums_bf16, const bf16* x, float* parts, u32 rows, u32 n, u32 rows_each) {
    column_sums(x, parts, rows, n, rows_each);
}
KERNEL(column_sums_f16, const f16* x, float* parts, u32 rows, u32 n, u32 rows_each) {
    column_sums(x, parts, rows, n, rows_each);
}

// out[n] (+)= sum of parts[count][stride], from each part its first n. Blocks of (32, 32) threads for 32 columns.
KERNEL_OF(1024, add_parts, const float* parts, u32 count, u32 stride, u32 n, float* out, u32 accumulate) {
    __shared__ float sums[32][32];
    u32 c = blockIdx.x * 32 + threadIdx.x;
    float sum = 0.0f;
    if (c < n) {
        for (u32 part = threadIdx.y; part < count; part += 32) sum += parts[u64(part) * stride + c];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < n) {
        for (u32 lane = 1; lane < 32; lane++) sum += sums[lane][threadIdx.x];
        out[c] = accumulate ? out[c] + sum : sum;
    }
}
