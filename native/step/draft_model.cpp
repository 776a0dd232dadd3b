#include "step/draft_rows.hpp"

#include "llama-ext.h"

#include <algorithm>
#include <cstring>

using namespace plb;

namespace {

using sequence = plb_draft_model::sequence;

// A sequence that is drafted for in each step lacks what the step has sampled, and no more.
constexpr size_t IN_STEP = PLB_DRAFT_LIMIT + 1;

// A slot that samples the most likely token, as often as it is asked.
void renew(plb_slot & slot) {
    slot.n_generated = 0;
    slot.generated.clear();
    slot.finish = PLB_FINISH_NONE;
    slot.error  = 0;
}

void forget(plb_draft_model & self, llama_seq_id seq) {
    llama_memory_seq_rm(llama_get_memory(self.model->ctx), seq, -1, -1);
    sequence & s = self.sequences[(size_t) seq];
    s.held.clear();
    s.n_agreed = 0;
}

// No drafts for it, until it begins again.
void give_up(plb_draft_model & self, llama_seq_id seq) {
    self.sequences[(size_t) seq].followed = false;
    forget(self, seq);
}

// The one with the most tokens, so that the others have room; whether there are others.
bool give_up_longest(plb_draft_model & self) {
    const auto by_length = [&](llama_seq_id a, llama_seq_id b) {
        return self.sequences[(size_t) a].known.size() < self.sequences[(size_t) b].known.size();
    };
    if (!self.drafting.empty()) {
        give_up(self, *std::max_element(self.drafting.begin(), self.drafting.end(), by_length));
    }
    return self.drafting.size() > 1;
}

size_t n_alike(const std::vector<llama_token> & a, const std::vector<llama_token> & b) {
    const size_t n = std::min(a.size(), b.size());
    return (size_t) (std::mismatch(a.begin(), a.begin() + (ptrdiff_t) n, b.begin()).first - a.begin());
}

// Whether the rows behind its first n tokens would see all that they attend to: the cells of a window
// that moves on are given to others.
bool can_go_back(const plb_draft_model & self, llama_seq_id seq, size_t n) {
    const llama_context * ctx = self.model->ctx;
    const int32_t window = llama_model_n_swa(llama_get_model(ctx));
    const auto first = (llama_pos) n - window;
    return window == 0 || llama_memory_seq_pos_min(llama_get_memory(ctx), seq) <= std::max(first, 0);
}

// Of these tokens as many as a sequence's memory begins with, those left out that were drafted from the
// model's own hidden states.
size_t n_held(const plb_draft_model & self, const sequence & s, const std::vector<llama_token> & known) {
    const size_t n = n_alike(s.held, known);
    return self.n_hidden > 0 ? std::min(n, s.n_agreed) : n;
}

// Of all that is held the longest prefix of its tokens, be it another sequence's: one that was moved
// or preempted, one with the same prompt.
void take_over(plb_draft_model & self, llama_seq_id seq) {
    sequence & s = self.sequences[(size_t) seq];
    size_t most = n_held(self, s, s.known);
    llama_seq_id from = seq;
    for (llama_seq_id other = 0; other < (llama_seq_id) self.sequences.size(); ++other) {
        const size_t n = n_held(self, self.sequences[(size_t) other], s.known);
        if (n > most && can_go_back(self, other, n)) {
            most = n;
            from = other;
        }
    }
    if (from != seq) {
        forget(self, seq);
        llama_memory_seq_cp(llama_get_memory(self.model->ctx), from, seq, 0, (llama_pos) most);
        s.held.assign(s.known.begin(), s.known.begin() + (ptrdiff_t) most);
        s.n_agreed = most;
        const sequence & other = self.sequences[(size_t) from];
        s.states = other.states;
        s.states.cut(n_alike(other.known, s.known));
    }
}

// Where a sequence is now: the tokens that its slot has sampled since, and a memory that holds nothing
// but the first of its tokens, the last one not among them.
void follow(plb_draft_model & self, llama_seq_id seq) {
    sequence & s = self.sequences[(size_t) seq];
    const std::vector<llama_token> & generated = self.target->slots[seq]->generated;
    s.known.insert(s.known.end(), generated.begin() + (ptrdiff_t) std::min(s.n_seen, generated.size()),
                   generated.end());
    s.n_seen = generated.size();
    const size_t most = std::min(s.held.size(), s.known.size() - 1);
    size_t n = std::min(s.n_agreed, most);
    // Where it started from its own hidden states, it starts again from the target's.
    while (self.n_hidden == 0 && n < most && s.held[n] == s.known[n]) {
        ++n;
    }
    s.own_pos = 0;
    if (n < s.held.size()) {
        if (!can_go_back(self, seq, n) ||
            !llama_memory_seq_rm(llama_get_memory(self.model->ctx), seq, (llama_pos) n, -1)) {
            forget(self, seq);
            n = 0;
        }
        s.held.resize(n);
    }
    s.n_agreed = n;
}

// Tokens of a slot of the target.
size_t n_known(const plb_slot & slot, const sequence & s) {
    return s.known.size() + slot.generated.size() - s.n_seen;
}

// So many positions the model's memory has behind the tokens that are known; below 1 it can't draft for it.
int32_t n_beyond(const plb_draft_model & self, const plb_slot & slot, const sequence & s) {
    const int32_t n_ctx_seq = (int32_t) std::min<uint32_t>(llama_n_ctx_seq(self.model->ctx), INT32_MAX);
    return std::min(self.model->views.n_pos_max, n_ctx_seq) - (int32_t) n_known(slot, s);
}

// How many tokens to draft for it.
int32_t wanted_of(const plb_draft_model & self, llama_seq_id seq) {
    const plb_slot * slot = self.target->slots[seq].get();
    const sequence & s = self.sequences[(size_t) seq];
    if (slot == nullptr || !slot->active() || slot->next_token < 0 || !s.followed) {
        return 0;
    }
    return std::min({self.given.n_most[seq], slot->params.max_tokens - slot->n_generated - 1,
                     n_beyond(self, *slot, s)});
}

// So many more of the tokens that are known, in rows that nothing is sampled from.
int32_t read(plb_draft_model & self, draft_rows & rows, llama_seq_id seq, size_t n) {
    sequence & s = self.sequences[(size_t) seq];
    int32_t code = PLB_OK;
    for (; n > 0 && code == PLB_OK; --n) {
        s.n_agreed = s.held.size() + 1;
        code = rows.add(seq, s.known[s.held.size()], false);
    }
    return code;
}

// What the model's memory lacks of each sequence. Those that have fallen behind catch up by no more rows
// than fit a batch, all together, so that no step waits long: they have no drafts until they are done.
int32_t catch_up(plb_draft_model & self, draft_rows & rows) {
    const int64_t began = plb_now_ns();
    auto n_left = (size_t) self.model->views.n_rows_max;
    bool behind = false;
    for (const llama_seq_id seq : self.drafting) {
        sequence & s = self.sequences[(size_t) seq];
        renew(*self.model->slots[seq]);
        const size_t lacks = s.known.size() - s.held.size();
        size_t n = lacks;
        if (lacks > IN_STEP) {
            behind = true;
            n = std::min(lacks, n_left);
            n_left -= n;
        }
        if (n < lacks) {
            s.n_wanted = 0;
        }
        const int32_t code = read(self, rows, seq, std::min(n, lacks - 1));
        if (code != PLB_OK) {
            return code;
        }
    }
    for (const llama_seq_id seq : self.drafting) {
        sequence & s = self.sequences[(size_t) seq];
        if (s.n_wanted > 0) {
            const int32_t code = rows.add(seq, s.known.back(), true);
            if (code != PLB_OK) {
                return code;
            }
            s.n_agreed = s.known.size();
        }
    }
    const int32_t code = rows.compute();
    self.catch_up_ns += behind ? plb_now_ns() - began : 0;
    return code;
}

// Then a token of each after the other.
int32_t draft(plb_draft_model & self) {
    draft_rows rows(self);
    int32_t code = catch_up(self, rows);
    for (bool any = true; any && code == PLB_OK;) {
        any = false;
        for (const llama_seq_id seq : self.drafting) {
            if (code == PLB_OK && self.sequences[(size_t) seq].n_wanted > 0) {
                any = true;
                code = rows.go_on(seq);
            }
        }
        code = code == PLB_OK ? rows.compute() : code;
    }
    return code;
}

// Whether the model has all of these tokens.
bool has_all(const plb_draft_model & self, const llama_token * begin, const llama_token * end) {
    return std::all_of(begin, end, [&](llama_token t) { return t < self.model->views.n_vocab; });
}

// Which of these slots have drafts, and where they are now.
int32_t look(plb_draft_model & self, const llama_seq_id * slots, int32_t n_slots) {
    self.drafting.clear();
    for (int32_t i = 0; i < n_slots; ++i) {
        const llama_seq_id seq = slots[i];
        if (seq < 0 || seq >= (int32_t) self.sequences.size()) {
            return PLB_E_SEQ;
        }
        self.given.n_given[seq] = 0;
        sequence & s = self.sequences[(size_t) seq];
        s.n_wanted = wanted_of(self, seq);
        if (s.n_wanted <= 0) {
            continue;
        }
        const std::vector<llama_token> & generated = self.target->slots[seq]->generated;
        const size_t n_seen = std::min(s.n_seen, generated.size());
        if (has_all(self, generated.data() + n_seen, generated.data() + generated.size())) {
            self.drafting.push_back(seq);
        } else {
            give_up(self, seq);
        }
    }
    std::sort(self.drafting.begin(), self.drafting.end());
    if (std::adjacent_find(self.drafting.begin(), self.drafting.end()) != self.drafting.end()) {
        return PLB_E_SEQ_TWICE;
    }
    for (const llama_seq_id seq : self.drafting) {
        follow(self, seq);
    }
    return PLB_OK;
}

int32_t draft_for(plb_draft_model & self, const llama_seq_id * slots, int32_t n_slots) {
    int32_t result = PLB_OK;
    self.catch_up_ns = 0;
    for (;;) {
        int32_t code = look(self, slots, n_slots);
        if (code != PLB_OK) {
            return code;
        }
        code = draft(self);
        if (code == PLB_OK) {
            return result;
        }
        for (const llama_seq_id seq : self.drafting) {
            self.given.n_given[seq] = 0;
            if (code != NO_CELLS) {
                give_up(self, seq); // what the memory holds of it is not known any more
            }
        }
        if (code != NO_CELLS) {
            return code;
        }
        result = code;
        if (!give_up_longest(self)) {
            return result;
        }
    }
}

// The sequences of these rows of the target that are drafted for.
void see(plb_draft_model & self, int32_t n_rows) {
    self.drafting.clear();
    for (int32_t i = 0; i < n_rows; ++i) {
        const llama_seq_id seq = self.target->seq[(size_t) i];
        const auto at = std::lower_bound(self.drafting.begin(), self.drafting.end(), seq);
        const bool there = at != self.drafting.end() && *at == seq;
        if (!there && self.sequences[(size_t) seq].followed && self.target->slots[seq] != nullptr) {
            self.drafting.insert(at, seq);
        }
    }
}

// Rows of the target: their hidden states are there for the next draft; where there is no room for one,
// the rows that start from those before are computed, but for a sequence that decodes without drafts:
// it may never have any. drafted: rows behind a sequence's next one count for nothing.
int32_t take_states(plb_draft_model & self, int32_t n_rows, bool drafted) {
    const plb_engine & target = *self.target;
    const float * states = llama_get_embeddings_nextn(target.ctx);
    draft_rows rows(self);
    for (int32_t i = 0; i < n_rows && states != nullptr; ++i) {
        const llama_seq_id seq = target.seq[(size_t) i];
        sequence & s = self.sequences[(size_t) seq];
        if (!s.followed || target.slots[seq] == nullptr) {
            continue;
        }
        if (drafted && target.pos[(size_t) i] >= target.slots[seq]->next_pos) {
            continue; // a rejected token's, or a row that only fills the graph
        }
        const auto pos = (size_t) target.pos[(size_t) i];
        const size_t n_read = std::min(s.n_agreed, s.held.size()), begin = s.states.begin();
        const auto n_gap = (size_t) self.model->views.n_rows_max; // a longer one is for catch_up
        const bool reads = target.flags[(size_t) i] == 0 || self.given.n_most[seq] > 0;
        if (reads && s.states.full(pos) && n_read <= begin + 1 && begin < n_read + n_gap) {
            follow(self, seq);
            const size_t n = std::min(pos + 1, s.known.size() - 1);
            const int32_t code = read(self, rows, seq, n - std::min(n, s.held.size()));
            if (code != PLB_OK) {
                return code;
            }
        }
        const int32_t at = target.gaps ? target.gaps->row(i) : i;
        s.states.put(pos, states + (size_t) at * self.n_hidden);
    }
    return rows.compute();
}

} // namespace

