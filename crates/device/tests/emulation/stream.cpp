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

struct Event::Point {
    std::mutex guard;
    std::condition_variable changed;
    bool reached = false;
    double at = 0.0;

    void reach() {
        std::lock_guard<std::mutex> lock(guard);
        reached = true, at = now();
        changed.notify_all();
    }
};

bool Event::reached() const {
    if (point == nullptr) return true;
    std::lock_guard<std::mutex> lock(point->guard);
    return point->reached;
}

void Event::wait() const {
    if (point == nullptr) return;
    std::unique_lock<std::mutex> lock(point->guard);
    point->changed.wait(lock, [&] { return point->reached; });
}

double Event::milliseconds() const {
    if (point == nullptr) return 0.0;
    std::lock_guard<std::mutex> lock(point->guard);
    return point->at;
}

struct Stream::Work {
    std::mutex guard;
    std::condition_variable changed;
    std::deque<std::function<void()>> left;
    bool ending = false;

    void run() {
        for (;;) {
            std::function<void()> next;
            {
                std::unique_lock<std::mutex> lock(guard);
                bool idle = left.empty();
                changed.wait(lock, [&] { return ending || !left.empty(); });
                if (left.empty()) return;
                if (idle) {
                    lock.unlock();
                    std::this_thread::sleep_for(LATE);
                    lock.lock();
                }
                next = std::move(left.front());
                left.pop_front();
            }
            next();
        }
    }
};

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
    if (!worker.joinable()) worker = std::thread([work = work] { work->run(); });
    work->left.push_back(std::move(piece));
    work->changed.notify_all();
}

Event Stream::end() {
    Event event;
    event.point = std::make_shared<Event::Point>();
    give([point = event.point] { point->reach(); });
    return event;
}

}  // namespace emulation
