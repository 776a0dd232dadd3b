// What the files of the shim know of each other. Nothing here is part of the contract.
#pragma once

#include "sampling/fused.hpp"
#include "step/drafts.hpp"
#include "step/gaps.hpp"
#include "step/ngram.hpp"
#include "device/placement.hpp"
#include "plb.h"
#include "device/thread_pool.hpp"
#include "step/ring.hpp"
#include "device/shortlist.hpp"

#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

struct plb_slot;

namespace plb {

constexpr float NEVER = -INFINITY; // the logit of a token that may not be chosen

// A failure on its way to a code and a text. Thrown inside the shim only.
struct failure {
    int32_t     code;
    std::string text;
};

struct sampler_free {
    void operator()(llama_sampler * sampler) const { llama_sampler_free(sampler); }
};

// Owns a sampler of libllama's; a copy owns a clone.
struct sampler_ptr : std::unique_ptr<llama_sampler, sampler_free> {
    using unique_ptr::unique_ptr;
    sampler_ptr(sampler_ptr &&) = default;
    sampler_ptr & operator=(sampler_ptr &&) = default;
    sampler_ptr(const sampler_ptr & other)
        : unique_ptr(other ? llama_sampler_clone(other.get()) : nullptr) {
        if (other && !*this) {
            throw failure{PLB_E_EXCEPTION, "libllama made no sampler"};
        }
    }
};

constexpr size_t TEXT_BYTES = 512;

// Throws `failure` with PLB_E_GRAMMAR for what libllama would refuse, print about, or hang on.
void check_grammar(const llama_vocab * vocab, const char * text);
// A slot's grammar, checked, where it begins; and a token on its way.
void set_grammar(plb_slot & slot, const llama_vocab * vocab, const plb_sampling & sampling);
bool grammar_applies(const plb_slot & slot);
void accept_in_grammar(plb_slot & slot, llama_token token);

// What sampling needs of the engine; one per sampling thread. Resident is what has been used of it.
struct scratch {
    explicit scratch(int32_t n_vocab)
        : candidates(new llama_token_data[(size_t) n_vocab]), memory(n_vocab) {}

    std::unique_ptr<llama_token_data[]> candidates; // [n_vocab]: the chain's
    fused_memory memory;
    fused_row    row;
};

struct vocabulary {
    const llama_vocab * vocab   = nullptr;
    int32_t             n_vocab = 0;
    std::atomic<int32_t> n_ctx  = 0; // the most cells that the context had: slots, which any thread makes, look so far back
    std::vector<llama_token> eog;
    std::vector<llama_token> suppressed; // by the model itself: never chosen
};

} // namespace plb

struct plb_slot {
    plb_sampling params = {};  // scalars; its pointers are not used
    std::vector<llama_logit_bias> biases;
    std::vector<llama_token>      stop_tokens;
    int32_t path = PLB_PATH_CHAIN;
    bool    short_enough = false; // SHORTLIST candidates are all that it can ask for
    plb::fused_state fused;    // one of the two has the draws and the penalties
    plb::sampler_ptr chain;
    plb::sampler_ptr grammar;  // beside the chain: it sees generated tokens only
    plb::sampler_ptr thoughts; // of a lazy grammar, which waits while the text is inside of them
    const llama_vocab * vocab = nullptr; // that it was made for
    std::vector<llama_token> generated;  // only of slots that have a vocabulary
    uint32_t seed        = 0;
    int32_t  n_generated = 0;
    int32_t  finish      = PLB_FINISH_NONE;
    int32_t  error       = 0;
    int32_t  next_token  = -1;
    int32_t  next_pos    = -1;
    bool     report      = false; // each of its results is among plb_views.finished
    int32_t  n_draws     = 0;  // since it was seeded
    plb::ngram        history; // where the engine drafts from it
    plb::draft_record record;
    char     error_text[plb::TEXT_BYTES] = "";

    bool active() const { return finish == PLB_FINISH_NONE; }
};

namespace plb {

// See plb_fault_set.
struct fault {
    int32_t countdown = 0; // 0: none
    int32_t code      = 0;
    int32_t n_rows    = 0;
    int32_t n_times   = 0;
    bool    lost      = false; // the device has failed meanwhile
};

// One row to sample.
struct row_job {
    plb_slot *    slot;
    const float * logits; // nullptr: there are none
    const llama_token * ids; // of SHORTLIST candidates, whose logits they are; nullptr: a whole row
    plb_result *  result;
    llama_token * top_token;
    float *       top_logprob;
};

// Rows of different slots on the threads of a pool: spread over them or, where there are fewer rows
// than half the threads, the fused ones cut into parts. Nothing is allocated after it is made.
class row_sampler {
public:
    row_sampler(const vocabulary & words, int32_t n_threads);
    row_sampler(const row_sampler &) = delete;
    row_sampler & operator=(const row_sampler &) = delete;

    int32_t   n_threads() const { return pool_.size(); }
    scratch & own() { return *scratch_[0]; } // the calling thread's
    void      sample(row_job * jobs, int32_t n) noexcept;

private:
    void sample_in_parts(row_job * jobs, int32_t n) noexcept;

