// Where a slot's grammar begins: at once, behind what the prompt has of it, or at a trigger.
#include "guard/guard.hpp"
#include "sampling/thinking.hpp"
#include "step/engine.hpp"

#include <algorithm>
#include <regex>
#include <stdexcept>
#include <vector>

namespace plb {

namespace {

using tokens = std::vector<llama_token>;

// std::regex calls itself for each part of a pattern, each repetition of it and each group: a
// stack's end is the process's.
constexpr size_t MAX_PATTERN = 16384; // bytes
constexpr size_t MAX_GROUPS  = 256;

struct pattern_extent {
    size_t bytes;  // with a{n} written out n times
    size_t groups; // in each other
};

// The most repetitions of what ends at `i`, which comes to stand behind the }.
size_t repetitions(const std::string & pattern, size_t & i) {
    size_t most = 1, number = 0;
    for (; i < pattern.size() && pattern[i] != '}'; ++i) {
        number = pattern[i] == ',' ? 0 : std::min(10 * number + (size_t) (pattern[i] - '0') % 10, MAX_PATTERN + 1);
        most   = std::max(most, number);
    }
    ++i;
    return most;
}

// Behind the ] of a class whose [ is before `i`.
size_t class_end(const std::string & pattern, size_t i) {
    for (; i < pattern.size() && pattern[i] != ']'; ++i) {
        const char kind = pattern[i] == '[' && i + 1 < pattern.size() ? pattern[i + 1] : ' ';
        if (pattern[i] == '\\') {
            ++i;
        } else if (kind == ':' || kind == '.' || kind == '=') { // [:alpha:]
            const size_t end = pattern.find({kind, ']'}, i + 2);
            i                = end == std::string::npos ? pattern.size() : end + 1;
        }
    }
    return std::min(i + 1, pattern.size());
}

pattern_extent extent(const std::string & pattern) {
    struct group {
        size_t before, last; // bytes; of what a repetition would repeat
    };
    std::vector<group> open(1);
    pattern_extent     all{0, 0};
    for (size_t i = 0; i < pattern.size();) {
        const size_t start = i++;
        const char   kind  = pattern[start];
        if (kind == '(') {
            open.push_back({});
            all.groups = std::max(all.groups, open.size() - 1);
            continue;
        }
        if (kind == '*' || kind == '+' || kind == '?') {
            ++open.back().last;
            continue;
        }
        if (kind == '{') {
            size_t & last = open.back().last;
            last          = std::min((last + 1) * repetitions(pattern, i), MAX_PATTERN + 1);
            continue;
        }
        size_t inner = 0;
        if (kind == ')' && open.size() > 1) {
            inner = open.back().before + open.back().last + 1;
            open.pop_back();
        } else if (kind == '\\') {
            ++i;
        } else if (kind == '[') {
            i = class_end(pattern, i);
        }
        open.back().before += open.back().last;
        open.back().last = inner + i - start;
    }
    for (const group & one : open) {
        all.bytes += one.before + one.last;
    }
    return all;
}

tokens copied(const llama_vocab * vocab, const llama_token * data, int32_t n) {
    if (n < 0 || (n > 0 && data == nullptr)) {
        throw failure{PLB_E_SAMPLING, "grammar_start: fewer tokens than it says"};
    }
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    for (int32_t i = 0; i < n; ++i) {
        if (data[i] < LLAMA_TOKEN_NULL || data[i] >= n_vocab) {
            throw failure{PLB_E_SAMPLING, "grammar_start: a token outside the vocabulary"};
        }
    }
    return tokens(data, data + n);
}

std::vector<tokens> parts_of(const tokens & all) {
    std::vector<tokens> parts(1);
    for (const llama_token token : all) {
        if (token != LLAMA_TOKEN_NULL) {
            parts.back().push_back(token);
        } else if (!parts.back().empty()) {
            parts.emplace_back();
        }
    }
    if (parts.back().empty()) {
        parts.pop_back();
    }
    return parts;
}

void check_patterns(const plb_grammar_start & start) {
    if (start.n_patterns < 0 || (start.n_patterns > 0 && start.patterns == nullptr)) {
        throw failure{PLB_E_SAMPLING, "grammar_start: fewer patterns than it says"};
    }
    for (int32_t i = 0; i < start.n_patterns; ++i) {
        const std::string text = start.patterns[i];
        const auto [bytes, groups] = extent(text);
        if (bytes > MAX_PATTERN || groups > MAX_GROUPS) {
            throw failure{PLB_E_GRAMMAR, "a trigger pattern of " + std::to_string(text.size()) + " bytes, " +
                                             std::to_string(bytes) + " or more with its repetitions written out, " +
                                             std::to_string(groups) + " groups deep: at most " +
                                             std::to_string(MAX_PATTERN) + " and " + std::to_string(MAX_GROUPS)};
        }
        try {
            std::regex pattern(text);
        } catch (const std::regex_error & error) {
            throw failure{PLB_E_GRAMMAR, "the trigger pattern " + text + " is no regular expression: " +
                                             error.what()};
        }
    }
}

// A token that the grammar can't take throws; one that ends a generation fails an assertion.
void accept_checked(llama_sampler * grammar, llama_token token) {
    const assertion_guard guard;
    try {
        llama_sampler_accept(grammar, token);
    } catch (const std::overflow_error & error) { // as in sample_by_chain
        throw failure{PLB_E_NO_CANDIDATE, error.what()};
    } catch (const std::exception & error) {
        throw failure{PLB_E_GRAMMAR_STATE, error.what()};
    }
}

// As accept_checked, for a token that the prompt has of the answer.
void accept_begun(llama_sampler * grammar, const llama_vocab * vocab, llama_token token) {
    try {
        accept_checked(grammar, token);
    } catch (const failure &) {
        if (!llama_vocab_is_eog(vocab, token)) {
            throw;
        }
        throw failure{PLB_E_GRAMMAR_STATE, "the answer that goes on has a token that ends it, " +
                                               std::to_string(token) + ", before its grammar does"};
    }
}

} // namespace

void set_grammar(plb_slot & slot, const llama_vocab * vocab, const plb_sampling & sampling) {
    if (llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_NONE) {
        throw failure{PLB_E_GRAMMAR, "the model has no vocabulary to apply a grammar to"};
    }
    const memory_watch memory;
    check_grammar(vocab, sampling.grammar);
    const plb_grammar_start start = sampling.grammar_start ? *sampling.grammar_start : plb_grammar_start{};
    const tokens triggers = copied(vocab, start.tokens, start.n_tokens);
    check_patterns(start);
    if (start.lazy && start.n_patterns + start.n_tokens == 0) {
        throw failure{PLB_E_SAMPLING, "grammar_start: a lazy grammar needs a trigger"};
    }
    try {
        slot.grammar.reset(
            start.lazy ? llama_sampler_init_grammar_lazy_patterns(
                             vocab, sampling.grammar, "root", const_cast<const char **>(start.patterns),
                             (size_t) start.n_patterns, triggers.data(), triggers.size())
                       : llama_sampler_init_grammar(vocab, sampling.grammar, "root"));
    } catch (const std::runtime_error & error) { // it begins in too many ways
        throw failure{PLB_E_GRAMMAR, error.what()};
    }
    memory.check(); // libllama would call it a grammar that does not parse
    if (!slot.grammar) {
        throw failure{PLB_E_GRAMMAR, "libllama does not accept this grammar: see its log"};
    }
    const tokens prefill = copied(vocab, start.prefill, start.n_prefill);
    const tokens opening = copied(vocab, start.thinking_start, start.n_thinking_start);
    const auto   endings = parts_of(copied(vocab, start.thinking_ends, start.n_thinking_ends));
    if (start.lazy && !opening.empty() && !endings.empty()) {
        slot.thoughts.reset(thinking_init(vocab, opening, endings));
    }
    for (const llama_token token : prefill) {
        if (slot.thoughts) {
            llama_sampler_accept(slot.thoughts.get(), token);
        } else if (!start.lazy) {
            accept_begun(slot.grammar.get(), vocab, token);
        }
    }
}

bool grammar_applies(const plb_slot & slot) {
    return slot.grammar && !(slot.thoughts && is_thinking(slot.thoughts.get()));
}

void accept_in_grammar(plb_slot & slot, llama_token token) {
    if (!slot.grammar) {
        return;
    }
    const bool applies = grammar_applies(slot); // before the token, which may end or begin thoughts
    if (slot.thoughts) {
        llama_sampler_accept(slot.thoughts.get(), token);
        const tokens * end = end_of_thoughts(slot.thoughts.get());
        if (!applies && !is_thinking(slot.thoughts.get()) && end != nullptr) {
            for (const llama_token last : *end) { // it may hold a trigger
                accept_checked(slot.grammar.get(), last);
            }
        }
    }
    if (applies) {
        accept_checked(slot.grammar.get(), token);
    }
}

} // namespace plb
