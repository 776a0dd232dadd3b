// Layers that predict further tokens: their drafts are those that the whole text gives at once, however it
// came into the memory; and what is sampled is the same with and without. Of a model with KV cells, and of
// one that keeps a state besides, which is taken back with the drafts.
#include "check.hpp"
#include "plb_testing.h"

#include "llama-ext.h"

#include <algorithm>
#include <map>

namespace {

constexpr int32_t N_SEQ = 4, MOST = 3, N_TOKENS = 60, N_BATCH = 64;

using floats = std::vector<float>;

llama_context * context_of(llama_model * model, llama_context_type type) {
    llama_context_params p = llama_context_default_params();
    p.n_ctx = 1024;
    p.n_batch = p.n_ubatch = N_BATCH;
    p.n_seq_max  = N_SEQ;
    p.n_threads  = p.n_threads_batch = 1;
    p.kv_unified = p.swa_full = true;
    p.ctx_type   = type;
    llama_context * ctx = llama_init_from_model(model, p);
    CHECK(ctx != nullptr);
    llama_set_embeddings_nextn(ctx, true, type == LLAMA_CONTEXT_TYPE_MTP);
    return ctx;
}

// Raw calls: the drafts behind a text.
class reference {
public:
    explicit reference(llama_model * model)
        : trunk_(context_of(model, LLAMA_CONTEXT_TYPE_DEFAULT)),
          layers_(context_of(model, LLAMA_CONTEXT_TYPE_MTP)), n_embd_(llama_model_n_embd_out(model)),
          n_vocab_(llama_vocab_n_tokens(llama_model_get_vocab(model))) {}
    ~reference() {
        llama_free(trunk_);
        llama_free(layers_);
    }

    text drafts(const text & known, int32_t n) {
        llama_memory_clear(llama_get_memory(trunk_), true);
        llama_memory_clear(llama_get_memory(layers_), true);
        const auto n_read = (int32_t) known.size() - 1;
        floats before((size_t) n_embd_); // of the position before
        for (int32_t at = 0; at < n_read; at += N_BATCH) {
            const int32_t n_rows = std::min(N_BATCH, n_read - at);
            decode(trunk_, &known[(size_t) at], nullptr, at, n_rows, false);
            const float * states = llama_get_embeddings_nextn(trunk_);
            floats shifted = before;
            shifted.insert(shifted.end(), states, states + (n_rows - 1) * n_embd_);
            before.assign(states + (n_rows - 1) * n_embd_, states + n_rows * n_embd_);
            decode(layers_, &known[(size_t) at], shifted.data(), at, n_rows, false);
        }
        text drafted = {known.back()};
        for (int32_t i = 0; i < n; ++i) {
            decode(layers_, &drafted.back(), before.data(), n_read + i, 1, true);
            const float * logits = llama_get_logits_ith(layers_, 0);
            const float * state  = llama_get_embeddings_nextn_ith(layers_, 0);
            before.assign(state, state + n_embd_);
            drafted.push_back((llama_token) (std::max_element(logits, logits + n_vocab_) - logits));
        }
        return {drafted.begin() + 1, drafted.end()};
    }

private:
    static void decode(llama_context * ctx, const llama_token * tokens, float * states, int32_t first,
                       int32_t n, bool output) {
        text token(tokens, tokens + n);
        std::vector<llama_pos> pos;
        std::vector<int8_t> outputs((size_t) n, (int8_t) output);
        for (int32_t i = 0; i < n; ++i) {
            pos.push_back(first + i);
        }
        CHECK_EQ(llama_decode(ctx, {n, token.data(), states, pos.data(), nullptr, nullptr,
                                    outputs.data()}), 0);
    }

    llama_context * trunk_, * layers_;
    int32_t n_embd_, n_vocab_;
};

plb_engine_params target_params() {
    plb_engine_params params = plb_engine_default_params();
    params.n_draft_max = MOST;
    return params;
}

struct models {
    fixture target;
    llama_context * ctx = context_of(target.model, LLAMA_CONTEXT_TYPE_MTP);
    plb_engine * engine = nullptr;
    plb_draft_model * draft = nullptr;
    plb_drafts drafts = {};
    std::map<llama_seq_id, text> known;

