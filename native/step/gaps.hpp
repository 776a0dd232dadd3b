// Where every sequence has a stream of cells of its own, libllama makes an ubatch only of sequences
// whose ids follow each other: one in between that has nothing to decode cuts the batch in two, and
// every part reads all weights. And a step of other rows than the one before takes a new graph. So a
// step may have rows of sequences that do not decode, whose output is not read; what they leave in the
// memory is removed before the next step.
#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace plb {

class gaps {
public:
    // most: sequences in a row that hold nothing and are filled in unasked. n_outputs_max, n_pos_max:
    // rows and positions that the context allows.
    gaps(llama_context * ctx, int32_t most, int32_t n_outputs_max, int32_t n_pos_max);

    int32_t most() const { return most_; }
    // The batch with n_each rows for each gap, and for each sequence below n_pad; or as it is, where
    // it is not n_each rows of each of ascending sequences, or there is no room; 0: as it is. Valid
    // until the next call.
    llama_batch fill(const llama_batch & batch, int32_t n_pad, int32_t n_each);
    int32_t n_filled() const { return (int32_t) filled_.size() * n_each_; } // rows
    // Where a row of the last batch is now.
    int32_t row(int32_t i) const { return filled_.empty() ? i : row_[(size_t) i]; }
    // Removes what the rows have left behind. False: libllama refuses, and it is still there.
    bool clear();

private:
    bool choose(const llama_batch & batch, int32_t n_pad);
    bool each_the_same(const llama_batch & batch, int32_t & n_outputs) const;
    void add(llama_token token, llama_pos pos, llama_seq_id seq, int8_t output);

    llama_memory_t memory_;
    int32_t most_;
    bool    whole_; // only all of a sequence can be removed
    int32_t n_rows_max_, n_outputs_max_, n_pos_max_;
    int32_t n_ = 0, n_each_ = 1;
    std::vector<int32_t>        row_;    // [n_rows_max]
    std::vector<llama_seq_id>   filled_; // sequences that have rows of ours, ascending
    std::vector<llama_pos>      held_;   // positions that each of them holds
    std::vector<llama_token>    token_;
    std::vector<llama_pos>      pos_;
    std::vector<int32_t>        n_seq_id_;
    std::vector<llama_seq_id>   seq_;
    std::vector<llama_seq_id *> seq_id_;
    std::vector<int8_t>         output_;
};

} // namespace plb
