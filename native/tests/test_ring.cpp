// The ring: what a reader thread gets while a run goes on is what the run computes, in order, once.
#include "check.hpp"
#include "step/engine.hpp"

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

#if defined(__linux__)
#include <sys/resource.h>
#endif

namespace {

constexpr int64_t SECOND = 1000000000;

plb_engine_params params_of(int32_t stream, int32_t n_steps_max) {
    plb_engine_params params = plb_engine_default_params();
    params.stream         = stream;
    params.n_steps_max    = n_steps_max;
    params.n_logprobs_max = 3;
    return params;
}

// A reader's memory.
struct page {
    std::vector<plb_step_info> steps;
    std::vector<int32_t> n_tokens, step, n_top;
    std::vector<llama_token> token, top_token;
    std::vector<float> logprob, top_logprob;
    plb_page out = {};

    page(int32_t n_seq, int32_t n, int32_t width) :
        steps(n), n_tokens(n_seq), step(n_seq * n), n_top(n_seq * n), token(n_seq * n),
        top_token(n_seq * n * width), logprob(n_seq * n), top_logprob(n_seq * n * width) {
        out = {n, 0, steps.data(), n_tokens.data(), token.data(), step.data(), logprob.data(),
               n_top.data(), top_token.data(), top_logprob.data()};
    }

    void clear() {
        out.n_steps = 0;
        std::fill(n_tokens.begin(), n_tokens.end(), 0);
    }
};

void what_was_read_is_room() {
    plb::ring ring;
    ring.allocate(4, 8);
    CHECK_EQ(ring.reserve(5), 0);
    ring.record(5);
    ring.publish();
    CHECK(!ring.has_room(6));
    ring.take(1);
    CHECK(ring.has_room(6)); // not in front of the end
    CHECK_EQ(ring.reserve(6), 0);
}

// More than there are sequences: rows of a prompt that are sampled, each of which is reported.
void all_results_of_a_step_are_finished_ones(const char * path) {
    fixture f(path, 256, 1, params_of(1, 4));
    const plb_sampling greedy = sampling_of(100);
    CHECK_EQ(plb_slot_set(f.engine, 0, &greedy, nullptr, 0), PLB_OK);
    CHECK_EQ(plb_slot_next(f.engine, 0, 20, 40, 1), PLB_OK);
    const int32_t n = f.views.n_seq_max + 8;
    for (int32_t i = 0; i < n; ++i) {
        f.row(i, 1, i, 0, PLB_ROW_SAMPLE);
    }
    plb_run_info info = {};
    CHECK_EQ(plb_run(f.engine, n, nullptr, 0, 0, 1, &info), PLB_OK);
    CHECK_EQ(info.n_finished, n);
    CHECK((size_t) info.n_finished <= f.engine->finished.size());
}

// The prompts of n sequences, in one step of a run without slots.
plb_run_info start(fixture & f, int32_t n, int32_t max_tokens) {
    const int32_t n_rows = f.start(std::vector<int32_t>(n, max_tokens));
    plb_run_info info = {};
    CHECK_EQ(plb_run(f.engine, n_rows, nullptr, 0, 0, 1, &info), PLB_OK);
    CHECK_EQ(info.n_steps, 1);
    CHECK_EQ(info.n_results, n);
    return info;
}

plb_run_info run(fixture & f, const std::vector<llama_seq_id> & slots, int32_t n_steps) {
    plb_run_info info = {};
    const int32_t code = plb_run(f.engine, 0, slots.data(), (int32_t) slots.size(), 0, n_steps, &info);
    CHECK_EQ(code, info.code);
    return info;
}

// What sequences 0..n-1 generate, by steps whose results no other thread reads.
std::vector<std::vector<llama_token>> expected(const char * path, int32_t n, int32_t n_tokens) {
    fixture f(path, 2048, 4, params_of(0, 32));
    std::vector<std::vector<llama_token>> tokens(n);
    start(f, n, n_tokens);
    for (int32_t seq = 0; seq < n; ++seq) {
        tokens[seq].push_back(f.views.results[seq].token);
    }
    std::vector<llama_seq_id> slots;
    for (int32_t seq = 0; seq < n; ++seq) {
        slots.push_back(seq);
    }
    while ((int32_t) tokens[0].size() < n_tokens) {
        const plb_run_info info = run(f, slots, 7);
        CHECK_EQ(info.code, PLB_OK);
        for (int32_t i = 0; i < info.n_results; ++i) {
            tokens[f.views.results[i].seq].push_back(f.views.results[i].token);
        }
    }
    return tokens;
}

// The last step of a run stays back until the next call; the interrupt and the wake come through.
void handed_over(fixture & f) {
    CHECK_EQ(plb_step(f.engine, 1), PLB_E_STREAM);
    page p(4, 16, 3);
    CHECK_EQ(plb_ring_wait(f.engine, 1, 0), 0);
    plb_run_info info = start(f, 2, 100);
    const int64_t first = info.n_recorded;
    CHECK_EQ(plb_ring_count(f.engine), first - 1);
    plb_ring_wake(f.engine);
    CHECK_EQ(plb_ring_wait(f.engine, first, 100 * SECOND), first - 1); // woken
    plb_ring_flush(f.engine);
    CHECK_EQ(plb_ring_wait(f.engine, first + 1, 100 * SECOND), first);
    CHECK_EQ(plb_ring_wait(f.engine, first + 1, 1000), first); // the wake is used up: it times out
    info = run(f, {1, 0}, 5);
    CHECK_EQ(info.n_recorded, first + 5);
    CHECK_EQ(plb_ring_count(f.engine), first + 4);
    CHECK_EQ(plb_ring_read(f.engine, first + 2, &p.out), first + 2);
    CHECK_EQ(p.n_tokens[0], 3);
    CHECK_EQ(p.step[2], first + 1);
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), 2);
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), 0);
    plb_ring_flush(f.engine);
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), 1);
    CHECK_EQ(p.out.n_steps, first + 5);
    const int32_t at = 16 + 5; // of sequence 1, the last token
    CHECK_EQ(p.n_tokens[1], 6);
    CHECK_EQ(p.n_top[at], 3);
    CHECK_EQ(p.top_token[at * 3], p.token[at]);
    CHECK(p.top_logprob[at * 3] == p.logprob[at] && p.logprob[at] < 0);
    CHECK(plb_ring_read(nullptr, 0, &p.out) == PLB_E_ARGUMENT);
    CHECK(plb_ring_read(f.engine, 0, nullptr) == PLB_E_ARGUMENT);
}

