// Rows of the caller's through slots (plb_rows): what a slot changes in a row, and on how many threads.
#include "allocations.hpp"
#include "check.hpp"
#include "fused_rows.hpp"
#include "tests/plb_testing.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <random>
#include <thread>

namespace {

// Bias, exclusions, penalties, log-probabilities, against the chain of the slot.
void changes() {
    const int32_t n = 3000, steps = 60;
    std::mt19937 random(4);
    std::vector<float> x(n);
    const llama_logit_bias bias[] = {{7, 5.0f}, {9, -INFINITY}, {2999, 8.0f}, {7, 1.0f}};
    const llama_token stop[] = {7, 2999};
    const std::vector<llama_token> prompt = {7, 8, 9, 7, 2999, 7};
    for (int variant = 0; variant < 24; ++variant) {
        plb_sampling p = sampling(variant % 4 ? 0.9f : 0, variant % 3 ? 0 : 30,
                                  variant % 2 ? 0.9f : 1, variant % 5 ? 0 : 0.02f);
        p.repeat_penalty    = variant % 2 ? 1.3f : 0.8f;
        p.frequency_penalty = variant % 3 ? 0.5f : 0;
        p.presence_penalty  = variant % 5 ? 0.3f : -0.2f;
        p.penalty_last_n    = variant % 3 == 0 ? 3 : variant % 3 == 1 ? 40 : 1;
        p.n_logit_bias = 4;
        p.logit_bias   = bias;
        p.n_stop_tokens = 2;
        p.stop_tokens   = stop;
        p.min_tokens = steps;
        p.max_tokens = steps;
        p.n_logprobs = 6;
        p.seed = (uint32_t) variant;
        plb_rows * rows = nullptr;
        CHECK_EQ(plb_rows_new(n, 2, 6, 1, &rows), PLB_OK);
        p.path = PLB_PATH_CHAIN;
        CHECK_EQ(plb_rows_set(rows, 0, &p, prompt.data(), (int32_t) prompt.size()), PLB_OK);
        p.path = PLB_PATH_FUSED;
        CHECK_EQ(plb_rows_set(rows, 1, &p, prompt.data(), (int32_t) prompt.size()), PLB_OK);
        for (int step = 0; step < steps; ++step) {
            fill(x, 1 + step % 3, random); // no equal logits, small nuclei
            std::vector<float> both = x;
            both.insert(both.end(), x.begin(), x.end());
            plb_result  result[2];
            llama_token top[12];
            float       logprob[12];
            CHECK_EQ(plb_rows_sample(rows, 2, both.data(), n, result, top, logprob), PLB_OK);
            CHECK(memcmp(x.data(), both.data() + n, sizeof(float) * n) == 0);
            CHECK_EQ(result[0].error, 0);
            CHECK_EQ(result[1].error, 0);
            CHECK_EQ(result[0].token, result[1].token);
            CHECK(result[1].token != 7 && result[1].token != 9 && result[1].token != 2999);
            CHECK_EQ(result[0].finish, result[1].finish);
            CHECK(std::fabs(result[0].logprob - result[1].logprob) < 1e-5);
            CHECK_EQ(result[1].n_top, 6);
            for (int i = 0; i < 6; ++i) {
                CHECK_EQ(top[i], top[6 + i]);
                CHECK(std::fabs(logprob[i] - logprob[6 + i]) < 1e-5);
            }
        }
        plb_rows_free(rows);
    }
}

void window() {
    std::mt19937 random(8);
    for (const int32_t last_n : {1, 2, 7, 64, 300}) {
        plb::penalty_window ours(last_n, 50);
        std::vector<llama_token> all;
        for (int i = 0; i < 2000; ++i) {
            all.push_back((llama_token) (random() % 50));
            ours.add(all.back());
            int32_t count[50] = {};
            for (size_t j = all.size() - std::min(all.size(), (size_t) last_n); j < all.size(); ++j) {
                ++count[all[j]];
            }
            for (const auto & seen : ours) {
                CHECK_EQ(seen.count, count[seen.token]);
                count[seen.token] = 0;
            }
            CHECK(std::all_of(count, count + 50, [](int32_t c) { return c == 0; }));
        }
    }
}

void pool_runs_each_task_once() {
    for (const int32_t n_threads : {1, 2, 3, 8}) {
        plb::pool pool(n_threads);
        CHECK_EQ(pool.size(), n_threads);
        struct {
            int32_t n_threads;
            std::atomic<int32_t> done[100];
            std::atomic<int32_t> inside[8];
        } tasks = {};
        tasks.n_threads = n_threads;
        for (int32_t round = 1; round <= 2000 / SHARE; ++round) {
            const int32_t n = round % 100 + 1;
            for (auto & done : tasks.done) {
                done = 0;
            }
            pool.run(n, [](void * context, int32_t i, int32_t thread) {
                auto & t = *static_cast<decltype(&tasks)>(context);
                CHECK(thread >= 0 && thread < t.n_threads);
                CHECK_EQ(t.inside[thread]++, 0);
                ++t.done[i];
                --t.inside[thread];
            }, &tasks);
            for (int32_t i = 0; i < 100; ++i) {
                CHECK_EQ(tasks.done[i], i < n);
            }
            if (round % (200 / SHARE) == 0) { // long enough for all to park
                std::this_thread::sleep_for(std::chrono::milliseconds(2));
            }
        }
    }
}

// The tokens do not depend on the number of threads, and no call allocates.
void threads_agree() {
    const int32_t n = 40000, n_rows = 6;
    std::mt19937 random(21);
    std::vector<float> x((size_t) n * n_rows), row(n);
    std::vector<std::vector<llama_token>> tokens;
    for (const int32_t n_threads : {1, 4, 16}) {
        plb_rows * rows = nullptr;
        CHECK_EQ(plb_rows_new(n, n_rows, 2, n_threads, &rows), PLB_OK);
        CHECK_EQ(plb_rows_threads(rows), n_threads);
        const plb_sampling variants[] = {sampling(0.8f, 40, 0.95f, 0.05f), sampling(1, 0, 0.95f, 0),
                                         sampling(0.8f, 0, 1, 0), sampling(0, 0, 1, 0),
                                         sampling(1, 0, 0.5f, 0), sampling(1.2f, 500, 0.9f, 0)};
        for (int32_t i = 0; i < n_rows; ++i) {
            plb_sampling p = variants[i];
            p.seed = (uint32_t) i;
            p.path = i == 5 ? PLB_PATH_CHAIN : PLB_PATH_AUTO;
            p.n_logprobs = i % 3;
            CHECK_EQ(plb_rows_set(rows, i, &p, nullptr, 0), PLB_OK);
        }
        random.seed(21);
        std::vector<llama_token> found;
        for (int32_t round = 0; round < 30; ++round) {
            for (int32_t i = 0; i < n_rows; ++i) {
                fill(row, (round + i) % N_SHAPES, random);
                std::copy(row.begin(), row.end(), x.begin() + (int64_t) n * i);
            }
            plb_result  result[n_rows];
            llama_token top[2 * n_rows];
            float       logprob[2 * n_rows];
            const int32_t now = round % 3 ? 5 : n_rows; // with and without the chain's row
            const long before = n_allocations;
            CHECK_EQ(plb_rows_sample(rows, now, x.data(), n, result, top, logprob), PLB_OK);
            CHECK(now == n_rows || n_allocations == before); // the chain's own top-k allocates
            for (int32_t i = 0; i < now; ++i) {
                CHECK_EQ(result[i].error, 0);
                found.push_back(result[i].token);
            }
        }
        tokens.push_back(found);
        plb_rows_free(rows);
    }
    CHECK(tokens[0] == tokens[1] && tokens[0] == tokens[2]);
}

} // namespace

int main() {
    window();
    changes();
    pool_runs_each_task_once();
    threads_agree();
    return 0;
}
