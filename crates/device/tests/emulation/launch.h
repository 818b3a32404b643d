// What the emulated driver needs of the emulation.
#pragma once
#include <functional>

#include "emulate.h"

namespace emulation {
/// The kernel of a name, or null.
const Kernel* find(const char* name);
/// Runs a kernel on all threads of all blocks, and returns when all have ended.
void launch(const Kernel& kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void** values);
/// Gives work to a stream, or where it is captured, to whatever launches the graph.
void enqueue(void* stream, std::function<void()> work);
/// Has a stream work whether anything on this machine waits for it or not: others may.
void hurry(void* stream);
/// Ends the process if so many bytes are not within one piece of memory of a GPU.
void check_within(uint64_t start, size_t size);
/// Number of the GPU that this thread works with; -1 if none.
int device();
}  // namespace emulation
