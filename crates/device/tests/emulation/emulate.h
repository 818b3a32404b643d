// The thread model of CUDA on a processor, enough of it to run the kernels in src/cuda/kernels unchanged: for tests.
//
// A block's threads are fibers of one thread of the processor. One runs until it meets a barrier, an exchange between the
// lanes of its warp, or its end; then comes the next. Blocks run one after the other. Every other launch takes blocks and
// threads in the opposite order, and shared memory of variable size holds NaN when a block begins, so that a missing
// barrier and memory that nobody wrote show as differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
// Blocks do not overlap, and neither do launches.
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(emulation::dynamic_shared())

struct dim3 {
    unsigned x, y, z;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

/// Places of the running thread.
struct Place {
    dim3 thread, block, threads, blocks;
};
extern Place place;

/// f16 by its bits, and the nearest one, ties to even.
inline float widen_f16(uint16_t bits) {
    _Float16 x;
    return std::memcpy(&x, &bits, 2), float(x);
}
inline uint16_t narrow_f16(float x) {
    auto y = _Float16(x);
    uint16_t bits;
    return std::memcpy(&bits, &y, 2), bits;
}

unsigned char* dynamic_shared();
/// Waits for all threads of the block that have not ended. Returns whether any of them said true.
bool barrier(bool any);
/// Gives a value to the warp, waits for its other lanes, and returns what all 32 gave.
const uint64_t* exchange(uint64_t value);

/// Products of a tensor core, and how it loads a factor from 16 rows of memory; see mma.cuh.
void mma(float* sums, const unsigned* left, const unsigned* right, float (*widen)(unsigned short));
void load_turned(unsigned* right, const void* row);
void mma_codes(int* sums, const unsigned* left, const unsigned* right);
/// Copies that happen as late as they may: when they are waited for.
void copy_16(void* to, const void* from);
void copies_end();
void wait_for_copies(unsigned last);

typedef void (*Body)(void** arguments);
/// A kernel: what runs it, and the bytes of each of its arguments.
struct Kernel {
    Body body;
    std::vector<size_t> sizes;
};
/// A kernel that can be found by its name.
struct Registered {
    Registered(const char* name, Kernel kernel);
};

template <class Function> struct Call;
template <class... A> struct Call<void (*)(A...)> {
    template <void (*kernel)(A...), size_t... I> static void with(void** arguments, std::index_sequence<I...>) {
        // Arguments are copied byte by byte, as a launch does.
        std::tuple<A...> values;
        ((void)std::memcpy(&std::get<I>(values), arguments[I], sizeof(A)), ...);
        kernel(std::get<I>(values)...);
    }
    template <void (*kernel)(A...)> static void body(void** arguments) {
        with<kernel>(arguments, std::index_sequence_for<A...>());
    }
    template <void (*kernel)(A...)> static Kernel of() { return {body<kernel>, {sizeof(A)...}}; }
};

template <class T> uint64_t bits(T x) {
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof x);
    return bits;
}
template <class T> T value(uint64_t bits) {
    T x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

}  // namespace emulation

#define KERNEL(name, ...)                                                                                    \
    static void name(__VA_ARGS__);                                                                           \
    static emulation::Registered registered_##name(#name, emulation::Call<decltype(&name)>::of<&name>());    \
    static void name(__VA_ARGS__)

#define KERNEL_OF(threads, name, ...) KERNEL(name, __VA_ARGS__)

#define threadIdx emulation::place.thread
#define blockIdx emulation::place.block
#define blockDim emulation::place.threads
#define gridDim emulation::place.blocks

inline void __syncthreads() { emulation::barrier(false); }
inline int __syncthreads_or(int x) { return emulation::barrier(x != 0); }
inline void __syncwarp() { emulation::exchange(0); }

template <class T> T __shfl_xor_sync(unsigned, T x, int distance) {
    unsigned lane = threadIdx.x % 32;
    return emulation::value<T>(emulation::exchange(emulation::bits(x))[lane ^ unsigned(distance)]);
}
inline unsigned __ballot_sync(unsigned, int x) {
    const uint64_t* all = emulation::exchange(x != 0);
    unsigned set = 0;
    for (unsigned lane = 0; lane < 32; lane++) set |= unsigned(all[lane]) << lane;
    return set;
}

inline float __uint_as_float(unsigned x) { return emulation::value<float>(x); }
inline unsigned __float_as_uint(float x) { return unsigned(emulation::bits(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __dp4a(int a, int b, int sum) {
    for (int byte = 0; byte < 4; byte++) sum += int(int8_t(a >> 8 * byte)) * int(int8_t(b >> 8 * byte));
    return sum;
}
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