bool plb::forget_others(plb_draft_model & self) {
    bool any = false;
    for (llama_seq_id seq = 0; seq < (llama_seq_id) self.sequences.size(); ++seq) {
        const bool needed = std::binary_search(self.drafting.begin(), self.drafting.end(), seq);
        if (!needed && !self.sequences[(size_t) seq].held.empty()) {
            forget(self, seq);
            any = true;
        }
    }
    return any;
}

int32_t plb::watch(plb_draft_model & self, int32_t n_rows, bool drafted) {
    if (self.n_hidden == 0) {
        return PLB_OK;
    }
    for (int32_t result = PLB_OK;;) {
        see(self, n_rows);
        int32_t code = PLB_OK;
        const int32_t threw =
            guarded(self.model->error, [&] { code = take_states(self, n_rows, drafted); });
        code = threw != PLB_OK ? threw : code;
        if (code == PLB_OK) {
            return result;
        }
        if (code != NO_CELLS) {
            for (const llama_seq_id seq : self.drafting) {
                give_up(self, seq);
            }
            return code;
        }
        result = code;
        if (!give_up_longest(self)) {
            return result;
        }
    }
}

void plb::tell_lacks(const plb_draft_model & self) {
    for (size_t seq = 0; seq < self.sequences.size(); ++seq) {
        const sequence & s = self.sequences[seq];
        const plb_slot * slot = self.target->slots[seq].get();
        const bool drafts = s.followed && slot != nullptr && n_beyond(self, *slot, s) > 0;
        const size_t lacks = drafts ? n_known(*slot, s) - s.n_agreed : 0;
        self.given.n_lacks[seq] = lacks > IN_STEP ? (int32_t) lacks : 0;
    }
}

