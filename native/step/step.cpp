// One step, from rows to results.
#include "step/engine.hpp"

#include "guard/guard.hpp"
#include "llama-ext.h"

#include <algorithm>

using namespace plb;

int32_t plb::fail(plb_engine & engine, int32_t code, int32_t row) noexcept {
    engine.info.bad_row = row;
    if (row < 0) {
        set_text(engine.error, "%s", plb_code_text(code));
    } else {
        set_text(engine.error, "row %d: %s", row, plb_code_text(code));
    }
    return code;
}

void plb::advance(plb_engine & engine, const plb_result & result) noexcept {
    if (result.token >= 0) {
        plb_slot & slot = *engine.slots[result.seq];
        slot.next_token = result.token;
        slot.next_pos   = engine.pos[result.row] + 1;
    }
}

bool plb::gives_logits(const plb_engine & engine) {
    return engine.info.on_device || llama_get_logits(engine.ctx) != nullptr;
}

void plb::find_logits(const plb_engine & engine, row_job & job, int32_t row, bool has_logits) {
    const int32_t at = engine.gaps ? engine.gaps->row(row) : row;
    if (engine.info.on_device) {
        job.logits = engine.short_rows[(size_t) at].logit;
        job.ids    = engine.short_rows[(size_t) at].id;
    } else if (has_logits) {
        job.logits = llama_get_logits_ith(engine.ctx, at);
    }
}

namespace {

constexpr int32_t ROW_FLAGS = PLB_ROW_OUTPUT | PLB_ROW_SAMPLE;

// Everything that libllama would assert on, and what only we know: 0, or the code and the row.
int32_t check_rows(plb_engine & engine, int32_t n_rows, int32_t & n_outputs) {
    const plb_views & views = engine.views;
    n_outputs = 0;
    for (int32_t i = 0; i < n_rows; ++i) {
        if (views.token[i] < 0 || views.token[i] >= views.n_vocab) {
            return fail(engine, PLB_E_TOKEN, i);
        }
        if (views.seq[i] < 0 || views.seq[i] >= views.n_seq_max) {
            return fail(engine, PLB_E_SEQ, i);
        }
        if (views.pos[i] < 0 || views.pos[i] >= views.n_pos_max) {
            return fail(engine, PLB_E_POS, i);
        }
        if (views.flags[i] & ~ROW_FLAGS) {
            return fail(engine, PLB_E_FLAGS, i);
        }
        if (views.flags[i] & PLB_ROW_SAMPLE) {
            const plb_slot * slot = engine.slots[views.seq[i]].get();
            if (slot == nullptr) {
                return fail(engine, PLB_E_NO_SLOT, i);
            }
            if (!slot->active()) {
                return fail(engine, PLB_E_SLOT_FINISHED, i);
            }
        }
        n_outputs += engine.all_outputs || views.flags[i] != 0;
    }
    if (n_outputs > engine.n_outputs_max) {
        return fail(engine, PLB_E_N_OUTPUTS);
    }
    const bool at_once = !llama_get_causal_attn(engine.ctx) || llama_pooling_type(engine.ctx) > 0;
    if (at_once && n_rows > engine.n_ubatch) {
        return fail(engine, PLB_E_UBATCH);
    }
    return PLB_OK;
}

llama_batch build_batch(plb_engine & engine, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) {
        engine.output[i] = engine.all_outputs || engine.flags[i] != 0;
    }
    const size_t width = engine.hidden.size() / (size_t) engine.views.n_rows_max;
    return {end - begin,
            engine.token.data() + begin,
            width == 0 ? nullptr : engine.hidden.data() + (size_t) begin * width,
            engine.pos.data() + begin,
            engine.n_seq_id.data() + begin,
            engine.seq_id.data() + begin,
            engine.output.data() + begin};
}

// llama_decode, or the fault that a test has asked for.
int32_t decode(plb_engine & engine, llama_batch batch) {
    fault & fault = engine.fault;
    if (fault.countdown == 0 || --fault.countdown > 0) {
        return llama_decode(engine.ctx, batch);
    }
    fault.countdown = --fault.n_times > 0;
    if (fault.code == PLB_E_DECODE) {
        fault.lost = true;
        return llama_decode(engine.ctx, batch);
    }
    batch.n_tokens = fault.n_rows < 0 ? batch.n_tokens : std::min(batch.n_tokens, fault.n_rows);
    if (batch.n_tokens > 0) {
        const int32_t code = llama_decode(engine.ctx, batch);
        if (code != 0) {
            return code;
        }
        llama_synchronize(engine.ctx);
    }
    return fault.code;
}

