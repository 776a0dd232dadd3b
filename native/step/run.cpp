// Several steps of pure decoding, without coming back.
#include "step/engine.hpp"

#include "llama-ext.h"

#include <algorithm>

using namespace plb;

namespace {

constexpr auto FULL_WAIT = std::chrono::milliseconds(50); // for a reader, before a run gives up

int32_t check_run(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_before,
                  int32_t n_steps) {
    const plb_views & views = engine.views;
    const int32_t n_rows_max = views.n_rows_max;
    if (n_slots < 0 || n_before < 0 || n_slots > std::min(views.n_seq_max, n_rows_max) ||
        n_before > n_rows_max - n_slots || n_slots + n_before < 1) {
        return fail(engine, PLB_E_N_ROWS);
    }
    if (n_steps < 1 || (!engine.stream && n_steps > views.n_steps_max) ||
        (n_before > 0 && n_steps > 1)) {
        return fail(engine, PLB_E_N_STEPS);
    }
    std::fill(engine.named.begin(), engine.named.end(), (uint8_t) 0);
    for (int32_t i = 0; i < n_slots; ++i) {
        const llama_seq_id seq = slots[i];
        if (seq < 0 || seq >= views.n_seq_max) {
            return fail(engine, PLB_E_SEQ, n_before + i);
        }
        const plb_slot * slot = engine.slots[seq].get();
        if (slot == nullptr) {
            return fail(engine, PLB_E_NO_SLOT, n_before + i);
        }
        if (!slot->active()) {
            return fail(engine, PLB_E_SLOT_FINISHED, n_before + i);
        }
        if (slot->next_token < 0) {
            return fail(engine, PLB_E_NO_TOKEN, n_before + i);
        }
        if (engine.named[seq]) {
            return fail(engine, PLB_E_SEQ_TWICE, n_before + i);
        }
        engine.named[seq] = 1;
    }
    int32_t bad = 0;
    if (engine.drafts && engine.drafts->begin(slots, n_slots, views.n_vocab, bad) != PLB_OK) {
        return fail(engine, PLB_E_DRAFT, n_before + bad);
    }
    return PLB_OK;
}

// A row of each slot: returns the largest position.
llama_pos write_next(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_before) {
    llama_pos last = 0;
    for (int32_t i = n_before; i < n_before + n_slots; ++i) {
        const llama_seq_id seq = slots[i - n_before];
        const plb_slot & slot = *engine.slots[seq];
        engine.seq[i]   = seq;
        engine.flags[i] = PLB_ROW_SAMPLE;
        engine.token[i] = slot.next_token;
        engine.pos[i]   = slot.next_pos;
        last = std::max(last, slot.next_pos);
    }
    return last;
}

// Rows that will be sampled; a step with more than the context has outputs for is refused anyway.
int32_t count_sampled(const plb_engine & engine, int32_t n_slots, int32_t n_before) {
    int32_t n = n_slots;
    for (int32_t i = 0; i < n_before; ++i) {
        n += (engine.flags[i] & PLB_ROW_SAMPLE) != 0;
    }
    return std::min(n, engine.n_outputs_max);
}

int32_t collect_finished(plb_engine & engine) {
    const plb_result * first = &engine.results[engine.info.first_result];
    const auto wanted = [&](const plb_result & r) {
        return r.finish != PLB_FINISH_NONE || engine.slots[r.seq]->report;
    };
    const auto end =
        std::copy_if(first, first + engine.info.n_results, engine.finished.begin(), wanted);
    return (int32_t) (end - engine.finished.begin());
}

// Rows of the next step, and how many of them are sampled at most.
struct rows_of_step {
    int32_t n;
    int32_t n_sampled;
    bool    drafted;
};

// False: there are no more positions.
bool write_step(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_before,
                int32_t n_pad, rows_of_step & rows) {
    const int32_t n = engine.drafts && n_before == 0
                          ? engine.drafts->write(engine, slots, n_slots, n_pad) : 0;
    if (n > 0) {
        rows = {n, n, true};
        return true;
    }
    rows = {n_before + n_slots, count_sampled(engine, n_slots, n_before), false};
    return write_next(engine, slots, n_slots, n_before) < engine.views.n_pos_max;
}

// Whether the rows before those of the slots, which check_run has named, may be a batch of their own.
bool apart(const plb_engine & engine, int32_t n_before) {
    const bool all = engine.all_outputs || (engine.drafts && engine.drafts->reads_hidden());
    if (all || !plb_computes_behind(engine.ctx)) {
        return false;
    }
    for (int32_t i = 0; i < n_before; ++i) {
        const llama_seq_id seq = engine.seq[i];
        if (engine.flags[i] != 0 || seq < 0 || seq >= engine.views.n_seq_max || engine.named[seq]) {
            return false;
        }
    }
    return true;
}

int32_t run_steps(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_before,
                  int32_t n_pad, int32_t n_steps, plb_run_info & run) {
    rows_of_step rows = {};
    const int32_t n_behind = n_slots > 0 && apart(engine, n_before) ? n_before : 0;
    const auto take_interrupt = [&] {
        return engine.interrupted.exchange(false, std::memory_order_acquire);
    };
    while (run.n_steps < n_steps) {
        engine.ring.publish();
        int64_t began = plb_now_ns();
        if (!write_step(engine, slots, n_slots, n_before, n_pad, rows) && run.n_steps > 0) {
            break;
        }
        if (!engine.ring.has_room(rows.n_sampled)) {
            began = INT64_MAX; // a wait is not the step's
            if (!engine.ring.wait_for_room(rows.n_sampled, [&] { return engine.interrupted.load(); },
                                           FULL_WAIT)) {
                take_interrupt();
                run.stop = PLB_STOP_FULL;
                break;
            }
        }
        const int32_t code =
            one_step(engine, rows.n, engine.ring.reserve(rows.n_sampled), n_pad, rows.drafted, n_behind);
        if (code != PLB_OK) {
            run.stop = PLB_STOP_CODE;
            return code;
        }
        if (++run.n_steps == 1) {
            run.first_ns = run.ns + plb_now_ns();
        }
        run.n_results  += engine.info.n_results;
        run.n_rows     += rows.n;
        run.n_drafted  += engine.info.n_drafted;
        run.n_accepted += engine.info.n_accepted;
        if (engine.drafts) {
            const int64_t ns = n_before > 0 || began == INT64_MAX ? 0 : plb_now_ns() - began;
            engine.drafts->computed(engine, slots, n_slots, rows.drafted, ns);
        }
        const bool interrupted = take_interrupt();
        run.n_finished = collect_finished(engine);
        if (engine.drafts && !engine.drafts->took_back()) { // the step was; the next one can't be
            set_text(engine.error, "%s", "libllama does not take back rows of rejected drafts");
            run.stop = PLB_STOP_CODE;
            return PLB_E_DECODE;
        }
        if (run.n_finished > 0) {
            run.stop = PLB_STOP_FINISH;
            break;
        }
        if (interrupted) {
            run.stop = PLB_STOP_INTERRUPT;
            break;
        }
    }
    return PLB_OK;
}

} // namespace