// The reader stands back while the other thread plans, not while it computes or has nothing to do.
void gives_way(fixture & f) {
    const auto waited = [&](int64_t timeout_ns) {
        const int64_t begin = plb_now_ns();
        plb_ring_yield(f.engine, timeout_ns);
        return plb_now_ns() - begin;
    };
    plb_ring_flush(f.engine);
    CHECK(waited(100 * SECOND) < 10 * SECOND);
    start(f, 1, 100);
    CHECK(waited(SECOND / 100) >= SECOND / 100);
    std::thread other([&] { plb_ring_flush(f.engine); });
    CHECK(waited(100 * SECOND) < 10 * SECOND);
    other.join();
    plb_ring_yield(nullptr, 0);
}

// How often the calling thread has waited, where the system tells.
int64_t n_waits() {
#if defined(__linux__)
    rusage usage = {};
    getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nvcsw;
#else
    return 0;
#endif
}

// A reader that waits for many steps sleeps until they are there, however many calls make them.
void sleeps_on(fixture & f) {
    const int64_t first = start(f, 1, 1000).n_recorded;
    constexpr int32_t N_CALLS = 200;
    plb_ring_wait(f.engine, 0, 0); // wakes that are left are used up
    int64_t n = 0;
    std::thread reader([&] {
        const int64_t before = n_waits();
        CHECK_EQ(plb_ring_wait(f.engine, first + N_CALLS, 100 * SECOND), first + N_CALLS);
        n = n_waits() - before;
    });
    page p(4, 16, 3);
    for (int32_t i = 0; i < N_CALLS; ++i) {
        run(f, {0}, 1);
        std::this_thread::sleep_for(std::chrono::microseconds(300)); // it may well sleep again
        if (i % 8 == 0) { // room
            p.clear();
            plb_ring_read(f.engine, INT64_MAX, &p.out);
        }
    }
    plb_ring_flush(f.engine);
    reader.join();
    CHECK(n < N_CALLS / 4);
}

// A full ring: the run waits a while, ends, and goes on when there is room.
void full(fixture & f) {
    page p(4, 64, 3);
    plb_ring_flush(f.engine);
    plb_ring_read(f.engine, INT64_MAX, &p.out);
    start(f, 2, 1000);
    plb_run_info info = run(f, {0, 1}, 1000);
    CHECK_EQ(info.stop, PLB_STOP_FULL);
    CHECK_EQ(info.n_steps, f.views.n_steps_max - 1);
    plb_interrupt(f.engine); // an interrupt does not wait
    info = run(f, {0, 1}, 1000);
    CHECK_EQ(info.stop, PLB_STOP_FULL);
    CHECK_EQ(info.n_steps, 0);
    CHECK_EQ(info.n_reused, 0);
    p.clear();
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), f.views.n_steps_max);
    info = run(f, {0, 1}, 3);
    CHECK_EQ(info.stop, PLB_STOP_STEPS);
    CHECK_EQ(info.n_steps, 3);
    // a page that is full takes no more steps; one that is full for one sequence neither
    plb_ring_flush(f.engine);
    page small(4, 2, 3);
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &small.out), 2);
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &small.out), 0);
    small.out.n_steps = 0;
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &small.out), 0);
    CHECK_EQ(small.n_tokens[0], 2);
    small.clear();
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &small.out), 1);
}

