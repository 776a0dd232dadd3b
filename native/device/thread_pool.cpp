#include "device/thread_pool.hpp"

#include <algorithm>
#include <chrono>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace plb {

namespace {

constexpr auto SPIN = std::chrono::microseconds(20); // before a helper parks

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Signals are the business of the threads that were there before us.
template <typename Body>
void without_signals(Body body) {
#if defined(__unix__) || defined(__APPLE__)
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    body();
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#else
    body();
#endif
}

} // namespace

pool::pool(int32_t n_threads) : helpers_(new helper[(size_t) std::max(0, n_threads - 1)]) {
    without_signals([&] {
        for (int32_t i = 0; i + 1 < n_threads; ++i) {
            try {
                helpers_[i].thread = std::thread([this, i] { live(i); });
                n_helpers_ = i + 1;
            } catch (const std::system_error &) {
                return;
            }
        }
    });
}

pool::~pool() {
    stop_.store(true);
    for (int32_t i = 0; i < n_helpers_; ++i) {
        {
            std::lock_guard<std::mutex> lock(helpers_[i].mutex);
        }
        helpers_[i].wake.notify_one();
    }
    for (int32_t i = 0; i < n_helpers_; ++i) {
        helpers_[i].thread.join();
    }
}

// True with an offer, false at the end. Spins for the next call of the same step, then sleeps.
bool pool::await_offer(helper & self) {
    const auto begin = std::chrono::steady_clock::now();
    do {
        for (int32_t i = 0; i < 32; ++i) {
            if (self.state.load(std::memory_order_relaxed) == OFFERED) {
                return true;
            }
            pause();
        }
    } while (std::chrono::steady_clock::now() - begin < SPIN);
    std::unique_lock<std::mutex> lock(self.mutex);
    self.parked.store(true);
    self.wake.wait(lock, [&] { return self.state.load() == OFFERED || stop_.load(); });
    self.parked.store(false);
    return !stop_.load();
}

void pool::live(int32_t index) {
    helper & self = helpers_[index];
    while (!stop_.load(std::memory_order_relaxed) && await_offer(self)) {
        int32_t offered = OFFERED;
        if (self.state.compare_exchange_strong(offered, WORKING, std::memory_order_acquire)) {
            for (const int32_t next : {2 * index + 2, 2 * index + 3}) {
                if (next < n_offered_) {
                    wake(next);
                }
            }
            work(index + 1);
            self.state.store(IDLE, std::memory_order_release);
        }
    }
}

// Has been offered work. It sees the offer before it parks, or we see here that it has parked.
void pool::wake(int32_t index) {
    helper & other = helpers_[index];
    if (other.parked.load()) {
        {
            std::lock_guard<std::mutex> lock(other.mutex);
        }
        other.wake.notify_one();
    }
}

void pool::work(int32_t thread) {
    for (int32_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < n_tasks_;) {
        task_(context_, i, thread);
    }
}

void pool::run(int32_t n, task work_of_one, void * context) noexcept {
    task_      = work_of_one;
    context_   = context;
    n_tasks_   = n;
    n_offered_ = std::min(n - 1, n_helpers_);
    next_.store(0, std::memory_order_relaxed);
    for (int32_t i = 0; i < n_offered_; ++i) {
        helpers_[i].state.store(OFFERED);
    }
    for (int32_t i = 0; i < std::min(2, n_offered_); ++i) {
        wake(i); // each of them wakes two more
    }
    work(0);
    for (int32_t i = 0; i < n_offered_; ++i) {
        int32_t offered = OFFERED;
        if (helpers_[i].state.compare_exchange_strong(offered, IDLE)) {
            continue;
        }
        for (int32_t spins = 0; helpers_[i].state.load(std::memory_order_acquire) == WORKING;) {
            if (++spins < 4096) {
                pause();
            } else {
                std::this_thread::yield();
            }
        }
    }
}

} // namespace plb
