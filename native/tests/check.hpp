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

struct fixture {
    llama_model   * model  = nullptr;
    llama_context * ctx    = nullptr;
    plb_engine    * engine = nullptr;
    plb_views       views  = {};
    int32_t         n_vocab = 0;

    fixture(const char * path, uint32_t n_ctx, uint32_t n_seq_max, plb_engine_params params) {
        llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
        llama_backend_init();
        model = llama_model_load_from_file(path, llama_model_default_params());
        CHECK(model != nullptr);
        llama_context_params p = llama_context_default_params();
        p.n_ctx           = n_ctx;
        p.n_batch         = 64;
        p.n_ubatch        = 64;
        p.n_seq_max       = n_seq_max;
        p.n_threads       = 1;
        p.n_threads_batch = 1;
        p.kv_unified      = true;
        ctx = llama_init_from_model(model, p);
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
};

inline const char * model_path(int argc, char ** argv) {
    const char * path = argc > 1 ? argv[1] : getenv("PLB_TEST_MODEL");
    if (path == nullptr) {
        fprintf(stderr, "usage: %s MODEL.gguf [LLAMA_CPP_DIR]\n", argv[0]);
        exit(2);
    }
    return path;
}
