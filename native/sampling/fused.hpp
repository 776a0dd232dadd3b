// The fused sampler: bias, penalties, truncation and draw in a few vectorised passes over one row of
// logits, with no candidate records and no full sort. It chooses what llama.cpp's chain of the same
// parameters chooses (order: bias, penalties, top-k, top-p, min-p, temperature, draw):
//
// - The same candidates with the same probabilities, equal logits in the order of their ids. (The chain
//   orders them as its unstable sort leaves them, and adds up weights as floats, one after the other:
//   where a sum comes to top-p within that rounding, it may keep one candidate more or less.)
// - The same token for the same seed where neither decides and the draw does not come within rounding
//   to the end of a token's share; except from a nucleus of more than SMALL candidates: that is drawn
//   from in the order of the ids. A token per seed, and the same distribution.
//
// A NaN or +inf anywhere in the row is PLB_E_LOGITS, as is a row of nothing but -inf; -inf excludes
// a token, and a row whose tokens are all excluded is PLB_E_NO_CANDIDATE.
#pragma once

#include "sampling/fused_kernels.hpp"
#include "plb.h"

#include <atomic>
#include <memory>
#include <random>
#include <vector>

namespace plb {

constexpr int32_t LIST      = 8192; // candidates that are made a list where no top-k asks for so many
constexpr int32_t SMALL     = 1024; // candidates of a nucleus that is sorted
constexpr int32_t RADIX_MIN = 512;  // candidates for which a radix sort pays

// Whether these parameters can take this path: no grammar, no typical-p.
bool fused_supports(const plb_sampling & params);
bool has_penalties(const plb_sampling & params);
int32_t n_looked_back(const plb_sampling & p, int32_t n_seen); // of so many tokens those that the penalties see

// The tokens that the penalties look back at, with their counts.
class penalty_window {
public:
    struct entry {
        llama_token token;
        int32_t     count;
    };

    penalty_window() = default;
    penalty_window(int32_t last_n, int32_t n_vocab); // last_n 0: remembers nothing
    penalty_window(const penalty_window & other);
    penalty_window & operator=(penalty_window &&) = default;
    void add(llama_token token);
    const entry * begin() const { return entries_.data(); }
    const entry * end() const { return entries_.data() + entries_.size(); }
    size_t capacity() const { return n_distinct_; } // most distinct tokens

private:
    void count(llama_token token, int32_t change);

    std::vector<llama_token> ring_;
    std::vector<entry>       entries_; // by token; never more than there is room for
    size_t next_ = 0, n_ring_ = 0, n_distinct_ = 0;
};

// What one request keeps from token to token.
struct fused_state {
    struct patch {
        llama_token token;
        float       logit; // before the change
    };

    std::mt19937   random;
    penalty_window window;
    std::vector<patch> patches; // room for all changes of a row

    fused_state() = default;
    // n_seen: tokens of prompt and answer at most; n_changes: biases and excluded tokens, penalties aside
    fused_state(const plb_sampling & params, uint32_t seed, int32_t n_seen, int32_t n_vocab,
                size_t n_changes);
};

struct token_span {
    const llama_token * token = nullptr;
    size_t              n     = 0;
};

// One row to sample, and what came of it. The row is changed while it is sampled and is afterwards
// as before: no two requests may share one at a time.
struct fused_request {
    float *              logits  = nullptr;
    const plb_sampling * params  = nullptr; // its scalars
    fused_state *        state   = nullptr;
    const llama_logit_bias * bias = nullptr;
    size_t               n_bias  = 0;
    token_span           never[3]; // tokens that may not be chosen now