int32_t plb_vocab_differs(const llama_vocab * a, const llama_vocab * b, llama_token first) {
    if (a == nullptr || b == nullptr || llama_vocab_type(a) == LLAMA_VOCAB_TYPE_NONE ||
        llama_vocab_type(b) == LLAMA_VOCAB_TYPE_NONE) {
        return -1;
    }
    const int32_t n = std::min(llama_vocab_n_tokens(a), llama_vocab_n_tokens(b));
    for (llama_token token = std::max(first, 0); token < n; ++token) {
        if (std::strcmp(llama_vocab_get_text(a, token), llama_vocab_get_text(b, token)) != 0) {
            return token;
        }
    }
    return -1;
}

int32_t plb_draft_model_new(plb_engine * model, plb_engine * target, plb_draft_model ** out) {
    if (model == nullptr || target == nullptr || out == nullptr || model == target || model->stream ||
        !target->drafts || model->views.n_seq_max < target->views.n_seq_max ||
        model->views.n_rows_max < target->views.n_seq_max) {
        return PLB_E_ARGUMENT;
    }
    *out = nullptr;
    const llama_model * weights = llama_get_model(model->ctx);
    const auto n_hidden = model->hidden.empty() ? 0 : (size_t) llama_model_n_embd_out(weights);
    if (n_hidden > 0 && weights != llama_get_model(target->ctx)) {
        return PLB_E_ARGUMENT;
    }
    if (n_hidden == 0 && (llama_model_is_recurrent(weights) || llama_model_is_hybrid(weights))) {
        return PLB_E_ROLLBACK;
    }
    return guarded(model->error, [&] {
        auto self = std::make_unique<plb_draft_model>();
        self->model  = model;
        self->target = target;
        self->given  = target->drafts->views();
        self->shares = llama_n_ctx_seq(model->ctx) == llama_n_ctx(model->ctx); // a pool of cells
        self->n_hidden = n_hidden;
        self->sequences.resize((size_t) target->views.n_seq_max);
        if (n_hidden > 0) {
            for (sequence & s : self->sequences) {
                s.states.allocate(IN_STEP + 1, n_hidden);
                s.own.resize(n_hidden);
            }
            llama_set_embeddings_nextn(model->ctx, true, /*masked*/ true);
            llama_set_embeddings_nextn(target->ctx, true, /*masked*/ false);
        }
        self->drafting.reserve((size_t) target->views.n_seq_max);
        plb_sampling greedy = plb_sampling_default();
        greedy.temperature = 0;
        greedy.max_tokens  = PLB_DRAFT_LIMIT + 1;
        for (int32_t seq = 0; seq < target->views.n_seq_max; ++seq) {
            const int32_t code = plb_slot_set(model, seq, &greedy, nullptr, 0);
            if (code != PLB_OK) {
                throw failure{code, plb_code_text(code)};
            }
        }
        *out = self.release();
    });
}

