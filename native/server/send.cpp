// Writing to many sockets at once.
#include <algorithm>

#include <sys/socket.h>

#include "plb.h"

namespace {

#ifdef MSG_NOSIGNAL
constexpr int k_flags = MSG_DONTWAIT | MSG_NOSIGNAL;
#else
constexpr int k_flags = MSG_DONTWAIT;  // a broken socket raises SIGPIPE, which Python ignores
#endif

}  // namespace

int32_t plb_send(int32_t n, const int32_t * sockets, const char * data, const int32_t * ends, int32_t * n_sent) {
    int32_t n_whole = 0;
    for (int32_t i = 0, begin = 0; i < n; begin = ends[i++]) {
        const ssize_t sent = ::send(sockets[i], data + begin, ends[i] - begin, k_flags);
        n_sent[i] = static_cast<int32_t>(std::max<ssize_t>(sent, 0));
        n_whole += n_sent[i] == ends[i] - begin;
    }
    return n_whole;
}
