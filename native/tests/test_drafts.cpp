// How many drafted rows pay, and what n-grams draft: no model is needed.
#include "allocations.hpp"
#include "check.hpp"

#include "step/corpus.hpp"
#include "step/draft_prices.hpp"
#include "step/ngram.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

namespace {

using plb::draft_offer;
using plb::draft_prices;

constexpr int32_t N_ROWS = 32;
constexpr int64_t SECOND = 1000000000; // in nanoseconds
constexpr std::array<float, 4> GOOD = {0.9f, 0.8f, 0.7f, 0.6f}, BAD = {0.05f, 0.01f, 0.0f, 0.0f};

// Prices of steps that take `first` seconds and `more` for each row behind the first.
plb_drafts priced(draft_prices & prices, float first, float more, float credit = 1) {
    plb_drafts views = {};
    prices.views(views);
    for (int32_t i = 1; i <= N_ROWS; ++i) {
        views.seconds[i] = views.worst[i] = first + more * (float) (i - 1);
    }
    *views.n_priced = N_ROWS + 1;
    *views.credit   = credit;
    return views;
}

std::vector<int32_t> chosen(draft_prices & prices, std::vector<draft_offer> offers, bool even) {
    prices.choose(offers, (int32_t) offers.size(), even);
    std::vector<int32_t> n;
    for (const draft_offer & offer : offers) {
        n.push_back(offer.chosen);
    }
    return n;
}

using counts = std::vector<int32_t>;

void rows_are_had_as_long_as_they_pay() {
    draft_prices prices(N_ROWS, 4);
    CHECK(!prices.there());
    priced(prices, 1, 0.01f);
    CHECK(prices.there());
    const draft_offer good = {GOOD.data(), 4, 0}, bad = {BAD.data(), 4, 0}, none = {GOOD.data(), 0, 0};
    CHECK(chosen(prices, {good}, false) == counts({4}));
    CHECK(chosen(prices, {good, none}, true) == counts({4, 0}));
    priced(prices, 1, 1); // each row costs as much as the first
    CHECK(chosen(prices, {good, good}, false) == counts({0, 0}));
    CHECK(chosen(prices, {good, good}, true) == counts({0, 0}));
    priced(prices, 1, 0.5f);
    CHECK(chosen(prices, {bad, good, bad}, false) == counts({0, 2, 0})); // to the one that gains
    CHECK(chosen(prices, {bad, good, bad}, true) == counts({0, 0, 0})); // rows of all
    CHECK(chosen(prices, {good, good}, true) == counts({2, 2}));
}

void what_is_asked_bounds_them() {
    draft_prices prices(N_ROWS, 4);
    const draft_offer good = {GOOD.data(), 4, 0};
    plb_drafts views = priced(prices, 1, 0.5f);
    *views.gain = 2;
    CHECK(chosen(prices, {good}, false) == counts({0}));
    *views.gain     = 0;
    views.seconds[4] = views.seconds[5] = 0; // longer than is allowed
    CHECK(chosen(prices, {good}, false) == counts({2}));
    *views.n_priced = 3;
    CHECK(chosen(prices, {good}, false) == counts({1}));
    *views.credit = -1;
    CHECK(chosen(prices, {good}, false) == counts({0}));
    views = priced(prices, 1, 0.1f, 0.4f); // at worst a row costs as much as the first
    for (int32_t i = 2; i <= N_ROWS; ++i) {
        views.worst[i] = (float) i;
    }
    CHECK(chosen(prices, {good}, false) == counts({2})); // 3 rows for 2.7 tokens; 4 for 3.4 lose 0.6
}

void steps_are_timed_and_paid_for() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.5f, 0);
    std::vector<draft_offer> offers = {{GOOD.data(), 4, 0}};
    prices.begin();
    prices.choose(offers, 1, false);
    prices.computed({1, false, true, SECOND, 1, 1});
    prices.computed({1, false, false, 9 * SECOND, 1, 1}); // another graph
    prices.computed({5, true, false, 3 * SECOND, 4, 1});
    CHECK(views.n_timed[1] == 1);
    CHECK(views.ns_timed[1] == SECOND);
    CHECK(views.n_timed[5] == 1);
    CHECK(views.ns_timed[5] == 3 * SECOND);
    CHECK(std::fabs(*views.credit - 1) < 1e-6f); // four tokens for three
    prices.computed({1, false, false, SECOND + SECOND / 4, 1, 1}); // back again: the drafts pay
    CHECK(views.n_timed[1] == 1);
    CHECK(std::llabs(views.ns_timed[5] - 3 * SECOND - SECOND / 4) < 100);
    CHECK(std::fabs(*views.credit - 0.75f) < 1e-6f);
    prices.computed({5, true, false, 3 * SECOND, 1, 1});
    CHECK(std::fabs(*views.credit + 1.25f) < 1e-6f);
    prices.computed({5, true, false, 0, 1, 1}); // not timed
    CHECK(std::fabs(*views.credit + 1.25f) < 1e-6f);
    prices.computed({1, false, true, SECOND, 1, 1});
    CHECK(views.n_timed[1] == 1);
    CHECK(views.n_timed[5] == 2);
    CHECK(std::fabs(*views.credit + 1.25f) < 1e-6f);
    prices.begin();
    CHECK(views.n_timed[5] == 0);
    CHECK(views.ns_timed[5] == 0);
    for (const int32_t seconds : {1, 1, 9, 1}) { // a disturbed one counts little
        prices.computed({1, false, true, seconds * SECOND, 1, 1});
    }
    CHECK(views.n_timed[1] == 4);
    CHECK(std::fabs(1e-9 * (double) views.ns_timed[1] - 16 / (3 + 1.0 / 9)) < 1e-6);
}

