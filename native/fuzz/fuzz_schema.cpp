// JSON schemas: the grammar that the converter makes of one is a grammar that a slot takes.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const time_limit limit;
    const std::string schema((const char *) data, size);
    // Python refuses references in a circle, and texts that are nested deeper.
    if (!is_shallow(schema) || schema.find("ref") != std::string::npos) {
        return 0;
    }
    if (char * grammar = plb_json_schema_to_gbnf(schema.c_str())) {
        use_grammar(grammar);
        plb_text_free(grammar);
    }
    return 0;
}
