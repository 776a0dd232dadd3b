// The run loop: the same as step by step to the last cell, the interrupt, and no allocation of ours.
#include "allocations.hpp"
#include "check.hpp"

#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>

namespace {

constexpr int32_t N_STEPS = 3000;

plb_engine_params params_of(int32_t n_steps_max) {
    plb_engine_params params = plb_engine_default_params();
    params.n_steps_max = n_steps_max;
    return params;
}

// n sequences with a prompt each, their first tokens sampled; budgets[i] tokens for sequence i.
void start(fixture & f, const std::vector<int32_t> & budgets, float temperature = 0) {
    CHECK_EQ(plb_step(f.engine, f.start(budgets, temperature)), PLB_OK);
    CHECK_EQ(f.views.info->n_results, budgets.size());
}

int32_t step_once(fixture & f, const std::vector<llama_seq_id> & slots) {
    for (size_t i = 0; i < slots.size(); ++i) {
        const plb_slot_info info = f.slot(slots[i]);
        f.row((int32_t) i, info.next_token, info.next_pos, slots[i], PLB_ROW_SAMPLE);
    }
    return plb_step(f.engine, (int32_t) slots.size());
}

plb_run_info run(fixture & f, const std::vector<llama_seq_id> & slots, int32_t n_steps) {
    plb_run_info info = {};
    const int32_t code = plb_run(f.engine, 0, slots.data(), (int32_t) slots.size(), 0, n_steps, &info);
    CHECK_EQ(code, info.code);
    return info;
}

// What Python can't ask for; tests/step/test_stepper_run.py has the rest.
void refused(fixture & f) {
    start(f, {100, 100});
    plb_run_info info = {};
    const llama_seq_id one = 1;
    CHECK_EQ(plb_run(nullptr, 0, &one, 1, 0, 1, &info), PLB_E_ARGUMENT);
    CHECK_EQ(plb_run(f.engine, 0, nullptr, 1, 0, 1, &info), PLB_E_ARGUMENT);
    CHECK_EQ(plb_run(f.engine, 0, &one, 1, 0, 1, nullptr), PLB_E_ARGUMENT);
    CHECK_EQ(plb_run(f.engine, 64, &one, 1, 0, 1, &info), PLB_E_N_ROWS);
    CHECK_EQ(plb_run(f.engine, 1, &one, 1, 0, 2, &info), PLB_E_N_STEPS);
    CHECK_EQ(f.slot(1).n_generated, 1);
}

// No cells at some step: what came before it stays, and the slots stand where it began.
void decode_error(fixture & f) {
    std::vector<plb_result> expected;
    start(f, {1000, 1000});
    while (step_once(f, {0, 1}) == PLB_OK) {
        expected.insert(expected.end(), f.views.results, f.views.results + 2);
    }
    start(f, {1000, 1000});
    const plb_run_info info = run(f, {0, 1}, N_STEPS);
    CHECK_EQ(info.code, 1);
    CHECK_EQ(info.stop, PLB_STOP_CODE);
    CHECK_EQ(info.n_results, expected.size());
    CHECK_EQ(info.n_steps * 2, info.n_results);
    CHECK_EQ(f.views.info->code, 1);
    CHECK(memcmp(f.views.results, expected.data(), expected.size() * sizeof(plb_result)) == 0);
    const llama_memory_t memory = llama_get_memory(f.ctx);
    for (llama_seq_id seq = 0; seq < 2; ++seq) {
        CHECK_EQ(f.slot(seq).n_generated, info.n_steps + 1);
        CHECK_EQ(f.slot(seq).next_pos, llama_memory_seq_pos_max(memory, seq) + 1);
    }
    CHECK(llama_memory_seq_rm(memory, 1, -1, -1));
    CHECK_EQ(run(f, {0}, 2).n_steps, 2); // room again
}

// A prompt and its last token, which a run computes behind it, as in one step.
void prompt_before(fixture & f) {
    start(f, {100, 100});
    CHECK_EQ(run(f, {0, 1}, 3).n_steps, 3);
    const plb_result expected = f.views.results[5];

    llama_memory_clear(llama_get_memory(f.ctx), true);
    const plb_sampling s = sampling_of(100, 0);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, 0), PLB_OK);
    CHECK_EQ(plb_slot_set(f.engine, 1, &s, nullptr, 0), PLB_OK);
    for (const auto & [token, pos, code] : std::vector<std::array<int32_t, 3>>{
             {-1, 3, PLB_E_TOKEN}, {f.views.n_vocab, 3, PLB_E_TOKEN}, {1, -1, PLB_E_POS}}) {
        CHECK_EQ(plb_slot_next(f.engine, 0, token, pos, 0), code);
    }
    CHECK_EQ(plb_slot_clear(f.engine, 2), PLB_OK);
    CHECK_EQ(plb_slot_next(f.engine, 2, 1, 0, 0), PLB_E_NO_SLOT);
    int32_t n_rows = 0;
    for (llama_seq_id seq = 0; seq < 2; ++seq) {
        const llama_token last = 60 + 2 * seq;
        f.row(n_rows++, 1, 0, seq, 0);
        f.row(n_rows++, 20 + seq, 1, seq, 0);
        f.row(n_rows++, 40, 2, seq, 0);
        CHECK_EQ(plb_slot_next(f.engine, seq, last, 3, seq == 0), PLB_OK);
    }
    plb_run_info info = {};
    const llama_seq_id both[] = {0, 1};
    CHECK_EQ(plb_run(f.engine, n_rows, both, 2, 0, 1, &info), PLB_OK);
    CHECK_EQ(info.n_results, 2);
    CHECK_EQ(info.n_finished, 1); // the slot that is reported
    CHECK_EQ(f.views.finished[0].seq, 0);
    CHECK_EQ(f.views.finished[0].finish, PLB_FINISH_NONE);
    CHECK_EQ(f.views.info->n_outputs, 2);
    CHECK_EQ(f.slot(1).next_pos, 4);
    info = run(f, {0, 1}, 3);
    CHECK_EQ(info.n_steps, 1); // slot 0 is reported each time
    CHECK_EQ(plb_slot_next(f.engine, 0, f.slot(0).next_token, 5, 0), PLB_OK);
    CHECK_EQ(run(f, {0, 1}, 2).n_steps, 2);
    CHECK_EQ(f.views.results[3].token, expected.token);
    CHECK_EQ(f.views.results[3].index, expected.index);
    CHECK_EQ(plb_run(f.engine, 0, both, 2, 5, 1, &info), PLB_E_ARGUMENT); // of 4 sequences
}

