// The draft model's memory: it follows sequences that end, move, share a prefix or come back. Answers, long
// prompts and calls that fail are tests/engine/test_draft_model.py's.
#include "check.hpp"

#include <algorithm>
#include <map>

namespace {

constexpr int32_t N_SEQ = 4, MOST = 4, N_TOKENS = 40, CATCH_UP = 64; // rows of a batch of the fixture

plb_engine_params drafting() {
    plb_engine_params params = plb_engine_default_params();
    params.n_draft_max = MOST;
    return params;
}

// A target, and the same weights once more that draft for it.
struct models {
    fixture target, small;
    plb_draft_model * draft  = nullptr;
    plb_drafts        drafts = {};
    std::map<llama_seq_id, text> known;

    models(const char * path, uint32_t n_ctx_small)
        : target(path, 1024, N_SEQ, drafting()),
          small(path, n_ctx_small, N_SEQ, plb_engine_default_params()) {
        CHECK_EQ(plb_draft_model_new(small.engine, target.engine, &draft), PLB_OK);
        CHECK_EQ(plb_engine_drafts(target.engine, &drafts), PLB_OK);
    }
    ~models() { plb_draft_model_free(draft); }

    // The prompt in the memory of the target, and the first token sampled.
    void start(llama_seq_id seq, const text & prompt, bool followed) {
        llama_memory_seq_rm(llama_get_memory(target.ctx), seq, -1, -1);
        const plb_sampling s = sampling_of(N_TOKENS);
        CHECK_EQ(plb_slot_set(target.engine, seq, &s, prompt.data(), (int32_t) prompt.size()), PLB_OK);
        for (size_t at = 0; at < prompt.size(); at += CATCH_UP) {
            const auto n = (int32_t) std::min(prompt.size() - at, (size_t) CATCH_UP);
            for (int32_t i = 0; i < n; ++i) {
                const size_t pos = at + (size_t) i;
                target.row(i, prompt[pos], (llama_pos) pos, seq,
                           pos + 1 == prompt.size() ? PLB_ROW_SAMPLE : 0);
            }
            CHECK_EQ(plb_step(target.engine, n), PLB_OK);
        }
        known[seq] = prompt;
        known[seq].push_back(target.views.results[0].token);
        if (followed) {
            begin(seq);
        }
    }

    void begin(llama_seq_id seq) {
        const text & tokens = known[seq];
        CHECK_EQ(plb_draft_model_begin(draft, seq, tokens.data(), (int32_t) tokens.size()), PLB_OK);
    }

    plb_run_info run(const std::vector<llama_seq_id> & slots, int32_t n_steps, int32_t n_most) {
        for (int32_t seq = 0; seq < N_SEQ; ++seq) {
            drafts.n_most[seq] = n_most;
        }
        plb_run_info info = {};
        const auto n = (int32_t) slots.size();
        CHECK_EQ(plb_run(target.engine, 0, slots.data(), n, 0, n_steps, &info), PLB_OK);
        for (int32_t i = 0; i < info.n_results; ++i) {
            known[target.views.results[i].seq].push_back(target.views.results[i].token);
        }
        return info;
    }

    // To the end of each; how many tokens were drafted and accepted.
    plb_run_info finish(std::vector<llama_seq_id> slots, int32_t n_most) {
        plb_run_info all = {};
        while (!slots.empty()) {
            const plb_run_info info = run(slots, 8, n_most);
            all.n_steps += info.n_steps;
            all.n_drafted += info.n_drafted;
            all.n_accepted += info.n_accepted;
            all.draft_code = info.draft_code != 0 ? info.draft_code : all.draft_code;
            for (int32_t i = 0; i < info.n_finished; ++i) {
                slots.erase(std::find(slots.begin(), slots.end(), target.views.finished[i].seq));
            }
        }
        return all;
    }