    int32_t       error   = 0; // PLB_E_LOGITS, PLB_E_NO_CANDIDATE
    llama_token   token   = -1;
    float         logprob = NAN;
    int32_t       n_top   = 0;
    llama_token * top_token   = nullptr; // [params->n_logprobs]
    float *       top_logprob = nullptr;
};

struct candidate {
    float       logit;
    llama_token id;
};

inline bool by_logit_and_id(const candidate & a, const candidate & b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// What stays of a row: the logits above `logit`, and of those equal to it the ids up to last_id.
struct cut {
    float   logit   = -INFINITY;
    int32_t last_id = -1;

    bool keeps(float x, int32_t id) const { return x > logit || (x == logit && id <= last_id); }
};

// Memory to sample one row in. Not more than what is touched becomes resident.
struct fused_memory {
    explicit fused_memory(int32_t n_vocab);

    int32_t n_vocab;
    std::vector<float>  block_max, scratch;
    std::vector<double> block_sum, upper_sum, group_sum;
    std::unique_ptr<candidate[]> list, other; // [n_vocab + BLOCK]
    alignas(64) float tail[BLOCK];
};

// The sampling of one row as passes over its blocks, which can be split among threads, and the
// decisions between them:
//     for (auto p = row.begin(request); p != NONE; p = row.next()) row.run(p, 0, row.n_blocks());
class fused_row {
public:
    enum pass { NONE, SCAN, WEIGH, WEIGH_BOTH };

    void bind(const kernels & set, fused_memory & memory) { k_ = &set, m_ = &memory; }
    pass begin(fused_request & request) noexcept;
    void run(pass p, int32_t first, int32_t last) noexcept; // any thread, blocks disjoint
    pass next() noexcept { return (this->*after_)(); }
    // Of all that the log-probabilities only, if they are asked for, and whether the row can be sampled:
    // request.error.
    void look_at(fused_request & request) noexcept;
    float logprob(llama_token token) const { return (float) (r_->logits[token] - norm_); }
    // Instead of all that: from the n largest logits of a row (request.logits, in any order) and whose
    // they are. They hold all that top-k can keep.
    void choose_from_shortlist(fused_request & request, const llama_token * ids, int32_t n) noexcept;
    pass current() const { return current_; }
    int32_t n_blocks() const { return row_.n_blocks; }
    // What the draw was from: the memory's list of so many, with their weights if there are two or
    // more, or all that stays where that is 0.
    int32_t n_list() const { return n_list_; }
    const cut & candidates() const { return keep_; }

private:
    using step = pass (fused_row::*)();

    // fused_row.cpp: one row from its logits to a token
    pass then(pass p, step after);
    void start(fused_request & request);
    pass fail(int32_t code);
    pass choose(llama_token token);
    void pad();
    bool good_raw_row();
    void note_logprobs();
    bool patch();
    void restore();
    pass after_raw_scan();
    pass after_raw_weighing();
    pass after_scan();
    pass by_index(cut keep);
    pass draw_from_edge_weighed();
    pass draw_weighed();
    pass draw_from_list(int32_t n, bool sorted);
    int32_t nucleus(int32_t n) const;
    float   largest() const;
    llama_token first_largest() const;
    double  total(const std::vector<double> & sums);
    float   weight(float logit) const;

    // fused_top_p.cpp: top-p of the whole vocabulary
    pass by_top_p();
    pass weigh_between_bounds();
    void guess_bounds();
    pass after_weighing_both();
    cut  nucleus_edge(int32_t n, double above, double target);
    pass draw_from_nucleus(cut edge);

    // fused_top_k.cpp: the largest candidates
    uint64_t at_least(const float * x, float low) const { return k_->between(x, low, INFINITY); }
    int32_t gather_above(float low, int32_t limit) const;
    float   top_block(int32_t k);
    void    sort_list(int32_t n);
    int32_t take_top(int32_t k);

    const kernels * k_ = nullptr;
    fused_memory  * m_ = nullptr;
    fused_request * r_ = nullptr;
    row_view row_;
    pass     current_ = NONE;
    step     after_   = nullptr;
    std::atomic<bool> bad_{false}; // a NaN was seen
    size_t   n_patches_ = 0;
    float    largest_ = 0;
    weighing how_{1, 0, 0};
    cut      keep_;               // of a draw by index
    int32_t  n_list_ = 0;         // of a draw from the list
    double   norm_ = 0, draw_ = 0;
    // top-p
    float    start_ = 0;           // 256 blocks reach it
    double   above_start_ = 0;     // weight of what does
    double   total_ = 0;           // of all weights: a guess, later exact
    double   guess_error_ = 0;     // of total_, relative
    float    low_ = 0, upper_ = 0; // the nucleus ends between them
    int32_t  tries_ = 0;
};

} // namespace plb
