// JSON schema to GBNF, by llama.cpp's own converter.
#include "plb.h"
#include "guard/guard.hpp"

#include "json-schema-to-grammar.h"
#include "json.h"


char * plb_json_schema_to_gbnf(const char * schema) {
    return plb::guarded_call((char *) nullptr, [&] {
        const plb::memory_watch memory;
        return plb::copied_text(json_schema_to_grammar(common_json::parse(schema), true), memory);
    });
}
