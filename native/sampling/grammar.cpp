// Checks a GBNF grammar before libllama reads it. Its parser prints errors to stderr instead of
// reporting them, runs out of memory on {3,2}, out of stack on deep nesting, takes exponential time
// over rules that share first symbols, and never returns on a left recursion that hides behind rules
// that may be empty. What passes here is read by libllama in reasonable time.
#include "sampling/grammar_parser.hpp"

namespace plb {

namespace {

constexpr uint64_t MAX_VISITS = 20000000; // of libllama's search for left recursion
constexpr uint32_t MAX_DEPTH  = 5000;     // of the same search, which recurses

// Calls visit(begin, end) for each alternative of a rule.
template <typename Visit>
void each_alternative(const rule_t & rule, Visit visit) {
    size_t start = 0;
    for (size_t i = 0; i <= rule.size(); ++i) {
        if (i == rule.size() || rule[i].kind == element::ALTERNATIVE) {
            visit(start, i);
            start = i + 1;
        }
    }
}

struct edge {
    uint32_t to;
    bool     tail; // nothing follows it in its alternative
};
using graph = std::vector<std::vector<edge>>;

// Which rules may stand first in which, given the rules that may be empty.
graph first_symbols(const std::vector<rule_t> & rules, const std::vector<bool> & may_be_empty) {
    graph edges(rules.size());
    for (size_t id = 0; id < rules.size(); ++id) {
        const rule_t & rule = rules[id];
        each_alternative(rule, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end && rule[i].kind == element::RULE; ++i) {
                edges[id].push_back({rule[i].rule, i + 1 == end});
                if (!may_be_empty[rule[i].rule]) {
                    break;
                }
            }
        });
    }
    return edges;
}

std::vector<bool> directly_empty(const std::vector<rule_t> & rules) {
    std::vector<bool> empty(rules.size());
    for (size_t id = 0; id < rules.size(); ++id) {
        each_alternative(rules[id], [&](size_t begin, size_t end) {
            empty[id] = empty[id] || begin == end;
        });
    }
    return empty;
}

// The rules that derive the empty text, by any way.
std::vector<bool> ever_empty(const std::vector<rule_t> & rules) {
    struct alternative { uint32_t rule; size_t n_left; };
    std::vector<alternative> alternatives;
    std::vector<std::vector<size_t>> used_in(rules.size());
    std::vector<bool>     empty = directly_empty(rules);
    std::vector<uint32_t> todo;
    for (size_t id = 0; id < rules.size(); ++id) {
        const rule_t & rule = rules[id];
        each_alternative(rule, [&](size_t begin, size_t end) {
            const bool only_rules = std::all_of(
                rule.begin() + (ptrdiff_t) begin, rule.begin() + (ptrdiff_t) end,
                [](const element & e) { return e.kind == element::RULE; });
            if (begin == end || !only_rules) {
                return;
            }
            for (size_t i = begin; i < end; ++i) {
                used_in[rule[i].rule].push_back(alternatives.size());
            }
            alternatives.push_back({(uint32_t) id, end - begin});
        });
        if (empty[id]) {
            todo.push_back((uint32_t) id);
        }
    }
    while (!todo.empty()) {
        const uint32_t id = todo.back();
        todo.pop_back();
        for (const size_t at : used_in[id]) {
            alternative & alt = alternatives[at];
            if (--alt.n_left == 0 && !empty[alt.rule]) {
                empty[alt.rule] = true;
                todo.push_back(alt.rule);
            }
        }
    }
    return empty;
}

[[noreturn]] void refuse_left_recursion(const std::string & name) {
    refuse_grammar("rule '" + name + "' is left-recursive: it can start with itself");
}

// Depth first, without recursion. enter(id), back(id, edge) for an edge into the open path, and
// leave(id) when all that follows from id is done.
template <typename Back, typename Leave>
void walk(const graph & edges, Back back, Leave leave) {
    enum : uint8_t { NEW, OPEN, DONE };
    struct frame { uint32_t id; size_t next; };
    std::vector<uint8_t> state(edges.size(), NEW);
    std::vector<frame>   path;
    for (uint32_t start = 0; start < edges.size(); ++start) {
        if (state[start] != NEW) {
            continue;
        }
        state[start] = OPEN;
        path.push_back({start, 0});
        while (!path.empty()) {
            const uint32_t id = path.back().id;
            if (path.back().next == edges[id].size()) {
                state[id] = DONE;
                path.pop_back();
                leave(id);
                continue;
            }
            const edge e = edges[id][path.back().next++];
            if (state[e.to] == OPEN) {
                back(e.to);
            } else if (state[e.to] == NEW) {
                state[e.to] = OPEN;
                path.push_back({e.to, 0});
            }
        }
    }
}

// libllama's own search: what it would find, and how long it would take.
void check_search(const grammar_parser & grammar) {
    const graph edges = first_symbols(grammar.rules, directly_empty(grammar.rules));
    std::vector<uint64_t> visits(edges.size(), 1);
    std::vector<uint32_t> depth(edges.size(), 1);
    uint64_t total = 0;
    walk(edges, [&](uint32_t id) { refuse_left_recursion(grammar.names[id]); },
         [&](uint32_t id) {
             for (const edge & e : edges[id]) {
                 visits[id] = std::min(visits[id] + visits[e.to], MAX_VISITS + 1);
                 depth[id]  = std::max(depth[id], depth[e.to] + 1);
             }
             total += visits[id];
             if (total > MAX_VISITS || depth[id] > MAX_DEPTH) {
                 refuse_grammar("rule '" + grammar.names[id] + "' can start in too many ways");
             }
         });
}

// A cycle that leaves something behind each time round makes libllama's stack grow without end.
// One of tail calls only, as in (x*)*, comes back to the same stack and is fine.
void check_growth(const grammar_parser & grammar) {
    const graph edges = first_symbols(grammar.rules, ever_empty(grammar.rules));
    // strongly connected components: order by finish, then gather on the reversed graph
    std::vector<uint32_t> order;
    walk(edges, [](uint32_t) {}, [&](uint32_t id) { order.push_back(id); });
    graph reversed(edges.size());
    for (uint32_t id = 0; id < edges.size(); ++id) {
        for (const edge & e : edges[id]) {
            reversed[e.to].push_back({id, e.tail});
        }
    }
    std::vector<uint32_t> component(edges.size(), UINT32_MAX);
    std::vector<uint32_t> todo;
    for (auto start = order.rbegin(); start != order.rend(); ++start) {
        if (component[*start] != UINT32_MAX) {
            continue;
        }
        component[*start] = *start;
        todo.push_back(*start);
        while (!todo.empty()) {
            const uint32_t id = todo.back();
            todo.pop_back();
            for (const edge & e : reversed[id]) {
                if (component[e.to] == UINT32_MAX) {
                    component[e.to] = *start;
                    todo.push_back(e.to);
                }
            }
        }
    }
    for (uint32_t id = 0; id < edges.size(); ++id) {
        for (const edge & e : edges[id]) {
            if (!e.tail && component[id] == component[e.to]) {
                refuse_left_recursion(grammar.names[id]);
            }
        }
    }
}

} // namespace

void check_grammar(const llama_vocab * vocab, const char * text) {
    grammar_parser grammar(vocab, text);
    grammar.parse();
    check_search(grammar);
    check_growth(grammar);
}

} // namespace plb