void plb_draft_model_free(plb_draft_model * self) {
    if (self != nullptr) {
        plb_draft_model_attach(self, 0);
    }
    delete self;
}

int32_t plb_draft_model_attach(plb_draft_model * self, int32_t attached) {
    if (self == nullptr) {
        return PLB_E_ARGUMENT;
    }
    drafts & drafts = *self->target->drafts;
    if (attached != 0 || drafts.model() == self) {
        drafts.attach(attached != 0 ? self : nullptr);
    }
    return PLB_OK;
}

int32_t plb_draft_model_begin(plb_draft_model * self, int32_t seq, const llama_token * tokens,
                              int32_t n_tokens) {
    if (self == nullptr || tokens == nullptr || n_tokens < 1) {
        return PLB_E_ARGUMENT;
    }
    if (seq < 0 || seq >= (int32_t) self->sequences.size()) {
        return PLB_E_SEQ;
    }
    const plb_slot * slot = self->target->slots[seq].get();
    if (slot == nullptr) {
        return PLB_E_NO_SLOT;
    }
    if (std::any_of(tokens, tokens + n_tokens,
                    [&](llama_token t) { return t < 0 || t >= self->target->views.n_vocab; })) {
        return PLB_E_TOKEN;
    }
    return guarded(self->model->error, [&] {
        sequence & s = self->sequences[(size_t) seq];
        const size_t room = (size_t) n_tokens + slot->generated.capacity() + PLB_DRAFT_LIMIT;
        s.known.reserve(room);
        s.held.reserve(room);
        s.states.cut(n_alike(s.known, {tokens, tokens + n_tokens}));
        s.known.assign(tokens, tokens + n_tokens);
        s.n_seen   = slot->generated.size();
        s.n_agreed = std::min(s.n_agreed, n_alike(s.held, s.known));
        s.followed = has_all(*self, tokens, tokens + n_tokens);
        if (self->shares && s.followed) {
            take_over(*self, seq);
        }
        tell_lacks(*self);
    });
}

int32_t plb_draft_model_end(plb_draft_model * self, int32_t seq) {
    if (self == nullptr) {
        return PLB_E_ARGUMENT;
    }
    if (seq < 0 || seq >= (int32_t) self->sequences.size()) {
        return PLB_E_SEQ;
    }
    self->sequences[(size_t) seq].followed = false; // what is held may serve the next one
    tell_lacks(*self);
    return PLB_OK;
}

int32_t plb_draft_model_draft(plb_draft_model * self, const llama_seq_id * slots, int32_t n_slots) {
    if (self == nullptr || (n_slots > 0 && slots == nullptr) || n_slots < 0 ||
        n_slots > (int32_t) self->sequences.size()) {
        return PLB_E_ARGUMENT;
    }
    int32_t code = PLB_OK;
    const int32_t threw =
        guarded(self->model->error, [&] { code = draft_for(*self, slots, n_slots); });
    return threw != PLB_OK ? threw : code;
}
