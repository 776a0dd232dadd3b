// GBNF into the rules that libllama's parser makes of it. For grammar.cpp.
#pragma once

#include "step/engine.hpp"

#include <algorithm>
#include <cstring>
#include <map>

namespace plb {

constexpr size_t   MAX_NESTING     = 256;
constexpr size_t   MAX_RULES       = 100000;
constexpr size_t   MAX_ELEMENTS    = 4000000;
constexpr uint64_t MAX_REPETITIONS = 2000;     // libllama's own limit

struct element {
    enum kind_t { TERMINAL, RULE, ALTERNATIVE } kind;
    uint32_t rule;
};
using rule_t = std::vector<element>;

inline bool is_word(char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-';
}

inline bool is_digit(char c) {
    return c >= '0' && c <= '9';
}

[[noreturn]] inline void refuse_grammar(const std::string & what) {
    throw failure{PLB_E_GRAMMAR, what};
}

// The same language, and the same synthetic rules for groups and repetitions, as libllama's parser.
class grammar_parser {
public:
    grammar_parser(const llama_vocab * vocab, const char * text) : vocab(vocab), text(text), pos(text) {}

    std::vector<rule_t>      rules;
    std::vector<std::string> names; // of each rule; a synthetic one has its parent's
    std::map<std::string, uint32_t> ids;

    void parse() {
        space(true);
        while (*pos) {
            definition();
        }
        for (const auto & [name, id] : ids) {
            if (!defined[id]) {
                refuse_grammar("rule '" + name + "' is used and not defined");
            }
        }
        if (ids.find("root") == ids.end()) {
            refuse_grammar("there is no rule 'root'");
        }
    }

private:
    const llama_vocab * vocab;
    const char * text;
    const char * pos;
    std::vector<bool> defined;
    size_t nesting    = 0;
    size_t n_elements = 0;

    [[noreturn]] void fail(const char * at, const std::string & what) const {
        const char * line_start = at;
        while (line_start > text && line_start[-1] != '\n') {
            --line_start;
        }
        const auto line = 1 + std::count(text, line_start, '\n');
        refuse_grammar("line " + std::to_string(line) + ", column " +
               std::to_string(at - line_start + 1) + ": " + what);
    }

    uint32_t new_rule(const std::string & name) {
        if (rules.size() >= MAX_RULES) {
            fail(pos, "more than " + std::to_string(MAX_RULES) + " rules, repetitions included");
        }
        rules.emplace_back();
        names.push_back(name);
        defined.push_back(false);
        return (uint32_t) rules.size() - 1;
    }

    uint32_t named_rule(const std::string & name) {
        const auto found = ids.find(name);
        return found != ids.end() ? found->second : ids[name] = new_rule(name);
    }

    void push(rule_t & rule, element::kind_t kind, uint32_t id = 0) {
        if (++n_elements > MAX_ELEMENTS) {
            fail(pos, "the grammar is too large, repetitions included");
        }
        rule.push_back({kind, id});
    }

    void space(bool newlines) {
        while (*pos == ' ' || *pos == '\t' || *pos == '#' ||
               (newlines && (*pos == '\r' || *pos == '\n'))) {
            if (*pos == '#') {
                pos += strcspn(pos, "\r\n");
            } else {
                ++pos;
            }
        }
    }

    std::string word() {
        const char * start = pos;
        while (is_word(*pos)) {
            ++pos;
        }
        if (pos == start) {
            fail(start, "expected a rule name");
        }
        return std::string(start, pos);
    }

    uint64_t integer() {
        if (!is_digit(*pos)) {
            fail(pos, "expected a number");
        }
        uint64_t value = 0;
        for (; is_digit(*pos); ++pos) {
            value = std::min<uint64_t>(value * 10 + (uint64_t) (*pos - '0'), UINT32_MAX);
        }
        return value;
    }

    void character() {
        if (*pos == '\0') {
            fail(pos, "unexpected end");
        }
        if (*pos != '\\') {
            const unsigned char lead = (unsigned char) *pos++;
            const int rest = lead >= 0xF0 ? 3 : lead >= 0xE0 ? 2 : lead >= 0xC0 ? 1 : 0;
            for (int i = 0; i < rest && *pos; ++i) {
                ++pos;
            }
            return;
        }
        const char * start = pos++;
        const int digits = *pos == 'x' ? 2 : *pos == 'u' ? 4 : *pos == 'U' ? 8 : 0;
        if (digits == 0 && (*pos == '\0' || strchr("trn\\\"[]-", *pos) == nullptr)) {
            fail(start, "unknown escape");
        }
        ++pos;
        for (int i = 0; i < digits; ++i, ++pos) {
            if (*pos == '\0' || strchr("0123456789abcdefABCDEF", *pos) == nullptr) {
                fail(start, "expected " + std::to_string(digits) + " hexadecimal digits");
            }
        }
    }

    void definition() {
        const char * start = pos;
        const std::string name = word();
        space(false);
        const uint32_t id = named_rule(name);
        if (strncmp(pos, "::=", 3) != 0) {
            fail(pos, "expected ::= after '" + name + "'");
        }
        pos += 3;
        space(true);
        rules[id] = alternatives(name, false); // a second definition replaces the first
        defined[id] = true;
        if (*pos == '\r') {
            pos += pos[1] == '\n' ? 2 : 1;
        } else if (*pos == '\n') {
            ++pos;
        } else if (*pos) {
            fail(pos, "unexpected character in the rule that starts with '" +
                      std::string(start, std::min<size_t>(strlen(start), 20)) + "'");
        }
        space(true);
    }

