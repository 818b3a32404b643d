// What the emulated driver needs of the emulation.
#pragma once
#include "emulate.h"

namespace emulation {
/// The kernel of a name, or null.
Body find(const char* name);
/// Runs a kernel on all threads of all blocks, and returns when all have ended.
void launch(Body kernel, dim3 blocks, dim3 threads, size_t shared_bytes, void** values);
}  // namespace emulation
