// Choosing one token from one row of logits.
#include "step/engine.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

namespace plb {

namespace {

bool any_candidate(const llama_token_data_array & candidates) {
    return std::any_of(candidates.data, candidates.data + candidates.size,
                       [](const llama_token_data & c) { return c.logit > NEVER; });
}

// All tokens with their biased logits, those that may not be chosen now at -inf.
llama_token_data_array fill(const vocabulary & words, scratch & scratch, const fused_request & request) {
    llama_token_data * data = scratch.candidates.get();
    for (int32_t i = 0; i < words.n_vocab; ++i) {
        data[i] = {i, request.logits[i], 0.0f};
    }
    for (size_t i = 0; i < request.n_bias; ++i) {
        data[request.bias[i].token].logit += request.bias[i].bias;
    }
    for (const token_span & span : request.never) {
        for (size_t i = 0; i < span.n; ++i) {
            data[span.token[i]].logit = NEVER;
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
        throw failure{PLB_E_EXCEPTION, "the samplers left no token to choose"};
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
                   const fused_request & request) {
    llama_token_data_array candidates = fill(words, scratch, request);
    const llama_token token = run_chain(slot, candidates);
    if (!grammar_applies(slot) || grammar_allows(slot, token)) {
        return token;
    }
    candidates = fill(words, scratch, request);
    llama_sampler_apply(slot.grammar.get(), &candidates);
    if (!any_candidate(candidates)) { // it may be complete: then it ends, though it is early
        fused_request may_end = request;
        may_end.never[1] = may_end.never[2] = {};
        candidates = fill(words, scratch, may_end);
        llama_sampler_apply(slot.grammar.get(), &candidates);
    }
    return run_chain(slot, candidates);
}

void accept(plb_slot & slot, llama_token token) {
    accept_in_grammar(slot, token);
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

void begin_row(const vocabulary & words, const row_job & job, fused_request & request) noexcept {
    plb_slot & slot = *job.slot;
    slot.error_text[0] = 0;
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
        set_text(slot.error_text, "%s", "the context gave no logits for this row");
    }
}

void end_row(const vocabulary & words, const row_job & job, const fused_request & request) noexcept {
    plb_slot & slot = *job.slot;
    plb_result & result = *job.result;
    result.index = slot.n_generated;
    result.error = slot.error = request.error;
    if (request.error) {
        result.token   = LLAMA_TOKEN_NULL;
        result.finish  = slot.finish = PLB_FINISH_ERROR;
        result.n_top   = 0;
        result.logprob = std::numeric_limits<float>::quiet_NaN();
        if (slot.error_text[0] == 0) {
            set_text(slot.error_text, "%s",
                     request.error == PLB_E_LOGITS
                         ? "the row's logits hold NaN or +inf, or nothing but -inf"
                         : "the biases leave no token to choose");
        }
        return;
    }
    result.token   = request.token;
    result.n_top   = request.n_top;
    result.logprob = request.logprob;
    if (slot.path == PLB_PATH_FUSED) {
        slot.fused.window.add(request.token);
        slot.n_draws += slot.params.temperature > 0;
    }
    ++slot.n_generated;
    if (words.vocab != nullptr) {
        slot.generated.push_back(result.token); // reserved in make_slot
    }
    slot.history.add(result.token, slot.record);
    result.finish = slot.finish = finish_of(words, slot, result.token);
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
    for (int32_t i = 0; i < n_tokens; ++i) {
        slot.history.add(tokens[i], slot.record);
    }
    slot.next_token   = tokens[n_tokens - 1];
}

static void sample_by_chain(const vocabulary & words, scratch & scratch, plb_slot & slot,
                            fused_request & request) noexcept {
    scratch.row.look_at(request);
    if (request.error) {
        return;
    }
    request.error = guarded(slot.error_text, [&] {
        try {
            request.token = choose(words, scratch, slot, request);
        } catch (const std::overflow_error & error) { // the grammar asks for too much work
            throw failure{PLB_E_NO_CANDIDATE, error.what()};
        }
        accept(slot, request.token);
    });
    if (!request.error && slot.params.n_logprobs >= 0) {
        request.logprob = scratch.row.logprob(request.token);
    }
}

void sample_row(const vocabulary & words, scratch & scratch, const row_job & job) noexcept {
    plb_slot & slot = *job.slot;
    fused_request request;
    begin_row(words, job, request);
    fused_row & row = scratch.row;
    row.bind(best_kernels(), scratch.memory);
    if (request.error) {
        // no logits
    } else if (slot.path == PLB_PATH_CHAIN) {
        sample_by_chain(words, scratch, slot, request);
    } else if (job.ids != nullptr) {
        row.choose_from_shortlist(request, job.ids, SHORTLIST);
    } else {
        for (auto p = row.begin(request); p != fused_row::NONE; p = row.next()) {
            row.run(p, 0, row.n_blocks());
        }
    }
    end_row(words, job, request);
}

} // namespace plb