// A step that fails is recorded, without results.
void failed(fixture & f) {
    page p(4, 64, 3);
    plb_ring_flush(f.engine);
    while (plb_ring_read(f.engine, INT64_MAX, &p.out) > 0) {
        p.clear();
    }
    start(f, 1, 1000);
    f.row(0, 5, 0, 0, 0); // position 0 again: libllama refuses it
    plb_run_info info = {};
    CHECK_EQ(plb_run(f.engine, 1, nullptr, 0, 0, 1, &info), -1);
    plb_ring_flush(f.engine);
    p.clear();
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), 2);
    CHECK_EQ(p.steps[1].code, -1);
    CHECK_EQ(p.steps[1].n_rows, 1);
    CHECK_EQ(p.n_tokens[0], 1);
}

// One thread computes, one reads: nothing is lost, doubled or out of order, whichever is faster.
void two_threads(const char * path, int32_t n_ring, int32_t n_page, int64_t rest_us) {
    constexpr int32_t N_SEQ = 3, N_TOKENS = 300;
    const auto tokens = expected(path, N_SEQ, N_TOKENS);
    fixture f(path, 2048, 4, params_of(1, n_ring));
    std::atomic<bool> over{false};
    std::vector<std::vector<llama_token>> got(N_SEQ);
    std::vector<plb_step_info> steps;
    std::thread reader([&] {
        page p(4, n_page, 3);
        int64_t n = 0;
        for (;;) {
            const bool last = over;
            const int64_t published = plb_ring_wait(f.engine, n + 1, SECOND / 100);
            while (n < published) {
                const int32_t n_read = plb_ring_read(f.engine, published, &p.out);
                n += n_read;
                for (int32_t seq = 0; seq < N_SEQ; ++seq) {
                    const llama_token * column = &p.token[(size_t) seq * n_page];
                    got[seq].insert(got[seq].end(), column, column + p.n_tokens[seq]);
                }
                steps.insert(steps.end(), p.steps.begin(), p.steps.begin() + p.out.n_steps);
                p.clear();
                std::this_thread::sleep_for(std::chrono::microseconds(rest_us));
            }
            if (last) {
                return;
            }
        }
    });
    start(f, N_SEQ, N_TOKENS);
    int32_t n_steps = 1;
    plb_run_info info = {};
    do {
        info = run(f, {0, 1, 2}, 1000);
        CHECK_EQ(info.code, PLB_OK);
        n_steps += info.n_steps;
    } while (info.stop != PLB_STOP_FINISH);
    CHECK_EQ(info.n_finished, N_SEQ);
    CHECK_EQ(f.views.finished[2].seq, 2);
    CHECK_EQ(f.views.finished[2].finish, PLB_FINISH_LENGTH);
    plb_ring_flush(f.engine);
    over = true;
    reader.join();
    CHECK_EQ(n_steps, N_TOKENS);
    CHECK_EQ(steps.size(), (size_t) info.n_recorded);
    CHECK(got == tokens);
    for (size_t i = 1; i < steps.size(); ++i) {
        CHECK(steps[i].t_start_ns > steps[i - 1].t_start_ns);
        CHECK_EQ(steps[i].n_results, 3);
    }
}

// What a slot has generated goes with it.
void history(fixture & f) {
    page p(4, 64, 3);
    plb_ring_flush(f.engine);
    while (plb_ring_read(f.engine, INT64_MAX, &p.out) > 0) {
        p.clear();
    }
    start(f, 1, 100);
    run(f, {0}, 5);
    plb_ring_flush(f.engine);
    p.clear();
    CHECK_EQ(plb_ring_read(f.engine, INT64_MAX, &p.out), 6);
    CHECK_EQ(plb_slot_copy(f.engine, 0, 2), PLB_OK);
    for (int32_t seq : {0, 2}) {
        plb_slot * slot = nullptr;
        const llama_token * tokens = nullptr;
        CHECK_EQ(plb_slot_take(f.engine, seq, &slot), PLB_OK);
        CHECK_EQ(plb_slot_tokens(slot, &tokens), 6);
        CHECK(memcmp(tokens, p.token.data(), 6 * sizeof(llama_token)) == 0);
        plb_slot_free(slot);
    }
    CHECK_EQ(plb_slot_tokens(nullptr, nullptr), PLB_E_ARGUMENT);
}

} // namespace

int main(int argc, char ** argv) {
    const char * path = model_path(argc, argv);
    {
        fixture f(path, 2048, 4, params_of(1, 12));
        handed_over(f);
        gives_way(f);
        sleeps_on(f);
        full(f);
        failed(f);
        history(f);
    }
    what_was_read_is_room();
    all_results_of_a_step_are_finished_ones(path);
    two_threads(path, 4, 64, 0);
    two_threads(path, 16, 5, 0);
    two_threads(path, 3, 2, 300); // the reader is slower
    two_threads(path, 256, 64, 0);
    return 0;
}
