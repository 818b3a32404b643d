// As much of CUDA's driver (libcuda.so.1) and of NVRTC as src/cuda calls, for GPUs that are emulated: one, or as many as
// FERROPT_EMULATED_GPUS says. Device memory and pinned memory are the processor's, a stream does its work when it gets round to
// it (stream.h), unless it is captured, and a "compiled" program is a name: its kernels are in this library. After as many kernels
// as FERROPT_EMULATED_FAILURE says, one goes wrong, and with it everything that comes later, as on a GPU. The driver's version is
// FERROPT_EMULATED_VERSION, if it is set; with FERROPT_EMULATED_LATE=1 what is uploaded is read when the stream gets round to it, as
// by GPUs that reach the processor's ordinary memory, and memory is given back without waiting for work that uses it, as a driver may.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "launch.h"
#include "stream.h"

using emulation::Event;
using emulation::Graph;
using emulation::Node;
using emulation::Stream;

namespace {

const int OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, NO_IMAGE = 200, NO_CONTEXT = 201, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL = 700, CAPTURING = 900, INVALIDATED = 901;
const size_t TOTAL = size_t(4) << 30, BORDER = 256;
const unsigned char MARK = 0xa5;

const int MOST_GPUS = 16;

// Shared memory of a block: all that it can have, what it has unless it was asked for more, and how much of that are a kernel's own
// variables.
const size_t MOST_SHARED = 227 << 10, SHARED = 48 << 10, OWN_SHARED = 512;

// What every program is compiled to.
const char CODE[] = "emulated";

// Blocks in the second and third direction: of a GPU 65,535, for which a test would take too long.
const unsigned MOST_BLOCKS = 4095;

bool late() {
    const char* text = std::getenv("FERROPT_EMULATED_LATE");
    return text != nullptr && std::atoi(text) != 0;
}

// A GPU, which is its own context.
struct Gpu {
    int number;
    size_t used;
    std::vector<Stream*> streams;
    // Held while memory is given back, which waits for all that the GPU does: others who ask it something wait as long.
    std::mutex busy;
};
// The one that this thread works with.
thread_local Gpu* current;

// Work of streams may run until the very end, so none of this is ever destroyed.
std::mutex& guard = *new std::mutex;
std::map<uint64_t, size_t>& pieces = *new std::map<uint64_t, size_t>;
// Shared memory that launches of a kernel may ask for, where that was said.
std::map<void*, size_t>& allowed = *new std::map<void*, size_t>;

bool may_have(void* function, size_t shared) {
    std::lock_guard<std::mutex> lock(guard);
    auto said = allowed.find(function);
    return shared <= (said == allowed.end() ? SHARED - OWN_SHARED : said->second);
}

Gpu* gpus() {
    static Gpu* all = [] {
        auto made = new Gpu[MOST_GPUS]();
        for (int i = 0; i < MOST_GPUS; i++) made[i].number = i;
        return made;
    }();
    return all;
}

int count() {
    const char* text = std::getenv("FERROPT_EMULATED_GPUS");
    int wanted = text == nullptr ? 1 : std::atoi(text);
    return wanted < 0 ? 0 : wanted > MOST_GPUS ? MOST_GPUS : wanted;
}

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

// The stream that this thread captures.
thread_local Stream* captured;

// CUDA_KERNEL_NODE_PARAMS_v1.
struct KernelNode {
    void* function;
    unsigned blocks[3], threads[3], shared;
    void **arguments, **extra;
};

// What starting a kernel does. Arguments are those of now, whenever it runs.
std::function<void()> work_of(const KernelNode& node) {
    auto kernel = static_cast<const emulation::Kernel*>(node.function);
    std::vector<std::vector<char>> values;
    for (size_t i = 0; i < kernel->sizes.size(); i++) {
        auto value = static_cast<const char*>(node.arguments[i]);
        values.emplace_back(value, value + kernel->sizes[i]);
    }
    dim3 blocks{node.blocks[0], node.blocks[1], node.blocks[2]}, threads{node.threads[0], node.threads[1], node.threads[2]};
    return [kernel, values, blocks, threads, shared = node.shared] {
        std::vector<void*> pointers;
        for (auto& value : values) pointers.push_back(const_cast<char*>(value.data()));
        emulation::launch(*kernel, blocks, threads, shared, pointers.data());
    };
}

// What a graph cannot do, on a stream: an error, after which the capture is worth nothing.
std::atomic<bool> failed;

// For all that this thread's GPU does.
void wait_for_all() {
    std::vector<Event> ends;
    {
        std::lock_guard<std::mutex> lock(guard);
        for (Stream* stream : current->streams) ends.push_back(stream->end());
    }
    for (Event& end : ends) end.wait();
}

// Whether this kernel is the one that goes wrong, or comes later. Nothing is under way then: the process may end at any time.
bool fails() {
    static const char* text = std::getenv("FERROPT_EMULATED_FAILURE");
    static std::atomic<long> left = text == nullptr ? 0 : std::atol(text);
    if (text == nullptr || failed || left-- > 0) return failed;
    wait_for_all();
    return failed = true;
}

int not_captured(void* stream) {
    if (failed) return ILLEGAL;
    auto s = static_cast<Stream*>(stream);
    if (s->graph == nullptr) return OK;
    s->invalid = true;
    return CAPTURING;
}

// What a thread may not do while it captures.
int not_while_capturing() { return failed ? ILLEGAL : captured == nullptr ? OK : not_captured(captured); }

struct Name {
    int error;
    const char *name, *text;
};
const Name NAMES[] = {
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NO_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {NO_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {ILLEGAL, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CAPTURING, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {INVALID, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
};
const Name& named(int error) {
    for (const Name& name : NAMES) {
        if (name.error == error) return name;
    }
    return NAMES[sizeof NAMES / sizeof *NAMES - 1];
}

}  // namespace

void emulation::check_within(uint64_t start, size_t size) {
    if (size == 0) return;
    std::lock_guard<std::mutex> lock(guard);
    auto after = pieces.upper_bound(start);
    if (after != pieces.begin()) {
        auto piece = *std::prev(after);
        if (start + size <= piece.first + piece.second) return check_borders(piece.first, piece.second);
    }
    std::fprintf(stderr, "emulation: %zu bytes at %#zx are not in memory of the device\n", size, size_t(start));
    std::abort();
}

void emulation::enqueue(void* stream, std::function<void()> work) {
    auto s = static_cast<Stream*>(stream);
    if (s->graph == nullptr) return s->give(std::move(work));
    s->graph->push_back(std::make_shared<Node>(Node{s->graph->size(), nullptr, std::move(work)}));
}

void emulation::hurry(void* stream) { static_cast<Stream*>(stream)->hurry(); }

int emulation::device() { return current == nullptr ? -1 : current->number; }

extern "C" {

int cuInit(unsigned) { return OK; }
int cuDriverGetVersion(int* version) {
    const char* text = std::getenv("FERROPT_EMULATED_VERSION");
    return *version = text == nullptr ? 13000 : std::atoi(text), OK;
}
int cuDeviceGetCount(int* number) { return *number = count(), OK; }
int cuDeviceGet(int* device, int number) { return *device = number, number >= 0 && number < count() ? OK : INVALID; }
int cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size_t(size), "emulated GPU"), OK; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = 4, OK;           // multiprocessors
        case 75: return *value = 8, OK;           // compute capability, major
        case 76: return *value = 0, OK;           // and minor
        case 88: return *value = late(), OK;  // whether it reaches the processor's ordinary memory
        case 97: return *value = int(MOST_SHARED), OK;  // shared memory of a block
        default: return INVALID;
    }
}
int cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = TOTAL, OK; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &gpus()[device], OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return OK; }
int cuCtxSetCurrent(void* context) { return current = static_cast<Gpu*>(context), OK; }
int cuGetErrorName(int error, const char** name) { return *name = named(error).name, OK; }
int cuGetErrorString(int error, const char** text) { return *text = named(error).text, OK; }

