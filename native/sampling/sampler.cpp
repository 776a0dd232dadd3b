// Choosing one token from one row of logits.
#include "step/engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

namespace plb {

namespace {

struct scan {
    float max;
    bool  bad; // NaN or +inf
};

// Independent lanes, so that it vectorises without -ffast-math.
scan scan_logits(const float * x, int32_t n) {
    constexpr int32_t LANES = 16;
    float   top[LANES];
    int32_t bad[LANES] = {};
    std::fill(top, top + LANES, NEVER);
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int32_t j = 0; j < LANES; ++j) {
            const float value = x[i + j];
            top[j] = value > top[j] ? value : top[j];
            bad[j] |= !(value < INFINITY);
        }
    }
    scan result = {NEVER, false};
    for (; i < n; ++i) {
        result.max = std::max(result.max, x[i]);
        result.bad |= !(x[i] < INFINITY);
    }
    for (int32_t j = 0; j < LANES; ++j) {
        result.max = std::max(result.max, top[j]);
        result.bad |= bad[j] != 0;
    }
    return result;
}

// log(sum(exp(x))) of finite or -inf logits with a finite maximum.
double log_sum_exp(const float * x, int32_t n, float max) {
    constexpr int32_t LANES = 8;
    double sum[LANES] = {};
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int32_t j = 0; j < LANES; ++j) {
            sum[j] += std::exp(x[i + j] - max);
        }
    }
    double total = 0;
    for (; i < n; ++i) {
        total += std::exp(x[i] - max);
    }
    for (int32_t j = 0; j < LANES; ++j) {
        total += sum[j];
    }
    return max + std::log(total);
}

// The n_top largest logits, in descending order, the smaller id first among equals.
int32_t top_logits(const float * x, int32_t n, int32_t n_top, double norm, llama_token * token,
                   float * logprob) {
    int32_t have = 0;
    for (int32_t i = 0; i < n; ++i) {
        if (x[i] == NEVER || (have == n_top && !(x[i] > logprob[have - 1]))) {
            continue;
        }
        int32_t at = have < n_top ? have++ : have - 1;
        for (; at > 0 && x[i] > logprob[at - 1]; --at) {
            logprob[at] = logprob[at - 1];
            token[at]   = token[at - 1];
        }
        logprob[at] = x[i];
        token[at]   = i;
    }
    for (int32_t i = 0; i < have; ++i) {
        logprob[i] = (float) (logprob[i] - norm);
    }
    return have;
}

bool any_candidate(const llama_token_data_array & candidates) {
    return std::any_of(candidates.data, candidates.data + candidates.size,
                       [](const llama_token_data & c) { return c.logit > NEVER; });
}

// All tokens with their biased logits, those that may not be chosen now at -inf.
llama_token_data_array fill(const vocabulary & words, scratch & scratch, const plb_slot & slot,
                            const float * logits) {
    llama_token_data * data = scratch.candidates.get();
    for (int32_t i = 0; i < words.n_vocab; ++i) {
        data[i] = {i, logits[i], 0.0f};
    }
    for (const auto & [token, bias] : slot.biases) {
        data[token].logit += bias;
    }
    for (const llama_token token : words.suppressed) {
        data[token].logit = NEVER;
    }
    const bool too_early = slot.n_generated < slot.params.min_tokens;
    if (too_early || slot.params.ignore_eog) {
        for (const llama_token token : words.eog) {
            data[token].logit = NEVER;
        }
    }
    if (too_early) {
        for (const llama_token token : slot.stop_tokens) {
            data[token].logit = NEVER;
        }
    }
    return {data, (size_t) words.n_vocab, -1, false};
}

// libllama's typical sampler takes log(p) of every candidate: one p = 0 makes its entropy NaN.
void drop_impossible(llama_token_data_array & candidates) {
    llama_token_data * end = candidates.data + candidates.size;
    float max = NEVER;
    for (const llama_token_data * c = candidates.data; c != end; ++c) {
        max = std::max(max, c->logit);
    }
    end = std::remove_if(candidates.data, end,
                         [=](const llama_token_data & c) { return !(c.logit > max - 100); });
    candidates.size = (size_t) (end - candidates.data);
}

