// The fused sampler against libllama's own chain: the same candidates, equal ones by id, the same
// probabilities, the same token where neither equal logits nor the chain's rounding decide, on random
// rows of several shapes and sizes, with every instruction set that this machine has.
//
// PLB_TEST_ROWS: how many rows to compare (default 3000, a tenth under AddressSanitizer;
// the long run, some minutes, is 100000; an emulated CPU may take 100).
#include "check.hpp"
#include "fused_rows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

namespace {

// From public calls only.
plb::sampler_ptr chain_of(const plb_sampling & p, int32_t n_vocab, uint32_t seed) {
    auto params = llama_sampler_chain_default_params();
    params.no_perf = true;
    llama_sampler * chain = llama_sampler_chain_init(params);
    if (plb::has_penalties(p)) {
        llama_sampler_chain_add(chain, llama_sampler_init_penalties(
            n_vocab, p.penalty_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty));
    }
    if (p.temperature == 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_greedy());
        return plb::sampler_ptr(chain);
    }
    if (p.top_k > 0) {
        llama_sampler_chain_add(chain, llama_sampler_init_top_k(p.top_k));
    }
    llama_sampler_chain_add(chain, llama_sampler_init_top_p(p.top_p, 0));
    llama_sampler_chain_add(chain, llama_sampler_init_min_p(p.min_p, 0));
    llama_sampler_chain_add(chain, llama_sampler_init_temp_ext(p.temperature, 0, 1));
    llama_sampler_chain_add(chain, llama_sampler_init_dist(seed));
    return plb::sampler_ptr(chain);
}

char row_in_work[200] = ""; // said when a CHECK ends the process

struct comparison {
    long rows = 0, lists = 0, by_index = 0, edges = 0, same_tokens = 0, decided = 0;
    double worst = 0, most_moved = 0;
};

// How far the chain's float sum of all weights, one after the other, is from the real one.
double rounding_of_sum(const std::vector<float> & x, float top) {
    float sum = 0;
    double exact = 0;
    for (const float v : x) {
        sum += expf(v - top);
        exact += std::exp((double) v - top);
    }
    return std::fabs(sum / exact - 1);
}

