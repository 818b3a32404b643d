// Products of 16 x 8 x 16 by tensor cores, halves of type E (bf16 or f16) summed in f32. Lane l of a warp is (g, t) = (l / 4,
// l % 4).
//
// Left factor [16][16], four words: rows g and g + 8, columns 2t and 2t + 1, then the same with columns 8 further.
// Right factor [16][8], two words: column g, rows 2t and 2t + 1, then 8 further. Sums [16][8]: row g, columns 2t and 2t + 1,
// then row g + 8.
#pragma once
#include "common.cuh"

#ifdef FERROPT_EMULATION
/// Two numbers in a word, the first in the low half.
template <class E> u32 two(float low, float high) { return Of<E>::f32(low).bits | u32(Of<E>::f32(high).bits) << 16; }

/// sums += left * right
template <class E> void mma(float* sums, const u32* left, const u32* right) {
    emulation::mma(sums, left, right, [](u16 bits) {
        E x;
        x.bits = bits;
        return to_f32(x);
    });
}
#else
template <class E> __device__ u32 two(float low, float high);
template <class E> __device__ void mma(float* sums, const u32* left, const u32* right);

// The types have the names that the instructions have for them.
#define TENSOR_CORES(E)                                                                                                       \
    template <> __device__ __forceinline__ u32 two<E>(float low, float high) {                                                \
        u32 both;                                                                                                             \
        asm("cvt.rn." #E "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));                                            \
        return both;                                                                                                          \
    }                                                                                                                         \
    template <> __device__ __forceinline__ void mma<E>(float* sums, const u32* left, const u32* right) {                      \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #E "." #E ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, " \
            "{%0, %1, %2, %3};"                                                                                               \
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                                      \
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));                          \
    }
TENSOR_CORES(bf16)
TENSOR_CORES(f16)
#endif

/// sums += left * right of signed bytes, 16 x 8 x 32, exactly. Each word has four neighbours in k where that of halves has two.
__device__ __forceinline__ void mma_codes(int* sums, const u32* left, const u32* right) {
#ifdef FERROPT_EMULATION
    emulation::mma_codes(sums, left, right);
#else
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
#endif
}

/// Begins to copy 16 bytes to shared memory, between addresses that 16 divides.
__device__ __forceinline__ void copy_16(void* to, const void* from) {
#ifdef FERROPT_EMULATION
    emulation::copy_16(to, from);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from) : "memory");
#endif
}
/// Closes a group of copies, which may be empty.
__device__ __forceinline__ void copies_end() {
#ifdef FERROPT_EMULATION
    emulation::copies_end();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits for this thread's copies but those of the last `N` groups. Others see them behind a barrier.
template <int N> __device__ __forceinline__ void wait_for_copies() {
#ifdef FERROPT_EMULATION
    emulation::wait_for_copies(N);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/// A left factor from 16 rows of shared memory, `ld` numbers apart.
template <class E> __device__ __forceinline__ void load_left(u32* left, const E* rows, u32 ld) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const E* at = rows + g * ld + 2 * t;
    left[0] = *reinterpret_cast<const u32*>(at), left[1] = *reinterpret_cast<const u32*>(at + 8 * ld);
    left[2] = *reinterpret_cast<const u32*>(at + 8), left[3] = *reinterpret_cast<const u32*>(at + 8 * ld + 8);
}

/// A right factor whose columns are 8 rows of shared memory.
template <class E> __device__ __forceinline__ void load_right(u32* right, const E* rows, u32 ld) {
    u32 g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const E* at = rows + g * ld + 2 * t;
    right[0] = *reinterpret_cast<const u32*>(at), right[1] = *reinterpret_cast<const u32*>(at + 8);
}

/// A right factor whose rows are 16 rows of shared memory, of each 8 numbers at an address that 16 divides.
template <class E> __device__ __forceinline__ void load_right_turned(u32* right, const E* rows, u32 ld) {
    const E* row = rows + threadIdx.x % 16 * ld;
#ifdef FERROPT_EMULATION
    emulation::load_turned(right, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(right[0]), "=r"(right[1]) : "r"(u32(__cvta_generic_to_shared(row))));
#endif
}
