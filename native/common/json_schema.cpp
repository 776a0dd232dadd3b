// JSON schema to GBNF, by llama.cpp's own converter.
#include "plb.h"
#include "guard/guard.hpp"

#include "json-schema-to-grammar.h"
#include "json.h"

#include <cstring>

char * plb_json_schema_to_gbnf(const char * schema) {
    return plb::guarded_call((char *) nullptr, [&] {
        return strdup(json_schema_to_grammar(common_json::parse(schema), true).c_str());
    });
}