llama_token run_chain(plb_slot & slot, llama_token_data_array & candidates) {
    if (!any_candidate(candidates)) {
        throw failure{PLB_E_NO_CANDIDATE, slot.grammar
            ? "the grammar and the biases leave no token to choose"
            : "the biases leave no token to choose"};
    }
    if (slot.params.typical_p < 1) {
        drop_impossible(candidates);
    }
    llama_sampler_apply(slot.chain.get(), &candidates);
    slot.n_draws += slot.params.temperature > 0;
    const int64_t at = candidates.selected;
    if (at < 0 || at >= (int64_t) candidates.size || !(candidates.data[at].logit > NEVER)) {
        throw failure{PLB_E_NO_CANDIDATE, "the samplers left no token to choose"};
    }
    return candidates.data[at].id;
}

bool grammar_allows(const plb_slot & slot, llama_token token) {
    llama_token_data       single = {token, 1.0f, 0.0f};
    llama_token_data_array array  = {&single, 1, -1, false};
    llama_sampler_apply(slot.grammar.get(), &array);
    return single.logit > NEVER;
}

// As llama.cpp does it: choose first, ask the grammar about that one token, and only when it is
// refused mask the whole vocabulary and choose again.
llama_token choose(const vocabulary & words, scratch & scratch, plb_slot & slot,
                   const float * logits) {
    llama_token_data_array candidates = fill(words, scratch, slot, logits);
    const llama_token token = run_chain(slot, candidates);
    if (!slot.grammar || grammar_allows(slot, token)) {
        return token;
    }
    candidates = fill(words, scratch, slot, logits);
    llama_sampler_apply(slot.grammar.get(), &candidates);
    return run_chain(slot, candidates);
}

void accept(plb_slot & slot, llama_token token) {
    if (slot.grammar) {
        try {
            llama_sampler_accept(slot.grammar.get(), token);
        } catch (const std::exception & error) {
            throw failure{PLB_E_GRAMMAR_STATE, error.what()};
        }
    }
    llama_sampler_accept(slot.chain.get(), token);
}

bool contains(const std::vector<llama_token> & tokens, llama_token token) {
    return std::find(tokens.begin(), tokens.end(), token) != tokens.end();
}

int32_t finish_of(const vocabulary & words, const plb_slot & slot, llama_token token) {
    if (contains(words.eog, token)) {
        return PLB_FINISH_EOG;
    }
    if (contains(slot.stop_tokens, token)) {
        return PLB_FINISH_STOP;
    }
    return slot.n_generated >= slot.params.max_tokens ? PLB_FINISH_LENGTH : PLB_FINISH_NONE;
}

} // namespace

// What a result starts from.
static void begin_result(const plb_slot & slot, plb_result & result) {
    result.token   = LLAMA_TOKEN_NULL;
    result.index   = slot.n_generated;
    result.finish  = PLB_FINISH_NONE;
    result.error   = PLB_OK;
    result.n_top   = 0;
    result.logprob = std::numeric_limits<float>::quiet_NaN();
}

// The token is chosen, or result.error says why not.
static void end_result(const vocabulary & words, plb_slot & slot, plb_result & result) {
    if (result.error) {
        result.token  = LLAMA_TOKEN_NULL;
        result.finish = PLB_FINISH_ERROR;
    } else {
        ++slot.n_generated;
        if (words.vocab != nullptr) {
            slot.generated.push_back(result.token); // reserved in make_slot
        }
        result.finish = finish_of(words, slot, result.token);
    }
    slot.finish = result.finish;
    slot.error  = result.error;
}

void begin_fused(const vocabulary & words, const row_job & job, fused_request & request) noexcept {
    plb_slot & slot = *job.slot;
    begin_result(slot, *job.result);
    const bool too_early = slot.n_generated < slot.params.min_tokens;
    request = {};
    request.logits = const_cast<float *>(job.logits); // and back as it was, see fused_request
    request.params = &slot.params;
    request.state  = &slot.fused;
    request.bias   = slot.biases.data();
    request.n_bias = slot.biases.size();
    request.never[0] = {words.suppressed.data(), words.suppressed.size()};
    if (too_early || slot.params.ignore_eog) {
        request.never[1] = {words.eog.data(), words.eog.size()};
    }
    if (too_early) {
        request.never[2] = {slot.stop_tokens.data(), slot.stop_tokens.size()};
    }
    request.top_token   = job.top_token;
    request.top_logprob = job.top_logprob;
    if (job.logits == nullptr) {
        request.error = PLB_E_LOGITS;
    }
}