// Waits for the device. Metal computes later, and that it has failed (most often for want of memory) it
// says in the log alone: the logits that lie there are an earlier step's.
void wait_for_outputs(plb_engine & engine) {
    plb_log_mark();
    if (std::exchange(engine.fault.lost, false)) {
        log_fragment(GGML_LOG_LEVEL_ERROR, "error: command buffer 0 failed with status 5\n");
    }
    llama_synchronize(engine.ctx);
    char text[TEXT_BYTES];
    const int32_t n = plb_log_errors(text, TEXT_BYTES);
    if (n > 0) {
        throw failure{PLB_E_DECODE, std::string(text, (size_t) n)};
    }
}

// Whether no slot has more than one of the rows that are sampled.
bool each_slot_once(plb_engine & engine, int32_t n_rows) {
    std::fill(engine.named.begin(), engine.named.end(), (uint8_t) 0);
    for (int32_t i = 0; i < n_rows; ++i) {
        if (engine.flags[i] & PLB_ROW_SAMPLE) {
            uint8_t & named = engine.named[engine.seq[i]];
            if (named) {
                return false;
            }
            named = 1;
        }
    }
    return true;
}

// Whether the caller looks for outputs where its rows are.
bool is_read(const plb_engine & engine, int32_t n_rows) {
    return engine.all_outputs || std::any_of(engine.flags.begin(), engine.flags.begin() + n_rows, [](uint8_t flags) {
               return flags & PLB_ROW_OUTPUT;
           });
}

// Whether the device may choose for all rows of this step that give an output. Those of a step with drafts
// are all sampled.
bool short_enough(plb_engine & engine, int32_t n_rows, bool drafted) {
    if (engine.all_outputs) {
        return false;
    }
    for (int32_t i = 0; i < n_rows; ++i) {
        const bool sampled = engine.flags[i] & PLB_ROW_SAMPLE;
        if ((!drafted && engine.flags[i] & PLB_ROW_OUTPUT) ||
            (sampled && !engine.slots[engine.seq[i]]->short_enough)) {
            return false;
        }
    }
    return drafted ? engine.drafts->n_longest() <= engine.n_outputs_per_seq : each_slot_once(engine, n_rows);
}

// Before a decode: where this step's candidates are chosen.
void choose_place(plb_engine & engine, int32_t n_rows, bool drafted) {
    plb_step_info & info = engine.info;
    if (engine.on_device == nullptr || info.n_outputs == 0) {
        return;
    }
    shortlist & device = *engine.on_device;
    info.on_device = engine.place.on_device(info.n_outputs, short_enough(engine, n_rows, drafted));
    if (info.on_device && !device.attach()) {
        info.on_device = 0;
        engine.place.refuse();
    } else if (!info.on_device) {
        device.detach();
    }
}

// Rows begin to n_rows - 1, which were a batch.
int32_t sample_rows(plb_engine & engine, int32_t begin, int32_t n_rows, int32_t first) {
    const bool has_logits = gives_logits(engine);
    const bool at_once = engine.info.on_device || each_slot_once(engine, n_rows); // short_enough
    int32_t n = 0;
    for (int32_t i = begin; i < n_rows; ++i) {
        if (!(engine.flags[i] & PLB_ROW_SAMPLE)) {
            continue;
        }
        plb_slot & slot = *engine.slots[engine.seq[i]];
        if (!slot.active()) {
            continue; // finished on an earlier row of this step
        }
        plb_result & result = engine.results[first + n];
        result.seq = engine.seq[i];
        result.row = i;
        const size_t top = (size_t) (first + n) * engine.views.n_logprobs_max;
        row_job & job = engine.jobs[n];
        job = {&slot, nullptr, nullptr, &result, &engine.top_token[top], &engine.top_logprob[top]};
        find_logits(engine, job, i - begin, has_logits);
        if (!at_once) { // a row may go on from one before it
            sample_row(engine.words, engine.sampler->own(), job);
            advance(engine, result);
        }
        ++n;
    }
    if (at_once) {
        engine.sampler->sample(engine.jobs.data(), n);
        for (int32_t i = 0; i < n; ++i) {
            advance(engine, engine.results[first + i]);
        }
    }
    return n;
}

