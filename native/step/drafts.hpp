// The drafted rows of a run: how many each slot has in a step, what they hold, and what is taken back.
#pragma once

#include "plb.h"

#include "step/corpus.hpp"
#include "step/draft_prices.hpp"
#include "step/ngram.hpp"

#include <cstdint>
#include <memory>
#include <vector>

namespace plb {

class drafts {
public:
    // Throws `failure` where the context can't take rows back.
    drafts(const llama_context * ctx, const plb_engine_params & params, int32_t n_seq_max);

    void bind(const llama_context * ctx);
    plb_drafts views();
    bool ngram() const { return drafter_ == PLB_DRAFTER_NGRAM; }
    // What its slots draft from besides their own tokens; nullptr: nothing.
    const corpus * texts() const { return corpus_.get(); }
    // A slot leaves its place for good.
    void leave(const plb_slot & slot);

    // What is asked for drafts before each step; nullptr: nothing.
    void attach(plb_draft_model * model) { model_ = model; }
    const plb_draft_model * model() const { return model_; }
    // Whether it needs the hidden states of all rows; and rows that were computed, for it.
    bool reads_hidden() const;
    void watch(int32_t n_rows, bool drafted);

    // A run of these slots begins: PLB_OK, or PLB_E_DRAFT and the slot that it speaks of.
    int32_t begin(const llama_seq_id * slots, int32_t n_slots, int32_t n_vocab, int32_t & bad);
    // Writes the rows of its next step; how many, 0 for one without drafts.
    int32_t write(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_pad);
    // Of the step that was written: rows of each sequence that are there in any case, or 1.
    int32_t n_each() const { return n_each_; }
    // And of the sequence with most.
    int32_t n_longest() const { return n_longest_; }
    // Samples its rows, the records from `first` on, and takes back the rest; how many records.
    int32_t sample(plb_engine & engine, int32_t first);
    // Whether libllama took back all rows that it was to, in this run.
    bool took_back() const { return took_back_; }
    // A step was computed; ns: what it took, 0 where that is not known.
    void computed(const plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, bool drafted,
                  int64_t ns);
    // The run has ended; what it tells of its drafts.
    void end(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, plb_run_info & run);

private:
    struct rows {
        llama_seq_id seq;
        int32_t first;     // row
        int32_t n;         // rows, those that only fill up included
        int32_t n_asked;   // tokens that were to be drafted
        int32_t n_drafted;
        int32_t n_taken;   // tokens sampled
    };

    rows draft(const plb_engine & engine, llama_seq_id seq);
    int32_t n_rows_max(const plb_engine & engine) const;
    int32_t width(const plb_engine & engine, int32_t n_pad) const;
    int32_t cut(const plb_engine & engine, int32_t n_pad, int32_t n_wanted);
    int32_t behind(const plb_engine & engine, const rows & r, int32_t n) const;
    int32_t choose(const plb_engine & engine, int32_t n_pad);
    void note(const plb_engine & engine, const rows & r, int32_t n_right);
    static void collect(match_record & own, match_record & usual);
    void hope(float weight);

    int32_t n_max_, drafter_;
    plb_draft_model * model_ = nullptr;
    int64_t catch_up_ns_ = 0; // of the run
    int64_t step_catch_up_ns_ = 0;
    int32_t draft_code_  = 0;
    draft_record usual_;      // of all slots
    bool    even_      = false; // all sequences of a step have the same number of rows
    int32_t n_ubatch_  = 0;
    int32_t n_ctx_seq_ = 0;
    bool    wanted_    = false;
    bool    took_back_ = true;
    int32_t n_each_    = 1;
    int32_t n_longest_ = 1;
    std::vector<int32_t>     n_most_, n_given_, n_taken_; // [n_seq_max]
    std::vector<int32_t>     n_drafts_, n_drafted_, n_accepted_, n_lacks_; // [n_seq_max]
    std::vector<int32_t>     n_right_;                    // [n_max]
    std::vector<llama_token> token_;                      // [n_seq_max][n_max]
    std::vector<float>       found_, right_;              // [n_seq_max][n_max]
    std::vector<rows>        rows_;                       // of the step, [n_slots]
    std::vector<int32_t>     live_;                       // in rows_
    draft_prices             prices_;
    match_record             matches_, shared_matches_;   // of all sequences
    std::unique_ptr<corpus>  corpus_;                     // nullptr: none
    std::vector<float>       chance_;                     // [n_seq_max][n_max], where there are prices
    std::vector<draft_offer> offers_;                     // as rows_
    int64_t                  n_reused_ = 0;               // graphs, before the step
};

} // namespace plb
