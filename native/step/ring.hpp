// Steps and their records on the way from the thread that computes to the one that reads: one of each.
#pragma once

#include "device/signal.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace plb {

// Counts only; the memory is the engine's. A step's records lie together: where they would not fit in
// front of the end, they begin at the start again.
class ring {
public:
    void allocate(int32_t n_steps, int32_t n_records) {
        n_steps_   = n_steps;
        n_records_ = n_records;
        starts_.resize((size_t) n_steps);
    }

    // -- the computing thread

    int64_t n_done() const { return n_done_; }
    int32_t next_step() const { return index(n_done_); }

    // Everything counts as read; the next step and the next record are the first of the memory.
    void start_over() {
        base_ = n_done_;
        next_ = 0;
        published_.store(n_done_);
        taken_.store(n_done_);
    }

    bool has_room(int32_t n_records) const {
        const int64_t taken = taken_.load();
        if (n_done_ - taken >= n_steps_) {
            return false;
        }
        const int64_t begin  = begin_of(n_records);
        const int64_t oldest = taken == n_done_ ? begin : starts_[index(taken)];
        return begin + n_records - oldest <= n_records_;
    }

    // Where the next step's records go, when there is room.
    int32_t reserve(int32_t n_records) {
        next_ = begin_of(n_records);
        return (int32_t) (next_ % n_records_);
    }

    void record(int32_t n_records) {
        starts_[index(n_done_)] = next_;
        next_ += n_records;
        ++n_done_;
    }

    // The reader may have what is done.
    void publish() {
        published_.store(n_done_);
        if (n_done_ >= wanted_.load()) {
            to_reader_.notify();
        }
    }

    // False when there is none in time, or the caller has been told to stop.
    template <typename Stopped>
    bool wait_for_room(int32_t n_records, Stopped stopped, std::chrono::nanoseconds timeout) {
        wake_reader();
        to_writer_.wait([&] { return has_room(n_records) || stopped(); }, timeout);
        return has_room(n_records);
    }

    // Between two runs the computing thread has something to plan: true until it is at it again.
    void plan(bool planning) {
        planning_.store(planning);
        if (!planning) {
            planned_.notify();
        }
    }

    // -- the reader

    void yield(std::chrono::nanoseconds timeout) {
        planned_.wait([&] { return !planning_.load(); }, timeout);
    }

    int64_t wait(int64_t n_wanted, std::chrono::nanoseconds timeout) {
        wanted_.store(n_wanted);
        to_reader_.wait([&] { return published_.load() >= n_wanted || poked_.load(); }, timeout);
        poked_.store(false);
        return published_.load();
    }

    int64_t n_taken() const { return taken_.load(std::memory_order_relaxed); }
    int32_t index(int64_t step) const { return (int32_t) ((step - base_) % n_steps_); }

    void take(int64_t n) {
        taken_.store(taken_.load(std::memory_order_relaxed) + n);
        to_writer_.notify();
    }

    // -- any thread

    int64_t n_published() const { return published_.load(); }

    void wake_reader() {
        poked_.store(true);
        to_reader_.notify();
    }

    void wake_writer() { to_writer_.notify(); }

private:
    int64_t begin_of(int32_t n_records) const {
        const int64_t left = n_records_ - next_ % n_records_;
        return n_records <= left ? next_ : next_ + left;
    }

    int32_t n_steps_   = 1;
    int32_t n_records_ = 1;
    // the computing thread's; records are counted with those left out at the end of the memory
    int64_t base_   = 0; // the step that lies at index 0
    int64_t n_done_ = 0;
    int64_t next_   = 0;
    std::vector<int64_t> starts_; // [n_steps_]: the first record of each

    std::atomic<int64_t> published_{0}, taken_{0}, wanted_{0};
    std::atomic<bool>    poked_{false}, planning_{false};
    signal to_reader_, to_writer_;
    signal planned_; // to a reader that yields: one that waits for steps sleeps on
};

} // namespace plb
