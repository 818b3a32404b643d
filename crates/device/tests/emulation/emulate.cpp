// Fibers, and launches of kernels that run on them.
#include "emulate.h"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

#ifndef __x86_64__
#error "fibers are written for x86-64"
#endif

// Saves what a function must keep, and goes on where another fiber did so.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

namespace emulation {

Place place;

namespace {

const size_t STACK = 64 << 10, MOST_SHARED = 227 << 10;

enum class State { Ready, AtBarrier, InExchange, Ended };

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    void* stack_pointer;
    State state;
    dim3 thread;
    // Groups of copies that were not waited for, the last of them open.
    std::deque<std::vector<Copy>> copies;
};

struct Warp {
    // Two sets in turns: a lane may give its next value before the others have read the last ones.
    uint64_t given[2][32];
    unsigned turn[32];
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<char> stacks;
void* scheduler;
Fiber* running;
unsigned running_index;
Body body;
void** arguments;
bool any_now, any_before;
bool backwards;
alignas(16) unsigned char shared[MOST_SHARED];

[[noreturn]] void fail(const char* what) {
    std::fprintf(stderr, "emulation: block (%u, %u), thread %u: %s\n", place.block.x, place.block.y, running_index, what);
    std::abort();
}

void pause(State state) {
    running->state = state;
    Fiber* self = running;
    emulation_switch(&self->stack_pointer, scheduler);
}

// Where every fiber begins; it runs one block's thread after the other.
void fiber_main() {
    for (;;) {
        body(arguments);
        pause(State::Ended);
    }
}

void prepare(unsigned threads) {
    if (fibers.size() >= threads) return;
    fibers.resize(threads);
    stacks.assign(threads * STACK, 0);
    for (unsigned i = 0; i < threads; i++) {
        void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(&stacks[(i + 1) * STACK - 64]) & ~uintptr_t(15));
        // As if called: an address to return to, then the function to begin with, then six registers.
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(&fiber_main);
        top -= 6;
        fibers[i].stack_pointer = top;
    }
    warps.resize((threads + 31) / 32);
}

void resume(unsigned index) {
    running = &fibers[index], running_index = index;
    running->state = State::Ready;
    place.thread = running->thread;
    emulation_switch(&scheduler, running->stack_pointer);
}

// Runs the lanes of a warp until all wait for the block or have ended.
void run_warp(unsigned first, unsigned last) {
    for (;;) {
        unsigned exchanging = 0, ended = 0, waiting = 0;
        for (unsigned i = 0; i < last - first; i++) {
            unsigned lane = backwards ? last - 1 - i : first + i;
            if (fibers[lane].state == State::Ready) resume(lane);
            exchanging += fibers[lane].state == State::InExchange;
            ended += fibers[lane].state == State::Ended;
            waiting += fibers[lane].state == State::AtBarrier;
        }
        if (exchanging == 0) return;
        if (exchanging != 32) {
            std::fprintf(stderr, "emulation: an exchange of %u lanes; %u have ended and %u are at a barrier\n", exchanging, ended, waiting);
            std::abort();
        }
        for (unsigned lane = first; lane < last; lane++) fibers[lane].state = State::Ready;
    }
}

void run_block(unsigned threads) {
    for (unsigned i = 0; i < threads; i++) {
        fibers[i].state = State::Ready;
        unsigned x = i % place.threads.x, rest = i / place.threads.x;
        fibers[i].thread = {x, rest % place.threads.y, rest / place.threads.y};
        fibers[i].copies.assign(1, {});
    }
    for (Warp& warp : warps) std::memset(warp.turn, 0, sizeof warp.turn);
    unsigned count = (threads + 31) / 32;
    for (;;) {
        for (unsigned i = 0; i < count; i++) {
            unsigned warp = backwards ? count - 1 - i : i;
            run_warp(warp * 32, std::min(threads, warp * 32 + 32));
        }
        bool waiting = false;
        for (unsigned i = 0; i < threads; i++) {
            if (fibers[i].state == State::AtBarrier) fibers[i].state = State::Ready, waiting = true;
        }
        if (!waiting) return;
        any_before = any_now, any_now = false;
    }
}

std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

std::mutex one_at_a_time;

}  // namespace

unsigned char* dynamic_shared() { return shared; }

bool barrier(bool any) {
    any_now = any_now || any;
    pause(State::AtBarrier);
    return any_before;
}

const uint64_t* exchange(uint64_t value) {
    Warp& warp = warps[running_index / 32];
    unsigned lane = running_index % 32, turn = warp.turn[lane]++ % 2;
    warp.given[turn][lane] = value;
    pause(State::InExchange);
    return warp.given[turn];
}