    int32_t rows_of_last_call() const { return small.views.info->n_rows; }
};

// What is held of a sequence serves one with the same prefix, wherever it is.
void takes_over(const char * path) {
    models p(path, 1024);
    CHECK_EQ(plb_draft_model_attach(p.draft, 1), PLB_OK);
    const text prompt = prompt_of(40, 3);
    p.start(0, prompt, true);
    p.run({0}, 2, MOST);
    CHECK_EQ(plb_draft_model_end(p.draft, 0), PLB_OK);
    p.start(3, prompt, true);
    CHECK_EQ(p.drafts.n_lacks[3], 0);
    CHECK_EQ(p.run({3}, 1, 1).n_drafted, 1);
    CHECK_EQ(p.rows_of_last_call(), 1); // the rest is sequence 0's
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(p.small.ctx), 3), (llama_pos) prompt.size());
    text other = prompt;
    other[20] = 19;
    p.start(1, other, true);
    CHECK_EQ(p.drafts.n_lacks[1], 41 - 20);
    CHECK_EQ(p.run({1}, 1, 1).n_drafted, 1);
    CHECK_EQ(p.rows_of_last_call(), 41 - 20);
    CHECK_EQ(p.drafts.n_lacks[1], 0);
    p.run({1}, 18, 0);
    CHECK_EQ(p.drafts.n_lacks[1], 20);
    CHECK_EQ(plb_draft_model_end(p.draft, 1), PLB_OK);
    CHECK_EQ(p.drafts.n_lacks[1], 0);
    // and the one that it was taken from goes on as if nothing had been
    p.begin(0);
    CHECK(p.run({0}, 1, MOST).n_accepted > 0);
}

// Where there are no cells, the longest one is given up, and the others go on.
void no_cells(const char * path) {
    models p(path, 256);
    CHECK_EQ(plb_draft_model_attach(p.draft, 1), PLB_OK);
    p.start(0, prompt_of(300, 1), true);
    p.start(1, prompt_of(150, 2), true);
    p.start(2, prompt_of(150, 90), true);
    plb_run_info all = p.finish({0, 1, 2}, MOST);
    CHECK_EQ(all.draft_code, 1);
    CHECK(all.n_accepted > 0);
    CHECK_EQ(p.known[0].size(), 300 + N_TOKENS);
    p.start(0, prompt_of(6, 2), true); // what others have left is forgotten for it
    p.start(1, prompt_of(150, 50), true);
    all = p.finish({0, 1}, MOST);
    CHECK_EQ(all.draft_code, PLB_OK);
    CHECK(all.n_accepted > N_TOKENS / 2);
}

// By n_most it drafts for some, for none, and not for a slot that it does not follow.
void as_many_as_wanted(const char * path) {
    models p(path, 1024);
    CHECK_EQ(plb_draft_model_attach(p.draft, 1), PLB_OK);
    p.start(0, prompt_of(8, 0), true);
    p.start(1, prompt_of(8, 1), false);
    CHECK_EQ(p.run({0, 1}, 2, 0).n_drafted, 0);
    CHECK(p.drafts.right[0] > 0.5f); // hopeful: it was never tried
    CHECK_EQ(p.run({0, 1}, 1, 2).n_drafted, 2);
    CHECK(p.drafts.found[0] > p.drafts.found[MOST]); // which has learnt that it gets none
    CHECK_EQ(plb_draft_model_attach(p.draft, 0), PLB_OK);
    CHECK_EQ(p.run({0, 1}, 2, MOST).n_drafted, 0);
    const llama_seq_id slot = 0;
    CHECK_EQ(plb_draft_model_draft(p.draft, &slot, 1), PLB_OK);
    CHECK_EQ(p.drafts.n_given[0], MOST);
    CHECK_EQ(p.run({0, 1}, 3, MOST).n_drafted, MOST); // for the first step of the three
}

} // namespace

int main(int argc, char ** argv) {
    const char * path = model_path(argc, argv);
    takes_over(path);
    no_cells(path);
    as_many_as_wanted(path);
    return 0;
}
