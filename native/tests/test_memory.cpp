// Out of memory at every allocation of a call, one after another: the call fails with a code and a text,
// nothing else has changed, and the next try succeeds.
//
// PLB_TEST_ALLOCATIONS=all: every one also where they are thousands (minutes); else some of those.
#include "allocations.hpp"
#include "check.hpp"

#include <cstring>
#include <functional>
#include <string>

namespace {

constexpr long MOST = 200000, DENSE = 50;
const char * const which = getenv("PLB_TEST_ALLOCATIONS");
const bool all = which != nullptr && strcmp(which, "all") == 0;

// `call` with its first, second, … allocation failing, until it needs no more of them. It returns
// whether it has succeeded, and looks itself whether a failure is a proper one. Some allocations
// may fail without harm (a hint, a log line), so a success is no error. Returns how many there are.
long walk(const char * name, const std::function<bool()> & call) {
    long n = 0, n_failed = 0;
    for (;; n += all ? 1 : 1 + n / DENSE) {
        CHECK(n < MOST);
        allocation_failed      = false;
        allocations_to_failure = n + 1;
        const bool done = call();
        allocations_to_failure = 0;
        n_failed += !done;
        if (!allocation_failed) {
            CHECK(done);
            break;
        }
    }
    printf("%-28s %6ld allocations, %6ld failures\n", name, n, n_failed);
    return n;
}

bool done(int32_t code, const char * text) {
    if (code == PLB_OK) {
        return true;
    }
    CHECK_EQ(code, PLB_E_MEMORY);
    CHECK(text[0] != '\0');
    return false;
}

void engines(fixture & f) {
    plb_engine_params params = plb_engine_default_params();
    params.n_logprobs_max = 4;
    params.n_threads      = 3;
    params.n_steps_max    = 8;
    params.n_draft_max    = 2;
    params.drafter        = PLB_DRAFTER_NGRAM;
    params.device_sampling = PLB_DEVICE_SAMPLING_ON;
    CHECK(walk("plb_engine_new", [&] {
        plb_engine * made = nullptr;
        const int32_t code = plb_engine_new(f.ctx, &params, &made);
        CHECK((code == PLB_OK) == (made != nullptr));
        if (made != nullptr) {
            plb_engine_detach(made);
        }
        plb_engine_free(made);
        return done(code, "memory"); // there is no engine yet that could have a text
    }) > 20);
}

struct request {
    const char * name;
    plb_sampling sampling;
};

std::vector<request> requests() {
    static const llama_logit_bias bias[] = {{5, 2.0f}, {6, -2.0f}};
    static const llama_token stops[] = {7, 9};
    static const char * const patterns[] = {"x+y"};
    static const llama_token triggers[] = {11};
    static plb_grammar_start start = {};
    start.lazy       = 1;
    start.n_patterns = 1;
    start.patterns   = patterns;
    start.n_tokens   = 1;
    start.tokens     = triggers;
    plb_sampling plain = plb_sampling_default();
    plain.max_tokens = 20;
    plain.seed       = 1;
    plb_sampling much = plain;
    much.n_logit_bias   = 2;
    much.logit_bias     = bias;
    much.n_stop_tokens  = 2;
    much.stop_tokens    = stops;
    much.repeat_penalty = 1.1f;
    much.penalty_last_n = 32;
    much.n_logprobs     = 2;
    plb_sampling chain = plain;
    chain.typical_p = 0.9f;
    plb_sampling grammar = plain;
    grammar.grammar = "root ::= item+\nitem ::= [a-z]{1,3} | \"(\" item \")\"";
    plb_sampling lazy = grammar;
    lazy.grammar_start = &start;
    return {{"plain", plain}, {"bias, stops, penalties", much}, {"chain", chain},
            {"grammar", grammar}, {"lazy grammar", lazy}};
}

void slots(fixture & f, const request & each) {
    const std::vector<llama_token> prompt = {1, 20, 40, 60};
    char error[256] = "";
    walk((std::string("plb_slot_new: ") + each.name).c_str(), [&] {
        plb_slot * slot = nullptr;
        const int32_t code = plb_slot_new(f.engine, &each.sampling, prompt.data(), 4, &slot, error,
                                          sizeof error);
        CHECK((code == PLB_OK) == (slot != nullptr));
        plb_slot_free(slot);
        return done(code, error);
    });
    walk((std::string("plb_slot_set: ") + each.name).c_str(), [&] {
        return done(plb_slot_set(f.engine, 0, &each.sampling, prompt.data(), 4),
                    plb_last_error(f.engine));
    });
    walk((std::string("plb_slot_copy: ") + each.name).c_str(), [&] {
        CHECK_EQ(plb_slot_clear(f.engine, 1), PLB_OK);
        const bool copied = done(plb_slot_copy(f.engine, 0, 1), plb_last_error(f.engine));
        plb_slot_info info = {};
        CHECK((plb_slot_get_info(f.engine, 1, &info) == PLB_OK) == copied); // whole or not there
        return copied;
    });
}

// Slot 0 fails alone where it needs memory to sample, as the grammar does; slot 1 samples all the same.
void steps(fixture & f, const request & each) {
    const std::vector<llama_token> prompt = {1, 20, 40, 60};
    const plb_sampling plain = requests().front().sampling;
    walk((std::string("plb_step: ") + each.name).c_str(), [&] {
        const long at = allocations_to_failure;
        allocations_to_failure = 0;
        llama_memory_clear(llama_get_memory(f.ctx), true);
        CHECK_EQ(plb_slot_set(f.engine, 0, &each.sampling, nullptr, 0), PLB_OK);
        CHECK_EQ(plb_slot_set(f.engine, 1, &plain, nullptr, 0), PLB_OK);
        f.prompt(0, prompt, 0);
        f.prompt(4, prompt, 1);
        allocations_to_failure = at;
        const int32_t code = plb_step(f.engine, 8);
        allocations_to_failure = 0;
        if (code != PLB_OK) { // libllama's own allocations: the step was not computed
            CHECK(plb_last_error(f.engine)[0] != '\0');
            return false;
        }
        CHECK_EQ(f.views.info->n_results, 2);
        const bool sampled = f.views.results[0].finish != PLB_FINISH_ERROR;
        if (!sampled) {
            CHECK(plb_slot_error(f.engine, 0)[0] != '\0');
        }
        CHECK(f.views.results[1].finish != PLB_FINISH_ERROR || sampled); // one of them at most
        return sampled && f.views.results[1].finish != PLB_FINISH_ERROR;
    });
}

// "out of memory" is the last line that was logged.
bool logged_no_memory() {
    char text[4096];
    const int32_t size = plb_log_errors(text, sizeof text);
    const std::string lines(text, size > 0 ? (size_t) size : 0);
    const std::string last = std::string(plb_code_text(PLB_E_MEMORY)) + "\n";
    return lines.size() >= last.size() &&
           lines.compare(lines.size() - last.size(), last.size(), last) == 0;
}

// A call that gives a text, always the same one, or nothing and a line in the log.
void texts(const std::string & name, const std::function<char *()> & make) {
    char * whole = make();
    CHECK(whole != nullptr);
    walk(name.c_str(), [&] {
        plb_log_mark();
        char * text = make();
        const bool made = text != nullptr;
        CHECK(made ? strcmp(text, whole) == 0 : logged_no_memory());
        plb_text_free(text);
        return made;
    });
    plb_text_free(whole);
}

void schemas() {
    texts("plb_json_schema_to_gbnf", [] {
        return plb_json_schema_to_gbnf(R"({"type": "object", "required": ["a", "c"], "properties": {
            "a": {"type": "string", "pattern": "^[a-z]{2,3}(x|y)$"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
            "c": {"anyOf": [{"const": 1}, {"enum": ["x", null]}, {"format": "date", "type": "string"}]}
        }, "$defs": {"n": {"type": "integer", "minimum": -7, "maximum": 120}}})");
    });
}

