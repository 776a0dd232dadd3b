// A slot from its parameters: what they may be, and the samplers that they ask for.
#include "step/engine.hpp"

#include <algorithm>
#include <cmath>
#include <random>

namespace plb {

namespace {

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
    require(p.path == PLB_PATH_AUTO || p.path == PLB_PATH_CHAIN ||
            (p.path == PLB_PATH_FUSED && fused_supports(p)), "path", p.path,
            "a path that can do what is asked for");
    for (int32_t i = 0; i < p.n_logit_bias; ++i) {
        const auto & [token, bias] = p.logit_bias[i];
        require(token >= 0 && token < words.n_vocab, "logit_bias token", token,
                "a token of the vocabulary");
        require(std::fabs(bias) <= 1.01e30f || bias == NEVER, "logit_bias", bias,
                "-1e30 to 1e30, or -inf");
    }
    for (int32_t i = 0; i < p.n_stop_tokens; ++i) {
        require(p.stop_tokens[i] >= 0 && p.stop_tokens[i] < words.n_vocab, "stop_token_ids",
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

// llama.cpp's default order. The logit bias, which comes first there, is added while the candidates
// are filled in: the same sum, without a search.
sampler_ptr make_chain(const plb_sampling & p, const vocabulary & words, int32_t n_seen) {
    llama_sampler_chain_params params = llama_sampler_chain_default_params();
    params.no_perf = true;
    sampler_ptr chain = checked(llama_sampler_chain_init(params));
    if (has_penalties(p)) {
        add(chain.get(), llama_sampler_init_penalties(words.n_vocab, n_looked_back(p, n_seen),
                                                      p.repeat_penalty, p.frequency_penalty,
                                                      p.presence_penalty));
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

// LLAMA_DEFAULT_SEED stands for a random one.
uint32_t seed_of(uint32_t seed) {
    if (seed == LLAMA_DEFAULT_SEED) {
        std::random_device device;
        do {
            seed = device();
        } while (seed == LLAMA_DEFAULT_SEED);
    }
    return seed;
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
    // tokens that it can ever look back at
    const auto n_seen = (int32_t) std::min<int64_t>(words.n_ctx, (int64_t) n_prompt + sampling.max_tokens);
    auto slot = std::make_unique<plb_slot>();
    slot->params = sampling;
    slot->vocab  = words.vocab;
    if (words.vocab != nullptr) {
        slot->generated.reserve((size_t) std::min<int32_t>(sampling.max_tokens, words.n_ctx));
    }
    slot->biases.assign(sampling.logit_bias, sampling.logit_bias + sampling.n_logit_bias);
    slot->stop_tokens.assign(sampling.stop_tokens, sampling.stop_tokens + sampling.n_stop_tokens);
    if (sampling.path != PLB_PATH_CHAIN && fused_supports(sampling)) {
        slot->path = PLB_PATH_FUSED;
        slot->seed = sampling.temperature == 0 ? LLAMA_DEFAULT_SEED : seed_of(sampling.seed);
        slot->fused = fused_state(sampling, slot->seed, n_seen, words.n_vocab,
                                  slot->biases.size() + slot->stop_tokens.size() +
                                      words.suppressed.size() + words.eog.size());
    } else {
        slot->chain = make_chain(sampling, words, n_seen);
        slot->seed  = llama_sampler_get_seed(slot->chain.get());
    }
    if (sampling.grammar != nullptr) {
        set_grammar(*slot, words.vocab, sampling);
    }
    const size_t n_never = words.suppressed.size() + words.eog.size() + slot->stop_tokens.size();
    const int32_t n_top = sampling.temperature == 0 ? 1 : sampling.top_k;
    slot->short_enough = slot->path == PLB_PATH_FUSED && !has_penalties(sampling) &&
                         slot->biases.empty() && sampling.n_logprobs < 0 && n_top > 0 &&
                         (size_t) n_top + n_never <= (size_t) SHORTLIST;
    slot->params.logit_bias  = nullptr;
    slot->params.stop_tokens = nullptr;
    slot->params.grammar     = nullptr;
    slot->params.grammar_start = nullptr;
    if (has_penalties(sampling)) {
        // what is further back than the penalties look has no effect
        const int32_t last_n = n_looked_back(sampling, n_seen);
        for (int32_t i = std::max(0, n_prompt - last_n); i < n_prompt; ++i) {
            if (slot->chain) {
                llama_sampler_accept(slot->chain.get(), prompt[i]);
            } else {
                slot->fused.window.add(prompt[i]);
            }
        }
    }
    return slot;
}

std::unique_ptr<plb_slot> copy_slot(const plb_slot & source) {
    auto slot = std::make_unique<plb_slot>(source);
    slot->generated.reserve(source.generated.capacity()); // a step must not allocate
    return slot;
}

void reseed(plb_slot & slot, uint32_t seed) {
    slot.params.seed = seed;
    slot.n_draws     = 0;
    if (slot.params.temperature == 0) {
        slot.seed = seed; // greedy draws nothing
        return;
    }
    if (slot.path == PLB_PATH_FUSED) {
        slot.seed = seed_of(seed);
        slot.fused.random.seed(slot.seed);
        return;
    }
    llama_sampler * chain = slot.chain.get();
    sampler_ptr draw = checked(llama_sampler_init_dist(seed));
    sampler_ptr old(llama_sampler_chain_remove(chain, llama_sampler_chain_n(chain) - 1));
    llama_sampler_chain_add(chain, draw.get()); // into the place that is free now
    draw.release();
    slot.seed = llama_sampler_get_seed(chain);
}

} // namespace plb