namespace {

unsigned short half_of(uint64_t words, unsigned which) { return (unsigned short)(words >> 16 * which); }

/// What all lanes of a warp give for a product: the left factor's first and last two words, and the right one's two.
struct Factors {
    uint64_t first[32], second[32], right[32];

    Factors(const unsigned* left, const unsigned* right) {
        auto gather = [](uint64_t* all, const unsigned* own) {
            std::memcpy(all, exchange(own[0] | uint64_t(own[1]) << 32), 32 * sizeof *all);
        };
        gather(first, left), gather(second, left + 2), gather(this->right, right);
    }
};

}  // namespace

void mma(float* sums, const unsigned* left, const unsigned* right, float (*widen)(unsigned short)) {
    Factors all(left, right);
    unsigned g = running_index % 32 / 4, t = running_index % 4;
    for (unsigned r = 0; r < 2; r++) {
        for (unsigned e = 0; e < 2; e++) {
            for (unsigned k = 0; k < 16; k++) {
                unsigned lane = k % 8 / 2, odd = k % 2;
                float a = widen(half_of((k < 8 ? all.first : all.second)[4 * g + lane], 2 * r + odd));
                float b = widen(half_of(all.right[4 * (2 * t + e) + lane], 2 * (k / 8) + odd));
                sums[2 * r + e] += a * b;
            }
        }
    }
}

void load_turned(unsigned* right, const void* row) {
    uint64_t rows[32];
    std::memcpy(rows, exchange(reinterpret_cast<uint64_t>(row)), sizeof rows);
    unsigned g = running_index % 32 / 4, t = running_index % 4;
    for (unsigned half = 0; half < 2; half++) {
        auto at = [&](unsigned i) {
            if (rows[8 * half + i] % 16 != 0) fail("a row of a factor does not begin at a multiple of 16 bytes");
            return unsigned(reinterpret_cast<const uint16_t*>(rows[8 * half + i])[g]);
        };
        right[half] = at(2 * t) | at(2 * t + 1) << 16;
    }
}

void mma_codes(int* sums, const unsigned* left, const unsigned* right) {
    Factors all(left, right);
    unsigned g = running_index % 32 / 4, t = running_index % 4;
    for (unsigned r = 0; r < 2; r++) {
        for (unsigned e = 0; e < 2; e++) {
            for (unsigned k = 0; k < 32; k++) {
                unsigned lane = k % 16 / 4, byte = k % 4;
                auto a = int8_t((k < 16 ? all.first : all.second)[4 * g + lane] >> (32 * r + 8 * byte));
                auto b = int8_t(all.right[4 * (2 * t + e) + lane] >> (32 * (k / 16) + 8 * byte));
                sums[2 * r + e] += int(a) * int(b);
            }
        }
    }
}

void copy_16(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0) {
        fail("a copy of 16 bytes between addresses that 16 does not divide");
    }
    running->copies.back().push_back({to, from});
}

void copies_end() { running->copies.emplace_back(); }

void wait_for_copies(unsigned last) {
    auto& groups = running->copies;
    // The open group is none of those that are counted.
    for (; groups.size() > last + 1; groups.pop_front()) {
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    }
}

Registered::Registered(const char* name, Kernel kernel) {
    if (!kernels().emplace(name, kernel).second) std::fprintf(stderr, "emulation: two kernels are called %s\n", name), std::abort();
}

const Kernel* find(const char* name) {
    auto found = kernels().find(name);
    return found == kernels().end() ? nullptr : &found->second;
}

void launch(const Kernel& kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void** values) {
    std::lock_guard<std::mutex> guard(one_at_a_time);
    unsigned count = threads.x * threads.y * threads.z;
    if (count == 0 || count > 1024 || shared_bytes > MOST_SHARED) fail("a launch that no GPU would take");
    prepare(count);
    body = kernel.body, arguments = values, backwards = !backwards, any_now = any_before = false;
    place.blocks = blocks, place.threads = threads;
    uint64_t all = uint64_t(blocks.x) * blocks.y * blocks.z;
    for (uint64_t i = 0; i < all; i++) {
        uint64_t block = backwards ? all - 1 - i : i;
        place.block = {unsigned(block % blocks.x), unsigned(block / blocks.x % blocks.y), unsigned(block / blocks.x / blocks.y)};
        std::memset(shared, 0xff, shared_bytes);
        run_block(count);
    }
}

}  // namespace emulation
