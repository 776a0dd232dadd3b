// Rows of one call of a model that drafts, in the making.
#pragma once

#include "step/draft_model.hpp"

namespace plb {

constexpr int32_t NO_CELLS = 1; // of llama_decode

class draft_rows {
public:
    explicit draft_rows(plb_draft_model & self) : self_(self) {}

    // A sequence's next token. PLB_OK, or the code of a step that was computed for want of room.
    int32_t add(llama_seq_id seq, llama_token token, bool sample);
    // The token that was drafted last for it; another one is sampled.
    int32_t go_on(llama_seq_id seq);
    // Computes them; what is sampled is a draft's next token.
    int32_t compute();

private:
    void start(const plb_draft_model::sequence & s, float * out) const;
    void give(const plb_result & result);

    plb_draft_model & self_;
    int32_t n_ = 0;
    bool sample_ = false; // of those that are in the making
};

} // namespace plb
