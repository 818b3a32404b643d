#include "stream.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

namespace emulation {

namespace {

// How long a stream that had nothing to do takes to begin.
const std::chrono::microseconds LATE(100);

double now() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

struct Stream::Work {
    std::mutex guard;
    std::condition_variable changed;
    std::deque<std::function<void()>> left;
    bool ending = false;
    // Pieces of work so far, and how many of them are to be done, of a stream that waits to be asked.
    size_t given = 0, done = 0, wanted = 0;
    bool waits = false;

    bool goes_on() { return !left.empty() && (!waits || done < wanted); }

    void run() {
        for (;;) {
            std::function<void()> next;
            {
                std::unique_lock<std::mutex> lock(guard);
                bool idle = !goes_on();
                changed.wait(lock, [&] { return ending || goes_on(); });
                if (left.empty()) return;
                if (idle) {
                    lock.unlock();
                    std::this_thread::sleep_for(LATE);
                    lock.lock();
                }
                next = std::move(left.front());
                left.pop_front();
                done++;
            }
            next();
        }
    }

    void want(size_t pieces) {
        std::lock_guard<std::mutex> lock(guard);
        if (pieces > wanted) wanted = pieces;
        changed.notify_all();
    }
};

struct Event::Point {
    std::mutex guard;
    std::condition_variable changed;
    bool reached = false;
    double at = 0.0;
    // Of which stream, and behind how many pieces of its work.
    std::weak_ptr<Stream::Work> work;
    size_t place = 0;

    void reach() {
        std::lock_guard<std::mutex> lock(guard);
        reached = true, at = now();
        changed.notify_all();
    }
};

void Event::want() const {
    if (auto work = point->work.lock()) work->want(point->place);
}

bool Event::reached() const {
    if (point == nullptr) return true;
    want();
    std::lock_guard<std::mutex> lock(point->guard);
    return point->reached;
}

void Event::wait() const {
    if (point == nullptr) return;
    want();
    std::unique_lock<std::mutex> lock(point->guard);
    point->changed.wait(lock, [&] { return point->reached; });
}

double Event::milliseconds() const {
    if (point == nullptr) return 0.0;
    std::lock_guard<std::mutex> lock(point->guard);
    return point->at;
}

Stream::Stream() : work(std::make_shared<Work>()) {}

Stream::~Stream() {
    {
        std::lock_guard<std::mutex> lock(work->guard);
        work->ending = true;
        work->changed.notify_all();
    }
    if (worker.joinable()) worker.join();
    delete graph;
}

void Stream::give(std::function<void()> piece) {
    std::lock_guard<std::mutex> lock(work->guard);
    give_locked(std::move(piece));
}

void Stream::give_locked(std::function<void()> piece) {
    if (!worker.joinable()) worker = std::thread([work = work] { work->run(); });
    work->left.push_back(std::move(piece));
    work->given++;
    work->changed.notify_all();
}

void Stream::give_wait(Event event) {
    {
        std::lock_guard<std::mutex> lock(work->guard);
        if (work->given == 0) work->waits = true;
    }
    give([event] { event.wait(); });
}

void Stream::hurry() {
    std::lock_guard<std::mutex> lock(work->guard);
    work->waits = false;
    work->changed.notify_all();
}

Event Stream::end() {
    Event event;
    event.point = std::make_shared<Event::Point>();
    // At once: another thread's piece in between would have the place, and nobody would ask for this one.
    std::lock_guard<std::mutex> lock(work->guard);
    event.point->work = work, event.point->place = work->given + 1;
    give_locked([point = event.point] { point->reach(); });
    return event;
}

}  // namespace emulation