    explicit models(const char * path) : target(path, 1024, N_SEQ, target_params(), true) {
        plb_engine_params params = plb_engine_default_params();
        params.mtp = 1;
        CHECK_EQ(plb_engine_new(ctx, &params, &engine), PLB_OK);
        CHECK_EQ(plb_draft_model_new(engine, target.engine, &draft), PLB_OK);
        CHECK_EQ(plb_engine_drafts(target.engine, &drafts), PLB_OK);
        CHECK_EQ(plb_draft_model_attach(draft, 1), PLB_OK);
    }
    ~models() {
        plb_draft_model_free(draft);
        plb_engine_free(engine);
        llama_free(ctx);
    }

    // The prompt in the memory of the target behind the first n_cached of it, and a token sampled.
    void start(llama_seq_id seq, const text & prompt, float temperature, bool followed, size_t n_cached = 0) {
        plb_sampling s = plb_sampling_default();
        s.temperature = temperature;
        s.max_tokens  = N_TOKENS;
        s.seed        = 7 + (uint32_t) seq;
        s.ignore_eog  = 1;
        llama_memory_seq_rm(llama_get_memory(target.ctx), seq, (llama_pos) n_cached, -1);
        CHECK_EQ(plb_slot_set(target.engine, seq, &s, prompt.data(), (int32_t) prompt.size()), PLB_OK);
        if (followed) {
            CHECK_EQ(plb_draft_model_begin(draft, seq, prompt.data(), (int32_t) prompt.size()), PLB_OK);
        }
        for (size_t at = n_cached; at < prompt.size(); at += N_BATCH) {
            const auto n = (int32_t) std::min(prompt.size() - at, (size_t) N_BATCH);
            for (int32_t i = 0; i < n; ++i) {
                const size_t pos = at + (size_t) i;
                target.row(i, prompt[pos], (llama_pos) pos, seq,
                           pos + 1 == prompt.size() ? PLB_ROW_SAMPLE : 0);
            }
            CHECK_EQ(plb_step(target.engine, n), PLB_OK);
        }
        known[seq] = prompt;
        known[seq].push_back(target.views.results[0].token);
    }

    plb_run_info run(const std::vector<llama_seq_id> & slots, int32_t n_steps, int32_t n_most) {
        std::fill_n(drafts.n_most, N_SEQ, n_most);
        plb_run_info info = {};
        CHECK_EQ(plb_run(target.engine, 0, slots.data(), (int32_t) slots.size(), 0, n_steps, &info), PLB_OK);
        CHECK_EQ(info.draft_code, PLB_OK);
        for (int32_t i = 0; i < info.n_results; ++i) {
            known[target.views.results[i].seq].push_back(target.views.results[i].token);
        }
        return info;
    }

    // A step, whose drafts are to be those of the whole texts; how many of them were right.
    int32_t step_as(reference & all, const std::vector<llama_seq_id> & slots) {
        std::map<llama_seq_id, text> expected;
        for (const llama_seq_id seq : slots) {
            expected[seq] = all.drafts(known[seq], MOST);
        }
        const plb_run_info info = run(slots, 1, MOST);
        CHECK_EQ(info.n_drafted, MOST * (int32_t) slots.size());
        for (const llama_seq_id seq : slots) {
            const llama_token * drafted = drafts.token + seq * drafts.n_draft_max;
            CHECK(expected[seq] == text(drafted, drafted + MOST));
        }
        return info.n_accepted;
    }