    rule_t alternatives(const std::string & name, bool nested) {
        if (++nesting > MAX_NESTING) {
            fail(pos, "groups nested more than " + std::to_string(MAX_NESTING) + " deep");
        }
        rule_t rule;
        sequence(name, rule, nested);
        while (*pos == '|') {
            push(rule, element::ALTERNATIVE);
            ++pos;
            space(true);
            sequence(name, rule, nested);
        }
        --nesting;
        return rule;
    }

    void sequence(const std::string & name, rule_t & rule, bool nested) {
        size_t   last   = rule.size(); // where the symbol starts that a repetition repeats
        uint64_t weight = 1;           // rules that it stands for
        const auto symbol = [&] { last = rule.size(); weight = 1; };
        while (*pos) {
            const char * start = pos;
            if (*pos == '"') {
                symbol();
                for (++pos; *pos != '"';) {
                    character();
                    push(rule, element::TERMINAL);
                }
                ++pos;
            } else if (*pos == '[') {
                symbol();
                pos += pos[1] == '^' ? 2 : 1;
                bool empty = true;
                while (*pos != ']') {
                    character();
                    if (pos[0] == '-' && pos[1] != ']') {
                        ++pos;
                        character();
                    }
                    empty = false;
                }
                ++pos;
                if (!empty) {
                    push(rule, element::TERMINAL);
                }
            } else if (*pos == '<' || *pos == '!') {
                symbol();
                token();
                push(rule, element::TERMINAL);
            } else if (is_word(*pos)) {
                const uint32_t id = named_rule(word());
                symbol();
                push(rule, element::RULE, id);
            } else if (*pos == '(') {
                ++pos;
                space(true);
                const size_t n_before = rules.size();
                const uint32_t id = new_rule(name);
                rule_t group = alternatives(name, true);
                rules[id] = std::move(group);
                defined[id] = true;
                symbol();
                weight = std::max<uint64_t>(1, rules.size() - n_before);
                push(rule, element::RULE, id);
                if (*pos != ')') {
                    fail(pos, "expected ')'");
                }
                ++pos;
            } else if (*pos == '.') {
                symbol();
                push(rule, element::TERMINAL);
                ++pos;
            } else if (*pos == '*' || *pos == '+' || *pos == '?') {
                const uint64_t low  = *pos == '+' ? 1 : 0;
                const uint64_t high = *pos == '?' ? 1 : UINT64_MAX;
                ++pos;
                repeat(start, name, rule, last, weight, low, high);
            } else if (*pos == '{') {
                ++pos;
                space(nested);
                const uint64_t low = integer();
                uint64_t high = low;
                space(nested);
                if (*pos == ',') {
                    ++pos;
                    space(nested);
                    high = is_digit(*pos) ? integer() : UINT64_MAX;
                    space(nested);
                }
                if (*pos != '}') {
                    fail(pos, "expected '}'");
                }
                ++pos;
                repeat(start, name, rule, last, weight, low, high);
            } else {
                return;
            }
            space(nested);
        }
    }

    void token() {
        const char * start = pos;
        pos += *pos == '!' ? 1 : 0;
        if (*pos != '<') {
            fail(pos, "expected '<'");
        }
        if (pos[1] == '[') {
            pos += 2;
            if (integer() >= UINT32_MAX) {
                fail(start, "the token id is too large");
            }
            if (pos[0] != ']' || pos[1] != '>') {
                fail(pos, "expected ']>'");
            }
            pos += 2;
            return;
        }
        const size_t length = strcspn(pos, ">");
        if (pos[length] == '\0') {
            fail(start, "expected '>'");
        }
        llama_token tokens[2];
        if (llama_tokenize(vocab, pos, (int32_t) length + 1, tokens, 2, false, true) != 1) {
            fail(start, "this is not one token of the vocabulary");
        }
        pos += length + 1;
    }

    // S{low,high}: S low times, then a chain of rules S' ::= S S' | with nothing after it
    void repeat(const char * at, const std::string & name, rule_t & rule, size_t last,
                uint64_t & weight, uint64_t low, uint64_t high) {
        if (last == rule.size()) {
            fail(at, "nothing to repeat before this");
        }
        if (low > MAX_REPETITIONS) {
            fail(at, "more than " + std::to_string(MAX_REPETITIONS) + " repetitions");
        }
        if (high < low) {
            fail(at, "a repetition whose maximum is below its minimum");
        }
        if (high > MAX_REPETITIONS) {
            high = UINT64_MAX; // as libllama does
        }
        const bool     endless = high == UINT64_MAX;
        const uint64_t total   = !endless && high > 0 ? high : std::max<uint64_t>(low, 1);
        if (weight * total > MAX_REPETITIONS) {
            fail(at, "repetitions of repetitions: more than " + std::to_string(MAX_REPETITIONS) +
                     " rules");
        }
        const rule_t once(rule.begin() + (ptrdiff_t) last, rule.end());
        if (low == 0) {
            rule.resize(last);
        }
        for (uint64_t i = 1; i < low; ++i) {
            for (const element & e : once) {
                push(rule, e.kind, e.rule);
            }
        }
        uint32_t previous = 0;
        const uint64_t n_optional = endless ? 1 : high - low;
        for (uint64_t i = 0; i < n_optional; ++i) {
            const uint32_t id = new_rule(name);
            rule_t optional;
            for (const element & e : once) {
                push(optional, e.kind, e.rule);
            }
            if (endless || i > 0) {
                push(optional, element::RULE, endless ? id : previous);
            }
            push(optional, element::ALTERNATIVE);
            rules[id] = std::move(optional);
            defined[id] = true;
            previous = id;
        }
        if (n_optional > 0) {
            push(rule, element::RULE, previous);
        }
        weight *= total;
    }
};

} // namespace plb