// The candidates and their probabilities; which of the two decides the token, if one does.
// Returns whether the token has to be the chain's.
bool compare(const one_row & ours, const llama_token_data_array & theirs, const std::vector<float> & x,
             const plb_sampling & p, comparison & counts, std::vector<char> & marks) {
    const float top = *std::max_element(x.begin(), x.end());
    const auto weight = [&](size_t id, double temperature) {
        return std::exp(((double) x[id] - top) / temperature);
    };
    std::fill(marks.begin(), marks.end(), (char) 0);
    const plb::candidate * list = ours.memory.list.get();
    const int32_t n_list = ours.row.n_list();
    counts.lists += n_list > 0;
    counts.by_index += n_list == 0;
    for (int32_t i = 0; i < n_list; ++i) {
        marks[(size_t) list[i].id] = 1;
        if (i > 0) { // by logit, then by id
            const float before = x[(size_t) list[i - 1].id], here = x[(size_t) list[i].id];
            const bool in_order = p.top_k <= 0 && p.top_p == 1
                                      ? list[i - 1].id < list[i].id
                                      : before > here || (before == here && list[i - 1].id < list[i].id);
            CHECK(in_order);
        }
    }
    double sum = 0, sum_at_1 = 0;
    for (size_t i = 0; i < x.size(); ++i) {
        if (n_list == 0) {
            marks[i] = ours.row.candidates().keeps(x[i], (int32_t) i);
        }
        sum += marks[i] ? weight(i, p.temperature) : 0;
        sum_at_1 += weight(i, 1);
    }
    double list_sum = 0;
    for (int32_t i = 0; i < n_list; ++i) {
        list_sum += list[i].logit;
    }
    for (int32_t i = 0; i < n_list && n_list > 1; ++i) { // by now the weights it was drawn with
        CHECK(std::fabs(list[i].logit / list_sum - weight((size_t) list[i].id, p.temperature) / sum) < 1e-5);
    }
    float end = INFINITY; // the smallest logit that we keep: which of the equal ones is for the ids
    for (size_t i = 0; i < x.size(); ++i) {
        end = marks[i] && weight(i, p.temperature) > 0 ? std::min(end, x[i]) : end;
    }
    for (size_t i = 0; i < theirs.size; ++i) {
        marks[(size_t) theirs.data[i].id] |= 2;
    }
    long at_end = 0, n_moved = 0; // candidates that only one of the two has
    double moved = 0, moved_at_1 = 0;
    bool lowest_first = true;
    for (size_t i = 0; i < x.size(); ++i) {
        if (x[i] == end) { // of equal ones, those with the lowest ids are in
            CHECK(!(marks[i] & 1) || lowest_first);
            lowest_first = marks[i] & 1;
        }
        if (marks[i] == 1 || marks[i] == 2) {
            const int sign = marks[i] == 1 ? 1 : -1;
            at_end += x[i] == end ? sign : 0;
            n_moved += x[i] != end && weight(i, 1) > 0;
            moved += x[i] != end ? weight(i, p.temperature) / sum : 0;
            moved_at_1 += x[i] != end ? weight(i, 1) / sum_at_1 : 0;
        }
    }
    n_moved += std::labs(at_end);
    if (at_end != 0) {
        moved += (double) std::labs(at_end) * std::exp((end - top) / p.temperature) / sum;
        moved_at_1 += (double) std::labs(at_end) * std::exp((double) end - top) / sum_at_1;
    }
    counts.edges += n_moved > 0;
    if (n_moved > 0) { // only where the chain's float sums come to p: the more terms, the rougher
        CHECK(p.top_p < 1);
        const double last = std::exp((double) end - top) / sum_at_1;
        counts.most_moved = std::max(counts.most_moved, moved_at_1);
        CHECK(moved_at_1 < (theirs.size > plb::SMALL ? 0.01
                                                     : 1e-4 + 2 * (last + rounding_of_sum(x, top))));
    }
    for (size_t i = 0; i < theirs.size; ++i) {
        const auto id = (size_t) theirs.data[i].id;
        if (marks[id] == 3) {
            const double a = weight(id, p.temperature) / sum;
            const double by_moved = a * moved / std::max(0.1, 1 - moved);
            const double difference = std::fabs(a - theirs.data[i].p) - 1.1 * by_moved;
            counts.worst = std::max(counts.worst, difference);
            CHECK(difference < 1e-5);
        }
    }
    return n_moved == 0 && (n_list > 0 || p.top_p == 1);
}

// Whether the draw, 0 to 1, comes within rounding to an end of the token's share of all that stays, in
// the order of ids. It is never further outside.
bool at_end_of_share(const one_row & ours, const std::vector<float> & x, float temperature,
                     llama_token token, double draw) {
    const float top = *std::max_element(x.begin(), x.end());
    double sum = 0, before = 0, behind = 0;
    for (int32_t i = 0; i < (int32_t) x.size(); ++i) {
        if (ours.row.candidates().keeps(x[i], i)) {
            before = i == token ? sum : before;
            sum += std::exp(((double) x[i] - top) / temperature);
            behind = i == token ? sum : behind;
        }
    }
    const double rounding = 1e-5 * sum, inside = std::min(draw * sum - before, behind - draw * sum);
    CHECK(inside > -rounding);
    return inside < rounding;
}

