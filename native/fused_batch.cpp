// Rows of many requests on the threads of a pool.
#include "fused.hpp"
#include "pool.hpp"

#include <algorithm>

namespace plb {

namespace {

constexpr int32_t PART_MIN = 256; // blocks: a part has to be worth a thread's attention

} // namespace

fused_sampler::fused_sampler(int32_t n_vocab, int32_t n_threads, const kernels & set)
    : set_(set), n_vocab_(n_vocab),
      pool_(new pool(n_threads > 0 ? n_threads : default_threads())),
      rows_(new fused_row[(size_t) pool_->size()]) {
    for (int32_t i = 0; i < pool_->size(); ++i) {
        memory_.push_back(std::make_unique<fused_memory>(n_vocab));
    }
}

fused_sampler::~fused_sampler() = default;

int32_t fused_sampler::n_threads() const {
    return pool_->size();
}

bool fused_sampler::splits(int32_t rows) const {
    return 2 * rows <= pool_->size() && n_vocab_ >= 2 * PART_MIN * BLOCK;
}

void fused_sampler::sample(fused_request & request, int32_t thread) noexcept {
    fused_row & row = rows_[thread];
    row.bind(set_, *memory_[thread], false);
    for (auto p = row.begin(request); p != fused_row::NONE; p = row.next()) {
        row.run(p, 0, row.n_blocks());
    }
}

void fused_sampler::sample(fused_request * requests, int32_t n) noexcept {
    if (n < 1) {
        return;
    }
    if (splits(n)) {
        sample_split(requests, n);
        return;
    }
    requests_ = requests;
    pool_->run(n, [](void * context, int32_t i, int32_t thread) {
        auto & self = *static_cast<fused_sampler *>(context);
        self.sample(self.requests_[i], thread);
    }, this);
}

// All rows in step: a pass of each of them in parts, then each one's decision.
void fused_sampler::sample_split(fused_request * requests, int32_t n) noexcept {
    int32_t n_live = 0;
    for (int32_t i = 0; i < n; ++i) {
        rows_[i].bind(set_, *memory_[i], true);
        n_live += rows_[i].begin(requests[i]) != fused_row::NONE;
    }
    while (n_live > 0) {
        const int32_t n_blocks = rows_[0].n_blocks();
        n_parts_ = std::max(1, std::min(pool_->size() / n_live, n_blocks / PART_MIN));
        pool_->run(n * n_parts_, [](void * context, int32_t i, int32_t) {
            auto & self = *static_cast<fused_sampler *>(context);
            fused_row & row = self.rows_[i / self.n_parts_];
            const int64_t part = i % self.n_parts_, n_blocks = row.n_blocks();
            if (row.current() != fused_row::NONE) {
                const auto edge = [&](int64_t k) {
                    return k == self.n_parts_ ? n_blocks : n_blocks * k / self.n_parts_ / 4 * 4;
                };
                row.run(row.current(), (int32_t) edge(part), (int32_t) edge(part + 1));
            }
        }, this);
        pool_->run(n, [](void * context, int32_t i, int32_t) {
            fused_row & row = static_cast<fused_sampler *>(context)->rows_[i];
            if (row.current() != fused_row::NONE) {
                row.next();
            }
        }, this);
        n_live = 0;
        for (int32_t i = 0; i < n; ++i) {
            n_live += rows_[i].current() != fused_row::NONE;
        }
    }
}

} // namespace plb