void a_dear_graph_stays() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.05f, 100);
    *views.new_graph = 1;
    std::vector<draft_offer> offers = {{GOOD.data(), 4, 0}};
    prices.begin();
    CHECK(prices.choose(offers, 1, false) == 5);
    const auto computed = [&](bool reused) { prices.computed({5, true, reused, SECOND, 4, 1}); };
    computed(false);
    computed(true);
    CHECK(views.n_timed[5] == 0); // what it takes at first is no price
    computed(true);
    CHECK(views.n_timed[5] == 1);
    offers[0].n = 2; // with rows that fill up
    CHECK(prices.choose(offers, 1, false) == 5 && offers[0].chosen == 2);
    CHECK(prices.choose(offers, 1, true) == 5 && offers[0].chosen == 2);
    offers[0].n = 0;
    CHECK(prices.choose(offers, 1, false) == 1 && prices.choose(offers, 1, true) == 1);
    offers[0].n = 4;
    offers.push_back({BAD.data(), 4, 0});
    CHECK(prices.choose(offers, 2, false) == 5 && offers[0].chosen == 3);
    *views.new_graph = 0; // it costs nothing
    offers = {{GOOD.data(), 2, 0}};
    CHECK(prices.choose(offers, 1, false) == 3 && prices.choose(offers, 1, true) == 3);
    prices.computed({3, true, false, SECOND, 2, 1});
    CHECK(views.n_timed[3] == 1);
    *views.new_graph = 1000; // more than it can give
    CHECK(prices.choose(offers, 2, false) == 3 && prices.choose(offers, 3, false) == 3);
    offers.push_back({GOOD.data(), 2, 0});
    CHECK(prices.choose(offers, 4, false) == 4 && offers[0].chosen == 0);
    prices.computed({20, true, false, SECOND, 20, 4});
    *views.new_graph = 1;
    CHECK(prices.choose(offers, 2, true) <= 2 * 5); // no slot fills up to more than it may have
}

void a_new_graph_pays_in_the_steps_to_come() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.05f, 100);
    *views.new_graph = 5; // more than one step can give
    std::vector<draft_offer> offers = {{GOOD.data(), 4, 0}};
    for (const bool even : {false, true}) {
        int32_t n_plain = 0;
        while (prices.choose(offers, 1, even) == 1 && n_plain < 99) {
            ++n_plain;
        }
        CHECK(n_plain == 7); // each would have been 0.7 s shorter: 4 tokens in 1.2 s
        prices.computed({5, true, false, SECOND, 4, 1});
        CHECK(prices.choose(offers, 1, even) == 5 && offers[0].chosen == 4);
        prices.graph = {};
    }
    *views.credit = 1; // less than it takes
    for (int32_t i = 0; i < 99; ++i) {
        CHECK(prices.choose(offers, 1, false) == 1 && prices.choose(offers, 1, true) == 1);
    }
}

