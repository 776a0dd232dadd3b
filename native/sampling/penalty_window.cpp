// What the fused sampler keeps of a request, and the memory that it samples a row in.
#include "sampling/fused.hpp"

#include <algorithm>

namespace plb {

bool has_penalties(const plb_sampling & p) {
    return p.penalty_last_n != 0 &&
           (p.repeat_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0);
}

bool fused_supports(const plb_sampling & params) {
    return params.grammar == nullptr && !(params.typical_p < 1);
}

penalty_window::penalty_window(int32_t last_n, int32_t n_vocab) {
    if (last_n <= 0) {
        return;
    }
    ring_.resize((size_t) last_n);
    entries_.resize((size_t) std::min(last_n, n_vocab) + 1); // one more between add and remove
    size_t size = 16;
    while (size < 2 * entries_.size()) {
        size *= 2;
    }
    table_.assign(size, -1);
}

size_t penalty_window::find(llama_token token) const {
    const size_t mask = table_.size() - 1;
    size_t at = ((uint32_t) token * 2654435769u) & mask;
    while (table_[at] >= 0 && entries_[table_[at]].token != token) {
        at = (at + 1) & mask;
    }
    return at;
}

void penalty_window::remove(size_t at) {
    const size_t mask = table_.size() - 1;
    const int32_t gone = table_[at];
    const int32_t last = (int32_t) --n_entries_;
    if (gone != last) { // the last entry takes its place
        const size_t moved = find(entries_[last].token);
        entries_[gone] = entries_[last];
        table_[moved]  = gone;
    }
    // close the gap in the run of taken slots
    for (size_t next = (at + 1) & mask; table_[next] >= 0; next = (next + 1) & mask) {
        const size_t home = ((uint32_t) entries_[table_[next]].token * 2654435769u) & mask;
        if (((next - home) & mask) >= ((next - at) & mask)) {
            table_[at] = table_[next];
            at = next;
        }
    }
    table_[at] = -1;
}

void penalty_window::add(llama_token token) {
    if (ring_.empty()) {
        return;
    }
    if (n_ring_ == ring_.size()) {
        const size_t oldest = find(ring_[next_]);
        if (--entries_[table_[oldest]].count == 0) {
            remove(oldest);
        }
    } else {
        ++n_ring_;
    }
    ring_[next_] = token;
    next_ = next_ + 1 == ring_.size() ? 0 : next_ + 1;
    const size_t at = find(token);
    if (table_[at] < 0) {
        table_[at] = (int32_t) n_entries_;
        entries_[n_entries_++] = {token, 1};
    } else {
        ++entries_[table_[at]].count;
    }
}

fused_state::fused_state(const plb_sampling & params, uint32_t seed, int32_t n_ctx,
                         int32_t n_vocab, size_t n_changes)
    : random(seed) {
    if (has_penalties(params)) {
        const int32_t last_n = params.penalty_last_n < 0 ? n_ctx
                                                         : std::min(params.penalty_last_n, n_ctx);
        window = penalty_window(last_n, n_vocab);
    }
    patches.resize(n_changes + window.capacity());
}

fused_memory::fused_memory(int32_t n_vocab)
    : n_vocab(n_vocab),
      list(new candidate[(size_t) n_vocab + BLOCK]),
      other(new candidate[(size_t) n_vocab + BLOCK]) {
    const size_t n_blocks = ((size_t) n_vocab + BLOCK - 1) / BLOCK;
    block_max.resize(n_blocks);
    scratch.resize(n_blocks);
    block_sum.resize(n_blocks);
    upper_sum.resize(n_blocks);
    group_sum.resize(n_blocks);
}

} // namespace plb
