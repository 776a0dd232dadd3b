// The slots of an engine: set, copied, taken out, put back.
#include "step/engine.hpp"

#include <algorithm>

using namespace plb;

namespace {

[[noreturn]] void refuse(int32_t code) {
    throw failure{code, plb_code_text(code)};
}

std::unique_ptr<plb_slot> & place_of(plb_engine & engine, int32_t seq) {
    if (seq < 0 || seq >= engine.views.n_seq_max) {
        refuse(PLB_E_SEQ);
    }
    return engine.slots[seq];
}

plb_slot & slot_of(plb_engine & engine, int32_t seq) {
    const std::unique_ptr<plb_slot> & place = place_of(engine, seq);
    if (!place) {
        refuse(PLB_E_NO_SLOT);
    }
    return *place;
}

// With what the engine drafts from, where it does.
std::unique_ptr<plb_slot> new_slot(const plb_engine & engine, const plb_sampling & sampling,
                                   const llama_token * prompt, int32_t n_prompt) {
    auto slot = make_slot(engine.words, sampling, engine.views.n_logprobs_max, prompt, n_prompt);
    if (engine.drafts && engine.drafts->ngram() && sampling.max_tokens < INT32_MAX) {
        slot->history = ngram(prompt, n_prompt, std::min({sampling.max_tokens, engine.words.n_ctx.load(), NGRAM_ROOM}));
    }
    return slot;
}

// What was there ends.
void place(plb_engine & engine, int32_t seq, std::unique_ptr<plb_slot> slot) {
    std::unique_ptr<plb_slot> & place = place_of(engine, seq);
    if (engine.drafts && place) {
        engine.drafts->leave(*place);
    }
    place = std::move(slot);
    if (place) { // one that comes from another engine has that one's corpus
        place->history.share(engine.drafts ? engine.drafts->texts() : nullptr);
    }
}

} // namespace

plb_sampling plb_sampling_default(void) {
    plb_sampling p = {};
    p.max_tokens     = 128;
    p.temperature    = 0.8f;
    p.top_k          = 40;
    p.top_p          = 0.95f;
    p.min_p          = 0.05f;
    p.typical_p      = 1;
    p.repeat_penalty = 1;
    p.penalty_last_n = 64;
    p.seed           = LLAMA_DEFAULT_SEED;
    p.n_logprobs     = -1;
    p.path           = PLB_PATH_AUTO;
    return p;
}

int32_t plb_slot_set(plb_engine * engine, int32_t seq, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt) {
    if (engine == nullptr || sampling == nullptr || n_prompt < 0 || (n_prompt > 0 && !prompt)) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        place_of(*engine, seq);
        place(*engine, seq, new_slot(*engine, *sampling, prompt, n_prompt));
    });
}

int32_t plb_slot_new(const plb_engine * engine, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt, plb_slot ** out,
                     char * error, int32_t n_error) {
    if (engine == nullptr || sampling == nullptr || out == nullptr || n_prompt < 0 ||
        (n_prompt > 0 && prompt == nullptr)) {
        return PLB_E_ARGUMENT;
    }
    *out = nullptr;
    char text[TEXT_BYTES] = "";
    const int32_t code = guarded(text, [&] {
        *out = new_slot(*engine, *sampling, prompt, n_prompt).release();
    });
    if (error != nullptr && n_error > 0) {
        snprintf(error, (size_t) n_error, "%s", text);
    }
    return code;
}

int32_t plb_slot_clear(plb_engine * engine, int32_t seq) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] { place(*engine, seq, nullptr); });
}

int32_t plb_slot_copy(plb_engine * engine, int32_t src, int32_t dst) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        place_of(*engine, dst);
        const plb_slot & slot = slot_of(*engine, src);
        if (src != dst) {
            place(*engine, dst, copy_slot(slot));
        }
    });
}

int32_t plb_slot_reseed(plb_engine * engine, int32_t seq, uint32_t seed) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] { reseed(slot_of(*engine, seq), seed); });
}

int32_t plb_slot_take(plb_engine * engine, int32_t seq, plb_slot ** out) {
    if (engine == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    *out = nullptr;
    return guarded(engine->error, [&] {
        slot_of(*engine, seq);
        *out = place_of(*engine, seq).release();
    });
}

int32_t plb_slot_put(plb_engine * engine, int32_t seq, plb_slot * slot) {
    if (engine == nullptr || slot == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        place_of(*engine, seq);
        if (slot->params.n_logprobs > engine->views.n_logprobs_max ||
            slot->vocab != engine->words.vocab) {
            refuse(PLB_E_SAMPLING); // made by an engine of another model or width
        }
        place(*engine, seq, std::unique_ptr<plb_slot>(slot));
    });
}

void plb_slot_free(plb_slot * slot) {
    delete slot;
}

int32_t plb_slot_next(plb_engine * engine, int32_t seq, llama_token token, llama_pos pos,
                      int32_t report) {
    if (engine == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        plb_slot & slot = slot_of(*engine, seq);
        if (token < 0 || token >= engine->views.n_vocab) {
            refuse(PLB_E_TOKEN);
        }
        if (pos < 0 || pos >= engine->views.n_pos_max) {
            refuse(PLB_E_POS);
        }
        slot.next_token = token;
        slot.next_pos   = pos;
        slot.report     = report != 0;
    });
}

int32_t plb_slot_replay(plb_slot * slot, const llama_token * tokens, int32_t n_tokens,
                        int32_t n_draws, int32_t next_pos) {
    if (slot == nullptr || tokens == nullptr || n_tokens < 1 || n_draws < 0 || next_pos < 0 ||
        slot->next_token >= 0 || n_tokens >= slot->params.max_tokens ||
        (n_draws > 0 && slot->params.temperature == 0)) {
        return PLB_E_ARGUMENT;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(slot->vocab);
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab) {
            return PLB_E_TOKEN;
        }
    }
    const int32_t code = guarded(slot->error_text, [&] { replay(*slot, tokens, n_tokens, n_draws); });
    slot->next_pos = next_pos;
    return code;
}

int32_t plb_slot_tokens(const plb_slot * slot, const llama_token ** out) {
    if (slot == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    *out = slot->generated.data();
    return (int32_t) slot->generated.size();
}

int32_t plb_slot_get_info(plb_engine * engine, int32_t seq, plb_slot_info * out) {
    if (engine == nullptr || out == nullptr) {
        return PLB_E_ARGUMENT;
    }
    return guarded(engine->error, [&] {
        const plb_slot & slot = slot_of(*engine, seq);
        *out = {
            slot.active(), slot.finish, slot.error, slot.path, slot.n_generated,
            slot.params.max_tokens - slot.n_generated, slot.next_token, slot.next_pos,
            slot.seed, slot.params.n_logprobs, slot.n_draws,
        };
    });
}

const char * plb_slot_error(plb_engine * engine, int32_t seq) {
    const bool found = engine != nullptr && seq >= 0 && seq < engine->views.n_seq_max &&
                       engine->slots[seq];
    return found ? engine->slots[seq]->error_text : "";
}
