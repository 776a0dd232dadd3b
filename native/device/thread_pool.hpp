// A few threads that help with a call's work and sleep between calls.
#pragma once

#include "device/signal.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace plb {

class pool {
public:
    // thread: 0 (the caller's) to size() - 1, for memory of one's own. Throws nothing.
    using task = void (*)(void * context, int32_t index, int32_t thread);

    // n_threads counts the caller's. Fewer are made where the system refuses more.
    explicit pool(int32_t n_threads);
    ~pool();
    pool(const pool &) = delete;
    pool & operator=(const pool &) = delete;

    int32_t size() const { return n_helpers_ + 1; }
    // Does task(context, 0..n-1), each once, in no order; returns when all are done. Allocates
    // nothing. One call at a time; a task must not call it.
    void run(int32_t n, task work, void * context) noexcept;

private:
    // A helper is offered a call's work, and takes the offer or, if it is late, finds it withdrawn:
    // no call waits for a thread that has not woken up yet.
    enum state : int32_t { IDLE, OFFERED, WORKING };

    struct alignas(64) helper {
        std::atomic<int32_t> state{IDLE};
        signal               wake;
        std::thread          thread;
    };

    void live(int32_t index);
    bool await_offer(helper & self);
    void work(int32_t thread);

    std::unique_ptr<helper[]> helpers_;
    int32_t n_helpers_ = 0;
    std::atomic<bool> stop_{false};
    signal            done_; // a helper with its part
    // the call
    task    task_    = nullptr;
    void *  context_ = nullptr;
    int32_t n_tasks_ = 0, n_offered_ = 0;
    alignas(64) std::atomic<int32_t> next_{0};
};

} // namespace plb
