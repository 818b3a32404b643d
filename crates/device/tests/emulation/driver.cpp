// As much of CUDA's driver (libcuda.so.1) and of NVRTC as src/cuda calls, for a GPU that is emulated. Device memory and pinned
// memory are the processor's, a stream does everything at once, and a "compiled" program is a name: its kernels are in this library.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "launch.h"

namespace {

const int OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NOT_FOUND = 500;
const size_t TOTAL = size_t(4) << 30, BORDER = 256;
const unsigned char MARK = 0xa5;

std::mutex guard;
std::map<uint64_t, size_t> pieces;
size_t used;

// Every piece has borders that must stay as they are.
void check_borders(uint64_t start, size_t size) {
    auto bytes = reinterpret_cast<unsigned char*>(start);
    for (size_t i = 0; i < BORDER; i++) {
        if (bytes[-1 - long(i)] != MARK || bytes[size + i] != MARK) {
            std::fprintf(stderr, "emulation: memory beside a piece of %zu bytes was written to\n", size);
            std::abort();
        }
    }
}

// A copy or a fill lies within one piece.
void check_within(uint64_t start, size_t size) {
    std::lock_guard<std::mutex> lock(guard);
    auto after = pieces.upper_bound(start);
    if (after != pieces.begin()) {
        auto piece = *std::prev(after);
        if (start + size <= piece.first + piece.second) return check_borders(piece.first, piece.second);
    }
    std::fprintf(stderr, "emulation: %zu bytes at %#zx are not in memory of the device\n", size, size_t(start));
    std::abort();
}

// A new piece; memory that nobody has written to holds NaN. `guard` is held.
bool take(uint64_t* start, size_t size) {
    size_t whole = (size + 2 * BORDER + BORDER - 1) / BORDER * BORDER;
    auto bytes = static_cast<unsigned char*>(std::aligned_alloc(BORDER, whole));
    if (bytes == nullptr) return false;
    std::memset(bytes, MARK, BORDER);
    std::memset(bytes + BORDER, 0xff, size);
    std::memset(bytes + BORDER + size, MARK, whole - BORDER - size);
    *start = reinterpret_cast<uint64_t>(bytes + BORDER);
    pieces[*start] = size;
    return true;
}

// Its size, or 0 if there is no such piece. `guard` is held.
size_t give_back(uint64_t start) {
    auto piece = pieces.find(start);
    if (piece == pieces.end()) return 0;
    size_t size = piece->second;
    check_borders(start, size);
    pieces.erase(piece);
    std::free(reinterpret_cast<unsigned char*>(start) - BORDER);
    return size;
}

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int* version) { return *version = 13000, OK; }
int cuDeviceGetCount(int* count) { return *count = 1, OK; }
int cuDeviceGet(int* device, int number) { return *device = number, number == 0 ? OK : INVALID; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size_t(size), "emulated GPU"), OK; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = 4, OK;           // multiprocessors
        case 75: return *value = 8, OK;           // compute capability, major
        case 76: return *value = 0, OK;           // and minor
        case 97: return *value = 227 << 10, OK;   // shared memory of a block
        default: return INVALID;
    }
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, OK; }
int cuDevicePrimaryCtxRetain(void** context, int) {
    static int the_one;
    return *context = &the_one, OK;
}
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxSetCurrent(void*) { return OK; }
int cuGetErrorName(int error, const char** name) {
    return *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == NOT_FOUND ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR_INVALID_VALUE", OK;
}
int cuGetErrorString(int error, const char** text) {
    return *text = error == OUT_OF_MEMORY ? "out of memory" : error == NOT_FOUND ? "named symbol not found" : "invalid argument", OK;
}