constexpr char TEMPLATE_WITH_TOOLS[] =
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}"
    "<tool_call>{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
constexpr char CHAT_WITH_TOOLS[] = R"({"messages": [{"role": "user", "content": "Weather?"}], "tools": [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties":
    {"city": {"type": "string"}}}}}]})";
constexpr char ANSWER[] = R"(Well. <tool_call>{"name": "weather", "arguments": {"city": "Rome"}})";

void chats(const llama_model * model, const std::string & name, const char * source) {
    texts("plb_chat_template_new: " + name, [&] { // what it says of itself is right, or it is not made
        plb_chat_template * made = plb_chat_template_new(model, source);
        char * info = made != nullptr ? plb_chat_template_info(made) : nullptr;
        plb_chat_template_free(made);
        return info;
    });
    plb_chat_template * chat = plb_chat_template_new(model, source);
    CHECK(chat != nullptr);
    texts("plb_chat_render: " + name, [&] {
        plb_chat_parser * parser = nullptr;
        char * text = plb_chat_render(chat, CHAT_WITH_TOOLS, &parser);
        CHECK((text != nullptr) == (parser != nullptr));
        plb_chat_parser_free(parser);
        return text;
    });
    plb_chat_parser * parser = nullptr;
    plb_text_free(plb_chat_render(chat, CHAT_WITH_TOOLS, &parser));
    CHECK(parser != nullptr);
    texts("plb_chat_parse: " + name, [&] {
        return plb_chat_parse(parser, ANSWER, sizeof ANSWER - 1, true);
    });
    plb_chat_parser_free(parser);
    plb_chat_template_free(chat);
}

