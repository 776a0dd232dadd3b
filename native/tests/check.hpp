// CHECK, and a model with a context for the tests that need one.
#pragma once

#include "plb.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK(condition)                                                                  \
    do {                                                                                  \
        if (!(condition)) {                                                               \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);       \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

#define CHECK_EQ(a, b)                                                                    \
    do {                                                                                  \
        const long long left = (long long) (a), right = (long long) (b);                  \
        if (left != right) {                                                              \
            fprintf(stderr, "%s:%d: %s is %lld, not %s = %lld\n", __FILE__, __LINE__, #a, \
                    left, #b, right);                                                     \
            exit(1);                                                                      \
        }                                                                                 \
    } while (0)

inline llama_context_params context_params(uint32_t n_ctx, uint32_t n_seq_max) {
    llama_context_params p = llama_context_default_params();
    p.n_ctx           = n_ctx;
    p.n_batch         = 64;
    p.n_ubatch        = 64;
    p.n_seq_max       = n_seq_max;
    p.n_threads       = 1;
    p.n_threads_batch = 1;
    p.kv_unified      = true;
    return p;
}

inline plb_sampling sampling_of(int32_t max_tokens, float temperature = 0, uint32_t seed = 5) {
    plb_sampling sampling = plb_sampling_default();
    sampling.temperature = temperature;
    sampling.max_tokens  = max_tokens;
    sampling.seed        = seed;
    sampling.ignore_eog  = 1;
    sampling.n_logprobs  = 3;
    return sampling;
}

struct fixture {
    llama_model   * model  = nullptr;
    llama_context * ctx    = nullptr;
    plb_engine    * engine = nullptr;
    plb_views       views  = {};
    int32_t         n_vocab = 0;

    fixture(const char * path, uint32_t n_ctx, uint32_t n_seq_max, plb_engine_params params,
            bool load_mtp = false) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        llama_model_params m = llama_model_default_params();
        m.load_mtp = load_mtp;
        model = llama_model_load_from_file(path, m);
        CHECK(model != nullptr);
        llama_context_params c = context_params(n_ctx, n_seq_max);
        c.n_rs_seq = (uint32_t) params.n_draft_max; // where it keeps a state
        ctx = llama_init_from_model(model, c);
        CHECK(ctx != nullptr);
        CHECK_EQ(plb_engine_new(ctx, &params, &engine), PLB_OK);
        CHECK_EQ(plb_engine_views(engine, &views), PLB_OK);
        n_vocab = views.n_vocab;
    }

    ~fixture() {
        llama_free(ctx); // before the engine: it must not touch the context any more
        plb_engine_free(engine);
        llama_model_free(model);
    }

    fixture(const fixture &) = delete;
    fixture & operator=(const fixture &) = delete;

    plb_slot_info slot(llama_seq_id seq) const {
        plb_slot_info info = {};
        CHECK_EQ(plb_slot_get_info(engine, seq, &info), PLB_OK);
        return info;
    }

    void row(int32_t i, llama_token token, llama_pos pos, llama_seq_id seq, int flags) {
        views.token[i] = token;
        views.pos[i]   = pos;
        views.seq[i]   = seq;
        views.flags[i] = (uint8_t) flags;
    }

    // Rows first..first+n-1: a prompt from position 0 on, its last row sampled.
    void prompt(int32_t first, const std::vector<llama_token> & tokens, llama_seq_id seq) {
        const int32_t n = (int32_t) tokens.size();
        for (int32_t i = 0; i < n; ++i) {
            row(first + i, tokens[i], i, seq, i == n - 1 ? PLB_ROW_SAMPLE : 0);
        }
    }

    // A new slot and a prompt for each of sequences 0.., in an empty memory: how many rows.
    int32_t start(const std::vector<int32_t> & max_tokens, float temperature = 0) {
        llama_memory_clear(llama_get_memory(ctx), true);
        int32_t n_rows = 0;
        for (int32_t seq = 0; seq < (int32_t) max_tokens.size(); ++seq, n_rows += 4) {
            const plb_sampling s = sampling_of(max_tokens[seq], temperature);
            CHECK_EQ(plb_slot_set(engine, seq, &s, nullptr, 0), PLB_OK);
            prompt(n_rows, {1, 20 + seq, 40, 60 + 2 * seq}, seq);
        }
        return n_rows;
    }
};

using text = std::vector<llama_token>;

// `n` tokens, which repeat nothing soon; another `first`, other ones.
inline text prompt_of(int32_t n, int32_t first) {
    text tokens = {1};
    for (int32_t i = 1; i < n; ++i) {
        tokens.push_back(20 + (first + 7 * i) % 200);
    }
    return tokens;
}

inline const char * model_path(int argc, char ** argv) {
    const char * path = argc > 1 ? argv[1] : getenv("PLB_TEST_MODEL");
    if (path == nullptr) {
        fprintf(stderr, "usage: %s MODEL.gguf [LLAMA_CPP_DIR]\n", argv[0]);
        exit(2);
    }
    return path;
}