    const vocabulary & words_;
    pool               pool_;
    std::vector<std::unique_ptr<scratch>> scratch_;  // [threads]
    std::vector<fused_request>            requests_; // [threads]
    row_job * jobs_    = nullptr;
    int32_t   n_parts_ = 0;
};

} // namespace plb

struct plb_engine {
    const int64_t   process = plb_process();
    llama_context * ctx = nullptr;
    plb::vocabulary words;
    plb_views       views = {};
    int32_t n_outputs_max = 0;
    int32_t n_outputs_per_seq = 1;
    int32_t n_ubatch      = 0;
    bool    all_outputs   = false;
    bool    sync          = false;
    bool    stream        = false;

    std::vector<llama_token>    token;
    std::vector<llama_pos>      pos;
    std::vector<llama_seq_id>   seq;
    std::vector<uint8_t>        flags;
    std::vector<int32_t>        n_seq_id;
    std::vector<llama_seq_id *> seq_id;
    std::vector<int8_t>         output;
    std::vector<float>          hidden;   // [n_rows_max][n_embd_out], what rows start from; empty: nothing
    std::vector<plb_result>     results;
    std::vector<llama_token>    top_token;
    std::vector<float>          top_logprob;
    plb_step_info               info = {};
    std::vector<plb_step_info>  steps;    // [n_steps_max]
    std::vector<plb_result>     finished; // [n_outputs_max]
    plb::ring                   ring;     // where in results and steps
    std::vector<uint8_t>        named;    // [n_seq_max]: a run's slots, while they are checked
    std::atomic<bool>           interrupted{false};
    plb::fault                  fault;

    std::vector<std::unique_ptr<plb_slot>> slots; // [n_seq_max]
    std::unique_ptr<plb::row_sampler> sampler;
    std::vector<plb::row_job> jobs; // [n_outputs_max]
    std::unique_ptr<plb::shortlist> on_device; // nullptr: never
    plb::placement place{PLB_DEVICE_SAMPLING_OFF};
    std::vector<plb::short_row> short_rows; // [n_rows]
    std::unique_ptr<plb::gaps> gaps; // nullptr: none are filled
    std::unique_ptr<plb::drafts> drafts; // nullptr: there are never any
    char error[plb::TEXT_BYTES] = "";
};

namespace plb {

// A slot from parameters; throws `failure`.
std::unique_ptr<plb_slot> make_slot(const vocabulary & words, const plb_sampling & sampling,
                                    int32_t n_logprobs_max,
                                    const llama_token * prompt, int32_t n_prompt);
std::unique_ptr<plb_slot> copy_slot(const plb_slot & slot);
void reseed(plb_slot & slot, uint32_t seed);
// Takes the slot to where it would be after sampling these tokens; throws `failure`.
void replay(plb_slot & slot, const llama_token * tokens, int32_t n_tokens, int32_t n_draws);

// Its start and its end, with the sampling in between.
void begin_row(const vocabulary & words, const row_job & job, fused_request & request) noexcept;
void end_row(const vocabulary & words, const row_job & job, const fused_request & request) noexcept;

// Choose, account and accept one token. Fills result.token, index, finish, error, logprob and n_top.
// Throws nothing: a failure is the slot's end, and is in the result.
void sample_row(const vocabulary & words, scratch & scratch, const row_job & job) noexcept;

template <typename... Args>
void set_text(char (&text)[TEXT_BYTES], const char * format, Args... args) noexcept {
    snprintf(text, TEXT_BYTES, format, args...);
}

// Check, build, decode, sample: rows 0..n_rows-1, the records from first_record on, which is the
// ring's. The step is recorded there, done or not, and in engine.info; returns the code. n_pad: see
// plb_run. drafted: the rows are those that engine.drafts has written. n_behind: so many of the first
// rows, none of them sampled, are a batch behind that of the others.
int32_t one_step(plb_engine & engine, int32_t n_rows, int32_t first_record, int32_t n_pad = 0,
                 bool drafted = false, int32_t n_behind = 0);

// Whether the last batch has logits, or what the device has chosen of them; and those of one of its rows,
// into the job that samples it.
bool gives_logits(const plb_engine & engine);
void find_logits(const plb_engine & engine, row_job & job, int32_t row, bool has_logits);

// A result's slot goes on behind it.
void advance(plb_engine & engine, const plb_result & result) noexcept;

// Sets the engine's text and the row that it speaks of; returns the code.
int32_t fail(plb_engine & engine, int32_t code, int32_t row = -1) noexcept;

// Runs body; whatever it throws becomes a code and a text.
template <typename Body>
int32_t guarded(char (&text)[TEXT_BYTES], Body body) noexcept {
    text[0] = 0;
    try {
        body();
        return PLB_OK;
    } catch (const failure & error) {
        set_text(text, "%s", error.text.c_str());
        return error.code;
    } catch (const std::bad_alloc &) {
        set_text(text, "%s", "out of memory");
        return PLB_E_MEMORY;
    } catch (const std::exception & error) {
        set_text(text, "libllama: %s", error.what());
        return PLB_E_EXCEPTION;
    } catch (...) {
        set_text(text, "%s", "libllama threw something that is no std::exception");
        return PLB_E_EXCEPTION;
    }
}

} // namespace plb
