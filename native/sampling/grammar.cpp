// Checks a GBNF grammar before libllama gets it. libllama's own parser reads it; what that parser does
// not survive is refused before, and what its grammars do not survive is refused after:
//   before  groups nested without end (it recurses), repetitions that multiply to gigabytes, {3,2}
//   after   left recursion, also behind rules that may be empty: the grammar's stacks grow without end;
//           rules that can start in too many ways: the search for left recursion takes exponential time
// The parser's parse() prints what is wrong; its parse_rule(), which is called here, throws it.
#include "step/engine.hpp"

#include "llama-grammar.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace plb {

namespace {

constexpr int      MAX_NESTING     = 256;
constexpr uint64_t MAX_REPETITIONS = 2000; // the parser's own limit: above it, a maximum is none
constexpr uint64_t MAX_RULES       = 100000;
constexpr uint64_t MAX_ELEMENTS    = 4000000;
constexpr uint64_t MAX_CALLS       = 20000000; // of libllama's search for left recursion
constexpr uint32_t MAX_DEPTH       = 5000;     // of the same search, which recurses
constexpr int      MAX_SWEEPS      = 100;

[[noreturn]] void refuse(const std::string & what) {
    throw failure{PLB_E_GRAMMAR, what};
}

[[noreturn]] void refuse_at(const char * text, const char * at, const std::string & what) {
    const char * line = at;
    while (line > text && line[-1] != '\n') {
        --line;
    }
    refuse("line " + std::to_string(1 + std::count(text, line, '\n')) + ", column " +
           std::to_string(at - line + 1) + ": " + what);
}

// -- before the parser: how large its rules can get ------------------------------------------------

const char * skip_space(const char * at) {
    while (*at == '#' || (*at && strchr(" \t\r\n", *at))) {
        at += *at == '#' ? strcspn(at, "\r\n") : 1;
    }
    return at;
}

// Behind the literal, the class or the token that starts here.
const char * skip_literal(const char * at) {
    const char end = *at == '[' ? ']' : *at == '<' ? '>' : '"';
    const bool characters = end != '>';
    for (++at; *at && *at != end; ++at) {
        const auto lead = (unsigned char) *at;
        int n = !characters   ? 0
                : lead == '\\' ? 1
                              : (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0);
        for (; n > 0 && at[1]; --n) { // the parser looks at none of these
            ++at;
        }
    }
    return *at ? at + 1 : at;
}

uint64_t read_number(const char *& at) {
    char * end = nullptr;
    const uint64_t number = *at >= '0' && *at <= '9' ? strtoull(at, &end, 10) : 0;
    at = end != nullptr ? end : at;
    return number;
}

// How often {low}, {low,} or {low,high} copies what it repeats.
uint64_t repetitions(const char * text, const char * brace) {
    const char * at = skip_space(brace + 1);
    const uint64_t low = read_number(at);
    uint64_t high = low;
    at = skip_space(at);
    if (*at == ',') {
        at = skip_space(at + 1);
        const char * digits = at;
        high = read_number(at);
        if (at != digits && high < low) {
            refuse_at(text, brace, "a repetition whose maximum is below its minimum");
        }
    }
    return std::clamp<uint64_t>(std::max(low, high), 1, MAX_REPETITIONS);
}

void check_size(const char * text) {
    int nesting = 0;
    uint64_t n_rules = 0, n_elements = 0;
    uint64_t symbol = 0; // elements of the last symbol, its repetitions included
    for (const char * at = skip_space(text), * start = at; *at; start = at = skip_space(at)) {
        if (*at == '"' || *at == '[' || *at == '<') {
            at = skip_literal(at);
            symbol = (uint64_t) (at - start);
        } else if (*at == '{') {
            const uint64_t n = repetitions(text, at);
            at += strcspn(at, "}");
            symbol = std::min(symbol * n, MAX_ELEMENTS + 1);
            n_rules += n;
        } else if (strchr("*+?", *at)) {
            ++at;
            ++n_rules;
        } else {
            nesting += *at == '(' ? 1 : *at == ')' ? -1 : 0;
            n_rules += *at == '(' || *at == '=';
            symbol = 1;
            ++at;
        }
        n_elements += symbol;
        if (nesting > MAX_NESTING) {
            refuse_at(text, start, "groups nested more than " + std::to_string(MAX_NESTING) + " deep");
        }
        if (n_rules > MAX_RULES || n_elements > MAX_ELEMENTS) {
            refuse_at(text, start, "the grammar is too large, repetitions included");
        }
    }
}

// -- the parser ------------------------------------------------------------------------------------

void parse(llama_grammar_parser & parser, const char * text) {
    try {
        for (const char * at = skip_space(text); *at;) {
            at = parser.parse_rule(at);
        }
    } catch (const std::out_of_range &) {
        refuse("a number is too large");
    } catch (const std::runtime_error & error) {
        // "expecting name at ...": the end of the text tells where
        const std::string what = error.what(), whole = text;
        const size_t at = what.find(" at ");
        const std::string tail = at == std::string::npos ? "" : what.substr(at + 4);
        if (at == std::string::npos || tail.size() > whole.size() ||
            whole.compare(whole.size() - tail.size(), tail.size(), tail) != 0) {
            refuse(what);
        }
        refuse_at(text, text + (whole.size() - tail.size()), what.substr(0, at));
    }
    for (const auto & [name, id] : parser.symbol_ids) {
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            refuse("rule '" + name + "' is used and not defined");
        }
    }
    if (parser.symbol_ids.count("root") == 0) {
        refuse("there is no rule 'root'");
    }
}

