// JSON schema to GBNF, by llama.cpp's own converter. The converter belongs to upstream's command line
// tools, not to libllama: its files are compiled into the shim. Three functions on text, which
// it needs of the other tools, are below.
#include "common.h"
#include "json-schema-to-grammar.h"
#include "json.h"

#include <string>
#include <vector>

std::string plb_json_schema_grammar(const char * schema);

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
