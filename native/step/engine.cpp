// The engine: its memory, and the context that it is bound to.
#include "step/engine.hpp"

#include "ggml-backend.h"
#include "llama-ext.h"

#include <algorithm>
#include <iterator>

using namespace plb;

namespace {

constexpr int32_t N_LOGPROBS_LIMIT = 1024;
constexpr int32_t N_STEPS_LIMIT    = 65536;
constexpr int32_t N_THREADS_LIMIT  = 512;
constexpr int32_t N_VOCAB_WORTH    = 16384;

void allocate(plb_engine & engine, int32_t n_rows, int32_t n_results, int32_t n_logprobs,
              int32_t n_steps) {
    engine.token.resize(n_rows);
    engine.pos.resize(n_rows);
    engine.seq.resize(n_rows);
    engine.flags.resize(n_rows);
    engine.output.resize(n_rows);
    engine.n_seq_id.assign(n_rows, 1);
    engine.seq_id.resize((size_t) n_rows + 1);
    for (int32_t i = 0; i < n_rows; ++i) {
        engine.seq_id[i] = &engine.seq[i];
    }
    engine.steps.resize(n_steps);
    engine.finished.resize((size_t) engine.n_outputs_max);
    engine.ring.allocate(n_steps, n_results);
    engine.named.resize(engine.slots.size());
    engine.results.resize(n_results);
    // one spare entry, so that the addresses are valid without any column too
    engine.top_token.resize((size_t) n_results * n_logprobs + 1);
    engine.top_logprob.resize((size_t) n_results * n_logprobs + 1);
    engine.jobs.resize((size_t) engine.n_outputs_max);
}

int32_t n_cells(const llama_context * ctx) {
    return (int32_t) std::min<uint32_t>(llama_n_ctx(ctx), INT32_MAX);
}

void read_vocabulary(vocabulary & words, const llama_context * ctx) {
    words.vocab   = llama_model_get_vocab(llama_get_model(ctx));
    words.n_vocab = llama_vocab_n_tokens(words.vocab);
    words.n_ctx   = n_cells(ctx);
    for (llama_token token = 0; token < words.n_vocab; ++token) {
        if (llama_vocab_is_eog(words.vocab, token)) {
            words.eog.push_back(token);
        }
    }
    int32_t n = 0;
    const llama_token * suppressed = llama_vocab_get_suppress_tokens(words.vocab, &n);
    std::copy_if(suppressed, suppressed + n, std::back_inserter(words.suppressed),
                 [&](llama_token token) { return token >= 0 && token < words.n_vocab; });
}

// A model that looks positions up in a table has as many as it was trained with.
int32_t positions(const llama_model * model) {
    const bool table = llama_model_rope_type(model) == LLAMA_ROPE_TYPE_NONE &&
                       !llama_model_is_recurrent(model) && !llama_model_is_hybrid(model);
    return table ? llama_model_n_ctx_train(model) : INT32_MAX;
}

// Whether it is worth asking the device at all, and whether that is known.
void place_sampling(plb_engine & engine, int32_t mode) {
    const int32_t n_vocab = engine.words.n_vocab;
    if (mode == PLB_DEVICE_SAMPLING_OFF || !shortlist::fits(n_vocab, engine.n_outputs_max)) {
        return;
    }
    bool ask = mode == PLB_DEVICE_SAMPLING_ON, known = false;
    if (!ask && n_vocab >= N_VOCAB_WORTH) {
        for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
            ggml_backend_dev_props device = {};
            ggml_backend_dev_get_props(ggml_backend_dev_get(i), &device);
            ask   = ask || device.type == GGML_BACKEND_DEVICE_TYPE_GPU ||
                  device.type == GGML_BACKEND_DEVICE_TYPE_IGPU;
            known = known || (device.type == GGML_BACKEND_DEVICE_TYPE_GPU &&
                              !device.caps.buffer_from_host_ptr); // memory of its own
        }
    }
    if (ask) {
        engine.place     = placement(mode, known);
        engine.on_device =
            std::make_unique<shortlist>(engine.ctx, mode == PLB_DEVICE_SAMPLING_ON);
        engine.short_rows.resize((size_t) engine.views.n_rows_max);
    }
}

} // namespace

plb_engine_params plb_engine_default_params(void) {
    return {0, 1, 20, 1, 0, 0, 32, PLB_DEVICE_SAMPLING_AUTO, 0, 0, PLB_DRAFTER_NONE, 0, 0, 0};
}

