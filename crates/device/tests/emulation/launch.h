// What the emulated driver needs of the emulation.
#pragma once
#include <functional>

#include "emulate.h"

namespace emulation {
/// The kernel of a name, or null.
const Kernel* find(const char* name);
/// Runs a kernel on all threads of all blocks, and returns when all have ended.
void launch(const Kernel& kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void** values);
/// Does work of a stream: at once, or where the stream is captured, whenever the graph is launched.
void enqueue(void* stream, std::function<void()> work);
}  // namespace emulation