int cuMemGetInfo_v2(size_t* left, size_t* total) {
    std::lock_guard<std::mutex> lock(guard);
    return *left = TOTAL - used, *total = TOTAL, OK;
}
int cuMemAlloc_v2(uint64_t* start, size_t size) {
    std::lock_guard<std::mutex> lock(guard);
    if (size == 0) return INVALID;
    if (size > TOTAL - used) return OUT_OF_MEMORY;
    if (!take(start, size)) return OUT_OF_MEMORY;
    used += size;
    return OK;
}
int cuMemFree_v2(uint64_t start) {
    std::lock_guard<std::mutex> lock(guard);
    size_t size = give_back(start);
    used -= size;
    return size > 0 ? OK : INVALID;
}
// Memory of the host that kernels reach too.
int cuMemHostAlloc(void** start, size_t size, unsigned flags) {
    std::lock_guard<std::mutex> lock(guard);
    const unsigned MAPPED = 2;
    if (size == 0 || !(flags & MAPPED)) return INVALID;
    uint64_t address;
    if (!take(&address, size)) return OUT_OF_MEMORY;
    return *start = reinterpret_cast<void*>(address), OK;
}
int cuMemFreeHost(void* start) {
    std::lock_guard<std::mutex> lock(guard);
    return give_back(reinterpret_cast<uint64_t>(start)) > 0 ? OK : INVALID;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void*) {
    check_within(to, size);
    return std::memset(reinterpret_cast<void*>(to), value, size), OK;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void*) {
    check_within(to, size);
    return std::memcpy(reinterpret_cast<void*>(to), from, size), OK;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void*) {
    check_within(from, size);
    return std::memcpy(to, reinterpret_cast<void*>(from), size), OK;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t size, void*) {
    check_within(to, size);
    check_within(from, size);
    return std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size), OK;
}

int cuStreamCreate(void** stream, unsigned) { return *stream = nullptr, OK; }
int cuStreamDestroy_v2(void*) { return OK; }
int cuStreamSynchronize(void*) { return OK; }
int cuEventCreate(void** event, unsigned) { return *event = new double(0.0), OK; }
int cuEventDestroy_v2(void* event) { return delete static_cast<double*>(event), OK; }
int cuEventRecord(void* event, void*) { return *static_cast<double*>(event) = now_ms(), OK; }
int cuEventSynchronize(void*) { return OK; }
int cuEventElapsedTime(float* ms, void* start, void* end) {
    return *ms = float(*static_cast<double*>(end) - *static_cast<double*>(start)), OK;
}

int cuModuleLoadData(void** module, const void* image) { return *module = const_cast<void*>(image), OK; }
int cuModuleUnload(void*) { return OK; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = reinterpret_cast<void*>(emulation::find(name));
    return *function == nullptr ? NOT_FOUND : OK;
}
int cuFuncSetAttribute(void*, int, int) { return OK; }
int cuLaunchKernel(void* function, unsigned bx, unsigned by, unsigned bz, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void*, void** arguments, void**) {
    if (bx == 0 || by == 0 || bz == 0 || by > 65535 || bz > 65535) return INVALID;
    emulation::launch(reinterpret_cast<emulation::Body>(function), {bx, by, bz}, {tx, ty, tz}, shared, arguments);
    return OK;
}

// ---- NVRTC

int nvrtcVersion(int* major, int* minor) { return *major = 0, *minor = 0, OK; }
const char* nvrtcGetErrorString(int) { return "an error that the emulation does not make"; }
int nvrtcCreateProgram(void** program, const char*, const char*, int, const char**, const char**) {
    static int the_one;
    return *program = &the_one, OK;
}
int nvrtcDestroyProgram(void**) { return OK; }
int nvrtcCompileProgram(void*, int, const char**) { return OK; }
int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = 1, OK; }
int nvrtcGetProgramLog(void*, char* log) { return *log = 0, OK; }
int nvrtcGetCUBINSize(void*, size_t* size) { return *size = 9, OK; }
int nvrtcGetCUBIN(void*, char* cubin) { return std::memcpy(cubin, "emulated", 9), OK; }

}  // extern "C"
