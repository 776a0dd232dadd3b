// Chats, by llama.cpp's own templates (Jinja) and parsers of answers: what llama-server does between
// a request's JSON and its sampling, and between the text that was generated and the answer's JSON.
#include "guard/guard.hpp"
#include "plb.h"

#include "chat.h"
#include "common.h"
#include "json.h"
#include "json-schema-to-grammar.h"
#include "sampling.h"

#include <cctype>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

struct plb_chat_template {
    const llama_vocab *       vocab;
    common_chat_templates_ptr templates;
    bool jinja;
    bool supports_thinking;
};

struct plb_chat_parser {
    common_chat_parser_params params;
};

namespace {

char * copied(const common_json & value, const plb::memory_watch & memory) {
    return plb::copied_text(value.dump_safe(), memory);
}

// The templates that libllama knows by their names, without Jinja. "chatml" is one of Jinja's too.
bool is_builtin(const std::string & name) {
    std::vector<const char *> names((size_t) llama_chat_builtin_templates(nullptr, 0));
    llama_chat_builtin_templates(names.data(), names.size());
    for (const char * known : names) {
        if (name == known && name != "chatml") {
            return true;
        }
    }
    return false;
}

bool thinks(const common_chat_templates * templates) {
    try {
        return common_chat_templates_support_enable_thinking(templates);
    } catch (const std::exception &) {
        return false; // a template that refuses this one chat
    }
}

common_chat_templates_inputs inputs_of(const plb_chat_template & self, const common_json & request) {
    common_chat_templates_inputs inputs;
    auto capabilities = common_chat_templates_get_caps(self.templates.get());
    inputs.messages    = common_chat_msgs_parse_oaicompat(request.at("messages"));
    inputs.tools       = common_chat_tools_parse_oaicompat(request.value("tools", common_json()));
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(request.value("tool_choice", "auto"));
    inputs.grammar     = request.value("grammar", "");
    if (request.contains("json_schema")) {
        inputs.json_schema = request.at("json_schema").dump();
        json_schema_to_grammar(request.at("json_schema"), true); // throws where it would be incomplete
    }
    inputs.use_jinja = self.jinja;
    inputs.parallel_tool_calls   = request.value("parallel_tool_calls",
                                                 (bool) capabilities["supports_parallel_tool_calls"]);
    inputs.add_generation_prompt = request.value("add_generation_prompt", true);
    if (request.contains("continue_final_message")) {
        inputs.continue_final_message =
            common_chat_continuation_parse(request.at("continue_final_message"));
    }
    inputs.reasoning_format =
        common_reasoning_format_from_name(request.value("reasoning_format", "deepseek"));
    inputs.enable_thinking = request.value("enable_thinking", true) && self.supports_thinking;
    if (request.contains("template_kwargs")) {
        for (const auto & item : request.at("template_kwargs").items()) {
            inputs.chat_template_kwargs[item.key()] = item.value().dump();
        }
    }
    return inputs;
}

std::string escaped(const std::string & word) {
    std::string pattern;
    for (const char c : word) {
        pattern += strchr(".^$|()*+?[]{}\\", c) ? std::string("\\") + c : std::string(1, c);
    }
    return pattern;
}

// A trigger's regular expression, as llama_sampler_init_grammar_lazy_patterns wants it.
std::string pattern_of(const common_grammar_trigger & trigger) {
    const std::string & value = trigger.value;
    switch (trigger.type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:
            return escaped(value);
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN_FULL:
            return value.empty() ? "^$"
                                 : (value.front() == '^' ? "" : "^") + value +
                                       (value.back() == '$' ? "" : "$");
        default:
            return value;
    }
}

// What the template has put at the start of the answer, as tokens.
std::vector<llama_token> prefill(const llama_vocab * vocab, const std::string & text) {
    if (text.empty()) {
        return {};
    }
    auto tokens = common_tokenize(vocab, text, false, true);
    const bool has_space = !tokens.empty() && isspace((unsigned char) text[0]) == 0 &&
                           isspace((unsigned char) common_token_to_piece(vocab, tokens[0], true)[0]) != 0;
    if (has_space) { // some tokenizers put it before the first special token
        tokens.erase(tokens.begin());
    }
    return tokens;
}

// Where content or thoughts end in an answer: what its parser reads up to.
common_json markers_of(const common_peg_arena & parser) {
    common_json markers = common_json::array();
    for (size_t i = 0; i < parser.size(); i++) {
        if (const auto * until = std::get_if<common_peg_until_parser>(&parser.get((common_peg_parser_id) i))) {
            for (const std::string & marker : until->delimiters) {
                markers.push_back(marker);
            }
        }
    }
    return markers;
}

common_json rendered(const llama_vocab * vocab, const common_chat_params & chat) {
    common_params_sampling sampling;
    sampling.grammar_lazy = chat.grammar_lazy;
    if (llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE) {
        common_sampling_add_preserved_tokens(sampling, vocab, chat.preserved_tokens);
        common_sampling_add_grammar_triggers(sampling, vocab, chat.grammar_triggers);
    }
    common_json patterns = common_json::array(), tokens = common_json::array();
    for (const common_grammar_trigger & trigger : sampling.grammar_triggers) {
        if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN) {
            tokens.push_back(trigger.token);
        } else {
            patterns.push_back(pattern_of(trigger));
        }
    }
    common_json texts = common_json::array();
    for (const llama_token token : sampling.preserved_tokens) {
        texts.push_back(common_token_to_piece(vocab, token, true));
    }
    common_json ends = common_json::array();
    for (const std::string & tag : chat.thinking_end_tags) {
        ends.push_back(common_tokenize(vocab, tag, false, true));
    }
    common_json out;
    out["prompt"]            = chat.prompt;
    out["format"]            = common_chat_format_name(chat.format);
    out["grammar"]           = chat.grammar;
    out["grammar_lazy"]      = chat.grammar_lazy;
    out["trigger_patterns"]  = patterns;
    out["trigger_tokens"]    = tokens;
    out["preserved_tokens"]  = sampling.preserved_tokens;
    out["preserved_texts"]   = texts;
    out["stops"]             = chat.additional_stops;
    out["generation_prompt"] = chat.generation_prompt;
    out["markers"]           = markers_of(chat.parser);
    out["prefill"]           = prefill(vocab, chat.generation_prompt);
    out["thinking_start"]    = common_tokenize(vocab, chat.thinking_start_tag, false, true);
    out["thinking_ends"]     = ends;
    return out;
}

} // namespace