// What a template's names and loops take: vendor/patches/jinja-work.patch.
void loops(const llama_model * model) {
    const auto allocations = [&](const std::string & source) {
        plb_chat_template * chat = plb_chat_template_new(model, source.c_str());
        plb_chat_parser * parser = nullptr;
        const long before = n_allocations;
        plb_text_free(plb_chat_render(chat, CHAT_WITH_TOOLS, &parser));
        const long n = n_allocations - before;
        CHECK(parser != nullptr);
        plb_chat_parser_free(parser);
        plb_chat_template_free(chat);
        return n;
    };
    const long named = allocations("{% for i in range(1000) %}{{ loop.last }}{% endfor %}");
    CHECK(2 * allocations("{% for i in range(1000) %}{{ i }}{% endfor %}") < named);
    std::string others;
    for (int i = 0; i < 100; ++i) {
        others += "{% set a_name_too_long_to_lie_in_a_string_" + std::to_string(i) + " = 1 %}";
    }
    const std::string sets = "{% for i in range(1000) %}{% set a_name_too_long_to_lie_in_a_string = i %}{% endfor %}";
    CHECK(allocations(others + sets) < 2 * allocations(sets));
}

} // namespace

int main(int argc, char ** argv) {
    plb_guard_install();
    plb_engine_params params = plb_engine_default_params();
    params.n_logprobs_max = 4;
    params.n_threads      = 1; // all that a step needs is of this thread
    fixture f(model_path(argc, argv), 128, 2, params);
    plb_log_install();
    engines(f);
    schemas();
    chats(f.model, "chatml", "chatml");
    chats(f.model, "tools", TEMPLATE_WITH_TOOLS);
    loops(f.model);
    for (const request & each : requests()) {
        slots(f, each);
        steps(f, each);
    }
    params.device_sampling = PLB_DEVICE_SAMPLING_ON;
    params.n_outputs_max   = 2;
    fixture on_device(model_path(argc, argv), 128, 2, params);
    steps(on_device, requests().front());
    CHECK_EQ(on_device.views.info->on_device, 1);
    return 0;
}
