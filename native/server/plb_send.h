/* Writing to many sockets at once. A part of plb.h. */
#ifndef PLB_SEND_H
#define PLB_SEND_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Sends part i, which ends before data[ends[i]] and begins where the one before it ends, to
 * sockets[i], without waiting. n_sent[i]: bytes that it took; 0 where it is broken or -1, and always on
 * Windows. Returns how many took all. */
int32_t plb_send(int32_t n, const int32_t * sockets, const char * data, const int32_t * ends, int32_t * n_sent);

#ifdef __cplusplus
}
#endif

#endif /* PLB_SEND_H */
