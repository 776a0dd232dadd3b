// A second model that drafts for an engine: its memory follows that of the first one. It is a smaller
// one, or the layers of the first one that predict further tokens: those start from its hidden states.
#pragma once

#include "step/engine.hpp"
#include "step/hidden_states.hpp"

#include <vector>

struct plb_draft_model {
    // What it has of one sequence.
    struct sequence {
        std::vector<llama_token> known; // all of the target's tokens, the last one included
        std::vector<llama_token> held;  // those in this model's memory
        size_t  n_agreed = 0;           // of both, that are known to be the same
        size_t  n_seen   = 0;           // of what the target's slot has generated
        int32_t n_wanted = 0;           // tokens to draft, of this call
        bool    followed = false;
        plb::hidden_states states;      // the target's, where this model starts from them
        std::vector<float> own;         // its own, behind the last token that it has drafted,
        size_t  own_pos = 0;            // for a token at this position, 0: there is none
    };

    plb_engine * model;
    plb_engine * target;
    plb_drafts   given; // the target's
    bool    shares      = false; // a sequence can take over the cells of another
    size_t  n_hidden    = 0;     // width of the hidden states that it starts from, 0: from none
    int64_t catch_up_ns = 0;     // of the last call: for tokens that it should have had before
    std::vector<sequence> sequences; // [n_seq_max of the target]
    std::vector<llama_seq_id> drafting; // of this call, ascending
};

namespace plb {

// The target has computed so many rows: where the model starts from hidden states, it takes theirs, and
// computes what there is no room for. Returns 0 or a code as plb_draft_model_draft.
int32_t watch(plb_draft_model & self, int32_t n_rows, bool drafted);

// Of the memory everything that no sequence of this call needs; whether there was anything.
bool forget_others(plb_draft_model & self);

// To the target's `n_lacks`.
void tell_lacks(const plb_draft_model & self);

} // namespace plb
