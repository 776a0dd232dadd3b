// A second, smaller model that drafts for an engine: its memory follows that of the first one.
#pragma once

#include "step/engine.hpp"

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
    };

    plb_engine * model;
    plb_engine * target;
    plb_drafts   given; // the target's
    bool    shares      = false; // a sequence can take over the cells of another
    int64_t catch_up_ns = 0;     // of the last call: for tokens that it should have had before
    std::vector<sequence> sequences; // [n_seq_max of the target]
    std::vector<llama_seq_id> drafting; // of this call, ascending
};
