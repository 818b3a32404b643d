// Streams that work beside the program and beside each other, and points in their work that others can wait for.
#pragma once
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace emulation {

/// A point in a stream's work; one that is reached already, until it is made by a stream.
class Event {
public:
    bool reached() const;
    void wait() const;
    /// When it was reached, by a clock that all share.
    double milliseconds() const;

private:
    friend class Stream;
    struct Point;
    void want() const;
    std::shared_ptr<Point> point;
};

/// A piece of a graph: which one it is, and of which kernel if it starts one.
struct Node {
    size_t number;
    const void* kernel;
    std::function<void()> work;
};

/// Work in its order.
typedef std::vector<std::shared_ptr<Node>> Graph;

/// A thread does its work in order. It begins late, so that whoever forgets to wait for it finds nothing done. One that begins by
/// waiting for another stream does nothing at all until something waits for it, but for what NCCL gives it, for which other
/// ranks wait.
class Stream {
public:
    Stream();
    /// Waits until all is done.
    ~Stream();
    void give(std::function<void()> work);
    /// Given first, makes a stream that works only for who waits for it.
    void give_wait(Event event);
    /// It works from now on whether anybody waits for it or not.
    void hurry();
    /// The end of all that it was given so far.
    Event end();

    // While it is captured: what, by which thread, and whether something was asked for that a graph cannot do.
    Graph* graph = nullptr;
    std::thread::id captor;
    bool invalid = false;

private:
    friend class Event;
    struct Work;
    /// As give, to be called by who has the guard of the work.
    void give_locked(std::function<void()> work);
    std::shared_ptr<Work> work;
    std::thread worker;
};

}  // namespace emulation
