// The texts of requests that have ended, for drafts from more than a sequence's own tokens. Of all that
// were added the last n_room tokens are there, whatever they were part of.
#pragma once

#include "plb.h"

#include <cstdint>
#include <vector>

namespace plb {

class corpus {
public:
    explicit corpus(int32_t n_room);

    void add(const llama_token * tokens, int32_t n); // a whole text
    // Where more than `length` tokens are those that end at `last`, which has n_before others before it:
    // `length` is how many then. At most n_most tokens that followed there; how many, 0: there is no
    // such place.
    int32_t draft(const llama_token * last, int32_t n_before, int32_t n_most, llama_token * out,
                  int32_t & length) const;

private:
    llama_token at(int64_t position) const { return tokens_[(size_t) (position % room_)]; }

    int64_t room_;
    int64_t n_ = 0;                    // tokens ever added, and what parts them
    std::vector<llama_token> tokens_;  // [room], by position
    std::vector<int64_t>     before_;  // [room]: the position before with the same last tokens, or -1
    std::vector<int64_t>     newest_;  // by hash
};

} // namespace plb
