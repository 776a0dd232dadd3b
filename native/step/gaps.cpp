#include "step/gaps.hpp"

#include <algorithm>

namespace plb {

gaps::gaps(llama_context * ctx, int32_t most, int32_t n_outputs_max, int32_t n_pos_max)
    : memory_(llama_get_memory(ctx)), most_(most),
      whole_(llama_model_is_recurrent(llama_get_model(ctx)) || llama_model_is_hybrid(llama_get_model(ctx))),
      n_rows_max_((int32_t) std::min(llama_n_batch(ctx), llama_n_ubatch(ctx))),
      n_outputs_max_(n_outputs_max),
      n_pos_max_(std::min<int32_t>(n_pos_max, (int32_t) llama_n_ctx_seq(ctx))) {
    const size_t n_rows = (size_t) n_rows_max_, n_seq_max = llama_n_seq_max(ctx);
    filled_.reserve(n_seq_max);
    held_.reserve(n_seq_max);
    row_.resize(n_rows);
    token_.resize(n_rows);
    pos_.resize(n_rows);
    n_seq_id_.assign(n_rows, 1);
    seq_.resize(n_rows);
    seq_id_.resize(n_rows + 1);
    output_.resize(n_rows);
    for (size_t i = 0; i < n_rows; ++i) {
        seq_id_[i] = &seq_[i];
    }
}

void gaps::add(llama_token token, llama_pos pos, llama_seq_id seq, int8_t output) {
    const auto i = (size_t) n_++;
    token_[i]  = token;
    pos_[i]    = pos;
    seq_[i]    = seq;
    output_[i] = output;
}

// Which sequences get a row. False: there is no room for those below n_pad.
bool gaps::choose(const llama_batch & batch, int32_t n_pad) {
    filled_.clear();
    held_.clear();
    llama_seq_id next = n_pad > 0 ? 0 : batch.seq_id[0][0];
    for (int32_t i = 0; i <= batch.n_tokens; i += n_each_) {
        const bool behind = i == batch.n_tokens; // all rows
        const llama_seq_id seq = behind ? std::max(next, n_pad) : batch.seq_id[i][0];
        const size_t before = filled_.size();
        bool fits = n_pad > 0 || seq - next <= most_;
        for (; fits && next < seq; ++next) {
            const llama_pos held = llama_memory_seq_pos_max(memory_, next) + 1;
            filled_.push_back(next);
            held_.push_back(held);
            fits = held == 0 || (n_pad > 0 && !whole_ && held + n_each_ <= n_pos_max_);
        }
        fits = fits && batch.n_tokens + n_filled() <= n_rows_max_;
        if (!fits && n_pad > 0) {
            return false;
        }
        if (!fits) {
            filled_.resize(before);
            held_.resize(before);
        }
        next = seq + 1;
    }
    return true;
}

bool gaps::each_the_same(const llama_batch & batch, int32_t & n_outputs) const {
    n_outputs = 0;
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        const llama_seq_id seq = batch.seq_id[i][0], before = i > 0 ? batch.seq_id[i - 1][0] : -1;
        if (i % n_each_ == 0 ? seq <= before : seq != before) {
            return false;
        }
        n_outputs += batch.logits[i] != 0;
    }
    return batch.n_tokens % n_each_ == 0;
}

llama_batch gaps::fill(const llama_batch & batch, int32_t n_pad, int32_t n_each) {
    filled_.clear();
    n_each_ = n_each;
    int32_t n_outputs = 0;
    if (n_each == 0 || batch.n_tokens > n_rows_max_ || !each_the_same(batch, n_outputs)) {
        return batch;
    }
    if (!choose(batch, n_pad)) {
        choose(batch, 0);
    }
    if (filled_.empty()) {
        return batch;
    }
    // An output of each row: so the graph is the same, whichever sequences decode.
    const bool output = n_outputs == batch.n_tokens &&
                        n_outputs + n_filled() <= n_outputs_max_;
    n_ = 0;
    size_t k = 0;
    const auto add_below = [&](llama_seq_id end) {
        for (; k < filled_.size() && filled_[k] < end; ++k) {
            for (int32_t j = 0; j < n_each_; ++j) {
                add(batch.token[0], held_[k] + j, filled_[k], output);
            }
        }
    };
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        add_below(batch.seq_id[i][0]);
        row_[(size_t) i] = n_;
        add(batch.token[i], batch.pos[i], batch.seq_id[i][0], batch.logits[i]);
    }
    add_below(INT32_MAX);
    return {n_,           token_.data(),  nullptr, pos_.data(), n_seq_id_.data(),
            seq_id_.data(), output_.data()};
}

bool gaps::clear() {
    bool all = true;
    for (size_t k = 0; k < filled_.size(); ++k) {
        all = llama_memory_seq_rm(memory_, filled_[k], held_[k], -1) && all;
    }
    return all;
}

} // namespace plb
