// libllama's and ggml's log lines, kept until Python asks for them: a callback into Python from
// whatever thread logs would take the GIL on the hot path.
#include "plb.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>

namespace {

constexpr size_t RING_BYTES  = 1 << 18;
constexpr size_t ERROR_BYTES = 1 << 12;

struct record {
    int32_t level;
    int32_t size;
};

// Fragments of text, oldest first. When it is full the oldest ones make room.
struct ring {
    std::mutex mutex;
    char    data[RING_BYTES];
    size_t  head    = 0; // where the oldest record starts
    size_t  used    = 0;
    int64_t dropped = 0; // records lost since the last drain

    void copy_in(const void * src, size_t n) {
        const size_t at    = (head + used) % RING_BYTES;
        const size_t first = std::min(n, RING_BYTES - at);
        memcpy(data + at, src, first);
        memcpy(data, (const char *) src + first, n - first);
        used += n;
    }

    void copy_out(void * dst, size_t n) {
        const size_t first = std::min(n, RING_BYTES - head);
        memcpy(dst, data + head, first);
        memcpy((char *) dst + first, data, n - first);
        skip(n);
    }

    void skip(size_t n) {
        head = (head + n) % RING_BYTES;
        used -= n;
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
ring & the_ring() {
    static ring * instance = new ring;
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

    const size_t size = std::min(length, RING_BYTES / 4);
    const record head = {level, (int32_t) size};

    ring & r = the_ring();
    const std::lock_guard<std::mutex> lock(r.mutex);
    while (r.used + sizeof(head) + size > RING_BYTES) {
        record oldest;
        r.copy_out(&oldest, sizeof(oldest));
        r.skip((size_t) oldest.size);
        r.dropped++;
    }
    r.copy_in(&head, sizeof(head));
    r.copy_in(text, size);
}

} // namespace

// For native/guard/guard.cpp.
void plb_log_append_error(const char * text) {
    on_log(GGML_LOG_LEVEL_ERROR, text, nullptr);
    on_log(GGML_LOG_LEVEL_CONT, "\n", nullptr);
}

void plb_log_install(void) {
    the_ring();
    llama_log_set(on_log, nullptr); // sets ggml's too
}

void plb_log_set_level(int32_t level) {
    min_level.store(level, std::memory_order_relaxed);
}

int32_t plb_log_drain(char * buf, int32_t size, int32_t * level, int64_t * dropped) {
    if (buf == nullptr || size <= 0 || level == nullptr || dropped == nullptr) {
        return PLB_E_ARGUMENT;
    }
    ring & r = the_ring();
    const std::lock_guard<std::mutex> lock(r.mutex);
    *dropped  = r.dropped;
    r.dropped = 0;
    if (r.used == 0) {
        return 0;
    }
    record head;
    r.copy_out(&head, sizeof(head));
    const size_t n = std::min((size_t) head.size, (size_t) size);
    r.copy_out(buf, n);
    r.skip((size_t) head.size - n);
    *level = head.level;
    return (int32_t) n;
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