int32_t plb_engine_new(llama_context * ctx, const plb_engine_params * params, plb_engine ** out) {
    if (ctx == nullptr || params == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    *out = nullptr;
    if (llama_get_memory(ctx) == nullptr) {
        return PLB_E_NO_DECODER;
    }
    const int32_t n_batch   = (int32_t) llama_n_batch(ctx);
    const int32_t n_seq_max = (int32_t) llama_n_seq_max(ctx);
    const int32_t n_outputs = params->n_outputs_max == 0 ? n_batch : params->n_outputs_max;
    if (n_outputs < n_seq_max || params->n_logprobs_max < 0 ||
        params->n_logprobs_max > N_LOGPROBS_LIMIT || params->n_threads < 1 ||
        params->n_threads > N_THREADS_LIMIT ||
        params->n_steps_max < 1 || params->n_steps_max > N_STEPS_LIMIT ||
        params->device_sampling < PLB_DEVICE_SAMPLING_AUTO ||
        params->device_sampling > PLB_DEVICE_SAMPLING_ON || params->gap_max < 0 ||
        (params->mtp != 0 && params->gap_max > 0) || // a row that fills up has no hidden state
        params->n_draft_max < 0 || params->n_draft_max > PLB_DRAFT_LIMIT ||
        params->drafter < PLB_DRAFTER_NONE || params->drafter > PLB_DRAFTER_NGRAM ||
        params->n_corpus < 0) {
        return PLB_E_ARGUMENT;
    }
    char ignored[TEXT_BYTES];
    return guarded(ignored, [&] {
        auto engine = std::make_unique<plb_engine>();
        engine->ctx           = ctx;
        engine->n_outputs_max = std::min(n_outputs, n_batch);
        engine->n_outputs_per_seq = params->n_outputs_per_seq == 0 ? engine->n_outputs_max
                                                                   : params->n_outputs_per_seq;
        engine->n_ubatch      = (int32_t) llama_n_ubatch(ctx);
        engine->all_outputs   = params->all_outputs != 0;
        engine->sync          = params->sync != 0;
        engine->stream        = params->stream != 0;
        engine->slots.resize(n_seq_max);
        read_vocabulary(engine->words, ctx);
        engine->sampler = std::make_unique<row_sampler>(engine->words, params->n_threads);
        const int32_t n_logprobs = std::min(params->n_logprobs_max, engine->words.n_vocab);
        const int32_t n_most = params->stream ? 1 : 1 + params->n_draft_max; // records of a slot
        const int64_t n_records = std::max<int64_t>(
            engine->n_outputs_max, (int64_t) n_seq_max * params->n_steps_max * n_most);
        allocate(*engine, n_batch, (int32_t) n_records, n_logprobs, params->n_steps_max);
        if (params->mtp != 0) {
            engine->hidden.resize((size_t) n_batch * llama_model_n_embd_out(llama_get_model(ctx)));
        }
        engine->views = {
            n_batch, (int32_t) n_records, n_logprobs, n_seq_max, engine->words.n_vocab,
            positions(llama_get_model(ctx)), params->n_steps_max,
            engine->token.data(), engine->pos.data(), engine->seq.data(), engine->flags.data(),
            engine->results.data(), engine->top_token.data(), engine->top_logprob.data(),
            &engine->info, engine->steps.data(), engine->finished.data(),
        };
        if (params->n_draft_max > 0) {
            engine->drafts = std::make_unique<drafts>(ctx, *params, n_seq_max);
        }
        place_sampling(*engine, params->device_sampling);
        if (params->gap_max > 0) {
            engine->gaps = std::make_unique<gaps>(ctx, params->gap_max, engine->n_outputs_max,
                                                  engine->views.n_pos_max);
        }
        *out = engine.release();
    });
}

void plb_engine_free(plb_engine * engine) {
    if (engine != nullptr && engine->process == plb_process()) {
        delete engine;
    }
}

int32_t plb_engine_detach(plb_engine * engine) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        if (engine->on_device) {
            engine->on_device->detach();
        }
    });
}

int32_t plb_engine_rebind(plb_engine * engine, llama_context * ctx) {
    if (engine == nullptr || ctx == nullptr || llama_get_memory(ctx) == nullptr ||
        (int32_t) llama_n_batch(ctx) != engine->views.n_rows_max ||
        (int32_t) llama_n_ubatch(ctx) != engine->n_ubatch ||
        (int32_t) llama_n_seq_max(ctx) != engine->views.n_seq_max ||
        llama_model_get_vocab(llama_get_model(ctx)) != engine->words.vocab) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        auto device = engine->on_device ? std::make_unique<shortlist>(ctx, *engine->on_device)
                                        : nullptr;
        // In a pool there are no gaps, but for a recurrent state.
        const bool streams = llama_n_ctx_seq(ctx) < llama_n_ctx(ctx) ||
                             llama_model_is_recurrent(llama_get_model(ctx));
        auto filled = engine->gaps && streams ? std::make_unique<gaps>(ctx, engine->gaps->most(),
                                                                 engine->n_outputs_max,
                                                                 engine->views.n_pos_max)
                                              : nullptr;
        engine->on_device = std::move(device);
        engine->gaps      = std::move(filled);
        engine->ctx       = ctx;
        if (engine->drafts) {
            llama_set_embeddings_nextn(ctx, engine->drafts->reads_hidden(), /*masked*/ false);
            engine->drafts->bind(ctx);
        }
        engine->words.n_ctx = std::max<int32_t>(engine->words.n_ctx, n_cells(ctx));
    });
}

int32_t plb_engine_views(plb_engine * engine, plb_views * out) {
    if (engine == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    *out = engine->views;
    return PLB_OK;
}

int32_t plb_engine_drafts(plb_engine * engine, plb_drafts * out) {
    if (engine == nullptr || out == nullptr || !engine->drafts) {
        return PLB_E_ARGUMENT;
    }
    *out = engine->drafts->views();
    return PLB_OK;
}

const char * plb_last_error(const plb_engine * engine) {
    return engine == nullptr ? "" : engine->error;
}
