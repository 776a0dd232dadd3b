// Sampling one row: bad logits, log-probabilities, and no allocation. That tokens are those of libllama's
// own chain is asked in test_fused.cpp, test_rows.cpp and tests/step/test_stepper.py.
#include "allocations.hpp"
#include "check.hpp"
#include "step/engine.hpp"

#include <algorithm>
#include <cmath>
#include <random>

namespace {

struct sampler_test {
    plb::vocabulary words;
    plb::scratch    scratch;
    std::mt19937    random{1};

    sampler_test(const llama_model * model)
        : scratch(llama_vocab_n_tokens(llama_model_get_vocab(model))) {
        words.vocab   = llama_model_get_vocab(model);
        words.n_vocab = llama_vocab_n_tokens(words.vocab);
        words.n_ctx   = 1024;
        words.eog     = {llama_vocab_eos(words.vocab)};
    }

    std::vector<float> row(float scale) {
        std::normal_distribution<float> draw(0, scale);
        std::vector<float> logits(words.n_vocab);
        std::generate(logits.begin(), logits.end(), [&] { return draw(random); });
        return logits;
    }

    plb_result sample(plb_slot & slot, const std::vector<float> & logits,
                      llama_token * top = nullptr, float * logprob = nullptr) {
        plb_result result = {};
        plb::sample_row(words, scratch, {&slot, logits.data(), nullptr, &result, top, logprob});
        return result;
    }
};

void bad_logits(sampler_test & t) {
    plb_sampling p = plb_sampling_default();
    plb_result result = {};
    for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) { // more of them: test_fused.cpp
        for (const int32_t path : {PLB_PATH_FUSED, PLB_PATH_CHAIN}) {
            p.path = path;
            auto slot = plb::make_slot(t.words, p, 0, nullptr, 0);
            auto logits = bad < 0 ? std::vector<float>(t.words.n_vocab, bad) : t.row(1);
            logits[17] = bad;
            result = t.sample(*slot, logits);
            CHECK_EQ(result.error, PLB_E_LOGITS);
            CHECK_EQ(result.finish, PLB_FINISH_ERROR);
            CHECK_EQ(result.token, -1);
            CHECK(!slot->active());
        }
    }
    p.path = PLB_PATH_AUTO;
    auto slot = plb::make_slot(t.words, p, 0, nullptr, 0);
    plb::sample_row(t.words, t.scratch, {slot.get(), nullptr, nullptr, &result, nullptr, nullptr});
    CHECK_EQ(result.error, PLB_E_LOGITS);

    // all but one at -inf is fine
    slot = plb::make_slot(t.words, p, 0, nullptr, 0);
    std::vector<float> one(t.words.n_vocab, -INFINITY);
    one[42] = -1e30f;
    CHECK_EQ(t.sample(*slot, one).token, 42);
}

void log_probabilities(sampler_test & t) {
    plb_sampling p = plb_sampling_default();
    p.n_logprobs = 5;
    p.temperature = 0;
    const llama_logit_bias bias = {9, 50.0f}; // chosen for its bias, reported without it
    p.n_logit_bias = 1;
    p.logit_bias   = &bias;
    auto slot = plb::make_slot(t.words, p, 5, nullptr, 0);
    auto logits = t.row(4);
    logits[3] = logits[20] = 30; // a tie: the smaller id first
    logits[5] = -INFINITY;
    llama_token top[5];
    float       logprob[5];
    const plb_result result = t.sample(*slot, logits, top, logprob);
    CHECK_EQ(result.token, 9);
    CHECK_EQ(result.n_top, 5);
    CHECK_EQ(top[0], 3);
    CHECK_EQ(top[1], 20);
    double sum = 0;
    for (const float x : logits) {
        sum += std::exp((double) x);
    }
    CHECK(std::fabs(result.logprob - (logits[9] - std::log(sum))) < 1e-5);
    for (int i = 0; i < 5; ++i) {
        CHECK(std::fabs(logprob[i] - (logits[top[i]] - std::log(sum))) < 1e-5);
        CHECK(i == 0 || logprob[i - 1] >= logprob[i]);
    }
}

// Typical sampling among tokens that are excluded: the likeliest of four equal ones is any of them.
void typical_with_excluded(sampler_test & t) {
    plb_sampling p = plb_sampling_default();
    p.top_k = 0;
    p.top_p = 1;
    p.min_p = 0;
    p.typical_p  = 0.5f;
    p.max_tokens = 1000;
    p.seed       = 1;
    std::vector<float> logits(t.words.n_vocab, -INFINITY);
    for (int i = 10; i < 14; ++i) {
        logits[i] = 5;
    }
    logits[20] = -200;
    auto slot = plb::make_slot(t.words, p, 0, nullptr, 0);
    for (int i = 0; i < 50; ++i) {
        const plb_result result = t.sample(*slot, logits);
        CHECK_EQ(result.error, 0);
        CHECK(result.token >= 10 && result.token < 14);
    }
}

void no_allocation(sampler_test & t) {
    for (const float temperature : {0.0f, 0.8f}) {
        plb_sampling p = plb_sampling_default();
        p.max_tokens  = 1000;
        p.temperature = temperature;
        p.ignore_eog  = 1;
        p.n_logprobs  = 3;
        auto slot = plb::make_slot(t.words, p, 3, nullptr, 0);
        const auto logits = t.row(4);
        llama_token top[3];
        float       logprob[3];
        t.sample(*slot, logits, top, logprob);
        const long before = n_allocations;
        for (int i = 0; i < 100; ++i) {
            CHECK_EQ(t.sample(*slot, logits, top, logprob).error, 0);
        }
        CHECK_EQ(n_allocations - before, 0);
    }
}

// However many cells the context has.
void penalties_look_back_at_what_there_is(sampler_test & t) {
    plb_sampling p = plb_sampling_default();
    p.repeat_penalty = 1.5f;
    p.max_tokens     = 8;
    const llama_token prompt[] = {1, 20, 40, 60};
    for (const auto & [last_n, n] : {std::pair(-1, 12), {1000, 12}, {5, 5}}) {
        p.penalty_last_n = last_n;
        CHECK_EQ(plb::make_slot(t.words, p, 0, prompt, 4)->fused.window.capacity(), n);
    }
}

} // namespace

int main(int argc, char ** argv) {
    fixture f(model_path(argc, argv), 64, 1, plb_engine_default_params());
    sampler_test t(f.model);
    bad_logits(t);
    log_probabilities(t);
    typical_with_excluded(t);
    no_allocation(t);
    penalties_look_back_at_what_there_is(t);
    return 0;
}
