// As much of cuBLASLt as src/cuda calls: products of matrices in columns, of f32, bf16 or f16, summed in f32.
#include <cstdint>
#include <cstring>
#include <vector>

#include "launch.h"

namespace {

const int OK = 0, INVALID = 7, F32 = 0, F16 = 2, BF16 = 14, COMPUTE_F32 = 68;

struct Operation {
    int compute, scale, transpose[2];
};
struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t ld;
};
struct Preference {
    uint64_t workspace;
};
// As in cublasLt.h.
struct Algorithm {
    uint64_t data[8];
};
struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

float widen(uint16_t x, int type) {
    if (type == F16) return emulation::widen_f16(x);
    uint32_t bits = uint32_t(x) << 16;
    float y;
    return std::memcpy(&y, &bits, 4), y;
}
uint16_t narrow(float x, int type) {
    if (type == F16) return emulation::narrow_f16(x);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float get(const void* x, int type, size_t at) {
    return type == F32 ? static_cast<const float*>(x)[at] : widen(static_cast<const uint16_t*>(x)[at], type);
}

/// Columns or rows of an operand with what is summed over beside each other: `[count][k]`.
std::vector<float> pack(const void* x, const Layout& l, bool along_rows, size_t count, size_t k) {
    std::vector<float> packed(count * k);
    for (size_t i = 0; i < count; i++) {
        for (size_t j = 0; j < k; j++) packed[i * k + j] = get(x, l.type, along_rows ? j + i * size_t(l.ld) : i + j * size_t(l.ld));
    }
    return packed;
}

float dot(const float* a, const float* b, size_t k) {
    float sums[16] = {};
    size_t i = 0;
    for (; i + 16 <= k; i += 16) {
        for (int j = 0; j < 16; j++) sums[j] += a[i + j] * b[i + j];
    }
    float sum = 0.0f;
    for (; i < k; i++) sum += a[i] * b[i];
    for (float s : sums) sum += s;
    return sum;
}

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
    static int the_one;
    return *handle = &the_one, OK;
}
int cublasLtDestroy(void*) { return OK; }
int cublasLtMatmulDescCreate(void** d, int compute, int scale) {
    return *d = new Operation{compute, scale, {0, 0}}, compute == COMPUTE_F32 && scale == F32 ? OK : INVALID;
}
int cublasLtMatmulDescDestroy(void* d) { return delete static_cast<Operation*>(d), OK; }
int cublasLtMatmulDescSetAttribute(void* d, int attribute, const void* value, size_t size) {
    if ((attribute != 3 && attribute != 4) || size != 4) return INVALID;
    return std::memcpy(&static_cast<Operation*>(d)->transpose[attribute - 3], value, 4), OK;
}
int cublasLtMatrixLayoutCreate(void** l, int type, uint64_t rows, uint64_t columns, int64_t ld) {
    if ((type != F32 && type != BF16 && type != F16) || ld < int64_t(rows) || rows == 0 || columns == 0) return INVALID;
    return *l = new Layout{type, rows, columns, ld}, OK;
}
int cublasLtMatrixLayoutDestroy(void* l) { return delete static_cast<Layout*>(l), OK; }
int cublasLtMatmulPreferenceCreate(void** p) { return *p = new Preference{0}, OK; }
int cublasLtMatmulPreferenceDestroy(void* p) { return delete static_cast<Preference*>(p), OK; }
int cublasLtMatmulPreferenceSetAttribute(void* p, int attribute, const void* value, size_t size) {
    if (attribute == 1 && size == 8) return std::memcpy(&static_cast<Preference*>(p)->workspace, value, 8), OK;
    return (attribute == 3 || (attribute >= 5 && attribute <= 8)) && size == 4 ? OK : INVALID;
}
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int wanted, Found* found, int* count) {
    if (wanted < 1) return INVALID;
    std::memset(found, 0, sizeof *found);
    return *count = 1, OK;
}
int cublasLtMatmul(void*, void* operation, const float* alpha, const void* a, void* a_layout, const void* b, void* b_layout,
                   const float* beta, const void* c, void* c_layout, void* d, void* d_layout, const Algorithm*, void*, size_t,
                   void* stream) {
    auto o = static_cast<Operation*>(operation);
    auto la = *static_cast<Layout*>(a_layout), lb = *static_cast<Layout*>(b_layout), ld = *static_cast<Layout*>(d_layout);
    bool ta = o->transpose[0] == 1, tb = o->transpose[1] == 1;
    size_t m = ta ? la.columns : la.rows, k = ta ? la.rows : la.columns, n = tb ? lb.rows : lb.columns;
    if ((tb ? lb.columns : lb.rows) != k || ld.rows != m || ld.columns != n || la.type != lb.type) return INVALID;
    if (c != d || c_layout != d_layout) return INVALID;
    // Descriptions and factors are those of now, whenever it runs.
    emulation::enqueue(stream, [=, factor = *alpha, before = *beta] {
        std::vector<float> left = pack(a, la, ta, m, k), right = pack(b, lb, !tb, n, k);
        for (size_t j = 0; j < n; j++) {
            for (size_t i = 0; i < m; i++) {
                size_t at = i + j * size_t(ld.ld);
                float x = factor * dot(&left[i * k], &right[j * k], k);
                if (before != 0.0f) x += before * get(d, ld.type, at);
                if (ld.type == F32) {
                    static_cast<float*>(d)[at] = x;
                } else {
                    static_cast<uint16_t*>(d)[at] = narrow(x, ld.type);
                }
            }
        }
    });
    return OK;
}

}  // extern "C"