plb_chat_template * plb_chat_template_new(const struct llama_model * model, const char * source) {
    return plb::guarded_call((plb_chat_template *) nullptr, [&] {
        const plb::memory_watch memory;
        auto self = std::make_unique<plb_chat_template>();
        const std::string text = source ? source : "";
        self->vocab     = llama_model_get_vocab(model);
        self->templates = common_chat_templates_init(model, text);
        self->jinja     = !is_builtin(text);
        self->supports_thinking = self->jinja && thinks(self->templates.get());
        memory.check();
        return self.release();
    });
}

void plb_chat_template_free(plb_chat_template * self) {
    delete self;
}

char * plb_chat_template_info(const plb_chat_template * self) {
    return plb::guarded_call((char *) nullptr, [&] {
        const plb::memory_watch memory;
        common_json info;
        info["source"]            = common_chat_templates_source(self->templates.get());
        info["capabilities"]      = common_chat_templates_get_caps(self->templates.get());
        info["supports_thinking"] = self->supports_thinking;
        return copied(info, memory);
    });
}

char * plb_chat_render(const plb_chat_template * self, const char * request, plb_chat_parser ** parser) {
    return plb::guarded_call((char *) nullptr, [&] {
        const plb::memory_watch memory;
        const auto inputs = inputs_of(*self, common_json::parse(request));
        common_chat_params chat = common_chat_templates_apply(self->templates.get(), inputs);
        const common_json answer = rendered(self->vocab, chat);
        auto made = std::make_unique<plb_chat_parser>();
        made->params = common_chat_parser_params(chat);
        made->params.parser = std::move(chat.parser);
        char * out = copied(answer, memory);
        *parser = made.release();
        return out;
    });
}

char * plb_chat_parse(const plb_chat_parser * parser, const char * text, size_t size, bool partial) {
    return plb::guarded_call((char *) nullptr, [&] {
        const plb::memory_watch memory;
        const common_chat_input input(std::string(text, size));
        return copied(common_chat_parse(input, partial, parser->params).to_json_oaicompat(), memory);
    });
}

void plb_chat_parser_free(plb_chat_parser * parser) {
    delete parser;
}
