// The step's contract: what is refused before libllama sees it, what a failure leaves untouched. Slots,
// finishes and results are tests/step/test_stepper.py's.
#include "check.hpp"
#include "tests/plb_testing.h"

#include <cmath>
#include <cstring>

namespace {

void refuses(fixture & f, int32_t n_rows, int32_t code, int32_t bad_row) {
    CHECK_EQ(plb_step(f.engine, n_rows), code);
    CHECK_EQ(f.views.info->code, code);
    CHECK_EQ(f.views.info->bad_row, bad_row);
    CHECK_EQ(f.views.info->n_results, 0);
    CHECK(plb_last_error(f.engine)[0] != 0);
    CHECK(strcmp(plb_code_text(code), "unknown code") != 0);
}

void arguments(fixture & f) {
    plb_engine * engine = nullptr;
    plb_engine_params params = plb_engine_default_params();
    CHECK_EQ(plb_engine_new(nullptr, &params, &engine), PLB_E_ARGUMENT);
    CHECK_EQ(plb_engine_new(f.ctx, nullptr, &engine), PLB_E_ARGUMENT);
    CHECK_EQ(plb_engine_new(f.ctx, &params, nullptr), PLB_E_ARGUMENT);
    params.n_outputs_max = 1; // below n_seq_max: libllama's own assertion
    CHECK_EQ(plb_engine_new(f.ctx, &params, &engine), PLB_E_ARGUMENT);
    params = plb_engine_default_params();
    params.n_logprobs_max = -1;
    CHECK_EQ(plb_engine_new(f.ctx, &params, &engine), PLB_E_ARGUMENT);
    CHECK(engine == nullptr);
    plb_engine_free(nullptr);
    plb_slot_free(nullptr);
    CHECK_EQ(plb_step(nullptr, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_engine_views(f.engine, nullptr), PLB_E_ARGUMENT);
    CHECK(strcmp(plb_last_error(nullptr), "") == 0);
    CHECK(strcmp(plb_slot_error(nullptr, 0), "") == 0);

    plb_sampling s = sampling_of(4);
    plb_slot * slot = nullptr;
    plb_slot_info info = {};
    CHECK_EQ(plb_slot_set(f.engine, 0, nullptr, nullptr, 0), PLB_E_ARGUMENT);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, -1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_slot_set(f.engine, -1, &s, nullptr, 0), PLB_E_SEQ);
    CHECK_EQ(plb_slot_set(f.engine, f.views.n_seq_max, &s, nullptr, 0), PLB_E_SEQ);
    CHECK_EQ(plb_slot_clear(f.engine, 99), PLB_E_SEQ);
    CHECK_EQ(plb_slot_copy(f.engine, 0, 1), PLB_E_NO_SLOT);
    CHECK_EQ(plb_slot_copy(f.engine, 0, 99), PLB_E_SEQ);
    CHECK_EQ(plb_slot_reseed(f.engine, 0, 1), PLB_E_NO_SLOT);
    CHECK_EQ(plb_slot_take(f.engine, 0, &slot), PLB_E_NO_SLOT);
    CHECK(slot == nullptr);
    CHECK_EQ(plb_slot_put(f.engine, 0, nullptr), PLB_E_ARGUMENT);
    CHECK_EQ(plb_slot_get_info(f.engine, 0, &info), PLB_E_NO_SLOT);
    const llama_token outside = f.n_vocab;
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, &outside, 1), PLB_E_SAMPLING);
    const auto bad = [&](auto change) {
        plb_sampling p = plb_sampling_default();
        change(p);
        CHECK_EQ(plb_slot_set(f.engine, 0, &p, nullptr, 0), PLB_E_SAMPLING);
        CHECK(plb_last_error(f.engine)[0] != 0);
    };
    bad([](plb_sampling & p) { p.max_tokens = 0; });
    bad([](plb_sampling & p) { p.min_tokens = -1; });
    bad([](plb_sampling & p) { p.min_tokens = p.max_tokens + 1; });
    bad([](plb_sampling & p) { p.temperature = -1; });
    bad([](plb_sampling & p) { p.temperature = NAN; });
    bad([](plb_sampling & p) { p.temperature = INFINITY; });
    bad([](plb_sampling & p) { p.temperature = 1e-30f; });
    bad([](plb_sampling & p) { p.top_p = 1.5f; });
    bad([](plb_sampling & p) { p.min_p = NAN; });
    bad([](plb_sampling & p) { p.typical_p = -0.5f; });
    bad([](plb_sampling & p) { p.repeat_penalty = 0; });
    bad([](plb_sampling & p) { p.frequency_penalty = INFINITY; });
    bad([](plb_sampling & p) { p.presence_penalty = NAN; });
    bad([](plb_sampling & p) { p.penalty_last_n = -2; });
    bad([](plb_sampling & p) { p.n_logprobs = 21; });
    bad([](plb_sampling & p) { p.n_logit_bias = 1; });
    bad([](plb_sampling & p) { p.n_stop_tokens = -1; });
    bad([&](plb_sampling & p) { p.n_stop_tokens = 1; p.stop_tokens = &outside; });
    const llama_logit_bias biases[] = {{-1, 0}, {0, NAN}, {0, INFINITY}};
    for (const auto & bias : biases) {
        bad([&](plb_sampling & p) { p.n_logit_bias = 1; p.logit_bias = &bias; });
    }
}

