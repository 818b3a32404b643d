// As much of NCCL as src/cuda calls, between ranks that are threads of a process or processes of a machine. They meet in a file
// that is named by the unique id: its first page, which all map, says who has given and taken what, and behind it is what they
// give. Calls are done late, and operations take a while. What ranks do differently is an error of all.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "launch.h"

namespace {

const int OK = 0, SYSTEM_ERROR = 2, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7;
const int UINT8 = 1, FLOAT16 = 6, FLOAT32 = 7, BFLOAT16 = 9, SUM = 0, MOST_RANKS = 16;
// Where in the file a rank puts what it gives to all, or to another one. Most of it is never written.
const size_t HEAD = 1 << 16, ROOM = size_t(1) << 30;
const std::chrono::microseconds DURATION(200), POLL(20);

struct Id {
    char text[128];
};
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

enum Kind { GATHER, SCATTER, REDUCE, BROADCAST, TRANSFER };
const char* const NAMES[] = {"all-gather", "reduce-scatter", "all-reduce", "broadcast", "transfer"};

// What a rank does.
struct Operation {
    int kind, type, root;
    uint64_t count;

    bool operator==(const Operation& o) const { return kind == o.kind && type == o.type && root == o.root && count == o.count; }
};
// Something that was given, and taken: so many times. Zeros, as the file is at first, are a good beginning.
struct Turns {
    std::atomic<uint64_t> given, taken;
    Operation operation;
};
struct Shared {
    std::atomic<int> joined, failed;
    int devices[MOST_RANKS];
    Turns all[MOST_RANKS];
    Turns pairs[MOST_RANKS][MOST_RANKS];
};
static_assert(sizeof(Shared) <= HEAD);

std::mutex& guard = *new std::mutex;
std::string& last_error = *new std::string;

size_t width(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 || type == FLOAT16 ? 2 : 1; }

float widen(uint16_t x, int type) { return type == FLOAT16 ? emulation::widen_f16(x) : emulation::value<float>(uint64_t(x) << 16); }
uint16_t narrow(float x, int type) {
    if (type == FLOAT16) return emulation::narrow_f16(x);
    auto bits = uint32_t(emulation::bits(x));
    return x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// Each sum is rounded to the type, as NCCL does it.
void add(char* sum, const char* more, size_t count, int type) {
    for (size_t i = 0; i < count; i++) {
        if (type == FLOAT32) {
            reinterpret_cast<float*>(sum)[i] += reinterpret_cast<const float*>(more)[i];
        } else {
            auto s = reinterpret_cast<uint16_t*>(sum);
            s[i] = narrow(widen(s[i], type) + widen(reinterpret_cast<const uint16_t*>(more)[i], type), type);
        }
    }
}

struct Communicator {
    int rank, size, file = -1;
    std::string path;
    Shared* shared = nullptr;
    std::atomic<int> state{IN_PROGRESS};
    std::atomic<bool> aborted{false};
    std::atomic<int> under_way{0};
    uint64_t turn = 0;
    // A call that is in progress: what it is going to do, and how often it was asked after.
    std::function<void()> call;
    int asked = 0;

    ~Communicator() {
        if (shared != nullptr) munmap(shared, HEAD);
        if (file >= 0) close(file);
    }

    void fail(int error, const std::string& why) {
        std::lock_guard<std::mutex> lock(guard);
        last_error = why;
        state = error;
    }

    // Returns false when it is not worth waiting any more.
    template <class Condition> bool wait(Condition condition) {
        while (!condition()) {
            if (aborted) return false;
            if (shared->failed) return fail(REMOTE_ERROR, "another rank has failed"), false;
            std::this_thread::sleep_for(POLL);
        }
        return true;
    }
    bool same(int other, const Operation& mine, const Operation& theirs) {
        if (mine == theirs) return true;
        auto say = [](int rank, const Operation& o) {
            return "rank " + std::to_string(rank) + " does the " + NAMES[o.kind] + " of " + std::to_string(o.count) + " of type " + std::to_string(o.type);
        };
        fail(INVALID_USAGE, say(rank, mine) + ", and " + say(other, theirs));
        shared->failed = 1;
        return false;
    }
    void put(int slot, const void* from, size_t bytes) {
        emulation::check_within(reinterpret_cast<uint64_t>(from), bytes);
        if (pwrite(file, from, bytes, off_t(HEAD + size_t(slot) * ROOM)) != ssize_t(bytes)) fail(SYSTEM_ERROR, "no room for what a rank gives");
    }
    void get(int slot, size_t offset, void* to, size_t bytes) {
        if (pread(file, to, bytes, off_t(HEAD + size_t(slot) * ROOM + offset)) != ssize_t(bytes)) fail(SYSTEM_ERROR, "what a rank gave is not there");
    }

    // Gives something, waits until all have given theirs, and takes what `take` wants of it.
    template <class Take> void together(Operation mine, const void* given, size_t bytes, Take take) {
        std::this_thread::sleep_for(DURATION);
        uint64_t now = ++turn;
        auto all = [&](auto of) {
            return wait([&] {
                for (int r = 0; r < size; r++) {
                    if (!of(shared->all[r])) return false;
                }
                return true;
            });
        };
        if (!all([&](Turns& t) { return t.taken >= now - 1; })) return;
        Turns& own = shared->all[rank];
        own.operation = mine;
        put(rank, given, bytes);
        own.given = now;
        if (!all([&](Turns& t) { return t.given >= now; })) return;
        for (int r = 0; r < size; r++) {
            if (!same(r, mine, shared->all[r].operation)) return;
        }
        take();
        own.taken = now;
    }
    // Elements of all ranks from one on, added up: a ring begins behind the rank that gets the sum.
    void sum(int last, size_t offset, char* out, size_t count, int type) {
        std::vector<char> more(count * width(type));
        for (int step = 1; step <= size; step++) {
            get((last + step) % size, offset, step == 1 ? out : more.data(), more.size());
            if (step > 1) add(out, more.data(), count, type);
        }
    }
    void transfer(int from, int to, void* memory, Operation mine) {
        std::this_thread::sleep_for(DURATION);
        Turns& turns = shared->pairs[from][to];
        int slot = MOST_RANKS + from * MOST_RANKS + to;
        if (rank == from) {
            uint64_t now = turns.given + 1;
            turns.operation = mine;
            put(slot, memory, mine.count);
            turns.given = now;
            // Done when it was taken: what would hang on a GPU hangs here.
            wait([&] { return turns.taken >= now; });
        } else {
            uint64_t now = turns.taken + 1;
            if (!wait([&] { return turns.given >= now; }) || !same(from, mine, turns.operation)) return;
            emulation::check_within(reinterpret_cast<uint64_t>(memory), mine.count);
            get(slot, 0, memory, mine.count);
            turns.taken = now;
        }
    }

    void join() {
        if (!wait([&] { return shared->joined >= size; })) return;
        if (rank == 0) unlink(path.c_str());
        for (int a = 0; a < size; a++) {
            for (int b = a + 1; b < size; b++) {
                if (shared->devices[a] != shared->devices[b]) continue;
                std::string both = "rank " + std::to_string(a) + " and rank " + std::to_string(b);
                return fail(INVALID_USAGE, "Duplicate GPU detected : " + both + " both on CUDA device " + std::to_string(shared->devices[a]));
            }
        }
        state = OK;
    }
};

// What the program holds; work that is under way has it too.
typedef std::shared_ptr<Communicator> Held;

Held& held(void* handle) { return *static_cast<Held*>(handle); }

// A group of this thread: what was wrong with one of its calls, and otherwise what they do. All are with one communicator here.
struct Group {
    int depth = 0, error = OK;
    Held communicator;
    std::vector<std::function<void()>> calls;
};
thread_local Group group;

// An error of a call is its group's too.
int wrong(int error) {
    if (group.depth > 0 && group.error == OK) group.error = error;
    return error;
}

// A call whose work is going to be given to a stream when it, or the group that it belongs to, is asked after.
int later(void* handle, void* stream, std::function<void(Communicator&)> work) {
    Held c = held(handle);
    if (c->state != OK) return wrong(c->state);
    if (c->call) return wrong(INVALID_USAGE);
    auto call = [c, stream, work = std::move(work)] {
        c->under_way++;
        emulation::hurry(stream);
        emulation::enqueue(stream, [c, work] {
            if (!c->aborted && c->state == OK) work(*c);
            c->under_way--;
        });
    };
    if (group.depth > 0) {
        if (group.communicator && group.communicator != c) return wrong(INVALID_USAGE);
        group.communicator = c;
        group.calls.push_back(call);
        return OK;
    }
    c->call = call;
    c->asked = 0;
    return IN_PROGRESS;
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) { return *version = 29900, OK; }
const char* ncclGetErrorString(int error) {
    switch (error) {
        case SYSTEM_ERROR: return "unhandled system error";
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        default: return "unknown result code";
    }
}
const char* ncclGetLastError(void*) {
    std::lock_guard<std::mutex> lock(guard);
    static thread_local std::string text;
    text = last_error;
    return text.c_str();
}
int ncclGetUniqueId(Id* id) {
    static std::atomic<int> made{0};
    long now = std::chrono::system_clock::now().time_since_epoch().count();
    std::snprintf(id->text, sizeof id->text, "/dev/shm/ferropt-emulated-nccl-%d-%d-%lx", int(getpid()), made++, now);
    return OK;
}
int ncclCommInitRankConfig(void** handle, int size, Id id, int rank, Config* config) {
    if (config->magic != 0xcafebeef || config->blocking != 0 || size > MOST_RANKS) return INVALID_ARGUMENT;
    auto c = std::make_shared<Communicator>();
    c->rank = rank, c->size = size, c->path = id.text;
    c->file = open(id.text, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (c->file < 0 || ftruncate(c->file, off_t(HEAD + (MOST_RANKS + MOST_RANKS * MOST_RANKS) * ROOM)) != 0) return SYSTEM_ERROR;
    void* mapped = mmap(nullptr, HEAD, PROT_READ | PROT_WRITE, MAP_SHARED, c->file, 0);
    if (mapped == MAP_FAILED) return SYSTEM_ERROR;
    c->shared = static_cast<Shared*>(mapped);
    c->shared->devices[rank] = emulation::device();
    c->shared->joined++;
    std::thread([c] { c->join(); }).detach();
    return *handle = new Held(c), IN_PROGRESS;
}
int ncclCommGetAsyncError(void* handle, int* error) {
    Communicator& c = *held(handle);
    if (c.call && c.asked++ > 0) std::exchange(c.call, nullptr)();
    return *error = c.call ? IN_PROGRESS : int(c.state), OK;
}
int ncclCommFinalize(void* handle) {
    Held c = held(handle);
    if (c->state != OK || c->call) return INVALID_USAGE;
    c->state = IN_PROGRESS;
    std::thread([c] {
        while (c->under_way > 0) std::this_thread::sleep_for(POLL);
        c->state = OK;
    }).detach();
    return IN_PROGRESS;
}
int ncclCommDestroy(void* handle) { return delete &held(handle), OK; }
int ncclCommAbort(void* handle) {
    held(handle)->aborted = true;
    unlink(held(handle)->path.c_str());
    return delete &held(handle), OK;
}

int ncclGroupStart() { return group.depth++, OK; }
int ncclGroupEnd() {
    if (group.depth == 0) return INVALID_USAGE;
    if (--group.depth > 0) return OK;
    Group ended = std::exchange(group, Group());
    if (ended.error != OK || !ended.communicator) return ended.error;
    ended.communicator->call = [calls = std::move(ended.calls)] {
        for (auto& call : calls) call();
    };
    ended.communicator->asked = 0;
    return IN_PROGRESS;
}

int ncclAllGather(const void* send, void* receive, size_t count, int type, void* handle, void* stream) {
    return later(handle, stream, [=](Communicator& c) {
        size_t bytes = count * width(type);
        c.together({GATHER, type, 0, count}, send, bytes, [&] {
            emulation::check_within(reinterpret_cast<uint64_t>(receive), bytes * size_t(c.size));
            for (int r = 0; r < c.size; r++) c.get(r, 0, static_cast<char*>(receive) + size_t(r) * bytes, bytes);
        });
    });
}
int ncclReduceScatter(const void* send, void* receive, size_t count, int type, int sum, void* handle, void* stream) {
    if (sum != SUM || type == UINT8) return wrong(INVALID_ARGUMENT);
    return later(handle, stream, [=](Communicator& c) {
        size_t bytes = count * width(type);
        c.together({SCATTER, type, 0, count}, send, bytes * size_t(c.size), [&] {
            emulation::check_within(reinterpret_cast<uint64_t>(receive), bytes);
            c.sum(c.rank, size_t(c.rank) * bytes, static_cast<char*>(receive), count, type);
        });
    });
}
int ncclAllReduce(const void* send, void* receive, size_t count, int type, int sum, void* handle, void* stream) {
    if (sum != SUM || type == UINT8) return wrong(INVALID_ARGUMENT);
    return later(handle, stream, [=](Communicator& c) {
        c.together({REDUCE, type, 0, count}, send, count * width(type), [&] {
            emulation::check_within(reinterpret_cast<uint64_t>(receive), count * width(type));
            size_t part = (count + size_t(c.size) - 1) / size_t(c.size);
            for (size_t r = 0, first = 0; first < count; r++, first += part) {
                size_t at = first * width(type);
                c.sum(int(r), at, static_cast<char*>(receive) + at, std::min(part, count - first), type);
            }
        });
    });
}
int ncclBroadcast(const void* send, void* receive, size_t count, int type, int root, void* handle, void* stream) {
    return later(handle, stream, [=](Communicator& c) {
        size_t bytes = count * width(type);
        c.together({BROADCAST, type, root, count}, send, c.rank == root ? bytes : 0, [&] {
            emulation::check_within(reinterpret_cast<uint64_t>(receive), bytes);
            c.get(root, 0, receive, bytes);
        });
    });
}
// A group does its transfers at the same time, which is not done here.
int ncclSend(const void* memory, size_t count, int type, int peer, void* handle, void* stream) {
    if (group.depth > 0) return wrong(INVALID_USAGE);
    return later(handle, stream, [=](Communicator& c) {
        c.transfer(c.rank, peer, const_cast<void*>(memory), {TRANSFER, type, c.rank, count * width(type)});
    });
}
int ncclRecv(void* memory, size_t count, int type, int peer, void* handle, void* stream) {
    if (group.depth > 0) return wrong(INVALID_USAGE);
    return later(handle, stream, [=](Communicator& c) {
        c.transfer(peer, c.rank, memory, {TRANSFER, type, peer, count * width(type)});
    });
}

}  // extern "C"