void same_as_chain(long n_rows, std::vector<const plb::kernels *> & sets) {
    const plb_sampling variants[] = {
        sampling(0, 40, 0.95f, 0.05f),    sampling(0.8f, 40, 0.95f, 0.05f), sampling(1, 40, 1, 0),
        sampling(0.7f, 128, 1, 0),        sampling(1, 129, 0.99f, 0),       sampling(0.7f, 1000, 0.9f, 0),
        sampling(1, 5000, 0.9f, 0.001f),  sampling(1, 1, 1, 0),             sampling(1, 0, 0.95f, 0),
        sampling(0.8f, 0, 0.5f, 0),       sampling(0.8f, 0, 0.99f, 0.01f),  sampling(0.8f, 0, 1, 0.05f),
        sampling(1.3f, 0, 1, 1e-4f),      sampling(0.8f, 0, 1, 0),          sampling(1, 0, 1, 0),
        sampling(2.5f, 0, 0.999f, 0),     sampling(0.9f, INT32_MAX, 0.9f, 0.02f),
        sampling(1, 0, 0, 0),             sampling(1, 20000, 1, 0),         sampling(0.3f, 0, 0.9f, 1),
    };
    constexpr int32_t N_VARIANTS = sizeof(variants) / sizeof(variants[0]);
    std::mt19937 random(11);
    comparison counts;
    const int32_t sizes[] = {61, 300, 1000, 1025, 5000, 32000, 151936, 262144};
    const double  share[] = {0.1, 0.1, 0.1, 0.1, 0.1, 0.3, 0.1, 0.1};
    for (int32_t s = 0; s < 8; ++s) {
        const int32_t n = sizes[s];
        one_row ours(n);
        std::vector<float> x(n), before(n);
        std::vector<char> marks(n);
        std::vector<llama_token_data> data(n);
        const long wanted = (long) (share[s] * (double) n_rows);
        const long each = std::max(1L, wanted / N_VARIANTS);
        long done = 0;
        for (int32_t variant = 0; variant < N_VARIANTS; ++variant) {
            const plb_sampling & p = variants[variant];
            plb::fused_state state(p, 99, 1000, n, 0);
            auto chain = chain_of(p, n, 99);
            for (long i = 0; i < each; ++i, ++done) {
                fill(x, (int32_t) ((i + 3 * variant) % N_SHAPES), random);
                before = x;
                for (int32_t j = 0; j < n; ++j) {
                    data[j] = {j, x[j], 0};
                }
                llama_token_data_array theirs = {data.data(), (size_t) n, -1, false};
                llama_sampler_apply(chain.get(), &theirs);
                const llama_token expected = theirs.data[theirs.selected].id;
                const plb::kernels & set = *sets[(size_t) (i % (long) sets.size())];
                snprintf(row_in_work, sizeof(row_in_work), "%s, %s, vocabulary %d, variant %d, row "
                         "%ld: the chain keeps %zu and takes %d\n", set.name,
                         SHAPES[(i + 3 * variant) % N_SHAPES], n, variant, i, theirs.size, expected);
                std::mt19937 draws = state.random;
                const double draw = std::uniform_real_distribution<double>(0, 1)(draws);
                const llama_token token = ours.sample(set, x, p, state, i % 4 == 3 ? 3 : 1);
                CHECK_EQ(ours.request.error, 0);
                CHECK(memcmp(x.data(), before.data(), sizeof(float) * (size_t) n) == 0);
                CHECK(token >= 0);
                if (p.temperature == 0) {
                    CHECK_EQ(token, expected);
                } else if (compare(ours, theirs, x, p, counts, marks)) {
                    ++counts.decided;
                    const bool sorted = p.top_k > 0 || p.top_p < 1; // which of equal ones is for the ids
                    CHECK(token == expected || (sorted && x[token] == x[expected]) ||
                          (ours.row.n_list() == 0 &&
                           at_end_of_share(ours, x, p.temperature, token, draw)));
                }
                counts.same_tokens += token == expected;
            }
        }
        counts.rows += done;
    }
    row_in_work[0] = 0;
    printf("%ld rows: %ld lists, %ld by index; %ld with another edge, at most %.1e of the weight; "
           "%ld tokens the same, %ld had to be; largest difference of a probability %.1e\n",
           counts.rows, counts.lists, counts.by_index, counts.edges, counts.most_moved,
           counts.same_tokens, counts.decided, counts.worst);
}

