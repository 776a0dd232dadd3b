// Where every sequence has a stream of cells of its own, libllama makes an ubatch only of sequences
// whose ids follow each other: a sequence in between that has nothing to decode cuts the batch in two,
// and every part reads all weights. One row for the one in between is cheaper. So a step may have rows
// of sequences that hold nothing, whose output is not read; what they leave in the memory is removed
// when the native call ends.
#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

namespace plb {

class gaps {
public:
    // most: sequences in a row that are filled in; 0: none
    gaps(llama_context * ctx, int32_t most);

    int32_t most() const { return most_; }
    // The batch with rows for the gaps, or as it is: where it is not one row for each of ascending
    // sequences, or a sequence in between holds something. Valid until the next call.
    llama_batch fill(const llama_batch & batch);
    int32_t n_filled() const { return n_filled_; }
    // Where a row of the last batch is now.
    int32_t row(int32_t i) const { return n_filled_ > 0 ? row_[(size_t) i] : i; }
    // Removes what the rows have left behind. False: libllama refuses, and it is still there.
    bool clear();

private:
    bool ours(llama_seq_id seq) const; // it holds nothing, or rows of ours
    void add(llama_token token, llama_pos pos, llama_seq_id seq, int8_t output);

    llama_memory_t memory_;
    int32_t most_;
    int32_t n_filled_ = 0;
    std::vector<int32_t>        row_;    // [n_batch]
    std::vector<llama_pos>      next_;   // [n_seq_max]: of a sequence that is filled in; 0: it is not
    std::vector<llama_seq_id>   filled_; // those
    std::vector<llama_token>    token_;
    std::vector<llama_pos>      pos_;
    std::vector<int32_t>        n_seq_id_;
    std::vector<llama_seq_id>   seq_;
    std::vector<llama_seq_id *> seq_id_;
    std::vector<int8_t>         output_;
    int32_t n_ = 0;
};

} // namespace plb