void end_fused(const vocabulary & words, const row_job & job, const fused_request & request) noexcept {
    plb_slot & slot = *job.slot;
    plb_result & result = *job.result;
    slot.error_text[0] = 0;
    result.token = request.token;
    result.error = request.error;
    if (request.error) {
        set_text(slot.error_text, "%s",
                 job.logits == nullptr ? "the context gave no logits for this row"
                 : request.error == PLB_E_LOGITS
                     ? "the row's logits hold NaN or +inf, or nothing but -inf"
                     : "the biases leave no token to choose");
    } else {
        slot.fused.window.add(request.token);
        slot.n_draws += slot.params.temperature > 0;
        result.logprob = request.logprob;
        result.n_top   = request.n_top;
    }
    end_result(words, slot, result);
}

void replay(plb_slot & slot, const llama_token * tokens, int32_t n_tokens, int32_t n_draws) {
    std::uniform_real_distribution<double> draw(0.0, 1.0);
    for (int32_t i = 0; i < n_draws; ++i) {
        if (slot.path == PLB_PATH_FUSED) {
            draw(slot.fused.random);
            continue;
        }
        // the last of the chain takes one number for a single candidate, too
        llama_token_data       single = {0, 0.0f, 0.0f};
        llama_token_data_array array  = {&single, 1, -1, false};
        llama_sampler * chain = slot.chain.get();
        llama_sampler_apply(llama_sampler_chain_get(chain, llama_sampler_chain_n(chain) - 1), &array);
    }
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (slot.path == PLB_PATH_FUSED) {
            slot.fused.window.add(tokens[i]);
        } else {
            accept(slot, tokens[i]);
        }
    }
    slot.n_draws     += n_draws;
    slot.n_generated += n_tokens;
    slot.generated.insert(slot.generated.end(), tokens, tokens + n_tokens);
    slot.next_token   = tokens[n_tokens - 1];
}

static void sample_fused(const vocabulary & words, scratch & scratch, const row_job & job) noexcept {
    fused_request request;
    begin_fused(words, job, request);
    fused_row & row = scratch.row;
    row.bind(best_kernels(), scratch.memory);
    if (!request.error && job.ids != nullptr) {
        row.choose_from_shortlist(request, job.ids, SHORTLIST);
    } else if (!request.error) {
        for (auto p = row.begin(request); p != fused_row::NONE; p = row.next()) {
            row.run(p, 0, row.n_blocks());
        }
    }
    end_fused(words, job, request);
}

void sample_row(const vocabulary & words, scratch & scratch, const row_job & job) noexcept {
    if (job.slot->path == PLB_PATH_FUSED) {
        sample_fused(words, scratch, job);
        return;
    }
    plb_slot & slot = *job.slot;
    plb_result & result = *job.result;
    const float * logits = job.logits;
    begin_result(slot, result);
    result.error = guarded(slot.error_text, [&] {
        if (logits == nullptr) {
            throw failure{PLB_E_LOGITS, "the context gave no logits for this row"};
        }
        const scan found = scan_logits(logits, words.n_vocab);
        if (found.bad) {
            throw failure{PLB_E_LOGITS, "the row's logits hold NaN or +inf"};
        }
        if (found.max == NEVER) {
            throw failure{PLB_E_LOGITS, "the row's logits are all -inf"};
        }
        const llama_token token = choose(words, scratch, slot, logits);
        accept(slot, token);
        if (slot.params.n_logprobs >= 0) {
            const double norm = log_sum_exp(logits, words.n_vocab, found.max);
            result.logprob = (float) (logits[token] - norm);
            if (slot.params.n_logprobs > 0) {
                result.n_top = top_logits(logits, words.n_vocab, slot.params.n_logprobs, norm,
                                          job.top_token, job.top_logprob);
            }
        }
        result.token = token;
    });
    end_result(words, slot, result);
}

} // namespace plb
