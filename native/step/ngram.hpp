// Drafts from a sequence's own tokens: where its last tokens have occurred before, what followed there is
// likely to follow again (a text that quotes or rewrites its prompt, code, a loop).
//
// As in an LZ77 compressor: every position is in a chain of those that end with the same few tokens,
// the newest first. Of these the one with the longest match is taken, the newest among equals. A draft
// that comes to the end of the tokens goes on with itself. A longer match in the texts of others
// (corpus.hpp) wins.
#pragma once

#include "plb.h"

#include <cstdint>
#include <vector>

namespace plb {

class corpus;

constexpr int32_t NGRAM       = 2;  // tokens that a match has at least
constexpr int32_t NGRAM_MOST  = 32; // that are compared
constexpr int32_t NGRAM_TRIES = 64; // positions that are looked at
constexpr int32_t NGRAM_ROOM  = 8192; // tokens beside the prompt's that there is room for: more take memory while they wait

uint32_t ngram_hash(const llama_token * last); // of NGRAM tokens, `last` the last one

// How drafts have done lately: means that forget, by the number of tokens.
struct draft_record {
    float   found[PLB_DRAFT_LIMIT] = {}; // share of the drafts with more than i tokens
    float   right[PLB_DRAFT_LIMIT] = {}; // share of which more than i were right
    int32_t n = 0;

    // Of n_asked tokens n_found were drafted, and n_right of these were right. What is behind n_asked
    // keeps its share of what is before.
    void note(int32_t n_asked, int32_t n_found, int32_t n_right);
};

// How often the next token was the one that followed the last match, by how many tokens that had.
struct match_record {
    static constexpr int32_t N_LENGTHS = 8;
    static int32_t of(int32_t length); // which of them

    float   right[N_LENGTHS]   = {}; // shares that forget
    int32_t n[N_LENGTHS]       = {}; // tokens, as far as they count
    int32_t n_new[N_LENGTHS]   = {}; // since they were last collected
    int32_t new_right[N_LENGTHS] = {};

    void note(int32_t length, bool is_right);
};

class ngram {
public:
    ngram() = default; // without room: drafts nothing
    ngram(const llama_token * prompt, int32_t n_prompt, int32_t n_more);

    // Where there is no room the oldest tokens are forgotten, as many as fill half of what is beside the
    // prompt's. Whether the drafts that there would have been are right goes to `record`.
    void add(llama_token token, draft_record & record);
    // What was found: how many tokens are the same there, in a text of the corpus or in its own.
    struct match {
        int32_t length;
        bool    shared;
    };
    // At most n_most tokens that may come next; how many.
    int32_t draft(int32_t n_most, llama_token * out, match & found) const;
    bool has_room() const { return !tokens_.empty(); }
    // From now on; it must outlive this one.
    void share(const corpus * texts) { corpus_ = texts; }
    void give(corpus & texts) const;
    match_record & matches(bool shared) { return shared ? shared_matches_ : matches_; }
    const match_record & matches(bool shared) const { return shared ? shared_matches_ : matches_; }

private:
    void append(llama_token token);
    void forget(int32_t n);
    int32_t find(int32_t & length) const;

    std::vector<llama_token> tokens_; // [room]
    std::vector<int32_t> before_;     // [room]: the position before with the same last tokens, or -1
    std::vector<int32_t> newest_;     // by hash
    int32_t n_ = 0, n_more_ = 0;
    // a draft that is compared with what comes
    llama_token watched_[PLB_DRAFT_LIMIT] = {};
    int32_t n_watched_ = 0, n_right_ = 0;
    match   matched_   = {0, false};
    match_record matches_, shared_matches_;
    const corpus * corpus_ = nullptr;
};

} // namespace plb
