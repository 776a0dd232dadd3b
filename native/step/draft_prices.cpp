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
// It is for the steps to come as well: each pays so much of what no other has paid yet.
constexpr float   GRAPH_SHARE = 1.0f / 16;

} // namespace

draft_prices::draft_prices(int32_t n_rows_max, int32_t n_draft_max) : graph(), n_draft_max_(n_draft_max) {
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

// Whether a step of so many rows is faster than the goal, which it becomes, and can't lose more than the
// credit; of that a further new graph has only what those before don't owe.
bool draft_prices::better(float tokens, int32_t n_rows, goal & than) const {
    const float whole = new_graph(n_rows), spare = whole > 0 ? credit_ - graph.owed : credit_;
    const float seconds = seconds_[(size_t) n_rows] + (than.pays_graph ? whole : 0);
    if (!(seconds_[(size_t) n_rows] > 0) || worst_[(size_t) n_rows] + whole - tokens * than.a_token > spare ||
        tokens <= than.speed * seconds) {
        return false;
    }
    than.speed = tokens / seconds;
    return true;
}

int32_t draft_prices::choose(std::vector<draft_offer> & offers, int32_t width, bool even) {
    width_ = width;
    const auto none = [&] { std::for_each(offers.begin(), offers.end(), [](draft_offer & o) { o.chosen = 0; }); };
    none();
    if (width >= n_priced_ || !(seconds_[(size_t) width] > 0) || credit_ < 0) {
        return width;
    }
    const float a_token = seconds_[(size_t) width] / (float) offers.size();
    struct choice {
        int32_t n_rows;
        float   speed; // tokens a second
    };
    const auto of = [&](bool pays_graph) {
        none();
        goal best{a_token, pays_graph, (1 + gain_) / a_token};
        const int32_t n_rows = even ? choose_even(offers, width, best) : choose_each(offers, width, best);
        return choice{n_rows, n_rows > width ? best.speed : 1 / a_token};
    };
    const choice free = of(false);
    if (free.n_rows == width || !(new_graph(free.n_rows) > 0)) {
        return free.n_rows;
    }
    // As one who rents skis buys some once the rent has cost as much: a new graph is made once there would
    // have been as much to gain.
    const choice now = of(true);
    graph.missed += seconds_[(size_t) now.n_rows] * (1 - now.speed / free.speed);
    return graph.missed < graph_ ? now.n_rows : of(false).n_rows;
}

int32_t draft_prices::choose_even(std::vector<draft_offer> & offers, int32_t width, goal & best) {
    int32_t longest = 0, most = 0, n_rows = width;
    for (const draft_offer & offer : offers) {
        longest = std::max(longest, offer.n);
    }
    auto tokens = (float) offers.size();
    for (int32_t k = 1; k <= longest && width * (k + 1) < n_priced_; ++k) {
        for (const draft_offer & offer : offers) {
            tokens += k <= offer.n ? offer.chance[k - 1] : 0;
        }
        if (better(tokens, width * (k + 1), best)) {
            most   = k;
            n_rows = width * (k + 1);
        }
    }
    const int32_t filled = graph.n_rows / width - 1; // drafted rows of each, some of which only fill up
    const bool fills = longest > 0 && graph.n_rows < n_priced_ && graph.n_rows % width == 0 &&
                       filled > longest && filled <= n_draft_max_;
    if (fills && better(tokens, graph.n_rows, best)) {
        most   = longest;
        n_rows = graph.n_rows;
    }
    for (draft_offer & offer : offers) {
        offer.chosen = std::min(offer.n, most);
    }
    return n_rows;
}

int32_t draft_prices::choose_each(std::vector<draft_offer> & offers, int32_t width, goal & best) {
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
        if (better(tokens, width + ++n, best)) {
            n_best = n;
            n_rows = width + n;
        }
    }
    if (n > 0 && graph.n_rows < n_priced_ && graph.n_rows > width + n && better(tokens, graph.n_rows, best)) {
        n_best = n;
        n_rows = graph.n_rows;
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
    if (graph.n_rows != step.n_rows) {
        graph.missed = 0;
    }
    graph.n_rows = step.n_rows;
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
    if (n_priced_ > 0) {
        const float part = GRAPH_SHARE * graph.owed;
        graph.owed   -= part;
        credit_ -= part;
    }
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
        const float counts = std::min(took, worst_[(size_t) n_rows] + GRAPH_STEPS * graph_);
        const float beyond = typical ? 0 : std::max(0.0f, counts - seconds_[(size_t) n_rows]);
        graph.owed   += beyond;
        credit_ += worth - (counts - beyond);
    }
}

} // namespace plb

int32_t plb_draft_rows(const plb_drafts * prices, int32_t n_slots, const int32_t * n_drafted,
                       const float * chance, int32_t width, int32_t even, int32_t * chosen,
                       plb_draft_graph * graph, int32_t * n_rows) {
    if (prices == nullptr || n_slots < 1 || n_drafted == nullptr || chance == nullptr || width < 1 ||
        chosen == nullptr || graph == nullptr || n_rows == nullptr || *prices->n_priced < 1) {
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
        own.graph = *graph;
        std::vector<plb::draft_offer> offers;
        for (int32_t i = 0; i < n_slots; ++i) {
            offers.push_back({chance + (ptrdiff_t) i * prices->n_draft_max, n_drafted[i], 0});
        }
        *n_rows = own.choose(offers, width, even != 0);
        *graph  = own.graph;
        for (int32_t i = 0; i < n_slots; ++i) {
            chosen[i] = offers[(size_t) i].chosen;
        }
    });
}
