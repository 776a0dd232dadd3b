// Sampling the rows of a step on several threads, and rows that come from no context.
#include "step/engine.hpp"

#include <algorithm>

using namespace plb;

namespace plb {

namespace {

constexpr int32_t PART_MIN = 256; // blocks: a part has to be worth a thread's attention
constexpr int32_t ALONE = 12; // shortlists: fewer are done before another thread is awake

} // namespace

row_sampler::row_sampler(const vocabulary & words, int32_t n_threads)
    : words_(words), pool_(n_threads > 0 ? n_threads : default_threads()) {
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
    if (n < ALONE && jobs[0].ids != nullptr) {
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
        begin_fused(words_, jobs[i], requests_[i]);
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
        end_fused(words_, jobs[i], requests_[i]);
    }
}

} // namespace plb

struct plb_rows {
    vocabulary words;
    int32_t    n_logprobs_max = 0;
    std::unique_ptr<row_sampler>           sampler;
    std::vector<std::unique_ptr<plb_slot>> slots;
    std::vector<row_job>                   jobs;
    llama_token no_token   = 0; // where no slot asks for log-probabilities
    float       no_logprob = 0;
    char        error[TEXT_BYTES] = "";
};

int32_t plb_rows_new(int32_t n_vocab, int32_t n_slots, int32_t n_logprobs_max, int32_t n_threads,
                     plb_rows ** out) {
    if (out == nullptr || n_vocab < 1 || n_slots < 1 || n_logprobs_max < 0 || n_threads < 0) {
        return PLB_E_ARGUMENT;
    }
    *out = nullptr;
    char ignored[TEXT_BYTES];
    return guarded(ignored, [&] {
        auto rows = std::make_unique<plb_rows>();
        rows->words.n_vocab  = n_vocab;
        rows->words.n_ctx    = INT32_MAX;
        rows->n_logprobs_max = std::min(n_logprobs_max, n_vocab);
        rows->sampler = std::make_unique<row_sampler>(rows->words, n_threads);
        rows->slots.resize((size_t) n_slots);
        rows->jobs.resize((size_t) n_slots);
        *out = rows.release();
    });
}

void plb_rows_free(plb_rows * rows) {
    delete rows;
}

int32_t plb_rows_threads(const plb_rows * rows) {
    return rows == nullptr ? 0 : rows->sampler->n_threads();
}

int32_t plb_rows_set(plb_rows * rows, int32_t slot, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt) {
    if (rows == nullptr || sampling == nullptr || slot < 0 || slot >= (int32_t) rows->slots.size() ||
        n_prompt < 0 || (n_prompt > 0 && prompt == nullptr)) {
        return PLB_E_ARGUMENT;
    }
    return guarded(rows->error, [&] {
        if (sampling->grammar != nullptr) {
            throw failure{PLB_E_GRAMMAR, "there is no vocabulary to apply a grammar to"};
        }
        if (sampling->penalty_last_n < 0 && has_penalties(*sampling)) {
            throw failure{PLB_E_SAMPLING, "penalty_last_n=-1: there is no context to look back at"};
        }
        rows->slots[slot] = make_slot(rows->words, *sampling, rows->n_logprobs_max, prompt, n_prompt);
    });
}

int32_t plb_rows_sample(plb_rows * rows, int32_t n, float * logits, int64_t stride,
                        plb_result * results, llama_token * top_token, float * top_logprob) {
    if (rows == nullptr || n < 0 || n > (int32_t) rows->slots.size() || logits == nullptr ||
        results == nullptr || stride < rows->words.n_vocab) {
        return PLB_E_ARGUMENT;
    }
    for (int32_t i = 0; i < n; ++i) {
        plb_slot * slot = rows->slots[i].get();
        if (slot == nullptr || !slot->active()) {
            return slot == nullptr ? PLB_E_NO_SLOT : PLB_E_SLOT_FINISHED;
        }
        if (slot->params.n_logprobs > 0 && (top_token == nullptr || top_logprob == nullptr)) {
            return PLB_E_ARGUMENT;
        }
        const int64_t top = (int64_t) i * rows->n_logprobs_max;
        results[i].seq = i;
        results[i].row = i;
        rows->jobs[i] = {slot, logits + i * stride, nullptr, &results[i],
                         top_token == nullptr ? &rows->no_token : top_token + top,
                         top_logprob == nullptr ? &rows->no_logprob : top_logprob + top};
    }
    rows->sampler->sample(rows->jobs.data(), n);
    return PLB_OK;
}

const char * plb_rows_error(const plb_rows * rows) {
    return rows == nullptr ? "" : rows->error;
}

float plb_rows_maximum(const float * logits, int32_t n) {
    return best_kernels().maximum(logits, n);
}

const char * plb_rows_simd(void) {
    return best_kernels().name;
}
