// One thread waits for another one.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace plb {

// Wakes a thread that waits for what others store in atomics. Costs a load where no thread waits.
class signal {
public:
    // ready() reads what was stored before notify(); false when the time is over.
    template <typename Ready>
    bool wait(Ready ready, std::chrono::nanoseconds timeout = std::chrono::hours(8760)) {
        if (ready()) {
            return true;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        n_waiting_.fetch_add(1);
        const bool is_ready = wake_.wait_for(lock, timeout, ready);
        n_waiting_.fetch_sub(1);
        return is_ready;
    }

    // Either we see here that a thread waits, or it has seen what we stored.
    void notify() {
        if (n_waiting_.load() > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            wake_.notify_all();
        }
    }

private:
    std::mutex              mutex_;
    std::condition_variable wake_;
    std::atomic<int32_t>    n_waiting_{0};
};

} // namespace plb
