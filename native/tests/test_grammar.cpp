// The check of grammars: what it must let through, what it must refuse, and that libllama agrees. What a
// slot makes of it is tests/step/test_stepper.py's.
#include "check.hpp"
#include "step/engine.hpp"

#include <fstream>
#include <sstream>

namespace {

std::string refusal(const llama_vocab * vocab, const std::string & grammar) {
    try {
        plb::check_grammar(vocab, grammar.c_str());
        return "";
    } catch (const plb::failure & error) {
        CHECK_EQ(error.code, PLB_E_GRAMMAR);
        CHECK(!error.text.empty());
        return error.text;
    }
}

void accepts(const llama_vocab * vocab, const std::string & grammar) {
    const std::string text = refusal(vocab, grammar);
    if (!text.empty()) {
        fprintf(stderr, "refused (%s):\n%s\n", text.c_str(), grammar.c_str());
        exit(1);
    }
    llama_sampler * sampler = llama_sampler_init_grammar(vocab, grammar.c_str(), "root");
    CHECK(sampler != nullptr);
    llama_sampler_free(sampler);
}

void refuses(const llama_vocab * vocab, const std::string & grammar, const char * why) {
    const std::string text = refusal(vocab, grammar);
    if (text.find(why) == std::string::npos) {
        fprintf(stderr, "'%s' is not in '%s', for:\n%s\n", why, text.c_str(), grammar.c_str());
        exit(1);
    }
}

std::string read(const std::string & path) {
    std::ifstream file(path);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

} // namespace

int main(int argc, char ** argv) {
    fixture f(model_path(argc, argv), 64, 1, plb_engine_default_params());
    const llama_vocab * vocab = llama_model_get_vocab(f.model);

    accepts(vocab, "root ::= \"yes\" | \"no\"");
    accepts(vocab, "root ::=");
    accepts(vocab, "# nothing but\r\nroot ::= [] # a comment\r\n\r\n");
    accepts(vocab, "root ::= [^\\x00-\\x1F\\\"\\\\] \"\\u00e9\" [a-z0-9-] . <[5]> !<[6]>");
    accepts(vocab, "root ::= (\"a\" |\n  \"b\" (\"c\")?)* x{2} x{2,} x{0,3} x+\nx ::= [ab]");
    accepts(vocab, "root ::= item*\nitem ::= ws \"x\"\nws ::= [ \\t\\n]*");
    accepts(vocab, "root ::= \"a\" ws* \"b\" ws*\nws ::= [ \\t]*"); // tail calls of what may be empty
    accepts(vocab, "root ::= x\nx ::= \"a\"\nx ::= \"b\"");           // the last definition counts
    accepts(vocab, "root ::= \"é世界\" [α-ω]");
    accepts(vocab, "root ::= \"a\"{0,2000}");
    if (argc > 2) {
        for (const char * name : {"arithmetic", "c", "chess", "english", "japanese", "json",
                                  "json_arr", "list"}) {
            const std::string text = read(std::string(argv[2]) + "/grammars/" + name + ".gbnf");
            if (!text.empty()) { // not in every copy of the sources
                accepts(vocab, text);
            }
        }
    }

    refuses(vocab, "", "no rule 'root'");
    refuses(vocab, "x ::= \"a\"", "no rule 'root'");
    refuses(vocab, "root ::= x", "'x' is used and not defined");
    refuses(vocab, "root = \"a\"", "line 1, column 6: expecting ::=");
    refuses(vocab, "root ::= \"a\"\n  | )", "line 2, column 3: expecting name");
    refuses(vocab, "root ::= \"a", "unexpected end");
    refuses(vocab, "root ::= [a-", "unexpected end");
    refuses(vocab, "root ::= [a", "unexpected end");
    refuses(vocab, "root ::= \"\\q\"", "unknown escape");
    refuses(vocab, "root ::= \"\\x1\"", "expecting 2 hex chars");
    refuses(vocab, "root ::= \"\\", "unknown escape");
    refuses(vocab, "root ::= (\"a\"", "expecting ')'");
    refuses(vocab, "root ::= *", "expecting preceding item");
    refuses(vocab, "root ::= \"\"*", "expecting preceding item");
    refuses(vocab, "root ::= \"a\"{", "expecting an int");
    refuses(vocab, "root ::= \"a\"{1;2}", "expecting ','");
    refuses(vocab, "root ::= \"a\"{2001}", "number of repetitions exceeds");
    refuses(vocab, "root ::= \"a\"{99999999999999999999}", "a number is too large");
    refuses(vocab, "root ::= (\"a\"{0,50}){50}", "exceeds sane defaults");
    refuses(vocab, "root ::= <", "expecting '>'");
    refuses(vocab, "root ::= <two tokens>", "invalid token '<two tokens>'");
    refuses(vocab, "root ::= !x", "expecting '<'");
    // Too big for a token or, where a long has 32 bits, for a number.
    refuses(vocab, "root ::= <[99999999999]>", sizeof(long) > 4 ? "too big" : "a number is too large");
    // the parser would take a maximum below the minimum for billions
    for (const char * backwards : {"{3,2}", "{ 3 , 2 }", "{0000000000003,2}", "{3#\n,2}"}) {
        refuses(vocab, "root ::= (\"a\"" + std::string(backwards) + ")", "below its minimum");
    }
    for (const char * before : {"<a#b>", "[#\\]]", "\"#\\\"\"", "\"\xe2\"\"\"", "#\n"}) {
        refuses(vocab, "root ::= (" + std::string(before) + "\"a\"{3,2})", "below its minimum");
    }
    refuses(vocab, "root ::= root \"a\" | \"b\"", "'root' is left-recursive");
    refuses(vocab, "root ::= \"\" root | \"b\"", "'root' is left-recursive");
    refuses(vocab, "root ::= a \"x\"\na ::= b\nb ::= a \"y\" | \"z\"", "is left-recursive");
    refuses(vocab, "root ::= a root \"x\" | \"y\"\na ::= b\nb ::= \"\"", "'root' is left-recursive");
    std::string doubling, chain, empties, wide;
    for (int i = 0; i < 60; ++i) {
        const std::string next = "r" + std::to_string(i + 1);
        doubling += "r" + std::to_string(i) + " ::= " + next + " | " + next + "\n";
    }
    refuses(vocab, "root ::= r0\n" + doubling + "r60 ::= \"a\"", "can start in too many ways");
    for (int i = 0; i < 20000; ++i) {
        chain += "x" + std::to_string(i) + " ::= x" + std::to_string(i + 1) + "\n";
        empties = "x" + std::to_string(i) + " ::= x" + std::to_string(i + 1) + "\n" + empties;
    }
    refuses(vocab, "root ::= x0\n" + chain + "x20000 ::= \"a\"", "can start in too many ways");
    refuses(vocab, "root ::= x0\n" + empties + "x20000 ::= \"\"", "refer to each other too often");
    // sizes: nesting, rules, elements
    refuses(vocab, "root ::= " + std::string(100000, '('), "nested more than 256 deep");
    for (int i = 0; i < 200; ++i) {
        wide += "x" + std::to_string(i) + " ::= \"a\"{0,2000}\n";
    }
    refuses(vocab, "root ::= \"a\"\n" + wide, "too large");
    const std::string literal = "root ::= \"" + std::string(100000, 'a') + "\"";
    refuses(vocab, literal + "{2000}", "too large");
    refuses(vocab, literal + std::string(100000, '+'), "too large");
    refuses(vocab, literal + "{100}{100}", "too large");
    return 0;
}
