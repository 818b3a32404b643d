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

/// A thread does its work in order. It begins late, so that whoever forgets to wait for it finds nothing done.
class Stream {
public:
    Stream();
    /// Waits until all is done.
    ~Stream();
    void give(std::function<void()> work);
    /// The end of all that it was given so far.
    Event end();

    // While it is captured: what, by which thread, and whether something was asked for that a graph cannot do.
    Graph* graph = nullptr;
    std::thread::id captor;
    bool invalid = false;

private:
    struct Work;
    std::shared_ptr<Work> work;
    std::thread worker;
};

}  // namespace emulation
