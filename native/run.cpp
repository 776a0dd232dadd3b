// Several steps of pure decoding, without coming back.
#include "engine.hpp"

#include <algorithm>

using namespace plb;

namespace {

int32_t check_run(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots,
                  int32_t n_steps) {
    const plb_views & views = engine.views;
    if (n_slots < 1 || n_slots > std::min(views.n_seq_max, views.n_rows_max)) {
        return fail(engine, PLB_E_N_ROWS);
    }
    if (n_steps < 1 || n_steps > views.n_steps_max) {
        return fail(engine, PLB_E_N_STEPS);
    }
    std::fill(engine.named.begin(), engine.named.end(), (uint8_t) 0);
    for (int32_t i = 0; i < n_slots; ++i) {
        const llama_seq_id seq = slots[i];
        if (seq < 0 || seq >= views.n_seq_max) {
            return fail(engine, PLB_E_SEQ, i);
        }
        const plb_slot * slot = engine.slots[seq].get();
        if (slot == nullptr) {
            return fail(engine, PLB_E_NO_SLOT, i);
        }
        if (!slot->active()) {
            return fail(engine, PLB_E_SLOT_FINISHED, i);
        }
        if (slot->next_token < 0) {
            return fail(engine, PLB_E_NO_TOKEN, i);
        }
        if (engine.named[seq]) {
            return fail(engine, PLB_E_SEQ_TWICE, i);
        }
        engine.named[seq] = 1;
    }
    return PLB_OK;
}

// What is the same in every step.
void write_rows(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots) {
    for (int32_t i = 0; i < n_slots; ++i) {
        engine.seq[i]   = slots[i];
        engine.flags[i] = PLB_ROW_SAMPLE;
    }
}

// What is not: returns the largest position.
llama_pos write_next(plb_engine & engine, int32_t n_slots) {
    llama_pos last = 0;
    for (int32_t i = 0; i < n_slots; ++i) {
        const plb_slot & slot = *engine.slots[engine.seq[i]];
        engine.token[i] = slot.next_token;
        engine.pos[i]   = slot.next_pos;
        last = std::max(last, slot.next_pos);
    }
    return last;
}

bool any_finished(const plb_engine & engine) {
    const plb_result * first = &engine.results[engine.info.first_result];
    return std::any_of(first, first + engine.info.n_results,
                       [](const plb_result & r) { return r.finish != PLB_FINISH_NONE; });
}

int32_t run_steps(plb_engine & engine, int32_t n_slots, int32_t n_steps, plb_run_info & run) {
    while (run.n_steps < n_steps) {
        const llama_pos last = write_next(engine, n_slots);
        if (run.n_steps > 0 && last >= engine.views.n_pos_max) {
            break;
        }
        const int32_t code = one_step(engine, n_slots, run.n_steps, run.n_results);
        if (code != PLB_OK) {
            run.stop = PLB_STOP_CODE;
            return code;
        }
        ++run.n_steps;
        run.n_results += engine.info.n_results;
        const bool rung = engine.bell.exchange(false, std::memory_order_acquire);
        if (any_finished(engine)) {
            run.stop = PLB_STOP_FINISH;
            break;
        }
        if (rung) {
            run.stop = PLB_STOP_BELL;
            break;
        }
    }
    return PLB_OK;
}

} // namespace

int32_t plb_run(plb_engine * engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_steps,
                plb_run_info * out) {
    if (engine == nullptr || slots == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    *out = {};
    engine->error[0] = 0;
    engine->info = {};
    engine->info.bad_row = -1;
    out->code = check_run(*engine, slots, n_slots, n_steps);
    if (out->code != PLB_OK) {
        out->stop = PLB_STOP_CODE;
        engine->info.code = out->code;
        return out->code;
    }
    write_rows(*engine, slots, n_slots);
    out->code = run_steps(*engine, n_slots, n_steps, *out);
    return out->code;
}

void plb_doorbell_ring(plb_engine * engine) {
    if (engine != nullptr) {
        engine->bell.store(true, std::memory_order_release);
    }
}
