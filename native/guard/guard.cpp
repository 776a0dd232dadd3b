// Calls whose input is a file or a blob. libllama checks part of what it reads by assertion, and a
// failed assertion ends the process; on a thread that is inside one of these calls it becomes an
// exception instead, which libllama's own handlers turn into an error, and else ours do.
// Elsewhere (other threads, raw calls) an assertion still ends the process, with its message.
#include "guard/guard.hpp"
#include "plb.h"

#ifndef _WIN32
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace {

thread_local int guarded = 0;
thread_local int64_t n_failed_allocations = 0;
std::new_handler before_ours = nullptr;

void on_assertion(const char * message) {
    if (guarded > 0) {
        throw std::runtime_error(message);
    }
    fprintf(stderr, "%s\n", message); // and back to ggml_abort, which ends the process
}

// What operator new calls when it finds no memory.
void on_failed_allocation() {
    ++n_failed_allocations;
    if (before_ours == nullptr) {
        throw std::bad_alloc();
    }
    before_ours();
}

} // namespace

namespace plb {

assertion_guard::assertion_guard()  { guarded++; }
assertion_guard::~assertion_guard() { guarded--; }

memory_watch::memory_watch() : before_(n_failed_allocations) {}
bool memory_watch::failed() const { return n_failed_allocations != before_; }

void memory_watch::check() const {
    if (failed()) {
        throw std::bad_alloc();
    }
}

char * copied_text(const std::string & text, const memory_watch & memory) {
    memory.check();
    const size_t size = text.size() + 1;
    char * copy = (char *) malloc(size);
    if (copy == nullptr) {
        throw std::bad_alloc();
    }
    memcpy(copy, text.c_str(), size);
    return copy;
}

} // namespace plb

void plb_guard_install(void) {
    ggml_set_abort_callback(on_assertion);
    if (std::get_new_handler() != on_failed_allocation) {
        before_ours = std::set_new_handler(on_failed_allocation);
    }
}

struct llama_model * plb_model_load(const char ** paths, size_t n_paths, struct llama_model_params params) {
    return plb::guarded_call((llama_model *) nullptr, [&] {
        return n_paths == 1 ? llama_model_load_from_file(paths[0], params)
                            : llama_model_load_from_splits(paths, n_paths, params);
    });
}

struct llama_context * plb_context_new(struct llama_model * model, struct llama_context_params params) {
    return plb::guarded_call((llama_context *) nullptr, [&] { return llama_init_from_model(model, params); });
}

struct llama_adapter_lora * plb_lora_load(struct llama_model * model, const char * path) {
    return plb::guarded_call((llama_adapter_lora *) nullptr, [&] { return llama_adapter_lora_init(model, path); });
}

size_t plb_state_seq_set(struct llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq) {
    return plb::guarded_call((size_t) 0, [&] { return llama_state_seq_set_data(ctx, src, size, seq); });
}

int64_t plb_process(void) {
#ifdef _WIN32
    return 0; // none is forked
#else
    return (int64_t) getpid();
#endif
}

void plb_model_free(int64_t process, struct llama_model * model) {
    if (process == plb_process()) {
        llama_model_free(model);
    }
}

void plb_lora_free(int64_t process, struct llama_adapter_lora * lora) {
    if (process == plb_process()) {
        llama_adapter_lora_free(lora);
    }
}

void plb_context_free(int64_t process, struct llama_context * ctx) {
    if (process == plb_process()) {
        llama_free(ctx);
    }
}

void plb_text_free(char * text) {
    free(text);
}
