// What the fused sampler keeps of a request, and the memory that it samples a row in.
#include "sampling/fused.hpp"

#include <algorithm>

namespace plb {

bool has_penalties(const plb_sampling & p) {
    return p.penalty_last_n != 0 &&
           (p.repeat_penalty != 1 || p.frequency_penalty != 0 || p.presence_penalty != 0);
}

int32_t n_looked_back(const plb_sampling & p, int32_t n_seen) {
    return p.penalty_last_n < 0 ? n_seen : std::min(p.penalty_last_n, n_seen);
}

bool fused_supports(const plb_sampling & params) {
    return params.grammar == nullptr && !(params.typical_p < 1);
}

penalty_window::penalty_window(int32_t last_n, int32_t n_vocab)
    : ring_((size_t) std::max(0, last_n)), n_distinct_((size_t) std::min(last_n, n_vocab)) {
    entries_.reserve(n_distinct_);
}

penalty_window::penalty_window(const penalty_window & other)
    : ring_(other.ring_), next_(other.next_), n_ring_(other.n_ring_),
      n_distinct_(other.n_distinct_) {
    entries_.reserve(n_distinct_); // a copied vector has only the room that it needs
    entries_ = other.entries_;
}

void penalty_window::count(llama_token token, int32_t change) {
    const auto at = std::lower_bound(entries_.begin(), entries_.end(), token,
                                     [](const entry & e, llama_token t) { return e.token < t; });
    if (at == entries_.end() || at->token != token) {
        entries_.insert(at, {token, change});
    } else if ((at->count += change) == 0) {
        entries_.erase(at);
    }
}

void penalty_window::add(llama_token token) {
    if (ring_.empty()) {
        return;
    }
    if (n_ring_ == ring_.size()) {
        count(ring_[next_], -1);
    } else {
        ++n_ring_;
    }
    ring_[next_] = token;
    next_ = next_ + 1 == ring_.size() ? 0 : next_ + 1;
    count(token, 1);
}

fused_state::fused_state(const plb_sampling & params, uint32_t seed, int32_t n_seen,
                         int32_t n_vocab, size_t n_changes)
    : random(seed) {
    if (has_penalties(params)) {
        window = penalty_window(n_looked_back(params, n_seen), n_vocab);
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
