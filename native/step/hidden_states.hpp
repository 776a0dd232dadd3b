// The hidden states of a sequence's last tokens, by position.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

namespace plb {

class hidden_states {
public:
    // So many of so many numbers each.
    void allocate(size_t n_most, size_t n_embd) {
        n_most_ = n_most;
        n_embd_ = n_embd;
        values_.resize(n_most * n_embd);
    }
    // nullptr: it is not known.
    const float * at(size_t pos) const {
        return begin_ <= pos && pos < end_ ? &values_[pos % n_most_ * n_embd_] : nullptr;
    }
    // Of the first that is known.
    size_t begin() const { return begin_; }
    // Whether it goes when that of this position comes.
    bool full(size_t pos) const { return pos == end_ && end_ - begin_ == n_most_; }
    // Those behind it are not known any more.
    void put(size_t pos, const float * state) {
        begin_ = begin_ <= pos && pos <= end_ ? begin_ : pos;
        end_   = pos + 1;
        begin_ = std::max(begin_, end_ - std::min(end_, n_most_));
        std::copy_n(state, n_embd_, &values_[pos % n_most_ * n_embd_]);
    }
    // Those of the first n positions are left.
    void cut(size_t n) {
        end_   = std::min(end_, n);
        begin_ = std::min(begin_, end_);
    }

private:
    size_t n_most_ = 0, n_embd_ = 0, begin_ = 0, end_ = 0;
    std::vector<float> values_;
};

} // namespace plb
