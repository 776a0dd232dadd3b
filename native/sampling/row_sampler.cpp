// Sampling the rows of a step on several threads.
#include "step/engine.hpp"

#include <algorithm>

namespace plb {

namespace {

constexpr int32_t PART_MIN = 256; // blocks: a part has to be worth a thread's attention
constexpr int32_t ALONE = 12; // rows of few candidates: fewer are done before another thread is awake
constexpr int32_t FEW   = 1024; // tokens of a vocabulary

} // namespace

row_sampler::row_sampler(const vocabulary & words, int32_t n_threads)
    : words_(words), pool_(n_threads) {
    for (int32_t i = 0; i < pool_.size(); ++i) {
        scratch_.push_back(std::make_unique<scratch>(words.n_vocab));
    }
    requests_.resize((size_t) pool_.size());
}

void row_sampler::sample(row_job * jobs, int32_t n) noexcept {
    if (n < 1) {
        return;
    }
    const auto fused = [](const row_job & job) {
        return job.slot->path == PLB_PATH_FUSED && job.logits != nullptr && job.ids == nullptr;
    };
    if (2 * n <= pool_.size() && words_.n_vocab >= 2 * PART_MIN * BLOCK &&
        std::all_of(jobs, jobs + n, fused)) {
        sample_in_parts(jobs, n);
        return;
    }
    jobs_ = jobs;
    if (n < ALONE && (jobs[0].ids != nullptr || words_.n_vocab <= FEW)) {
        for (int32_t i = 0; i < n; ++i) {
            sample_row(words_, own(), jobs[i]);
        }
        return;
    }
    pool_.run(n, [](void * context, int32_t i, int32_t thread) {
        auto & self = *static_cast<row_sampler *>(context);
        sample_row(self.words_, *self.scratch_[thread], self.jobs_[i]);
    }, this);
}

// All rows in step: a pass of each of them in parts, then each one's decision.
void row_sampler::sample_in_parts(row_job * jobs, int32_t n) noexcept {
    int32_t n_live = 0;
    for (int32_t i = 0; i < n; ++i) {
        begin_row(words_, jobs[i], requests_[i]);
        scratch_[i]->row.bind(best_kernels(), scratch_[i]->memory);
        n_live += scratch_[i]->row.begin(requests_[i]) != fused_row::NONE;
    }
    while (n_live > 0) {
        const int32_t n_blocks = scratch_[0]->row.n_blocks();
        n_parts_ = std::max(1, std::min(pool_.size() / n_live, n_blocks / PART_MIN));
        pool_.run(n * n_parts_, [](void * context, int32_t i, int32_t) {
            auto & self = *static_cast<row_sampler *>(context);
            fused_row & row = self.scratch_[i / self.n_parts_]->row;
            if (row.current() == fused_row::NONE) {
                return;
            }
            const auto edge = [&](int64_t part) { // passes are at their best with fours of blocks
                const int64_t all = row.n_blocks();
                return (int32_t) (part == self.n_parts_ ? all : all * part / self.n_parts_ / 4 * 4);
            };
            const int32_t part = i % self.n_parts_;
            row.run(row.current(), edge(part), edge(part + 1));
        }, this);
        pool_.run(n, [](void * context, int32_t i, int32_t) {
            fused_row & row = static_cast<row_sampler *>(context)->scratch_[i]->row;
            if (row.current() != fused_row::NONE) {
                row.next();
            }
        }, this);
        n_live = 0;
        for (int32_t i = 0; i < n; ++i) {
            n_live += scratch_[i]->row.current() != fused_row::NONE;
        }
    }
    for (int32_t i = 0; i < n; ++i) {
        end_row(words_, jobs[i], requests_[i]);
    }
}

} // namespace plb
