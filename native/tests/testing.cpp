// What tests and benches need besides the contract: faults on purpose, and rows that come from no context.
#include "tests/plb_testing.h"

#include "step/engine.hpp"

#include <algorithm>

using namespace plb;

int32_t plb_fault_set(plb_engine * engine, int32_t countdown, int32_t code, int32_t n_rows,
                      int32_t n_times) {
    if (engine == nullptr || countdown < 0 || (countdown > 0 && code == 0) || n_rows < -1 ||
        n_times < 1) {
        return PLB_E_ARGUMENT;
    }
    engine->fault = {countdown, code, n_rows, n_times, false};
    return PLB_OK;
}

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
    if (out == nullptr || n_vocab < 1 || n_slots < 1 || n_logprobs_max < 0 || n_threads < 1) {
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
