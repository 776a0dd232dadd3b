// Thoughts in an answer: a lazy grammar is not triggered in them.
#pragma once

#include "llama.h"

#include <vector>

namespace plb {

// A sampler that accepts tokens and changes nothing. `ends`: one at least.
llama_sampler * thinking_init(const llama_vocab * vocab, const std::vector<llama_token> & start,
                              const std::vector<std::vector<llama_token>> & ends);
bool is_thinking(const llama_sampler * thoughts);
// The tokens that ended them; nullptr: none did.
const std::vector<llama_token> * end_of_thoughts(const llama_sampler * thoughts);

} // namespace plb