// A nucleus of thousands, which has an order of its own: the frequencies are the probabilities.
void distribution(const plb::kernels & set, int32_t n_draws) {
    const int32_t n = 32000;
    std::mt19937 random(5);
    std::vector<float> x(n);
    fill(x, 0, random);
    for (const float temperature : {1.0f, 0.7f}) {
        const plb_sampling p = sampling(temperature, 0, 0.9f, 0);
        plb::fused_state state(p, 3, 100, n, 0);
        one_row ours(n);
        constexpr int32_t GROUPS = 50;
        std::vector<double> expected(GROUPS), seen(GROUPS);
        ours.sample(set, x, p, state);
        CHECK_EQ(ours.row.n_list(), 0);
        double sum = 0;
        for (int32_t i = 0; i < n; ++i) {
            const double w = ours.row.candidates().keeps(x[i], i) ? std::exp(x[i] / temperature) : 0;
            expected[i % GROUPS] += w;
            sum += w;
        }
        for (int32_t i = 0; i < n_draws; ++i) {
            const llama_token token = ours.sample(set, x, p, state);
            CHECK(ours.row.candidates().keeps(x[token], token));
            seen[token % GROUPS] += 1;
        }
        double chi_square = 0;
        for (int32_t i = 0; i < GROUPS; ++i) {
            const double e = expected[i] / sum * n_draws;
            chi_square += (seen[i] - e) * (seen[i] - e) / e;
        }
        CHECK(chi_square < 100); // 49 degrees of freedom: exceeded once in 40,000
    }
}

// What vectors compute, against loops.
void kernel_results(const plb::kernels & set) {
    std::mt19937 random(2);
    const int32_t n = 64 * 9 + 17;
    std::vector<float> x(n);
    for (int round = 0; round < 50; ++round) {
        fill(x, round % N_SHAPES, random);
        float tail[64];
        std::fill(tail, tail + 64, -INFINITY);
        memcpy(tail, &x[64 * 9], sizeof(float) * 17);
        const plb::row_view row = {x.data(), tail, n, 9, 10};
        float top[10];
        CHECK(!set.scan(row, 0, 10, top));
        for (int32_t b = 0; b < 10; ++b) {
            const auto first = x.begin() + 64 * b;
            CHECK(top[b] == *std::max_element(first, b == 9 ? x.end() : first + 64));
        }
        const float largest = *std::max_element(x.begin(), x.end());
        CHECK(set.maximum(x.data(), 64 * 9) == *std::max_element(top, top + 9));
        for (const float temp : {1.0f, 0.8f, 0.1f, 3.0f}) {
            const plb::weighing how(temp, largest, -INFINITY);
            double sums[10], all[10], upper[10];
            float each[64];
            set.weigh(row, 0, 10, top, how, sums);
            set.weigh_both(row, 0, 10, top, how, 0, all, upper);
            for (int32_t b = 0; b < 10; ++b) {
                double truth = 0, above = 0;
                set.weights(row.block(b), how, each);
                for (int32_t i = 0; i < 64; ++i) {
                    const float v = row.block(b)[i];
                    const double w = std::exp(((double) v - largest) / temp);
                    truth += w;
                    above += v >= 0 ? w : 0;
                    CHECK(std::fabs(each[i] - w) <= 2e-5 * w + 2e-38);
                }
                const double most = 2e-6 * (1 + std::fabs(largest / temp)) * truth + 1e-30;
                CHECK(std::fabs(sums[b] - truth) <= most);
                CHECK(std::fabs(all[b] - truth) <= most);
                CHECK(std::fabs(upper[b] - above) <= most);
            }
        }
        uint64_t expected = 0;
        for (int32_t i = 0; i < 64; ++i) {
            expected |= (uint64_t) (x[i] >= -0.5f && x[i] < 1) << i;
        }
        CHECK(set.between(x.data(), -0.5f, 1) == expected);
    }
    // a NaN anywhere
    const plb::row_view row = {x.data(), nullptr, 64 * 9, 9, 9};
    float top[9];
    for (int32_t at = 0; at < 64 * 9; ++at) {
        std::fill(x.begin(), x.end(), 1.0f);
        x[at] = at % 2 ? NAN : -NAN;
        CHECK(set.scan(row, 0, 9, top));
    }
}