void a_graph_that_gains_something_gives_way_to_a_better_one() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.05f, 100);
    *views.new_graph = 2;
    std::vector<draft_offer> offers = {{GOOD.data(), 4, 0}};
    prices.graph.n_rows = 2;
    int32_t n_steps = 0;
    while (prices.choose(offers, 1, false) == 2 && n_steps < 99) {
        CHECK(offers[0].chosen == 1);
        ++n_steps;
    }
    CHECK(n_steps > 1 && n_steps < 9);
    CHECK(prices.choose(offers, 1, false) == 5 && offers[0].chosen == 4);
}

void steps_to_come_pay_for_a_new_graph() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.05f, 5);
    *views.new_graph = 4;
    std::vector<draft_offer> offers = {{GOOD.data(), 4, 0}};
    prices.begin();
    prices.graph.missed = 9;
    CHECK(prices.choose(offers, 1, false) == 5);
    prices.computed({5, true, false, 9 * SECOND, 1, 1}); // more than there was credit for
    CHECK(std::fabs(*views.credit - (5 + 1 - 1.2f)) < 1e-5f);
    CHECK(prices.choose(offers, 1, false) == 5); // it is there now
    offers[0].n = 2;
    CHECK(prices.choose(offers, 2, false) == 5 && offers[0].chosen == 2); // there is no credit for one more
    offers[0].n = 4;
    CHECK(prices.choose(offers, 1, false) == 5);
    prices.computed({5, true, true, SECOND, 4, 1});
    float owed = 7.8f;
    CHECK(std::fabs(*views.credit - (4.8f + 4 - 1 - owed / 16)) < 1e-5f);
    owed *= 15 / 16.0f;
    const float before = *views.credit;
    for (int32_t i = 0; i < 200; ++i) {
        prices.computed({1, false, true, SECOND, 1, 1}); // one without drafts pays as well
    }
    CHECK(std::fabs(*views.credit - (before - owed)) < 1e-3f);
    *views.n_priced = 0;
    prices.computed({5, true, false, 9 * SECOND, 1, 1});
    CHECK(std::fabs(*views.credit - (before - owed)) < 1e-3f);
}

void drafts_tell_how_long_their_match_is() {
    const std::vector<llama_token> prompt = {4, 5, 6, 7, 8, 20, 5, 6, 7, 9, 20, 4, 5, 6, 7};
    plb::ngram ngram(prompt.data(), (int32_t) prompt.size(), 8);
    std::array<llama_token, PLB_DRAFT_LIMIT> out = {};
    plb::ngram::match match = {};
    CHECK(ngram.draft(3, out.data(), match) == 3);
    CHECK(match.length == 4 && !match.shared);
    CHECK(out[0] == 8 && out[1] == 20 && out[2] == 5);
    CHECK(ngram.draft(0, out.data(), match) == 0);
    plb::ngram without;
    CHECK(!without.has_room());
    CHECK(without.draft(4, out.data(), match) == 0);
}