void rows(fixture & f) {
    plb_sampling s = sampling_of(4);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, 0), PLB_OK);
    refuses(f, 0, PLB_E_N_ROWS, -1);
    refuses(f, -5, PLB_E_N_ROWS, -1);
    refuses(f, f.views.n_rows_max + 1, PLB_E_N_ROWS, -1);
    f.row(0, 10, 0, 0, 0);
    for (const llama_token token : {-1, f.n_vocab, INT32_MAX, INT32_MIN}) {
        f.row(1, token, 1, 0, PLB_ROW_SAMPLE);
        refuses(f, 2, PLB_E_TOKEN, 1);
    }
    for (const llama_seq_id seq : {-1, f.views.n_seq_max, INT32_MAX}) {
        f.row(1, 10, 1, seq, PLB_ROW_SAMPLE);
        refuses(f, 2, PLB_E_SEQ, 1);
    }
    f.row(1, 10, -1, 0, PLB_ROW_SAMPLE);
    refuses(f, 2, PLB_E_POS, 1);
    f.row(1, 10, 1, 0, 8);
    refuses(f, 2, PLB_E_FLAGS, 1);
    f.row(1, 10, 1, 1, PLB_ROW_SAMPLE);
    refuses(f, 2, PLB_E_NO_SLOT, 1);

    // libllama's own refusal (a gap in the positions): its code, and the slot as it was
    f.row(0, 10, 0, 0, 0);
    f.row(1, 10, 5, 0, PLB_ROW_SAMPLE);
    CHECK_EQ(plb_step(f.engine, 2), -1);
    CHECK_EQ(f.slot(0).n_generated, 0);
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(f.ctx), 0), -1);
    CHECK_EQ(plb_slot_clear(f.engine, 0), PLB_OK);
    CHECK_EQ(plb_slot_clear(f.engine, 0), PLB_OK);
}

