#include "step/drafts.hpp"

#include "step/draft_model.hpp"
#include "step/engine.hpp"

#include "llama-ext.h"

#include <algorithm>

namespace plb {

namespace {

// What is expected of a drafter that was never tried: so many of its tokens are right, one after the
// other. And what a slot that begins is worth of it: a drafter that once did badly is tried again.
constexpr float HOPE = 0.8f, FORGET = 1.0f / 32;

constexpr int32_t COLLECTED = 512; // matches of a length that what is usual remembers
constexpr float   OTHERS = 8;      // what is usual counts as so many matches of one's own

// Of matches of this length the share whose next token is right: of a sequence, and of all others where it
// knows little itself. None at all count as two of which one is.
float share_of(const match_record & own, const match_record & usual, int32_t length) {
    const int32_t i = match_record::of(length);
    const auto n = (float) usual.n[i];
    const float others = (n * usual.right[i] + 1) / (n + 2);
    return ((float) own.n[i] * own.right[i] + OTHERS * others) / ((float) own.n[i] + OTHERS);
}

bool keeps_a_state(const llama_model * model) {
    return llama_model_is_recurrent(model) || llama_model_is_hybrid(model);
}

} // namespace

drafts::drafts(const llama_context * ctx, const plb_engine_params & params, int32_t n_seq_max)
    : n_max_(params.n_draft_max), drafter_(params.drafter), prices_((int32_t) llama_n_batch(ctx), n_max_) {
    bind(ctx);
    // A step in several ubatches may move states, and not their snapshots.
    const bool streams = llama_n_ctx_seq(ctx) < llama_n_ctx(ctx);
    if (keeps_a_state(llama_get_model(ctx)) && (streams || plb_max_rollback(ctx) < n_max_)) {
        throw failure{PLB_E_ROLLBACK, plb_code_text(PLB_E_ROLLBACK)};
    }
    if (params.n_corpus > 0) {
        corpus_ = std::make_unique<corpus>(params.n_corpus);
    }
    const auto n = (size_t) n_seq_max, n_all = n * (size_t) n_max_;
    n_most_.resize(n);
    n_given_.resize(n);
    n_taken_.resize(n);
    n_drafts_.resize(n);
    n_right_.resize((size_t) n_max_);
    n_drafted_.resize(n);
    n_accepted_.resize(n);
    n_lacks_.resize(n);
    token_.resize(n_all);
    found_.resize(n_all);
    right_.resize(n_all);
    rows_.reserve(n);
    live_.reserve(n);
    chance_.resize(n_all);
    offers_.reserve(n);
    hope(1);
    usual_.n = 4; // drafts that it weighs as much as
}

void drafts::hope(float weight) {
    float right = 1;
    for (int32_t i = 0; i < n_max_; ++i) {
        right *= HOPE;
        usual_.found[i] += weight * (1 - usual_.found[i]);
        usual_.right[i] += weight * (right - usual_.right[i]);
    }
}

void drafts::bind(const llama_context * ctx) {
    n_ubatch_  = (int32_t) std::min(llama_n_ubatch(ctx), llama_n_batch(ctx));
    n_ctx_seq_ = (int32_t) std::min<uint32_t>(llama_n_ctx_seq(ctx), INT32_MAX);
    even_ = llama_n_ctx_seq(ctx) < llama_n_ctx(ctx) || keeps_a_state(llama_get_model(ctx));
}

plb_drafts drafts::views() {
    plb_drafts views = {};
    views.n_draft_max = n_max_;
    views.n_most  = n_most_.data();
    views.n_given = n_given_.data();
    views.token   = token_.data();
    views.n_taken = n_taken_.data();
    views.found   = found_.data();
    views.right   = right_.data();
    views.n_drafts   = n_drafts_.data();
    views.n_right    = n_right_.data();
    views.n_drafted  = n_drafted_.data();
    views.n_accepted = n_accepted_.data();
    views.n_lacks    = n_lacks_.data();
    prices_.views(views);
    return views;
}

int32_t drafts::begin(const llama_seq_id * slots, int32_t n_slots, int32_t n_vocab, int32_t & bad) {
    wanted_ = false;
    took_back_ = true;
    catch_up_ns_ = 0;
    draft_code_  = 0;
    prices_.begin();
    for (bad = 0; bad < n_slots; ++bad) {
        const auto seq = (size_t) slots[bad];
        const int32_t most = n_most_[seq], given = n_given_[seq];
        if (most < 0 || most > n_max_ || given < 0 || given > n_max_) {
            return PLB_E_DRAFT;
        }
        const llama_token * token = &token_[seq * (size_t) n_max_];
        if (!std::all_of(token, token + given, [&](llama_token t) { return t >= 0 && t < n_vocab; })) {
            return PLB_E_DRAFT;
        }
        wanted_ = wanted_ || most > 0;
        n_taken_[seq] = n_drafts_[seq] = n_drafted_[seq] = n_accepted_[seq] = 0;
    }
    std::fill(n_right_.begin(), n_right_.end(), 0);
    return PLB_OK;
}

// A slot and the drafted tokens of its next step, in token_.
drafts::rows drafts::draft(const plb_engine & engine, llama_seq_id seq) {
    const plb_slot & slot = *engine.slots[seq];
    const int32_t positions = std::min(engine.views.n_pos_max, n_ctx_seq_) - 1 - slot.next_pos;
    const int32_t budget = slot.params.max_tokens - slot.n_generated - 1;
    const int32_t most = std::min({n_most_[(size_t) seq], budget, positions});
    if (most < 1 || slot.report) {
        return {seq, 0, 0, 0, 0, 0};
    }
    const size_t at = (size_t) seq * (size_t) n_max_;
    const int32_t n_given = n_given_[(size_t) seq];
    int32_t n = 0;
    float * chance = &chance_[at];
    if (n_given > 0) {
        n = std::min(n_given, most);
        const draft_record & record = slot.record;
        for (int32_t i = 0; i < n; ++i) {
            chance[i] = record.found[i] > 0 ? std::min(1.0f, record.right[i] / record.found[i]) : 0;
        }
    } else {
        ngram::match match = {};
        float likely = 1;
        n = slot.history.draft(most, &token_[at], match);
        const match_record & usual = match.shared ? shared_matches_ : matches_;
        for (int32_t i = 0; i < n; ++i) {
            likely *= share_of(slot.history.matches(match.shared), usual, match.length + i);
            chance[i] = likely;
        }
    }
    const bool catches_up = n == 0 && model_ != nullptr && model_->sequences[(size_t) seq].followed;
    return {seq, 0, 0, catches_up ? 0 : most, n, 0};
}

// Rows that fit a step with drafts.
int32_t drafts::n_rows_max(const plb_engine & engine) const {
    return std::min({n_ubatch_, engine.n_outputs_max, engine.views.n_rows_max});
}

// Rows of a step in which each slot has one.
int32_t drafts::width(const plb_engine & engine, int32_t n_pad) const {
    if (!even_ || !engine.gaps) {
        return (int32_t) rows_.size();
    }
    const auto by_seq = [](const rows & a, const rows & b) { return a.seq < b.seq; };
    const auto [low, high] = std::minmax_element(rows_.begin(), rows_.end(), by_seq);
    return n_pad > 0 ? std::max(n_pad, high->seq + 1) : high->seq + 1 - low->seq;
}

// Of what was drafted as much as pays; the rows that the step is to have.
int32_t drafts::choose(const plb_engine & engine, int32_t n_pad) {
    offers_.clear();
    for (const rows & r : rows_) {
        offers_.push_back({&chance_[(size_t) r.seq * (size_t) n_max_], r.n_drafted, 0});
    }
    const int32_t n_wanted = prices_.choose(offers_, width(engine, n_pad), even_);
    for (size_t i = 0; i < rows_.size(); ++i) {
        if (offers_[i].chosen < rows_[i].n_drafted) {
            rows_[i].n_asked = rows_[i].n_drafted = offers_[i].chosen;
        }
    }
    return n_wanted;
}

// Drafts are cut so that all rows fit one ubatch; how many rows a slot has at least, where there are to
// be n_wanted in all.
int32_t drafts::cut(const plb_engine & engine, int32_t n_pad, int32_t n_wanted) {
    const int32_t room = n_rows_max(engine);
    int32_t longest = 0, n_planned = 0;
    for (const rows & r : rows_) {
        longest   = std::max(longest, r.n_drafted);
        n_planned = std::max(n_planned, n_most_[(size_t) r.seq]);
    }
    int32_t n = longest;
    if (!even_) {
        const auto fits = [&](int32_t most) {
            int32_t n_rows = 0;
            for (const rows & r : rows_) {
                n_rows += 1 + std::min(r.n_drafted, most);
            }
            return n_rows <= room;
        };
        while (n > 0 && !fits(n)) {
            --n;
        }
    } else if (longest > 0) {
        const int32_t wide = width(engine, n_pad);
        n = std::min({std::max(n, n_wanted / wide - 1), n_planned, room / wide - 1});
        const int32_t n_pos = std::min(engine.views.n_pos_max, n_ctx_seq_);
        for (const rows & r : rows_) {
            n = std::min(n, n_pos - 1 - engine.slots[r.seq]->next_pos);
        }
        for (llama_seq_id seq = 0; seq < n_pad; ++seq) { // rows that fill up need positions, too
            const int32_t left = n_pos - 1 - llama_memory_seq_pos_max(llama_get_memory(engine.ctx), seq);
            n = left > 1 ? std::min(n, left - 1) : n; // one without room holds none back
        }
        while (n > 0 && prices_.there() && !prices_.allows(wide * (n + 1))) {
            --n;
        }
    }
    for (rows & r : rows_) {
        if (r.n_drafted > std::max(n, 0)) {
            r.n_asked = r.n_drafted = std::max(n, 0);
        }
    }
    return even_ ? 1 + std::max(n, 0) : 1;
}

// Rows that fill up behind the drafts of a slot, where each has its own number of rows and the step is to
// have n more. With them it has no more than it may have with drafts: the device samples so many.
int32_t drafts::behind(const plb_engine & engine, const rows & r, int32_t n) const {
    const int32_t next = engine.slots[r.seq]->next_pos + 1 + r.n_drafted;
    const int32_t positions = std::min(engine.views.n_pos_max, n_ctx_seq_) - next;
    return std::clamp(std::min(n_most_[(size_t) r.seq] - r.n_drafted, positions), 0, n);
}

int32_t drafts::write(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots, int32_t n_pad) {
    n_each_ = n_longest_ = 1;
    if (!wanted_) {
        return 0;
    }
    if (model_ != nullptr) {
        const int32_t code = plb_draft_model_draft(model_, slots, n_slots);
        draft_code_ = code != PLB_OK ? code : draft_code_;
        step_catch_up_ns_ = model_->catch_up_ns;
        catch_up_ns_ += step_catch_up_ns_;
    }
    rows_.clear();
    int32_t n_drafted = 0;
    for (int32_t i = 0; i < n_slots; ++i) {
        rows_.push_back(draft(engine, slots[i]));
    }
    const int32_t n_wanted = prices_.there() ? choose(engine, n_pad) : 0;
    n_each_ = cut(engine, n_pad, n_wanted);
    int32_t n_more = even_ ? 0 : std::min(n_wanted, n_rows_max(engine));
    for (const rows & r : rows_) {
        n_more = std::max(0, n_more - 1 - r.n_drafted);
    }
    int32_t row = 0;
    for (rows & r : rows_) {
        const plb_slot & slot = *engine.slots[r.seq];
        const llama_token * token = &token_[(size_t) r.seq * (size_t) n_max_];
        r.first = row;
        const int32_t n_behind = behind(engine, r, n_more);
        n_more -= n_behind;
        r.n = std::max(1 + r.n_drafted, n_each_) + n_behind;
        n_longest_ = std::max(n_longest_, r.n);
        for (int32_t j = 0; j < r.n; ++j, ++row) {
            engine.token[row] = j == 0 || j > r.n_drafted ? slot.next_token : token[j - 1];
            engine.pos[row]   = slot.next_pos + j;
            engine.seq[row]   = r.seq;
            engine.flags[row] = (uint8_t) (j == 0 ? PLB_ROW_SAMPLE : PLB_ROW_OUTPUT);
        }
        n_drafted += r.n_drafted;
        n_given_[(size_t) r.seq] = 0;
    }
    if (n_drafted == 0) {
        std::for_each(rows_.begin(), rows_.end(), [&](const rows & r) { note(engine, r, 0); });
        n_each_ = 1;
        return 0;
    }
    return row;
}

// What came of what was asked for. An n-gram's record are its matches.
void drafts::note(const plb_engine & engine, const rows & r, int32_t n_right) {
    plb_slot & slot = *engine.slots[r.seq];
    if (r.n_asked > 0 && !slot.history.has_room()) {
        slot.record.note(r.n_asked, r.n_drafted, n_right);
        if (model_ == nullptr || r.n_drafted > 0) { // one that the model does not follow says nothing of others
            usual_.note(r.n_asked, r.n_drafted, n_right);
        }
    }
}

// In rounds: a row of each slot that goes on, on all sampling threads.
int32_t drafts::sample(plb_engine & engine, int32_t first) {
    const bool has_logits = gives_logits(engine);
    live_.clear();
    for (size_t i = 0; i < rows_.size(); ++i) {
        live_.push_back((int32_t) i);
    }
    int32_t n = 0;
    while (!live_.empty()) {
        const auto n_jobs = (int32_t) live_.size();
        for (int32_t j = 0; j < n_jobs; ++j) {
            const rows & r = rows_[(size_t) live_[(size_t) j]];
            const int32_t row = r.first + r.n_taken;
            plb_result & result = engine.results[first + n + j];
            result.seq = r.seq;
            result.row = row;
            const size_t top = (size_t) (first + n + j) * engine.views.n_logprobs_max;
            engine.jobs[j] = {engine.slots[r.seq].get(), nullptr, nullptr, &result, &engine.top_token[top],
                              &engine.top_logprob[top]};
            find_logits(engine, engine.jobs[j], row, has_logits);
        }
        engine.sampler->sample(engine.jobs.data(), n_jobs);
        size_t n_live = 0;
        for (int32_t j = 0; j < n_jobs; ++j) {
            const plb_result & result = engine.results[first + n + j];
            rows & r = rows_[(size_t) live_[(size_t) j]];
            advance(engine, result);
            const bool right = r.n_taken < r.n_drafted && result.token == engine.token[result.row + 1];
            ++r.n_taken;
            if (right && engine.slots[r.seq]->active()) {
                live_[n_live++] = live_[(size_t) j];
            }
        }
        live_.resize(n_live);
        n += n_jobs;
    }
    llama_memory_t memory = llama_get_memory(engine.ctx);
    for (const rows & r : rows_) {
        n_taken_[(size_t) r.seq] += r.n_taken;
        n_drafts_[(size_t) r.seq] += r.n_drafted > 0;
        std::for_each_n(n_right_.begin(), r.n_taken - 1, [](int32_t & n) { ++n; });
        n_drafted_[(size_t) r.seq] += r.n_drafted;
        n_accepted_[(size_t) r.seq] += r.n_taken - 1;
        engine.info.n_drafted  += r.n_drafted;
        engine.info.n_accepted += r.n_taken - 1;
        note(engine, r, r.n_taken - 1);
        if (r.n_taken < r.n) {
            const llama_pos end = engine.pos[r.first] + r.n_taken;
            took_back_ = llama_memory_seq_rm(memory, r.seq, end, -1) && took_back_;
        }
    }
    return n;
}

void drafts::computed(const plb_engine & engine, const llama_seq_id * slots, int32_t n_slots,
                      bool drafted, int64_t ns) {
    const plb_step_info & info = engine.info;
    for (int32_t i = 0; i < n_slots && !drafted; ++i) {
        ++n_taken_[(size_t) slots[i]];
    }
    const bool reused = info.n_reused > n_reused_;
    n_reused_ = info.n_reused;
    if (ns > 0 && model_ != nullptr && wanted_) { // what it lacked is no part of a step
        ns = drafted ? ns - step_catch_up_ns_ : 0;
    }
    const draft_prices::step step = {info.n_rows + info.n_filled, drafted, reused, ns, info.n_results,
                                     n_slots};
    prices_.computed(step);
}

bool drafts::reads_hidden() const {
    return model_ != nullptr && model_->n_hidden > 0;
}

void drafts::watch(int32_t n_rows, bool drafted) {
    if (model_ != nullptr) {
        const int32_t code = plb::watch(*model_, n_rows, drafted);
        draft_code_ = code != PLB_OK ? code : draft_code_;
    }
}

void drafts::leave(const plb_slot & slot) {
    if (corpus_ && slot.history.has_room()) {
        slot.history.give(*corpus_);
    }
}

// What its matches were like goes into what is usual.
void drafts::collect(match_record & own, match_record & usual) {
    for (int32_t i = 0; i < match_record::N_LENGTHS; ++i) {
        const int32_t n = own.n_new[i];
        if (n > 0) {
            const float weight = (float) n / (float) (usual.n[i] + n);
            usual.right[i] += weight * ((float) own.new_right[i] / (float) n - usual.right[i]);
            usual.n[i] = std::min(usual.n[i] + n, COLLECTED);
            own.n_new[i] = own.new_right[i] = 0;
        }
    }
}

void drafts::end(plb_engine & engine, const llama_seq_id * slots, int32_t n_slots,
                 plb_run_info & run) {
    for (int32_t i = 0; i < n_slots; ++i) {
        const auto seq = (size_t) slots[i];
        plb_slot & slot = *engine.slots[seq];
        collect(slot.history.matches(false), matches_);
        collect(slot.history.matches(true), shared_matches_);
        if (!ngram() && slot.record.n == 0 && !slot.report) {
            slot.record = usual_;
            slot.record.n = 1;
            hope(FORGET);
        }
        const draft_record & record = slot.record;
        std::copy_n(record.found, n_max_, found_.begin() + (ptrdiff_t) (seq * (size_t) n_max_));
        std::copy_n(record.right, n_max_, right_.begin() + (ptrdiff_t) (seq * (size_t) n_max_));
        n_given_[seq] = 0;
    }
    if (model_ != nullptr) {
        tell_lacks(*model_);
    }
    run.catch_up_ns = catch_up_ns_;
    run.draft_code  = draft_code_;
    wanted_ = false;
    n_each_ = 1;
}

} // namespace plb

int32_t plb_max_rollback([[maybe_unused]] const llama_context * ctx) {
#ifdef LLAMA_ROLLS_BACK_OWN_PAST // vendor/patches/state-rolled-back.patch
    return (int32_t) llama_n_rs_seq(ctx);
#else
    return 0;
#endif
}