void texts_that_have_ended_are_drafted_from() {
    const std::vector<llama_token> one = {4, 5, 6, 7, 8, 20}, two = {30, 5, 6, 7, 9, 21, 22};
    std::array<llama_token, PLB_DRAFT_LIMIT> out = {};
    plb::ngram::match match = {};
    plb::corpus texts(16);
    plb::ngram ngram(two.data(), 4, 8); // 30 5 6 7
    ngram.share(&texts);
    CHECK(ngram.draft(4, out.data(), match) == 0);
    texts.add(one.data(), (int32_t) one.size());
    texts.add(two.data(), 3); // nothing follows
    CHECK(ngram.draft(4, out.data(), match) == 2); // to the end of that text
    CHECK(match.length == 3 && match.shared);
    CHECK(out[0] == 8 && out[1] == 20);
    texts.add(two.data(), (int32_t) two.size());
    CHECK(ngram.draft(4, out.data(), match) == 3); // a longer match
    CHECK(match.length == 4 && match.shared);
    CHECK(out[0] == 9 && out[1] == 21 && out[2] == 22);
    CHECK(ngram.draft(1, out.data(), match) == 1);
    plb::draft_record record;
    for (const llama_token token : {5, 6, 7}) {
        ngram.add(token, record);
    }
    CHECK(ngram.draft(2, out.data(), match) == 2); // its own text, where that is no shorter
    CHECK(match.length == 3 && !match.shared);
    for (int32_t i = 0; i < 20; ++i) { // what is old goes
        texts.add(one.data(), (int32_t) one.size());
    }
    plb::ngram again(two.data(), 4, 8);
    again.share(&texts);
    CHECK(again.draft(4, out.data(), match) == 2);
    CHECK(match.length == 3);
    const std::vector<llama_token> longest(100, 3);
    texts.add(longest.data(), 100);
    CHECK(again.draft(4, out.data(), match) == 0);
    again.give(texts);
    plb::ngram other(two.data(), 3, 8); // 30 5 6
    other.share(&texts);
    CHECK(other.draft(4, out.data(), match) == 1);
    CHECK(out[0] == 7);
}

void a_simulation_decides_the_same() {
    draft_prices prices(N_ROWS, 4);
    plb_drafts views = priced(prices, 1, 0.5f);
    views.n_draft_max = 4;
    const std::array<int32_t, 3> n = {4, 4, 4};
    std::array<float, 12> chance = {};
    std::copy(BAD.begin(), BAD.end(), chance.begin());
    std::copy(GOOD.begin(), GOOD.end(), chance.begin() + 4);
    std::copy(BAD.begin(), BAD.end(), chance.begin() + 8);
    std::array<int32_t, 3> chosen_rows = {};
    plb_draft_graph none = {}, seven = {7, 0, 0};
    int32_t n_rows = 0;
    for (const int32_t even : {0, 1}) {
        CHECK(plb_draft_rows(&views, 3, n.data(), chance.data(), 3, even, chosen_rows.data(), &none, &n_rows) == PLB_OK);
        CHECK(n_rows == (even ? 3 : 5));
        const draft_offer bad = {BAD.data(), 4, 0}, good = {GOOD.data(), 4, 0};
        CHECK(counts(chosen_rows.begin(), chosen_rows.end()) == chosen(prices, {bad, good, bad}, even != 0));
    }
    *views.new_graph = 1000; // more than it can give
    CHECK(plb_draft_rows(&views, 1, n.data(), GOOD.data(), 1, 0, chosen_rows.data(), &seven, &n_rows) == PLB_OK);
    CHECK(n_rows == 1);
    views = priced(prices, 1, 0.01f);
    views.n_draft_max = 4;
    *views.new_graph  = 1000;
    CHECK(plb_draft_rows(&views, 1, n.data(), GOOD.data(), 1, 0, chosen_rows.data(), &seven, &n_rows) == PLB_OK);
    CHECK(n_rows == 7 && chosen_rows[0] == 4); // the graph that is there
    CHECK(plb_draft_rows(&views, 0, n.data(), chance.data(), 3, 0, chosen_rows.data(), &none, &n_rows) == PLB_E_ARGUMENT);
    CHECK(plb_draft_rows(&views, 1, n.data(), chance.data(), 3, 0, chosen_rows.data(), &none, nullptr) == PLB_E_ARGUMENT);
    CHECK(plb_draft_rows(&views, 1, n.data(), chance.data(), 3, 0, chosen_rows.data(), nullptr, &n_rows) == PLB_E_ARGUMENT);
}

