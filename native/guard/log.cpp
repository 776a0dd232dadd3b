// libllama's and ggml's log lines, stored until Python asks for them: a callback into Python from
// whatever thread logs would take the GIL on the hot path.
#include "guard/guard.hpp"
#include "plb.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <mutex>
#include <new>
#include <string>

namespace {

constexpr size_t LOG_BYTES   = 1 << 18;
constexpr size_t ERROR_BYTES = 1 << 12;

struct fragment {
    int32_t     level;
    std::string text;
};

// Fragments of text, oldest first. When there is too much, the oldest ones make room.
struct backlog {
    std::mutex           mutex;
    std::deque<fragment> fragments;
    size_t  n_bytes = 0;
    int64_t dropped = 0; // fragments lost since the last drain

    fragment take() {
        fragment oldest = std::move(fragments.front());
        fragments.pop_front();
        n_bytes -= oldest.text.size();
        return oldest;
    }
};

// What this thread has logged as a warning or an error since its mark: the newest part of it.
struct thread_errors {
    char    text[ERROR_BYTES];
    size_t  size  = 0;
    int32_t level = GGML_LOG_LEVEL_INFO; // of the last fragment, for a continuation

    void append(const char * src, size_t n) {
        if (n > ERROR_BYTES) {
            src += n - ERROR_BYTES;
            n = ERROR_BYTES;
        }
        if (size + n > ERROR_BYTES) {
            const size_t gone = size + n - ERROR_BYTES;
            memmove(text, text + gone, size - gone);
            size -= gone;
        }
        memcpy(text + size, src, n);
        size += n;
    }
};

// Never destroyed: a backend may log at exit.
backlog & the_backlog() {
    static backlog * instance = new backlog;
    return *instance;
}

std::atomic<int32_t> min_level{GGML_LOG_LEVEL_INFO};
thread_local thread_errors errors;

void on_log(enum ggml_log_level level_in, const char * text, void *) {
    const int32_t level = level_in == GGML_LOG_LEVEL_CONT ? errors.level : (int32_t) level_in;
    errors.level = level;

    const size_t length = strlen(text);
    if (level >= GGML_LOG_LEVEL_WARN) {
        errors.append(text, length);
    }
    if (level < min_level.load(std::memory_order_relaxed) || length == 0) {
        return;
    }

    backlog & log = the_backlog();
    const std::lock_guard<std::mutex> lock(log.mutex);
    try {
        log.fragments.push_back({level, std::string(text, std::min(length, LOG_BYTES / 4))});
    } catch (const std::bad_alloc &) {
        log.dropped++;
        return;
    }
    log.n_bytes += log.fragments.back().text.size();
    while (log.n_bytes > LOG_BYTES) {
        log.take();
        log.dropped++;
    }
}

} // namespace

void plb::add_error(const char * text) {
    errors.append(text, strlen(text));
    errors.append("\n", 1);
}

void plb::log_fragment(enum ggml_log_level level, const char * text) {
    on_log(level, text, nullptr);
}

void plb_log_install(void) {
    the_backlog();
    llama_log_set(on_log, nullptr); // sets ggml's too
}

void plb_log_set_level(int32_t level) {
    min_level.store(level, std::memory_order_relaxed);
}

int32_t plb_log_drain(char * buf, int32_t size, int32_t * level, int64_t * dropped) {
    if (buf == nullptr || size <= 0 || level == nullptr || dropped == nullptr) {
        return PLB_E_ARGUMENT;
    }
    backlog & log = the_backlog();
    const std::lock_guard<std::mutex> lock(log.mutex);
    *dropped    = log.dropped;
    log.dropped = 0;
    if (log.fragments.empty()) {
        return 0;
    }
    const fragment oldest = log.take();
    *level = oldest.level;
    return (int32_t) oldest.text.copy(buf, (size_t) size);
}

void plb_log_mark(void) {
    errors.size = 0;
}

int32_t plb_log_errors(char * buf, int32_t size) {
    if (buf == nullptr || size <= 0) {
        return PLB_E_ARGUMENT;
    }
    const size_t n = std::min(errors.size, (size_t) size);
    memcpy(buf, errors.text + (errors.size - n), n);
    return (int32_t) n;
}
