// Whether a text is inside of thoughts, by llama.cpp's own sampler for budgets of them: here without
// a budget, and only asked for its state.
#include "sampling/thinking.hpp"

#include "reasoning-budget.h"

#include <climits>

namespace plb {

llama_sampler * thinking_init(const llama_vocab * vocab, const std::vector<llama_token> & start,
                              const std::vector<std::vector<llama_token>> & ends) {
    return common_reasoning_budget_init(vocab, {start}, ends, ends.front(), INT_MAX);
}

bool is_thinking(const llama_sampler * thoughts) {
    const auto state = common_reasoning_budget_get_state(thoughts);
    return state != REASONING_BUDGET_IDLE && state != REASONING_BUDGET_DONE;
}

const std::vector<llama_token> * end_of_thoughts(const llama_sampler * thoughts) {
    return common_reasoning_budget_get_end_match(thoughts);
}

} // namespace plb
