#include "step/draft_prices.hpp"

#include "step/engine.hpp"

#include <algorithm>
#include <cmath>

namespace plb {

namespace {

// A step's time beyond its own, at most, for a new graph.
constexpr float GRAPH_MOST = 1;

// A new graph is dear from this share of a step without drafts on. After so many more steps with it a
// device has recorded it; what it takes until then is at most so many times what it takes at first.
constexpr float   DEAR = 0.1f;
constexpr int32_t SETTLED = 2;
constexpr float   GRAPH_STEPS = 2;
constexpr float   GRAPH_SHARE = 1.0f / 16; // of what a new one takes, in the step that begins with it

} // namespace

draft_prices::draft_prices(int32_t n_rows_max, int32_t n_draft_max) : n_draft_max_(n_draft_max) {
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
    out.new_graph = &graph_;
    out.n_timed  = n_timed_.data();
    out.ns_timed = ns_timed_.data();
}

// Whether a step of so many rows gives more tokens a second than `best`, which it becomes, and can't lose
// more than the credit.
bool draft_prices::better(float tokens, int32_t n_rows, float a_token, float & best) const {
    const float seconds = seconds_[(size_t) n_rows], whole = graph(n_rows), more = whole * graph_share_;
    if (!(seconds > 0) || worst_[(size_t) n_rows] + whole - tokens * a_token > credit_ ||
        tokens <= best * (seconds + more)) {
        return false;
    }
    best = tokens / (seconds + more);
    return true;
}

int32_t draft_prices::choose(std::vector<draft_offer> & offers, int32_t width, bool even) {
    width_ = width;
    for (draft_offer & offer : offers) {
        offer.chosen = 0;
    }
    if (width >= n_priced_ || !(seconds_[(size_t) width] > 0) || credit_ < 0) {
        return width;
    }
    const float a_token = seconds_[(size_t) width] / (float) offers.size();
    const float best = (1 + gain_) / a_token;
    // Where the graph that is there does not pay, a new one may in the steps to come.
    int32_t n_rows = width;
    for (const float share : {1.0f, GRAPH_SHARE}) {
        graph_share_ = share;
        n_rows = even ? choose_even(offers, width, a_token, best) : choose_each(offers, width, a_token, best);
        if (n_rows > width || !(graph_ > 0)) {
            break;
        }
    }
    return n_rows;
}

int32_t draft_prices::choose_even(std::vector<draft_offer> & offers, int32_t width, float a_token,
                                  float best) {
    int32_t longest = 0, most = 0, n_rows = width;
    for (const draft_offer & offer : offers) {
        longest = std::max(longest, offer.n);
    }
    auto tokens = (float) offers.size();
    for (int32_t k = 1; k <= longest && width * (k + 1) < n_priced_; ++k) {
        for (const draft_offer & offer : offers) {
            tokens += k <= offer.n ? offer.chance[k - 1] : 0;
        }
        if (better(tokens, width * (k + 1), a_token, best)) {
            most   = k;
            n_rows = width * (k + 1);
        }
    }
    const int32_t filled = graph_rows_ / width - 1; // drafted rows of each, some of which only fill up
    const bool fills = longest > 0 && graph_rows_ < n_priced_ && graph_rows_ % width == 0 &&
                       filled > longest && filled <= n_draft_max_;
    if (fills && better(tokens, graph_rows_, a_token, best)) {
        most   = longest;
        n_rows = graph_rows_;
    }
    for (draft_offer & offer : offers) {
        offer.chosen = std::min(offer.n, most);
    }
    return n_rows;
}

int32_t draft_prices::choose_each(std::vector<draft_offer> & offers, int32_t width, float a_token,
                                  float best) {
    auto tokens = (float) offers.size();
    int32_t n_best = 0, n = 0, n_rows = width;
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
            n_rows = width + n;
        }
    }
    if (n > 0 && graph_rows_ < n_priced_ && graph_rows_ > width + n && better(tokens, graph_rows_, a_token, best)) {
        n_best = n;
        n_rows = graph_rows_;
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
    return n_rows;
}

