/* A step's tokens to many sockets at once. A part of plb.h. */
#ifndef PLB_SEND_H
#define PLB_SEND_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The text of a token as it is sent. data NULL: not known yet; with n -1: none, it depends on its
 * neighbours. */
typedef struct plb_text {
    const char * data;
    int32_t      n;
} plb_text;

/* Texts by token, of the tokens below n. */
typedef struct plb_texts {
    plb_text * of;
    int32_t    n;
} plb_texts;

enum {
    PLB_SINK_NEWS    = -1, /* there is something new that is not one token with a text */
    PLB_SINK_UNKNOWN = -2, /* there is one token, whose text is not known yet */
};

/* A stream whose tokens go to a socket, each as a chunk of HTTP: before, its text, after. */
typedef struct plb_sink {
    const plb_page  * page;   /* its next token is entry `at` of column `slot` of this page, */
    int32_t           slot, at;
    int32_t           turn;   /* as long as the column's turn is this one */
    int32_t           socket;
    const plb_texts * texts;
    const char      * before, * after;
    int32_t           n_before, n_after;
    double            since;  /* when its last token was sent */
    int32_t           n_sent; /* of what is left to the caller: PLB_SINK_*, or the bytes of the chunk that
                                 the socket took of the token before `at` */
} plb_sink;

/* n sinks have had their last token at the same time. */
typedef struct plb_gap {
    double  since;
    int32_t n;
} plb_gap;

/* Sends what is new of n sinks, without waiting, where that is one token of `page` with a text.
 * shown, turns [n_seq_max]: how many entries of each column are there, and its turn, looked at behind
 * that. now: the time, on the clock of `since`. gaps [n], n_gaps: of the sinks with a token that was sent.
 * left [n]: the sinks that are left to the caller. Returns how many these are. */
int32_t plb_send_tokens(const plb_page * page, const int32_t * shown, const int32_t * turns, plb_sink * sinks,
                        int32_t n, double now, plb_gap * gaps, int32_t * n_gaps, int32_t * left);

#ifdef __cplusplus
}
#endif

#endif /* PLB_SEND_H */
