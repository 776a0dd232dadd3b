// Calls in which a failed assertion of llama.cpp's is an exception, and an exception is a failure.
#pragma once

#include "ggml.h"

#include <exception>

namespace plb {

// For the time that it lives, on its own thread: a failed assertion throws.
struct assertion_guard {
    assertion_guard();
    ~assertion_guard();
};

// As llama.cpp logs it, see plb_log_errors: a line, and a piece of one.
void log_error(const char * text);
void log_fragment(enum ggml_log_level level, const char * text);

// What `f` returns; `failed`, and why in plb_log_errors, when it throws.
template <typename R, typename F>
R guarded_call(R failed, F && f) {
    const assertion_guard guard;
    try {
        return f();
    } catch (const std::exception & e) {
        log_error(e.what());
    } catch (...) {
        log_error("unknown exception");
    }
    return failed;
}

} // namespace plb