// It costs nothing where sequences have streams: libllama makes an ubatch there for each number of rows
// of a sequence anyway. And the graph of these rows is built while the device computes the slots'.
int32_t plb_computes_behind([[maybe_unused]] const llama_context * ctx) {
#ifdef LLAMA_KEEP_OUTPUTS // vendor/patches/synchronize-outputs.patch
    return llama_n_ctx_seq(ctx) != llama_n_ctx(ctx);
#else
    return 0;
#endif
}

int32_t plb_run(plb_engine * engine, int32_t n_before, const llama_seq_id * slots, int32_t n_slots,
                int32_t n_pad, int32_t n_steps, plb_run_info * out) {
    if (engine == nullptr || out == nullptr || (n_slots > 0 && slots == nullptr) || n_pad < 0 ||
        n_pad > engine->views.n_seq_max) {
        return PLB_E_ARGUMENT;
    }
    *out = {};
    engine->error[0] = 0;
    engine->info = {};
    engine->info.bad_row = -1;
    if (!engine->stream) {
        engine->ring.start_over();
    }
    out->code = check_run(*engine, slots, n_slots, n_before, n_steps);
    if (out->code != PLB_OK) {
        out->stop = PLB_STOP_CODE;
        engine->info.code = out->code;
    } else {
        engine->info.n_reused = llama_perf_context(engine->ctx).n_reused;
        out->n_reused = -engine->info.n_reused;
        engine->ring.plan(false);
        out->ns   = -plb_now_ns();
        out->code = run_steps(*engine, slots, n_slots, n_before, n_pad, n_steps, *out);
        out->ns  += plb_now_ns();
        if (engine->drafts) {
            engine->drafts->end(*engine, slots, n_slots, *out);
        }
        out->n_reused += engine->info.n_reused;
    }
    out->n_recorded = engine->ring.n_done();
    engine->ring.plan(true);
    return out->code;
}

void plb_interrupt(plb_engine * engine) {
    if (engine != nullptr) {
        engine->interrupted.store(true);
        engine->ring.wake_writer();
    }
}
