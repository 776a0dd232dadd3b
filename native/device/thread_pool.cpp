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

// What a thread spins for before it sleeps: a helper for the next call of the same step, the caller for
// the helpers' last rows.
constexpr auto HELPER_SPIN = std::chrono::microseconds(20);
constexpr auto CALLER_SPIN = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

template <typename Ready>
bool spin(Ready ready, std::chrono::nanoseconds most) {
    const auto begin = std::chrono::steady_clock::now();
    do {
        for (int32_t i = 0; i < 32; ++i) {
            if (ready()) {
                return true;
            }
            pause();
        }
    } while (std::chrono::steady_clock::now() - begin < most);
    return false;
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

pool::pool(int32_t n_threads)
    : helpers_(n_threads > 1 ? new helper[(size_t) n_threads - 1] : nullptr) {
    without_signals([&] {
        for (int32_t i = 0; i + 1 < n_threads; ++i) {
            try {
                helpers_[i].thread = std::thread([this, i] { live(i); });
                n_helpers_ = i + 1;
            } catch (const std::exception &) { // no thread, or no memory for one: fewer helpers
                return;
            }
        }
    });
}

pool::~pool() {
    stop_.store(true);
    for (int32_t i = 0; i < n_helpers_; ++i) {
        helpers_[i].wake.notify();
        helpers_[i].thread.join();
    }
}

// True with an offer, false at the end.
bool pool::await_offer(helper & self) {
    const auto ready = [&] { return self.state.load() == OFFERED || stop_.load(); };
    if (!spin(ready, HELPER_SPIN)) {
        self.wake.wait(ready);
    }
    return !stop_.load();
}

void pool::live(int32_t index) {
    helper & self = helpers_[index];
    while (await_offer(self)) {
        int32_t offered = OFFERED;
        if (self.state.compare_exchange_strong(offered, WORKING)) {
            for (const int32_t next : {2 * index + 2, 2 * index + 3}) {
                if (next < n_offered_) {
                    helpers_[next].wake.notify();
                }
            }
            work(index + 1);
            self.state.store(IDLE);
            done_.notify();
        }
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
        helpers_[i].wake.notify(); // each of them wakes two more
    }
    work(0);
    for (int32_t i = 0; i < n_offered_; ++i) {
        int32_t offered = OFFERED;
        if (helpers_[i].state.compare_exchange_strong(offered, IDLE)) {
            continue;
        }
        const auto ready = [&] { return helpers_[i].state.load() != WORKING; };
        if (!spin(ready, CALLER_SPIN)) {
            done_.wait(ready);
        }
    }
}

} // namespace plb