// -- after the parser: what its rules can start with -----------------------------------------------

bool ends_alternative(const llama_grammar_element & element) {
    return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
}

// The rules that derive the empty text, by any way.
std::vector<bool> find_empty(const llama_grammar_rules & rules) {
    std::vector<bool> empty(rules.size());
    const auto has_empty_alternative = [&](const llama_grammar_rule & rule) {
        bool all = true;
        for (const llama_grammar_element & element : rule) {
            if (!ends_alternative(element)) {
                all = all && element.type == LLAMA_GRETYPE_RULE_REF && empty[element.value];
            } else if (all) {
                return true;
            } else {
                all = true;
            }
        }
        return false;
    };
    for (int sweep = 0; sweep < MAX_SWEEPS; ++sweep) {
        bool changed = false;
        for (size_t id = rules.size(); id-- > 0;) {
            if (!empty[id] && has_empty_alternative(rules[id])) {
                empty[id] = changed = true;
            }
        }
        if (!changed) {
            return empty;
        }
    }
    refuse("rules that may be empty refer to each other too often");
}

// Walks from each rule to those that may stand first in it, as libllama's search does: what that search
// would find, and how long it would take.
class search {
public:
    explicit search(const llama_grammar_parser & parser)
        : rules_(parser.rules), empty_(find_empty(parser.rules)), found_(parser.rules.size()),
          names_(parser.rules.size()) {
        for (const auto & [name, id] : parser.symbol_ids) {
            names_[id] = name.substr(0, name.find('_')); // a group's and a repetition's: the rule's own
        }
        uint64_t n_calls = 0;
        for (uint32_t id = 0; id < rules_.size(); ++id) {
            n_calls += explore(id, 0).n_calls;
            check(id, n_calls, 0);
        }
    }

private:
    struct reach {
        uint64_t n_calls = 0; // 0: not there yet
        uint32_t depth  = 0; // 0: on the way
    };

    const reach & explore(uint32_t id, uint32_t level) {
        reach & here = found_[id];
        if (here.depth > 0) {
            return here;
        }
        if (here.n_calls > 0) {
            refuse("rule '" + names_[id] + "' is left-recursive: it can start with itself");
        }
        check(id, 0, level);
        uint64_t n_calls = here.n_calls = 1;
        uint32_t depth  = 0;
        const llama_grammar_rule & rule = rules_[id];
        size_t first = 0; // of the alternative
        bool reachable = true; // all before it in the alternative may be empty
        for (size_t i = 0; i < rule.size(); ++i) {
            if (ends_alternative(rule[i])) {
                first = i + 1;
                reachable = true;
                continue;
            }
            reachable = reachable && rule[i].type == LLAMA_GRETYPE_RULE_REF;
            // X ::= S X | nothing, a repetition of what may be empty, comes back to the same stack
            const bool repeats = i > first && rule[i].value == id && ends_alternative(rule[i + 1]);
            if (reachable && !repeats) {
                const reach & next = explore(rule[i].value, level + 1);
                n_calls += next.n_calls;
                depth = std::max(depth, next.depth);
            }
            reachable = reachable && empty_[rule[i].value];
        }
        check(id, n_calls, depth + 1);
        here = {n_calls, depth + 1};
        return here;
    }

    void check(uint32_t id, uint64_t n_calls, uint32_t depth) const {
        if (n_calls > MAX_CALLS  || depth > MAX_DEPTH) {
            refuse("rule '" + names_[id] + "' can start in too many ways");
        }
    }

    const llama_grammar_rules & rules_;
    std::vector<bool>        empty_;
    std::vector<reach>       found_;
    std::vector<std::string> names_;
};

} // namespace

void check_grammar(const llama_vocab * vocab, const char * text) {
    check_size(text);
    llama_grammar_parser parser(vocab);
    parse(parser, text);
    search all(parser);
}

} // namespace plb