    llama_pos end_of(llama_seq_id seq) const {
        return llama_memory_seq_pos_max(llama_get_memory(ctx), seq) + 1;
    }
};

// Prompts in one batch and in several, of which none is a multiple of another; tokens that were drafted,
// rejected and taken; many that were not; and the same again in another sequence.
void drafts_of_the_whole_text(const char * path) {
    models m(path);
    reference all(m.target.model);
    m.start(2, prompt_of(5, 1), 0, true);
    m.start(0, prompt_of(200, 3), 0, true);
    int32_t n_accepted = 0;
    for (int32_t i = 0; i < 5; ++i) {
        n_accepted += m.step_as(all, {2, 0});
    }
    CHECK(n_accepted > 0 && n_accepted < 2 * 5 * MOST);
    m.run({0}, 8, 0); // others wait
    m.step_as(all, {0, 2});
    const llama_pos n_read = m.end_of(0);
    CHECK(n_read > 200);
    m.run({0, 2}, 22, 0); // where nothing is drafted, nothing is read
    CHECK_EQ(m.end_of(0), n_read);
    CHECK_EQ(m.run({0, 2}, 1, MOST).n_drafted, 2 * MOST); // before something is, all that it lacks
    CHECK(m.end_of(0) > n_read + 22);
    CHECK_EQ(plb_draft_model_end(m.draft, 0), PLB_OK);
    CHECK_EQ(plb_draft_model_end(m.draft, 2), PLB_OK);
    m.start(0, prompt_of(30, 5), 0, true); // in place of another one
    m.step_as(all, {0});
}

// A prefix that another sequence has computed is taken over, and so is what the layers have of it.
void a_prefix(const char * path) {
    models m(path);
    reference all(m.target.model);
    const text prompt = prompt_of(100, 3);
    m.start(0, prompt, 0, true);
    m.run({0}, 1, MOST);
    const text moved = m.known[0]; // the whole of it
    llama_memory_seq_cp(llama_get_memory(m.target.ctx), 0, 3, 0, -1);
    m.start(3, moved, 0, true, moved.size() - 1);
    m.step_as(all, {3, 0});
    llama_memory_seq_cp(llama_get_memory(m.target.ctx), 0, 1, 0, 80);
    text other = prompt;
    other[80] = 19;
    m.start(1, other, 0, true, 80);
    CHECK(m.end_of(1) >= 80);
    CHECK_EQ(m.run({1}, 1, MOST).n_drafted, MOST);
    m.run({0, 1}, 1, MOST);
    // and of one that comes from elsewhere nothing is known: it is read once more
    llama_memory_seq_cp(llama_get_memory(m.target.ctx), 0, 2, 0, 80);
    llama_memory_seq_rm(llama_get_memory(m.ctx), 2, -1, -1);
    other[0] = 18;
    m.start(2, other, 0, true, 80);
    m.run({0, 1, 2}, 3, MOST);
    CHECK_EQ(m.run({2}, 1, MOST).n_drafted, MOST);
}

void same_with_and_without(const char * path, float temperature) {
    models m(path);
    std::map<llama_seq_id, text> plain;
    for (const bool drafting : {false, true}) {
        for (int32_t seq = 0; seq < 3; ++seq) {
            m.start(seq, prompt_of(15 + 30 * seq, seq), temperature, drafting);
        }
        int32_t n_drafted = 0, n_accepted = 0;
        for (std::vector<llama_seq_id> slots = {2, 0, 1}; !slots.empty();) {
            const plb_run_info info = m.run(slots, 8, MOST);
            n_drafted += info.n_drafted;
            n_accepted += info.n_accepted;
            for (int32_t i = 0; i < info.n_finished; ++i) {
                slots.erase(std::find(slots.begin(), slots.end(), m.target.views.finished[i].seq));
            }
        }
        CHECK_EQ(n_drafted > 0, drafting);
        CHECK_EQ(n_accepted > 0, drafting);
        if (!drafting) {
            plain = m.known;
        }
    }
    CHECK(m.known == plain);
}

// A call of the layers that fails while the target reads a prompt ends drafts, and nothing else.
void fails(const char * path, int32_t code) {
    models m(path);
    const text prompt = prompt_of(100, 3);
    CHECK_EQ(plb_fault_set(m.engine, 1, code, 1, 1), PLB_OK);
    m.start(0, prompt, 0, true);
    CHECK_EQ(m.run({0}, 2, MOST).n_drafted, 0);
    m.start(0, prompt, 0, true);
    CHECK(m.run({0}, 2, MOST).n_drafted > 0);
}

} // namespace

int main(int argc, char ** argv) {
    CHECK(argc > 5);
    a_prefix(argv[4]);
    for (const char * path : {argv[4], argv[5]}) {
        drafts_of_the_whole_text(path);
        same_with_and_without(path, 0);
        same_with_and_without(path, 1.0f);
        fails(path, 1);
        fails(path, -3);
    }
    return 0;
}