void matches_are_counted_by_their_length() {
    const std::vector<llama_token> prompt = {4, 5, 6, 7, 8, 20, 4, 5, 6};
    plb::ngram ngram(prompt.data(), (int32_t) prompt.size(), 3);
    plb::draft_record record;
    ngram.add(7, record); // right, behind three
    ngram.add(8, record); // right, behind four
    ngram.add(9, record); // wrong, behind five
    const plb::match_record & matches = ngram.matches(false);
    const int32_t three = plb::match_record::of(3), four = plb::match_record::of(4);
    CHECK(three < four);
    CHECK(matches.n[three] == 1 && matches.right[three] == 1);
    CHECK(matches.n[four] == 1 && matches.right[four] == 1);
    CHECK(matches.n[plb::match_record::of(5)] == 1);
    CHECK(matches.right[plb::match_record::of(5)] == 0);
    CHECK(plb::match_record::of(100) == plb::match_record::N_LENGTHS - 1);
    CHECK(record.n == 1 && record.right[1] > 0 && record.right[2] == 0);
}

// A text that is copied goes on to be, however long it is: what it was copied from lies as far back always.
void what_is_oldest_is_forgotten() {
    constexpr int32_t N = 3000, ROOM = 100;
    std::vector<llama_token> text;
    for (int32_t i = 0; i < N; ++i) {
        text.push_back((llama_token) ((uint32_t) i * 2654435761u >> 12));
    }
    plb::ngram ngram(text.data(), N, ROOM);
    plb::draft_record record;
    std::array<llama_token, PLB_DRAFT_LIMIT> out = {};
    plb::ngram::match match = {};
    const long before = n_allocations;
    for (int32_t i = 0; i + 1 < N; ++i) {
        ngram.add(text[(size_t) i], record);
        CHECK(i == 0 || (ngram.draft(1, out.data(), match) == 1 && out[0] == text[(size_t) i + 1]));
    }
    CHECK_EQ(n_allocations, before);
    CHECK(match.length == plb::NGRAM_MOST);
    for (const llama_token token : {1, 2, 3, 1, 2}) {
        ngram.add(token, record);
    }
    CHECK(ngram.draft(2, out.data(), match) == 2 && out[0] == 3 && out[1] == 1);
}

// What a step of a slot does: what was sampled is added, a draft found, in its own text and in the corpus,
// and as much of it chosen as pays.
void a_step_with_drafts_allocates_nothing() {
    constexpr int32_t N = 500;
    std::vector<llama_token> text;
    for (int32_t i = 0; i < N; ++i) {
        text.push_back(i % 7 == 6 ? i % 5 : i % 7); // it repeats itself, and not at once
    }
    plb::corpus texts(N);
    texts.add(text.data(), N);
    plb::ngram ngram(text.data(), 30, N);
    ngram.share(&texts);
    draft_prices prices(N_ROWS, 4);
    priced(prices, 1, 0.01f);
    plb::draft_record record;
    std::array<llama_token, PLB_DRAFT_LIMIT> out = {};
    std::array<float, PLB_DRAFT_LIMIT> chance = {};
    std::vector<draft_offer> offers(1);
    plb::ngram::match match = {};
    int32_t n_drafted = 0;
    const long before = n_allocations;
    prices.begin();
    for (int32_t i = 30; i < N; ++i) {
        ngram.add(text[(size_t) i], record);
        const int32_t n = ngram.draft(PLB_DRAFT_LIMIT, out.data(), match);
        std::fill_n(chance.begin(), n, 0.9f);
        offers[0] = {chance.data(), n, 0};
        const int32_t n_rows = prices.choose(offers, 1, i % 2 == 0);
        prices.computed({n_rows, offers[0].chosen > 0, true, 1000000, 1, 1});
        n_drafted += offers[0].chosen;
    }
    CHECK(n_allocations == before);
    CHECK(n_drafted > N);
}

} // namespace

int main() {
    rows_are_had_as_long_as_they_pay();
    what_is_asked_bounds_them();
    steps_are_timed_and_paid_for();
    a_dear_graph_stays();
    a_new_graph_pays_in_the_steps_to_come();
    a_graph_that_gains_something_gives_way_to_a_better_one();
    steps_to_come_pay_for_a_new_graph();
    drafts_tell_how_long_their_match_is();
    texts_that_have_ended_are_drafted_from();
    a_simulation_decides_the_same();
    matches_are_counted_by_their_length();
    what_is_oldest_is_forgotten();
    a_step_with_drafts_allocates_nothing();
    return 0;
}
