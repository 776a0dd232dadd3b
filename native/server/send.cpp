// Writing to many sockets at once.
#include <algorithm>

#ifndef _WIN32
#include <sys/socket.h>
#endif

#include "plb.h"

namespace {

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

}  // namespace

int32_t plb_send(int32_t n, const int32_t * sockets, const char * data, const int32_t * ends, int32_t * n_sent) {
    int32_t n_whole = 0;
    for (int32_t i = 0, begin = 0; i < n; begin = ends[i++]) {
        n_sent[i] = send_some(sockets[i], data + begin, ends[i] - begin);
        n_whole += n_sent[i] == ends[i] - begin;
    }
    return n_whole;
}
