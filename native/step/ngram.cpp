#include "step/ngram.hpp"

#include "step/corpus.hpp"

#include <algorithm>

namespace plb {

namespace {

constexpr int32_t OLDEST = 32;  // tokens that a share of matches remembers
constexpr float   SLOWEST = 1.0f / 16; // a new draft's weight in the record, when it is old

} // namespace

uint32_t ngram_hash(const llama_token * last) {
    uint32_t hash = 0;
    for (int32_t i = 0; i < NGRAM; ++i) {
        hash = (hash ^ (uint32_t) last[-i]) * 0x9E3779B1u;
    }
    return hash ^ (hash >> 15);
}

void draft_record::note(int32_t n_asked, int32_t n_found, int32_t n_right) {
    const float weight = std::max(1.0f / (float) (++n + 1), SLOWEST); // it begins with one of nothing
    float share_found = 1, share_right = 1;
    for (int32_t i = 0; i < PLB_DRAFT_LIMIT; ++i) {
        if (i >= n_asked) {
            found[i] *= share_found;
            right[i] *= share_right;
            continue;
        }
        const float found_before = found[i], right_before = right[i];
        found[i] += weight * ((float) (i < n_found) - found[i]);
        right[i] += weight * ((float) (i < n_right) - right[i]);
        share_found = found_before > 0 ? found[i] / found_before : 1;
        share_right = right_before > 0 ? right[i] / right_before : 1;
    }
}

int32_t match_record::of(int32_t length) {
    constexpr int32_t from[N_LENGTHS] = {0, 3, 4, 5, 7, 10, 16, 32};
    int32_t i = N_LENGTHS - 1;
    while (length < from[i]) {
        --i;
    }
    return i;
}

void match_record::note(int32_t length, bool is_right) {
    const int32_t i = of(length);
    n[i] = std::min(n[i] + 1, OLDEST);
    right[i] += ((float) is_right - right[i]) / (float) n[i];
    ++n_new[i];
    new_right[i] += is_right;
}

ngram::ngram(const llama_token * prompt, int32_t n_prompt, int32_t n_more) {
    const size_t room = (size_t) n_prompt + (size_t) n_more;
    size_t n_hashes = 64;
    while (n_hashes < room) {
        n_hashes *= 2;
    }
    n_more_ = n_more;
    tokens_.resize(room);
    before_.assign(room, -1);
    newest_.assign(n_hashes, -1);
    for (int32_t i = 0; i < n_prompt; ++i) {
        append(prompt[i]);
    }
    n_watched_ = draft(PLB_DRAFT_LIMIT, watched_, matched_);
}

void ngram::append(llama_token token) {
    const int32_t at = n_++;
    tokens_[(size_t) at] = token;
    if (at + 1 >= NGRAM) {
        int32_t & newest = newest_[ngram_hash(&tokens_[(size_t) at]) & (newest_.size() - 1)];
        before_[(size_t) at] = newest;
        newest = at;
    }
}

// The oldest ones. The others are chained as if they were all.
void ngram::forget(int32_t n) {
    const auto end = std::copy(tokens_.begin() + n, tokens_.begin() + n_, tokens_.begin());
    std::fill(newest_.begin(), newest_.end(), -1);
    n_ = 0;
    std::for_each(tokens_.begin(), end, [&](llama_token token) { append(token); });
}

void ngram::add(llama_token token, draft_record & record) {
    if (!has_room()) {
        return;
    }
    if ((size_t) n_ == tokens_.size()) {
        forget(n_more_ / 2 + 1);
    }
    append(token);
    if (n_watched_ > 0) {
        matches(matched_.shared).note(matched_.length + n_right_, watched_[n_right_] == token);
    }
    if (n_right_ < n_watched_ && watched_[n_right_] == token) {
        ++n_right_;
        if (n_right_ < n_watched_) {
            return;
        }
    }
    record.note(PLB_DRAFT_LIMIT, n_watched_, n_right_);
    n_right_   = 0;
    n_watched_ = draft(PLB_DRAFT_LIMIT, watched_, matched_);
}

// The position that ends as the last one does, and how many tokens are the same; -1: there is none.
int32_t ngram::find(int32_t & length) const {
    length = NGRAM - 1;
    int32_t found = -1;
    if (n_ < 1) {
        return found;
    }
    const int32_t last = n_ - 1;
    int32_t tries = NGRAM_TRIES;
    for (int32_t at = before_[(size_t) last]; at >= 0 && tries-- > 0; at = before_[(size_t) at]) {
        int32_t n = 0;
        const int32_t most = std::min(NGRAM_MOST, at + 1);
        while (n < most && tokens_[(size_t) (at - n)] == tokens_[(size_t) (last - n)]) {
            ++n;
        }
        if (n > length) {
            length = n;
            found  = at;
            if (n == NGRAM_MOST) {
                break;
            }
        }
    }
    return found;
}

int32_t ngram::draft(int32_t n_most, llama_token * out, match & match) const {
    match  = {0, false};
    n_most = std::min(n_most, PLB_DRAFT_LIMIT + 0);
    if (n_most < 1 || n_ < 1) {
        return 0;
    }
    const int32_t found = find(match.length);
    if (corpus_ != nullptr) {
        int32_t length = found < 0 ? 0 : match.length;
        const int32_t n = corpus_->draft(&tokens_[(size_t) (n_ - 1)], n_ - 1, n_most, out, length);
        if (n > 0) {
            match = {length, true};
            return n;
        }
    }
    for (int32_t i = 0; found >= 0 && i < n_most; ++i) {
        const int32_t at = found + 1 + i;
        out[i] = at < n_ ? tokens_[(size_t) at] : out[at - n_];
    }
    return found < 0 ? 0 : n_most;
}

void ngram::give(corpus & texts) const {
    texts.add(tokens_.data(), n_);
}

} // namespace plb