void bad_rows(const plb::kernels & set) {
    const int32_t n = 200;
    one_row ours(n);
    for (const plb_sampling & p : {sampling(0, 0, 1, 0), sampling(0.8f, 40, 0.95f, 0.05f),
                                   sampling(1, 0, 0.9f, 0), sampling(0.8f, 0, 1, 0)}) {
        plb::fused_state state(p, 1, 100, n, 8);
        std::vector<float> x(n, 1.0f);
        for (const float bad : {NAN, -NAN, INFINITY}) {
            for (int32_t at = 0; at < n; at += 7) {
                x[at] = bad;
                ours.request = {};
                ours.sample(set, x, p, state);
                CHECK_EQ(ours.request.error, PLB_E_LOGITS);
                // also where the token is excluded
                const llama_token never = at;
                ours.request.never[0] = {&never, 1};
                ours.sample(set, x, p, state);
                CHECK_EQ(ours.request.error, PLB_E_LOGITS);
                CHECK(!(x[at] < INFINITY));
                x[at] = 1;
            }
        }
        ours.request = {};
        std::fill(x.begin(), x.end(), -INFINITY);
        ours.sample(set, x, p, state);
        CHECK_EQ(ours.request.error, PLB_E_LOGITS);
        x[5] = -1e30f;
        CHECK_EQ(ours.sample(set, x, p, state), 5);
        const llama_token five = 5;
        ours.request.never[0] = {&five, 1};
        ours.sample(set, x, p, state);
        CHECK_EQ(ours.request.error, PLB_E_NO_CANDIDATE);
        CHECK(x[5] == -1e30f);
        ours.request = {};
    }
}

// The largest k, by logit and among equal ones by id.
void order_of_equal_logits(const plb::kernels & set) {
    std::mt19937 random(6);
    for (const int32_t n : {50, 64, 1000, 20000}) {
        one_row ours(n);
        std::vector<float> x(n);
        std::vector<plb::candidate> all(n);
        for (int32_t i = 0; i < 60; ++i) {
            fill(x, i % N_SHAPES, random);
            const plb_sampling p = sampling(1, std::min(n, 1 + i * i), 1, 0);
            plb::fused_state state(p, 1, 100, n, 0);
            ours.sample(set, x, p, state);
            const auto n_finite = (int32_t) std::count_if(x.begin(), x.end(),
                                                          [](float v) { return v > -INFINITY; });
            CHECK_EQ(ours.row.n_list(), std::min(p.top_k, n_finite));
            for (int32_t j = 0; j < n; ++j) {
                all[j] = {x[j], j};
            }
            std::partial_sort(all.begin(), all.begin() + p.top_k, all.end(),
                              plb::by_logit_and_id);
            for (int32_t j = 0; j < ours.row.n_list(); ++j) {
                CHECK_EQ(ours.memory.list[j].id, all[j].id);
            }
        }
    }
}

} // namespace

int main() {
    atexit([] { fputs(row_in_work, stderr); });
    std::vector<const plb::kernels *> sets;
    for (const char * name : {"avx512", "avx2", "base"}) {
        if (const plb::kernels * set = plb::kernels_named(name)) {
            sets.push_back(set);
            kernel_results(*set);
            bad_rows(*set);
        }
    }
    CHECK(!sets.empty());
    order_of_equal_logits(*sets[0]);
    const char * asked  = getenv("PLB_TEST_ROWS");
    const long   n_rows = asked == nullptr ? 3000 / SHARE : atol(asked);
    distribution(*sets[0], (int32_t) std::max(2000L, std::min(20000L, 10 * n_rows)));
    same_as_chain(n_rows, sets);
    return 0;
}
