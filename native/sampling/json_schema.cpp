// JSON schema to GBNF, by llama.cpp's own converter. It is a part of its command line tools, not of
// libllama, so its few files are compiled into the shim, and what they need of the rest is here. The
// converter prints a warning where it gives up on a pattern and accepts any string instead; here
// that is an error.
#include "common.h"
#include "json-schema-to-grammar.h"
#include "json.h"
#include "trie.h"
#include "unicode.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <map>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

std::string plb_json_schema_grammar(const char * schema);

namespace {

template <typename... Args>
int refuse(FILE *, const char *, Args... what) {
    throw std::runtime_error((std::string(what) + ...));
}

} // namespace

#define fprintf refuse
#include "json-schema-to-grammar.cpp"
#undef fprintf

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

std::string plb_json_schema_grammar(const char * schema) {
    return json_schema_to_grammar(common_json::parse(schema), true);
}
