// What the files of llama.cpp's `common` that are compiled into the shim need of its other files,
// which belong to upstream's command line tools: functions on text and tokens, and a log.
#include "guard/guard.hpp"

#include "common.h"
#include "log.h"
#include "sampling.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <stdexcept>

// -- text --

std::string string_join(const std::vector<std::string> & values, const std::string & separator) {
    std::string joined;
    for (size_t i = 0; i < values.size(); ++i) {
        joined += (i ? separator : "") + values[i];
    }
    return joined;
}

std::vector<std::string> string_split(const std::string & text, const std::string & delimiter) {
    std::vector<std::string> parts;
    size_t begin = 0;
    for (size_t end; (end = text.find(delimiter, begin)) != std::string::npos;
         begin = end + delimiter.size()) {
        parts.push_back(text.substr(begin, end - begin));
    }
    parts.push_back(text.substr(begin));
    return parts;
}

std::string string_repeat(const std::string & text, size_t n) {
    std::string repeated;
    repeated.reserve(text.size() * n);
    for (size_t i = 0; i < n; ++i) {
        repeated += text;
    }
    return repeated;
}

void string_replace_all(std::string & text, const std::string & search, const std::string & replace) {
    if (search.empty()) {
        return;
    }
    for (size_t at = 0; (at = text.find(search, at)) != std::string::npos; at += replace.size()) {
        text.replace(at, search.size(), replace);
    }
}

// -- tokens --

std::vector<llama_token> common_tokenize(const llama_vocab * vocab, const std::string & text,
                                         bool add_special, bool parse_special) {
    std::vector<llama_token> tokens(text.size() + 2);
    const auto write = [&] {
        return llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(),
                              (int32_t) tokens.size(), add_special, parse_special);
    };
    int32_t n = write();
    if (n < 0 && n != INT32_MIN) {
        tokens.resize((size_t) -n);
        n = write();
    }
    if (n < 0) {
        throw std::runtime_error("the text has more tokens than fit an int32");
    }
    tokens.resize((size_t) n);
    return tokens;
}

std::string common_token_to_piece(const llama_vocab * vocab, llama_token token, bool special) {
    std::string piece(32, '\0');
    const auto write = [&] {
        return llama_token_to_piece(vocab, token, piece.data(), (int32_t) piece.size(), 0, special);
    };
    int32_t n = write();
    if (n < 0) {
        piece.resize((size_t) -n);
        n = write();
    }
    piece.resize((size_t) std::max(n, 0));
    return piece;
}

void common_sampling_add_preserved_tokens(common_params_sampling & sampling, const llama_vocab * vocab,
                                          const std::vector<std::string> & texts) {
    for (const std::string & text : texts) {
        const auto tokens = common_tokenize(vocab, text, false, true);
        if (tokens.size() == 1) {
            sampling.preserved_tokens.insert(tokens[0]);
        }
    }
}

void common_sampling_add_grammar_triggers(common_params_sampling & sampling, const llama_vocab * vocab,
                                          std::vector<common_grammar_trigger> triggers) {
    for (common_grammar_trigger & trigger : triggers) {
        if (trigger.type == COMMON_GRAMMAR_TRIGGER_TYPE_WORD) {
            const auto tokens = common_tokenize(vocab, trigger.value, false, true);
            if (tokens.size() == 1) {
                if (sampling.preserved_tokens.count(tokens[0]) == 0) {
                    throw std::runtime_error("the trigger " + trigger.value + " is no preserved token");
                }
                trigger.type  = COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN;
                trigger.token = tokens[0];
            }
        }
        sampling.grammar_triggers.push_back(std::move(trigger));
    }
    if (sampling.grammar_lazy && sampling.grammar_triggers.empty()) {
        throw std::runtime_error("a lazy grammar without triggers");
    }
}

// -- log: warnings and errors go where libllama's go --

int common_log_get_verbosity_thold(void) {
    return LOG_LEVEL_WARN;
}

struct common_log * common_log_main() {
    return nullptr;
}

void common_log_add(struct common_log *, enum ggml_log_level level, const char * format, ...) {
    char text[4096];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    plb::log_fragment(level, text);
}
