// Slots: building a request's samplers, and choosing one token from one row of logits.
#include "engine.hpp"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>

namespace plb {

namespace {

constexpr float NEVER = -INFINITY;

void require(bool ok, const char * name, double value, const char * limit) {
    if (ok) {
        return;
    }
    char text[TEXT_BYTES];
    set_text(text, "%s=%g: %s", name, value, limit);
    throw failure{PLB_E_SAMPLING, text};
}

void check_sampling(const plb_sampling & p, const vocabulary & words, int32_t n_logprobs_max) {
    const auto finite = [](float x) { return std::isfinite(x); };
    require(p.max_tokens >= 1, "max_tokens", p.max_tokens, "1 or more");
    require(p.min_tokens >= 0 && p.min_tokens <= p.max_tokens, "min_tokens", p.min_tokens,
            "0 to max_tokens");
    require(finite(p.temperature) && (p.temperature == 0 || p.temperature >= 0.99e-4f),
            "temperature", p.temperature, "0, or 1e-4 or more");
    require(p.top_p >= 0 && p.top_p <= 1, "top_p", p.top_p, "0 to 1");
    require(p.min_p >= 0 && p.min_p <= 1, "min_p", p.min_p, "0 to 1");
    require(p.typical_p >= 0 && p.typical_p <= 1, "typical_p", p.typical_p, "0 to 1");
    require(p.repeat_penalty >= 0.99e-6f && p.repeat_penalty <= 1.01e6f, "repeat_penalty",
            p.repeat_penalty, "1e-6 to 1e6");
    require(std::fabs(p.frequency_penalty) <= 1.01e6f, "frequency_penalty", p.frequency_penalty,
            "-1e6 to 1e6");
    require(std::fabs(p.presence_penalty) <= 1.01e6f, "presence_penalty", p.presence_penalty,
            "-1e6 to 1e6");
    require(p.penalty_last_n >= -1, "penalty_last_n", p.penalty_last_n, "-1 or more");
    require(p.n_logprobs >= -1 && p.n_logprobs <= n_logprobs_max, "n_logprobs", p.n_logprobs,
            "-1 to the engine's n_logprobs_max");
    require(p.n_logit_bias >= 0 && (p.n_logit_bias == 0 || p.logit_bias), "n_logit_bias",
            p.n_logit_bias, "0, or as many as logit_bias holds");
    require(p.n_stop_tokens >= 0 && (p.n_stop_tokens == 0 || p.stop_tokens), "n_stop_tokens",
            p.n_stop_tokens, "0, or as many as stop_tokens holds");
    for (int32_t i = 0; i < p.n_logit_bias; ++i) {
        const auto & [token, bias] = p.logit_bias[i];
        require(token >= 0 && token < words.n_vocab, "logit_bias token", token,
                "a token of the vocabulary");
        require(std::fabs(bias) <= 1.01e30f || bias == NEVER, "logit_bias", bias,
                "-1e30 to 1e30, or -inf");
    }
    for (int32_t i = 0; i < p.n_stop_tokens; ++i) {
        require(p.stop_tokens[i] >= 0 && p.stop_tokens[i] < words.n_vocab, "stop token",
                p.stop_tokens[i], "a token of the vocabulary");
    }
}

sampler_ptr checked(llama_sampler * sampler) {
    if (sampler == nullptr) {
        throw failure{PLB_E_EXCEPTION, "libllama made no sampler"};
    }
    return sampler_ptr(sampler);
}

void add(llama_sampler * chain, llama_sampler * sampler) {
    sampler_ptr owned = checked(sampler);
    llama_sampler_chain_add(chain, owned.get());
    owned.release();
}

bool has_penalties(const plb_sampling & p) {
    return p.penalty_last_n != 0 &&
           (p.repeat_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0);
}

// llama.cpp's default order. The logit bias, which comes first there, is added while the candidates
// are filled in: the same sum, without a search.
sampler_ptr make_chain(const plb_sampling & p, const vocabulary & words) {
    llama_sampler_chain_params params = llama_sampler_chain_default_params();
    params.no_perf = true;
    sampler_ptr chain = checked(llama_sampler_chain_init(params));
    if (has_penalties(p)) {
        const int32_t last_n = p.penalty_last_n < 0 ? words.n_ctx
                                                    : std::min(p.penalty_last_n, words.n_ctx);
        add(chain.get(), llama_sampler_init_penalties(words.n_vocab, last_n, p.repeat_penalty,
                                                      p.frequency_penalty, p.presence_penalty));
    }
    if (p.temperature == 0) {
        add(chain.get(), llama_sampler_init_greedy());
        return chain;
    }
    if (p.top_k > 0) {
        add(chain.get(), llama_sampler_init_top_k(p.top_k));
    }
    if (p.typical_p < 1) {
        add(chain.get(), llama_sampler_init_typical(p.typical_p, 0));
    }
    if (p.top_p < 1) {
        add(chain.get(), llama_sampler_init_top_p(p.top_p, 0));
    }
    if (p.min_p > 0) {
        add(chain.get(), llama_sampler_init_min_p(p.min_p, 0));
    }
    add(chain.get(), llama_sampler_init_temp_ext(p.temperature, 0, 1));
    add(chain.get(), llama_sampler_init_dist(p.seed));
    return chain;
}

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
    llama_token_data * data = scratch.candidates.data();
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

llama_token run_chain(plb_slot & slot, llama_token_data_array & candidates) {
    if (!any_candidate(candidates)) {
        throw failure{PLB_E_NO_CANDIDATE, slot.grammar
            ? "the grammar and the biases leave no token to choose"
            : "the biases leave no token to choose"};
    }
    llama_sampler_apply(slot.chain.get(), &candidates);
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

std::unique_ptr<plb_slot> make_slot(const vocabulary & words, const plb_sampling & sampling,
                                    int32_t n_logprobs_max,
                                    const llama_token * prompt, int32_t n_prompt) {
    check_sampling(sampling, words, n_logprobs_max);
    for (int32_t i = 0; i < n_prompt; ++i) {
        require(prompt[i] >= 0 && prompt[i] < words.n_vocab, "prompt token", prompt[i],
                "a token of the vocabulary");
    }
    auto slot = std::make_unique<plb_slot>();
    slot->params = sampling;
    slot->vocab  = words.vocab;
    slot->biases.assign(sampling.logit_bias, sampling.logit_bias + sampling.n_logit_bias);
    slot->stop_tokens.assign(sampling.stop_tokens, sampling.stop_tokens + sampling.n_stop_tokens);
    slot->chain = make_chain(sampling, words);
    slot->seed  = llama_sampler_get_seed(slot->chain.get());
    if (sampling.grammar != nullptr) {
        if (llama_vocab_type(words.vocab) == LLAMA_VOCAB_TYPE_NONE) {
            throw failure{PLB_E_GRAMMAR, "the model has no vocabulary to apply a grammar to"};
        }
        check_grammar(words.vocab, sampling.grammar);
        slot->grammar.reset(llama_sampler_init_grammar(words.vocab, sampling.grammar, "root"));
        if (!slot->grammar) {
            throw failure{PLB_E_GRAMMAR, "libllama does not accept this grammar: see its log"};
        }
    }
    slot->params.logit_bias  = nullptr;
    slot->params.stop_tokens = nullptr;
    slot->params.grammar     = nullptr;
    if (has_penalties(sampling)) {
        // what is further back than the penalties look has no effect
        const int32_t last_n = sampling.penalty_last_n < 0 ? words.n_ctx : sampling.penalty_last_n;
        for (int32_t i = std::max(0, n_prompt - last_n); i < n_prompt; ++i) {
            llama_sampler_accept(slot->chain.get(), prompt[i]);
        }
    }
    return slot;
}

std::unique_ptr<plb_slot> copy_slot(const plb_slot & source) {
    auto slot = std::make_unique<plb_slot>();
    slot->params      = source.params;
    slot->vocab       = source.vocab;
    slot->biases      = source.biases;
    slot->stop_tokens = source.stop_tokens;
    slot->chain       = checked(llama_sampler_clone(source.chain.get()));
    if (source.grammar) {
        slot->grammar = checked(llama_sampler_clone(source.grammar.get()));
    }
    slot->seed        = source.seed;
    slot->n_generated = source.n_generated;
    slot->finish      = source.finish;
    slot->error       = source.error;
    slot->next_token  = source.next_token;
    slot->next_pos    = source.next_pos;
    memcpy(slot->error_text, source.error_text, sizeof(source.error_text));
    return slot;
}

void reseed(plb_slot & slot, uint32_t seed) {
    slot.params.seed = seed;
    if (slot.params.temperature == 0) {
        slot.seed = seed; // greedy draws nothing
        return;
    }
    llama_sampler * chain = slot.chain.get();
    sampler_ptr draw = checked(llama_sampler_init_dist(seed));
    sampler_ptr old(llama_sampler_chain_remove(chain, llama_sampler_chain_n(chain) - 1));
    llama_sampler_chain_add(chain, draw.get()); // into the place that is free now
    draw.release();
    slot.seed = llama_sampler_get_seed(chain);
}

void sample_row(const vocabulary & words, scratch & scratch, plb_slot & slot, const float * logits,
                plb_result & result, llama_token * top_token, float * top_logprob) noexcept {
    result.token   = LLAMA_TOKEN_NULL;
    result.index   = slot.n_generated;
    result.finish  = PLB_FINISH_NONE;
    result.n_top   = 0;
    result.logprob = std::numeric_limits<float>::quiet_NaN();
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
                                          top_token, top_logprob);
            }
        }
        result.token = token;
        ++slot.n_generated;
        result.finish = finish_of(words, slot, token);
    });
    if (result.error) {
        result.finish = PLB_FINISH_ERROR;
    }
    slot.finish = result.finish;
    slot.error  = result.error;
}

} // namespace plb