int cuMemGetInfo_v2(size_t* left, size_t* total) {
    std::lock_guard<std::mutex> lock(guard);
    return *left = TOTAL - current->used, *total = TOTAL, OK;
}
int cuMemAlloc_v2(uint64_t* start, size_t size) {
    if (int error = not_while_capturing()) return error;
    if (current == nullptr) return NO_CONTEXT;
    std::lock_guard<std::mutex> alone(current->busy);
    std::lock_guard<std::mutex> lock(guard);
    if (size == 0) return INVALID;
    if (size > TOTAL - current->used) return OUT_OF_MEMORY;
    if (!take(start, size)) return OUT_OF_MEMORY;
    current->used += size;
    return OK;
}
// Waits for all that the GPU does, as the driver may, which keeps others waiting meanwhile.
int cuMemFree_v2(uint64_t start) {
    if (int error = not_while_capturing()) return error;
    if (current == nullptr) return NO_CONTEXT;
    std::lock_guard<std::mutex> alone(current->busy);
    if (!late()) wait_for_all();
    std::lock_guard<std::mutex> lock(guard);
    size_t size = give_back(start);
    current->used -= size;
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
    if (int error = not_while_capturing()) return error;
    std::lock_guard<std::mutex> lock(guard);
    return give_back(reinterpret_cast<uint64_t>(start)) > 0 ? OK : INVALID;
}
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void* stream) {
    if (failed) return ILLEGAL;
    emulation::enqueue(stream, [=] {
        emulation::check_within(to, size);
        std::memset(reinterpret_cast<void*>(to), value, size);
    });
    return OK;
}
// Memory of the processor is never pinned here, so that copies of it cannot be captured; what is copied from it is taken at once,
// unless the GPU reaches it.
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t size, void* stream) {
    if (int error = not_captured(stream)) return error;
    auto bytes = static_cast<const char*>(from);
    if (late()) {
        emulation::enqueue(stream, [=] {
            emulation::check_within(to, size);
            std::memcpy(reinterpret_cast<void*>(to), bytes, size);
        });
        return OK;
    }
    emulation::enqueue(stream, [to, values = std::vector<char>(bytes, bytes + size)] {
        emulation::check_within(to, values.size());
        std::memcpy(reinterpret_cast<void*>(to), values.data(), values.size());
    });
    return OK;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t size, void* stream) {
    if (int error = not_captured(stream)) return error;
    emulation::enqueue(stream, [=] {
        emulation::check_within(from, size);
        std::memcpy(to, reinterpret_cast<void*>(from), size);
    });
    return OK;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t size, void* stream) {
    if (failed) return ILLEGAL;
    emulation::enqueue(stream, [=] {
        emulation::check_within(to, size);
        emulation::check_within(from, size);
        std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), size);
    });
    return OK;
}

