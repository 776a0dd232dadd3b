#include "step/draft_rows.hpp"

#include "llama-ext.h"

#include <algorithm>

namespace plb {

int32_t draft_rows::add(llama_seq_id seq, llama_token token, bool sample) {
    plb_engine & model = *self_.model;
    plb_draft_model::sequence & s = self_.sequences[(size_t) seq];
    if (self_.n_hidden > 0) {
        // Only where all rows have outputs, every architecture gives the hidden states of these.
        const int32_t code = n_ > 0 && sample != sample_ ? compute() : PLB_OK;
        if (code != PLB_OK) {
            return code;
        }
        sample_ = sample;
        start(s, &model.hidden[(size_t) n_ * self_.n_hidden]);
    }
    const auto row = (size_t) n_++;
    model.token[row] = token;
    model.pos[row]   = (llama_pos) s.held.size();
    model.seq[row]   = seq;
    model.flags[row] = (uint8_t) (sample ? PLB_ROW_SAMPLE : 0);
    s.held.push_back(token);
    return n_ == model.views.n_rows_max ? compute() : PLB_OK;
}

int32_t draft_rows::go_on(llama_seq_id seq) {
    const plb_drafts & given = self_.given;
    return add(seq, given.token[seq * given.n_draft_max + given.n_given[seq] - 1], true);
}

int32_t draft_rows::compute() {
    if (n_ == 0) {
        return PLB_OK;
    }
    plb_engine & model = *self_.model;
    int32_t code = plb_step(&model, n_);
    if (code == NO_CELLS && forget_others(self_)) {
        code = plb_step(&model, n_);
    }
    for (int32_t i = 0; code == NO_CELLS && i < n_; ++i) { // none was computed
        const llama_seq_id seq = model.seq[(size_t) i];
        plb_draft_model::sequence & s = self_.sequences[(size_t) seq];
        s.held.pop_back();
        s.n_agreed = std::min(s.n_agreed, s.held.size());
        llama_memory_seq_rm(llama_get_memory(model.ctx), seq, (llama_pos) s.held.size(), -1);
    }
    n_ = 0;
    for (int32_t i = 0; code == PLB_OK && i < model.info.n_results; ++i) {
        give(model.results[(size_t) i]);
    }
    return code;
}

void draft_rows::give(const plb_result & result) {
    plb_draft_model::sequence & s = self_.sequences[(size_t) result.seq];
    if (result.token < 0 || result.token >= self_.target->views.n_vocab) {
        s.n_wanted = 0;
        return;
    }
    const plb_drafts & given = self_.given;
    int32_t & n_given = given.n_given[result.seq];
    given.token[result.seq * given.n_draft_max + n_given++] = result.token;
    if (n_given >= s.n_wanted || result.finish != PLB_FINISH_NONE) {
        s.n_wanted = 0;
    } else if (self_.n_hidden > 0) {
        const float * state = llama_get_embeddings_nextn_ith(self_.model->ctx, result.row);
        std::copy_n(state, self_.n_hidden, s.own.begin());
        s.own_pos = s.held.size();
    }
}

// What the row of the next token starts from: the hidden state of the position before, zeros where
// that is not known (the first one, or one that others have computed).
void draft_rows::start(const plb_draft_model::sequence & s, float * out) const {
    const size_t pos = s.held.size();
    const float * state = pos == 0 ? nullptr : s.own_pos == pos ? s.own.data() : s.states.at(pos - 1);
    if (state != nullptr) {
        std::copy_n(state, self_.n_hidden, out);
    } else {
        std::fill_n(out, self_.n_hidden, 0.0f);
    }
}

} // namespace plb