int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

void interrupt(fixture & f) {
    start(f, {10000});
    plb_interrupt(nullptr);
    plb_interrupt(f.engine); // between two runs: the next one ends after one step
    plb_interrupt(f.engine);
    plb_run_info info = run(f, {0}, 5);
    CHECK_EQ(info.stop, PLB_STOP_INTERRUPT);
    CHECK_EQ(info.n_steps, 1);
    info = run(f, {0}, 5);
    CHECK_EQ(info.stop, PLB_STOP_STEPS);
    CHECK_EQ(info.n_steps, 5);

    // from another thread: no step starts after the interrupt
    std::atomic<bool> started{false};
    int64_t interrupted_at = 0;
    std::thread other([&] {
        while (!started) {
            std::this_thread::yield();
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(3));
        plb_interrupt(f.engine);
        interrupted_at = now_ns();
    });
    started = true;
    info = run(f, {0}, N_STEPS);
    other.join();
    CHECK_EQ(info.stop, PLB_STOP_INTERRUPT);
    CHECK(info.n_steps < N_STEPS);
    CHECK(f.views.steps[info.n_steps - 1].t_start_ns <= interrupted_at);
}

// A run allocates what its llama_decode calls allocate, and nothing more.
void allocations(fixture & f, float temperature) {
    constexpr int32_t N = 24;
    std::vector<llama_token> tokens;
    for (int32_t round = 0; round < 2; ++round) { // the first one warms up
        start(f, {1000, 1000, 1000}, temperature);
        const long before = n_allocations;
        plb_run_info info = {};
        const llama_seq_id slots[] = {0, 1, 2};
        CHECK_EQ(plb_run(f.engine, 0, slots, 3, 0, N, &info), PLB_OK);
        const long of_run = n_allocations - before;
        CHECK_EQ(info.n_steps, N);
        tokens.clear();
        for (int32_t i = 0; i < info.n_results; ++i) {
            tokens.push_back(f.views.results[i].token);
        }
        // the same rows again, by llama_decode alone
        start(f, {1000, 1000, 1000}, temperature);
        llama_batch batch = llama_batch_init(3, 0, 1);
        batch.n_tokens = 3;
        const long before_raw = n_allocations;
        for (int32_t step = 0; step < N; ++step) {
            for (int32_t i = 0; i < 3; ++i) {
                batch.token[i]     = step ? tokens[3 * (step - 1) + i] : f.views.results[i].token;
                batch.pos[i]       = 4 + step;
                batch.n_seq_id[i]  = 1;
                batch.seq_id[i][0] = i;
                batch.logits[i]    = 1;
            }
            CHECK_EQ(llama_decode(f.ctx, batch), 0);
            llama_synchronize(f.ctx);
        }
        const long of_decode = n_allocations - before_raw;
        llama_batch_free(batch);
        if (round == 1) {
            printf("allocations of %d steps: %ld, of llama_decode alone %ld\n", N, of_run,
                   of_decode);
            CHECK_EQ(of_run, of_decode);
        }
    }
}

} // namespace

int main(int argc, char ** argv) {
    const char * path = model_path(argc, argv);
    {
        fixture f(path, 256, 4, params_of(N_STEPS));
        refused(f);
        prompt_before(f);
        decode_error(f);
        allocations(f, 0);
        allocations(f, 0.8f);
    }
    {
        fixture f(path, 4096, 1, params_of(N_STEPS));
        CHECK_EQ(f.views.n_steps_max, N_STEPS);
        CHECK_EQ(f.views.n_results_max, N_STEPS);
        interrupt(f);
    }
    for (const int32_t n : {0, 65537}) {
        fixture f(path, 64, 1, params_of(1));
        const plb_engine_params params = params_of(n);
        plb_engine * engine = nullptr;
        CHECK_EQ(plb_engine_new(f.ctx, &params, &engine), PLB_E_ARGUMENT);
        CHECK(engine == nullptr);
    }
    return 0;
}
