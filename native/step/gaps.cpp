#include "step/gaps.hpp"

namespace plb {

gaps::gaps(llama_context * ctx, int32_t most)
    : memory_(llama_get_memory(ctx)), most_(most) {
    const size_t n_batch = llama_n_batch(ctx), n_seq_max = llama_n_seq_max(ctx);
    row_.resize(n_batch);
    next_.resize(n_seq_max);
    filled_.reserve(n_seq_max);
    token_.resize(n_batch);
    pos_.resize(n_batch);
    n_seq_id_.assign(n_batch, 1);
    seq_.resize(n_batch);
    seq_id_.resize(n_batch + 1);
    output_.resize(n_batch);
    for (size_t i = 0; i < n_batch; ++i) {
        seq_id_[i] = &seq_[i];
    }
}

bool gaps::ours(llama_seq_id seq) const {
    return next_[(size_t) seq] > 0 || llama_memory_seq_pos_max(memory_, seq) < 0;
}

void gaps::add(llama_token token, llama_pos pos, llama_seq_id seq, int8_t output) {
    const auto i = (size_t) n_++;
    token_[i]  = token;
    pos_[i]    = pos;
    seq_[i]    = seq;
    output_[i] = output;
}

llama_batch gaps::fill(const llama_batch & batch) {
    n_ = n_filled_ = 0;
    const int32_t n_batch = (int32_t) token_.size();
    const auto seq_of = [&](int32_t i) { return batch.seq_id[i][0]; };
    for (int32_t i = 1; i < batch.n_tokens; ++i) {
        if (seq_of(i) <= seq_of(i - 1)) {
            return batch;
        }
    }
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (i > 0) {
            const llama_seq_id first = seq_of(i - 1) + 1, end = seq_of(i);
            bool fits = end - first <= most_ && batch.n_tokens + n_filled_ + end - first <= n_batch;
            for (llama_seq_id seq = first; fits && seq < end; ++seq) {
                fits = ours(seq);
            }
            for (llama_seq_id seq = first; fits && seq < end; ++seq) {
                // One more at every step of a call, as of those that decode: there is room for it
                // as long as there is for them.
                llama_pos & next = next_[(size_t) seq];
                if (next == 0) {
                    filled_.push_back(seq);
                }
                add(batch.token[i], next++, seq, 0);
                ++n_filled_;
            }
        }
        row_[(size_t) i] = n_;
        add(batch.token[i], batch.pos[i], seq_of(i), batch.logits[i]);
    }
    if (n_filled_ == 0) {
        return batch;
    }
    return {n_,           token_.data(),  nullptr, pos_.data(), n_seq_id_.data(),
            seq_id_.data(), output_.data()};
}

bool gaps::clear() {
    size_t n_left = 0;
    for (llama_seq_id seq : filled_) {
        if (llama_memory_seq_rm(memory_, seq, -1, -1)) {
            next_[(size_t) seq] = 0;
        } else {
            filled_[n_left++] = seq;
        }
    }
    filled_.resize(n_left);
    return n_left == 0;
}

} // namespace plb