int cuStreamCreate(void** stream, unsigned) {
    std::lock_guard<std::mutex> lock(guard);
    if (current == nullptr) return NO_CONTEXT;
    auto made = new Stream;
    current->streams.push_back(made);
    return *stream = made, OK;
}
// Its work is done first, as the driver does it, which does not wait for that.
int cuStreamDestroy_v2(void* stream) {
    if (captured == stream) captured = nullptr;
    {
        std::lock_guard<std::mutex> lock(guard);
        for (int i = 0; i < MOST_GPUS; i++) {
            auto& all = gpus()[i].streams;
            for (size_t j = 0; j < all.size(); j++) {
                if (all[j] == stream) all.erase(all.begin() + long(j)), j--;
            }
        }
    }
    return delete static_cast<Stream*>(stream), OK;
}
int cuStreamSynchronize(void* stream) {
    if (int error = not_captured(stream)) return error;
    return static_cast<Stream*>(stream)->end().wait(), OK;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned flags) {
    if (int error = not_captured(stream)) return error;
    if (flags != 0) return INVALID;
    return static_cast<Stream*>(stream)->give_wait(*static_cast<Event*>(event)), OK;
}

// Only the mode of one thread: what other threads do is not forbidden.
int cuStreamBeginCapture_v2(void* stream, unsigned mode) {
    auto s = static_cast<Stream*>(stream);
    if (mode != 1 || s->graph != nullptr || captured != nullptr) return INVALID;
    s->graph = new Graph, s->captor = std::this_thread::get_id(), s->invalid = false;
    return captured = s, OK;
}
int cuStreamEndCapture(void* stream, void** graph) {
    auto s = static_cast<Stream*>(stream);
    *graph = nullptr;
    if (s->graph == nullptr || s->captor != std::this_thread::get_id()) return INVALID;
    captured = nullptr;
    Graph* made = std::exchange(s->graph, nullptr);
    if (s->invalid) return delete made, INVALIDATED;
    return *graph = made, OK;
}
int cuStreamGetCaptureInfo_v2(void* stream, int* state, uint64_t*, void**, void* const** last, size_t* count) {
    auto s = static_cast<Stream*>(stream);
    *state = s->graph == nullptr ? 0 : s->invalid ? 2 : 1;
    if (*state != 1) return OK;
    static thread_local void* node;
    *count = s->graph->empty() ? 0 : 1;
    if (*count == 1) node = s->graph->back().get();
    return *last = &node, OK;
}
// The nodes of what is made are its own, in the same order.
int cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long flags) {
    if (flags != 0 || graph == nullptr) return INVALID;
    auto all = new Graph;
    for (auto& node : *static_cast<Graph*>(graph)) all->push_back(std::make_shared<Node>(*node));
    return *made = all, OK;
}
int cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), OK; }
int cuGraphLaunch(void* graph, void* stream) {
    if (int error = not_captured(stream)) return error;
    std::vector<std::function<void()>> now;
    for (auto& node : *static_cast<Graph*>(graph)) {
        if (node->kernel != nullptr && fails()) return ILLEGAL;
        now.push_back(node->work);
    }
    static_cast<Stream*>(stream)->give([now] {
        for (auto& work : now) work();
    });
    return OK;
}
// What was launched before does not change.
int cuGraphExecKernelNodeSetParams(void* graph, void* node, const KernelNode* params) {
    if (failed) return ILLEGAL;
    auto& all = *static_cast<Graph*>(graph);
    size_t number = static_cast<Node*>(node)->number;
    if (number >= all.size() || all[number]->kernel == nullptr || all[number]->kernel != params->function) return INVALID;
    all[number]->work = work_of(*params);
    return OK;
}
int cuGraphExecDestroy(void* graph) { return delete static_cast<Graph*>(graph), OK; }

