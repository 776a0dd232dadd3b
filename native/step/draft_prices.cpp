#include "step/draft_prices.hpp"

#include <algorithm>

namespace plb {

draft_prices::draft_prices(int32_t n_rows_max) {
    const size_t n = (size_t) n_rows_max + 1;
    seconds_.resize(n);
    worst_.resize(n);
    n_timed_.resize(n);
    ns_timed_.resize(n);
}

void draft_prices::views(plb_drafts & out) {
    out.n_priced = &n_priced_;
    out.seconds  = seconds_.data();
    out.worst    = worst_.data();
    out.credit   = &credit_;
    out.gain     = &gain_;
    out.n_timed  = n_timed_.data();
    out.ns_timed = ns_timed_.data();
}

// Whether a step of so many rows gives more tokens a second than `best`, which it becomes, and can't lose
// more than the credit.
bool draft_prices::better(float tokens, int32_t n_rows, float a_token, float & best) const {
    const float seconds = seconds_[(size_t) n_rows];
    if (!(seconds > 0) || worst_[(size_t) n_rows] - tokens * a_token > credit_ ||
        tokens <= best * seconds) {
        return false;
    }
    best = tokens / seconds;
    return true;
}

void draft_prices::choose(std::vector<draft_offer> & offers, int32_t width, bool even) {
    width_ = width;
    const auto n_slots = (float) offers.size();
    int32_t longest = 0;
    for (draft_offer & offer : offers) {
        offer.chosen = 0;
        longest = std::max(longest, offer.n);
    }
    if (width >= n_priced_ || !(seconds_[(size_t) width] > 0) || credit_ < 0) {
        return;
    }
    const float plain = seconds_[(size_t) width], a_token = plain / n_slots;
    float tokens = n_slots, best = (1 + gain_) / a_token;
    if (even) {
        int32_t most = 0;
        for (int32_t k = 1; k <= longest && width * (k + 1) < n_priced_; ++k) {
            for (const draft_offer & offer : offers) {
                tokens += k <= offer.n ? offer.chance[k - 1] : 0;
            }
            if (better(tokens, width * (k + 1), a_token, best)) {
                most = k;
            }
        }
        for (draft_offer & offer : offers) {
            offer.chosen = std::min(offer.n, most);
        }
        return;
    }
    int32_t n_best = 0, n = 0;
    const auto likeliest = [&]() -> draft_offer * {
        draft_offer * found = nullptr;
        for (draft_offer & offer : offers) {
            const bool more = offer.chosen < offer.n;
            if (more && (!found || offer.chance[offer.chosen] > found->chance[found->chosen])) {
                found = &offer;
            }
        }
        return found;
    };
    for (draft_offer * next = likeliest(); next && width + n + 1 < n_priced_; next = likeliest()) {
        tokens += next->chance[next->chosen++];
        if (better(tokens, width + ++n, a_token, best)) {
            n_best = n;
        }
    }
    for (; n > n_best; --n) { // the unlikeliest ones go
        draft_offer * last = nullptr;
        for (draft_offer & offer : offers) {
            if (offer.chosen > 0 &&
                (!last || offer.chance[offer.chosen - 1] < last->chance[last->chosen - 1])) {
                last = &offer;
            }
        }
        --last->chosen;
    }
}

void draft_prices::begin() {
    std::fill(n_timed_.begin(), n_timed_.end(), 0);
    std::fill(ns_timed_.begin(), ns_timed_.end(), (int64_t) 0);
}

void draft_prices::computed(int32_t n_rows, bool drafted, bool reused, int64_t ns, int32_t n_tokens,
                            int32_t n_slots) {
    const int32_t before = n_before_;
    n_before_ = drafted ? n_rows : 0;
    if (ns <= 0 || (size_t) n_rows >= seconds_.size()) {
        return;
    }
    if (!drafted) {
        if (before == 0 && reused) {
            ++n_timed_[(size_t) n_rows];
            ns_timed_[(size_t) n_rows] += ns;
        } else if (before > 0 && n_rows < n_priced_) { // a new graph, for which the drafts pay
            const auto more = ns - (int64_t) (1e9f * seconds_[(size_t) n_rows]);
            ns_timed_[(size_t) before] += n_timed_[(size_t) before] > 0 && more > 0 ? more : 0;
        }
        return;
    }
    ++n_timed_[(size_t) n_rows];
    ns_timed_[(size_t) n_rows] += ns;
    if (n_rows < n_priced_ && width_ < n_priced_) {
        const float took = std::min(1e-9f * (float) ns, worst_[(size_t) n_rows]);
        credit_ += seconds_[(size_t) width_] / (float) n_slots * (float) n_tokens - took;
    }
}

} // namespace plb
