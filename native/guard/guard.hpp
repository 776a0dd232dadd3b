// Calls in which a failed assertion of llama.cpp's is an exception, and an exception is a failure.
#pragma once

#include "ggml.h"
#include "plb.h"

#include <cstdint>
#include <exception>
#include <new>
#include <string>

namespace plb {

// For the time that it lives, on its own thread: a failed assertion throws.
struct assertion_guard {
    assertion_guard();
    ~assertion_guard();
};

// Whether an allocation has failed on this thread since this was made. llama.cpp takes some of those
// failures for mistakes in its input, and goes on after others with less than was asked for.
class memory_watch {
public:
    memory_watch();
    bool failed() const;
    void check() const; // throws std::bad_alloc where one has failed

private:
    int64_t before_;
};

// A copy that plb_text_free frees. Throws std::bad_alloc where memory was short, also before.
char * copied_text(const std::string & text, const memory_watch & memory);

// A line for plb_log_errors alone: who called tells it.
void add_error(const char * text);
// As llama.cpp logs it: a piece of a line.
void log_fragment(enum ggml_log_level level, const char * text);

// What `f` returns; `failed`, and why in plb_log_errors, when it throws: where memory was short,
// the text of PLB_E_MEMORY is the last line.
template <typename R, typename F>
R guarded_call(R failed, F && f) {
    const assertion_guard guard;
    const memory_watch memory;
    try {
        return f();
    } catch (const std::bad_alloc &) {
        add_error(plb_code_text(PLB_E_MEMORY));
    } catch (const std::exception & e) {
        add_error(memory.failed() ? plb_code_text(PLB_E_MEMORY) : e.what());
    } catch (...) {
        add_error("unknown exception");
    }
    return failed;
}

} // namespace plb