// What waits for outputs waits for those of the batch before, which a batch without any leaves alone.
void keep_outputs([[maybe_unused]] plb_engine & engine, [[maybe_unused]] bool keep) {
#ifdef LLAMA_KEEP_OUTPUTS // vendor/patches/synchronize-outputs.patch
    llama_keep_outputs(engine.ctx, keep);
#endif
}

int32_t check_decode_sample(plb_engine & engine, int32_t n_rows, int32_t n_pad, bool drafted,
                            int32_t n_behind) {
    plb_step_info & info = engine.info;
    info.n_rows = n_rows;
    if (n_rows < 1 || n_rows > engine.views.n_rows_max) {
        return fail(engine, PLB_E_N_ROWS);
    }
    const int32_t refused = check_rows(engine, n_rows, info.n_outputs);
    if (refused != PLB_OK) {
        return refused;
    }
    llama_batch batch = build_batch(engine, n_behind, n_rows);
    if (engine.gaps) {
        const int32_t n_each = drafted ? engine.drafts->n_each() : !is_read(engine, n_rows);
        batch = engine.gaps->fill(batch, n_pad, n_each);
        info.n_filled = engine.gaps->n_filled();
    }
    const int64_t t_built = plb_now_ns();
    info.build_ns = t_built - info.t_start_ns;

    int32_t code = PLB_OK;
    int32_t threw = guarded(engine.error, [&] {
        choose_place(engine, n_rows, drafted);
        code = decode(engine, batch);
    });
    const bool cleared = !engine.gaps || engine.gaps->clear();
    if (n_behind > 0 && !threw && !code && cleared) {
        threw = guarded(engine.error, [&] {
            keep_outputs(engine, true);
            code = decode(engine, build_batch(engine, 0, n_behind));
            if (engine.sync) {
                keep_outputs(engine, false);
            }
        });
    }
    const int64_t t_decoded = plb_now_ns();
    info.decode_ns = t_decoded - t_built;
    if (threw || code) {
        code = threw ? (int32_t) PLB_E_DECODE : code;
        if (!threw) {
            set_text(engine.error, "%s", plb_code_text(code));
        }
        return code;
    }
    if (!cleared) {
        set_text(engine.error, "%s", "libllama does not remove the rows that filled gaps");
        return PLB_E_DECODE;
    }
    if (info.n_outputs > 0 || engine.sync) {
        const int32_t lost = guarded(engine.error, [&] { wait_for_outputs(engine); });
        if (lost) {
            return PLB_E_DECODE;
        }
    }
    const int64_t t_synced = plb_now_ns();
    info.sync_ns   = t_synced - t_decoded;
    if (info.on_device && !engine.on_device->read(batch, engine.short_rows)) {
        set_text(engine.error, "%s", "device sampling: the candidates' rows can't be told");
        return PLB_E_DECODE;
    }
    if (drafted) {
        info.n_results = engine.drafts->sample(engine, info.first_result);
    } else if (info.n_outputs > 0) {
        info.n_results = sample_rows(engine, n_behind, n_rows, info.first_result);
    }
    if (engine.drafts) {
        engine.drafts->watch(n_rows, drafted);
    }
    const int64_t t_sampled = plb_now_ns();
    info.sample_ns = t_sampled - t_synced;
    if (info.n_results == n_rows) {
        engine.place.took(n_rows, info.on_device != 0, t_sampled - t_built);
    }
    return PLB_OK;
}

} // namespace

int32_t plb::one_step(plb_engine & engine, int32_t n_rows, int32_t first_record, int32_t n_pad,
                      bool drafted, int32_t n_behind) {
    engine.error[0] = 0;
    plb_step_info & info = engine.info;
    info = {};
    info.t_start_ns   = plb_now_ns();
    info.first_result = first_record;
    info.bad_row      = -1;
    info.code         = check_decode_sample(engine, n_rows, n_pad, drafted, n_behind);
    if (n_behind > 0) {
        keep_outputs(engine, false);
    }
    info.n_reused     = llama_perf_context(engine.ctx).n_reused;
    engine.steps[engine.ring.next_step()] = info;
    engine.ring.record(info.n_results);
    return info.code;
}

int32_t plb_step(plb_engine * engine, int32_t n_rows) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    if (engine->stream) {
        return fail(*engine, PLB_E_STREAM);
    }
    engine->ring.start_over();
    return one_step(*engine, n_rows, 0);
}
