// How many of its drafted rows a step has: as many as give most tokens a second.
//
// A row costs what the step takes longer with it, and gives a token with the chance that its draft and
// those before it are right. The caller says what steps take by their number of rows (plb_drafts); what
// they took is counted for it. A step may take longer than was said, and its drafts be wrong: what that
// has lost, and may lose at worst, is never more than the caller's credit. A new graph is paid by the steps
// that follow; else it would use up the credit, and they would never come.
#pragma once

#include "plb.h"

#include <cstdint>
#include <vector>

namespace plb {

// Of one slot in a step.
struct draft_offer {
    const float * chance; // [n]: that so many and one more are right; none is larger than the one before
    int32_t       n;      // drafted rows that it can have
    int32_t       chosen;
};

class draft_prices {
public:
    // n_draft_max: drafted rows of a slot, those that only fill up included.
    draft_prices(int32_t n_rows_max, int32_t n_draft_max);

    void views(plb_drafts & out);
    // Without prices every offer is chosen.
    bool there() const { return n_priced_ > 0; }
    // Whether there may be a step with so many rows.
    bool allows(int32_t n_rows) const { return n_rows < n_priced_ && seconds_[(size_t) n_rows] > 0; }
    // Sets `chosen`; returns the rows that the step is to have, those that only fill up included. width:
    // rows of the step without drafts. even: all slots have as many rows as the one with most, `width` of
    // each.
    int32_t choose(std::vector<draft_offer> & offers, int32_t width, bool even);

    // That was computed.
    struct step {
        int32_t n_rows;
        bool    drafted;
        bool    reused;   // its graph was there
        int64_t ns;       // 0: not known
        int32_t n_tokens; // that its slots have sampled
        int32_t n_slots;
    };

    plb_draft_graph graph; // `choose` and `computed` change it

    void begin(); // of a run
    void computed(const step & step);

private:
    // That a step is to beat.
    struct goal {
        float a_token;    // seconds without drafts
        bool  pays_graph; // it alone pays for a new graph
        float speed;      // tokens a second
    };

    bool better(float tokens, int32_t n_rows, goal & than) const;
    int32_t choose_even(std::vector<draft_offer> & offers, int32_t width, goal & best);
    int32_t choose_each(std::vector<draft_offer> & offers, int32_t width, goal & best);
    float new_graph(int32_t n_rows) const { return n_rows == graph.n_rows ? 0 : graph_; }
    bool  settled(const step & step);

    std::vector<float>   seconds_, worst_; // [n_rows_max + 1]
    std::vector<int32_t> n_timed_;         // [n_rows_max + 1]
    std::vector<int64_t> ns_timed_;        // [n_rows_max + 1]
    int32_t n_draft_max_;
    int32_t n_priced_ = 0;
    float   credit_   = 0;
    float   gain_     = 0;
    float   graph_    = 0;
    int32_t n_same_   = 0;     // steps with that graph since it was new
    int32_t n_before_ = 0;     // rows of the step before, if it had drafts
    int32_t width_    = 0;     // of the last choice
};

} // namespace plb