// The decode that was chosen fails as it was told to, and only that.
void faults(fixture & f) {
    llama_memory_t memory = llama_get_memory(f.ctx);
    plb_sampling s = sampling_of(1000);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, 0), PLB_OK);
    CHECK_EQ(plb_fault_set(nullptr, 1, 1, 0, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_fault_set(f.engine, -1, 1, 0, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_fault_set(f.engine, 1, 0, 0, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_fault_set(f.engine, 1, 1, -2, 1), PLB_E_ARGUMENT);
    CHECK_EQ(plb_fault_set(f.engine, 1, 1, 0, 0), PLB_E_ARGUMENT);
    const struct { int32_t code, n_rows; llama_pos pos_max; } all[] = {
        {1, 0, -1}, {2, 2, 1}, {-3, -1, 3}, {-1, 99, 3},
    };
    for (const auto & fault : all) {
        llama_memory_clear(memory, true);
        CHECK_EQ(plb_fault_set(f.engine, 2, fault.code, fault.n_rows, 1), PLB_OK);
        f.row(0, 10, 0, 1, 0);
        CHECK_EQ(plb_step(f.engine, 1), PLB_OK);
        const plb_slot_info before = f.slot(0);
        f.prompt(0, {1, 20, 30, 40}, 0);
        CHECK_EQ(plb_step(f.engine, 4), fault.code);
        CHECK_EQ(f.views.info->n_results, 0);
        CHECK_EQ(f.slot(0).n_generated, before.n_generated);
        CHECK_EQ(llama_memory_seq_pos_max(memory, 0), fault.pos_max);
        CHECK(llama_memory_seq_rm(memory, 0, -1, -1));
        CHECK_EQ(plb_step(f.engine, 4), PLB_OK);
    }
    CHECK_EQ(plb_fault_set(f.engine, 2, -3, 0, 2), PLB_OK);
    for (const int32_t code : {0, -3, -3, 0}) {
        llama_memory_clear(memory, true);
        CHECK_EQ(plb_step(f.engine, 4), code);
    }
    CHECK_EQ(plb_fault_set(f.engine, 1, 1, 0, 1), PLB_OK);
    CHECK_EQ(plb_fault_set(f.engine, 0, 0, 0, 1), PLB_OK);
    llama_memory_clear(memory, true);
    CHECK_EQ(plb_step(f.engine, 4), PLB_OK);
}

// Another context in the first one's place, which is gone: slots go on, the memory is empty.
void another_context(fixture & f) {
    plb_sampling s = sampling_of(1000);
    CHECK_EQ(plb_slot_set(f.engine, 0, &s, nullptr, 0), PLB_OK);
    llama_memory_clear(llama_get_memory(f.ctx), true);
    f.prompt(0, {1, 20, 30, 40}, 0);
    CHECK_EQ(plb_step(f.engine, 4), PLB_OK);
    const plb_slot_info first = f.slot(0);
    f.row(0, first.next_token, first.next_pos, 0, PLB_ROW_SAMPLE);
    CHECK_EQ(plb_step(f.engine, 1), PLB_OK);
    const llama_token second = f.slot(0).next_token;

    llama_context_params p = context_params(256, 4);
    p.n_batch = p.n_ubatch = 32;
    llama_context * other = llama_init_from_model(f.model, p);
    CHECK_EQ(plb_engine_rebind(f.engine, other), PLB_E_ARGUMENT); // of another size
    CHECK_EQ(plb_engine_rebind(f.engine, nullptr), PLB_E_ARGUMENT);
    CHECK_EQ(plb_engine_rebind(nullptr, f.ctx), PLB_E_ARGUMENT);
    llama_free(other);
    p.n_batch = p.n_ubatch = 64;
    llama_free(f.ctx);
    f.ctx = llama_init_from_model(f.model, p);
    CHECK_EQ(plb_engine_rebind(f.engine, f.ctx), PLB_OK);
    CHECK_EQ(llama_memory_seq_pos_max(llama_get_memory(f.ctx), 0), -1);
    f.prompt(0, {1, 20, 30, 40}, 0);
    f.row(3, 40, 3, 0, 0);
    f.row(4, first.next_token, 4, 0, PLB_ROW_SAMPLE);
    CHECK_EQ(plb_step(f.engine, 5), PLB_OK);
    CHECK_EQ(f.slot(0).n_generated, 3);
    CHECK_EQ(f.slot(0).next_token, second);
}

} // namespace

int main(int argc, char ** argv) {
    fixture f(model_path(argc, argv), 256, 4, plb_engine_default_params());
    arguments(f);
    rows(f);
    faults(f);
    another_context(f);
    return 0;
}