int cuEventCreate(void** event, unsigned) { return *event = new Event, OK; }
int cuEventDestroy_v2(void* event) {
    if (current == nullptr) return NO_CONTEXT;
    std::lock_guard<std::mutex> alone(current->busy);
    return delete static_cast<Event*>(event), OK;
}
int cuEventRecord(void* event, void* stream) {
    if (int error = not_captured(stream)) return error;
    return *static_cast<Event*>(event) = static_cast<Stream*>(stream)->end(), OK;
}
int cuEventQuery(void* event) {
    if (current == nullptr) return NO_CONTEXT;
    std::lock_guard<std::mutex> alone(current->busy);
    return static_cast<Event*>(event)->reached() ? OK : NOT_READY;
}
int cuEventSynchronize(void* event) { return static_cast<Event*>(event)->wait(), OK; }
int cuEventElapsedTime(float* ms, void* start, void* end) {
    return *ms = float(static_cast<Event*>(end)->milliseconds() - static_cast<Event*>(start)->milliseconds()), OK;
}

int cuModuleLoadData(void** module, const void* image) {
    if (std::strcmp(static_cast<const char*>(image), CODE) != 0) return NO_IMAGE;
    return *module = const_cast<void*>(image), OK;
}
int cuModuleUnload(void*) { return OK; }
int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = const_cast<emulation::Kernel*>(emulation::find(name));
    return *function == nullptr ? NOT_FOUND : OK;
}
// Which kernels have how much is not known here: more than any has that is started with more.
int cuFuncGetAttribute(int* value, int attribute, void*) {
    return attribute == 1 ? (*value = int(OWN_SHARED), OK) : INVALID;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value < 0 || size_t(value) + OWN_SHARED > MOST_SHARED) return INVALID;
    std::lock_guard<std::mutex> lock(guard);
    return allowed[function] = size_t(value), OK;
}
int cuLaunchKernel(void* function, unsigned bx, unsigned by, unsigned bz, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** arguments, void**) {
    if (bx == 0 || by == 0 || bz == 0 || by > MOST_BLOCKS || bz > MOST_BLOCKS || !may_have(function, shared)) return INVALID;
    auto s = static_cast<Stream*>(stream);
    // What is captured does not run yet.
    if (s->graph == nullptr ? fails() : failed.load()) return ILLEGAL;
    emulation::enqueue(stream, work_of({function, {bx, by, bz}, {tx, ty, tz}, shared, arguments, nullptr}));
    if (s->graph != nullptr) s->graph->back()->kernel = function;
    return OK;
}

// ---- NVRTC

const char* nvrtcGetErrorString(int) { return "an error that the emulation does not make"; }
int nvrtcCreateProgram(void** program, const char*, const char*, int, const char**, const char**) {
    static int the_one;
    return *program = &the_one, OK;
}
int nvrtcDestroyProgram(void**) { return OK; }
int nvrtcCompileProgram(void*, int, const char**) { return OK; }
int nvrtcGetProgramLogSize(void*, size_t* size) { return *size = 1, OK; }
int nvrtcGetProgramLog(void*, char* log) { return *log = 0, OK; }
int nvrtcGetCUBINSize(void*, size_t* size) { return *size = sizeof CODE, OK; }
int nvrtcGetCUBIN(void*, char* cubin) { return std::memcpy(cubin, CODE, sizeof CODE), OK; }

}  // extern "C"
