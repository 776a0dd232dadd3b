// A step's tokens to many sockets at once.
#include <algorithm>
#include <cstdio>
#include <cstring>

#ifndef _WIN32
#include <sys/socket.h>
#endif

#include "plb.h"

namespace {

constexpr int32_t CHUNK_MAX = 4096;  // bytes; a larger one is left to the caller
constexpr int32_t FRAME_MAX = 12;    // bytes of a chunk around what it has: its length and two line ends

// Bytes that the socket took.
int32_t send_some(int32_t socket, const char * data, int32_t n) {
#if defined(_WIN32)
    (void) socket, (void) data, (void) n;
    return 0;  // there only the event loop's own calls write to its sockets
#elif defined(MSG_NOSIGNAL)
    return static_cast<int32_t>(std::max<ssize_t>(::send(socket, data, n, MSG_DONTWAIT | MSG_NOSIGNAL), 0));
#else  // a broken socket raises SIGPIPE, which Python ignores
    return static_cast<int32_t>(std::max<ssize_t>(::send(socket, data, n, MSG_DONTWAIT), 0));
#endif
}

// A chunk of HTTP with the text of a token; its bytes.
int32_t write_chunk(char * to, const plb_sink & sink, const plb_text & text) {
    char * end = to + std::snprintf(to, FRAME_MAX, "%x\r\n", sink.n_before + text.n + sink.n_after);
    const auto add = [&end](const char * data, int32_t n) {
        std::memcpy(end, data, n);
        end += n;
    };
    add(sink.before, sink.n_before);
    add(text.data, text.n);
    add(sink.after, sink.n_after);
    add("\r\n", 2);
    return static_cast<int32_t>(end - to);
}

void count_gap(plb_gap * gaps, int32_t * n_gaps, double since) {
    if (*n_gaps == 0 || gaps[*n_gaps - 1].since != since) gaps[(*n_gaps)++] = {since, 0};
    gaps[*n_gaps - 1].n++;
}

// PLB_SINK_*, or whether it has news: 0 without any.
int32_t look(const plb_page * page, const int32_t * shown, const int32_t * turns, const plb_sink & sink,
             plb_text * text) {
    if (sink.page != page) return PLB_SINK_NEWS;
    const int32_t n_new = shown[sink.slot] - sink.at;
    if (turns[sink.slot] != sink.turn) return PLB_SINK_NEWS;  // what is new may be another stream's
    if (n_new == 0) return 0;
    if (n_new != 1) return PLB_SINK_NEWS;
    const llama_token token = page->token[static_cast<int64_t>(sink.slot) * page->n_steps_max + sink.at];
    *text = token < sink.texts->n ? sink.texts->of[token] : plb_text{nullptr, 0};
    if (text->data == nullptr) return text->n < 0 ? PLB_SINK_NEWS : PLB_SINK_UNKNOWN;
    const int64_t n_chunk = int64_t{FRAME_MAX} + sink.n_before + text->n + sink.n_after;
    return n_chunk > CHUNK_MAX ? PLB_SINK_NEWS : 1;
}

}  // namespace

int32_t plb_send_tokens(const plb_page * page, const int32_t * shown, const int32_t * turns, plb_sink * sinks,
                        int32_t n, double now, plb_gap * gaps, int32_t * n_gaps, int32_t * left) {
    char chunk[CHUNK_MAX];
    int32_t n_left = 0;
    *n_gaps = 0;
    for (int32_t i = 0; i < n; ++i) {
        plb_sink & sink = sinks[i];
        plb_text text{};
        sink.n_sent = look(page, shown, turns, sink, &text);
        if (sink.n_sent == 0) continue;
        if (sink.n_sent > 0) {
            count_gap(gaps, n_gaps, sink.since);
            sink.since = now;
            sink.at++;
            const int32_t n_chunk = write_chunk(chunk, sink, text);
            sink.n_sent = send_some(sink.socket, chunk, n_chunk);
            if (sink.n_sent == n_chunk) continue;
        }
        left[n_left++] = i;
    }
    return n_left;
}