void draft_prices::begin() {
    std::fill(n_timed_.begin(), n_timed_.end(), 0);
    std::fill(ns_timed_.begin(), ns_timed_.end(), (int64_t) 0);
}

// Whether it took what such steps take once their graph is there; where new ones cost little, all do.
bool draft_prices::settled(const step & step) {
    if (!step.drafted) {
        return step.reused;
    }
    graph_rows_   = step.n_rows;
    n_same_ = step.reused ? n_same_ + 1 : 0;
    const bool dear = width_ < n_priced_ && graph_ > DEAR * seconds_[(size_t) width_];
    return !dear || n_same_ >= SETTLED;
}

void draft_prices::computed(const step & step) {
    const int32_t before = n_before_, n_rows = step.n_rows;
    const bool typical = settled(step);
    n_before_ = step.drafted ? n_rows : 0;
    if (step.ns <= 0 || (size_t) n_rows >= seconds_.size()) {
        return;
    }
    const bool priced = n_rows < n_priced_;
    const float took = 1e-9f * (float) step.ns;
    if (!step.drafted && before > 0) { // for which the drafts pay
        // As much as it can be on account of drafts; what is beyond has disturbed it.
        const float said = priced ? seconds_[(size_t) n_rows] : 0;
        const float more = std::clamp(took - said, -said, GRAPH_MOST * said);
        if (n_timed_[(size_t) before] > 0 && more > 0) {
            ns_timed_[(size_t) before] += (int64_t) (1e9f * more);
        }
        credit_ -= more;
        return;
    }
    if (typical) { // the mean of their speeds: one that was disturbed counts little
        const int32_t n = ++n_timed_[(size_t) n_rows];
        int64_t & ns = ns_timed_[(size_t) n_rows];
        const double per_ns = ns > 0 ? (double) (n - 1) * (n - 1) / (double) ns : 0;
        ns = std::llround((double) n * n / (per_ns + 1 / (double) step.ns));
    }
    if (step.drafted && priced && width_ < n_priced_) {
        const float worth = seconds_[(size_t) width_] / (float) step.n_slots * (float) step.n_tokens;
        credit_ += worth - std::min(took, worst_[(size_t) n_rows] + GRAPH_STEPS * graph_);
    }
}

} // namespace plb

int32_t plb_draft_rows(const plb_drafts * prices, int32_t n_slots, const int32_t * n_drafted,
                       const float * chance, int32_t width, int32_t even, int32_t * chosen,
                       int32_t * n_rows) {
    if (prices == nullptr || n_slots < 1 || n_drafted == nullptr || chance == nullptr || width < 1 ||
        chosen == nullptr || n_rows == nullptr || *prices->n_priced < 1) {
        return PLB_E_ARGUMENT;
    }
    const int32_t n_priced = *prices->n_priced;
    char error[plb::TEXT_BYTES];
    return plb::guarded(error, [&] {
        plb::draft_prices own(n_priced - 1, prices->n_draft_max);
        plb_drafts views = {};
        own.views(views);
        *views.n_priced = n_priced;
        std::copy_n(prices->seconds, n_priced, views.seconds);
        std::copy_n(prices->worst, n_priced, views.worst);
        *views.credit = *prices->credit;
        *views.gain   = *prices->gain;
        *views.new_graph = *prices->new_graph;
        own.lean(*n_rows);
        std::vector<plb::draft_offer> offers;
        for (int32_t i = 0; i < n_slots; ++i) {
            offers.push_back({chance + (ptrdiff_t) i * prices->n_draft_max, n_drafted[i], 0});
        }
        *n_rows = own.choose(offers, width, even != 0);
        for (int32_t i = 0; i < n_slots; ++i) {
            chosen[i] = offers[(size_t) i].chosen;
        }
    });
}
