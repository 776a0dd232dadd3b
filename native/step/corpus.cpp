#include "step/corpus.hpp"

#include "step/ngram.hpp"

#include <algorithm>

namespace plb {

namespace {

constexpr llama_token END = -1; // of a text

} // namespace

corpus::corpus(int32_t n_room) : room_(n_room) {
    size_t n_hashes = 64;
    while (n_hashes < (size_t) n_room) {
        n_hashes *= 2;
    }
    tokens_.assign((size_t) n_room, END);
    before_.assign((size_t) n_room, -1);
    newest_.assign(n_hashes, -1);
}

void corpus::add(const llama_token * tokens, int32_t n) {
    if (n <= NGRAM) { // nothing follows in it
        return;
    }
    for (int32_t i = 0; i <= n; ++i) {
        const auto at = (size_t) (n_ % room_);
        tokens_[at] = i < n ? tokens[i] : END;
        before_[at] = -1;
        if (i + 1 >= NGRAM && i < n) {
            int64_t & newest = newest_[ngram_hash(tokens + i) & (newest_.size() - 1)];
            before_[at] = newest;
            newest = n_;
        }
        ++n_;
    }
}

int32_t corpus::draft(const llama_token * last, int32_t n_before, int32_t n_most, llama_token * out,
                      int32_t & length) const {
    if (n_before + 1 < NGRAM || n_most < 1) {
        return 0;
    }
    const int64_t oldest = std::max<int64_t>(0, n_ - room_);
    int64_t found = -1;
    int32_t tries = NGRAM_TRIES;
    int64_t position = newest_[ngram_hash(last) & (newest_.size() - 1)];
    for (; position >= oldest && tries-- > 0; position = before_[(size_t) (position % room_)]) {
        const auto most = (int32_t) std::min<int64_t>({NGRAM_MOST, n_before + 1, position - oldest + 1});
        int32_t n = 0;
        while (n < most && at(position - n) == last[-n]) {
            ++n;
        }
        if (n > std::max(length, NGRAM - 1)) {
            length = n;
            found  = position;
            if (n == NGRAM_MOST) {
                break;
            }
        }
    }
    if (found < 0) {
        return 0;
    }
    int32_t n = 0;
    for (; n < n_most && at(found + 1 + n) != END; ++n) { // each text has an end
        out[n] = at(found + 1 + n);
    }
    return n;
}

} // namespace plb
