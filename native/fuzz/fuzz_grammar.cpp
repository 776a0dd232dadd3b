// Grammars of users: refused with a text, or usable.
#include "fuzz.hpp"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    const time_limit limit;
    use_grammar(std::string((const char *) data, size).c_str());
    return 0;
}
