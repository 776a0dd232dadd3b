/* The ring: what another thread reads while a run goes on. A part of plb.h. */
#ifndef PLB_RING_H
#define PLB_RING_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -- reading while a run goes on (engines with `stream`) ---------------------------------------
 * Each step that was tried, failed ones included, is recorded with its records, and stays until it
 * was read: by one thread, which may be another one than that which computes. Steps are counted from
 * 0 over the life of the engine. A run publishes each step when the next one starts; its last one is
 * published by the next run or by plb_ring_flush, so that the caller, which has a plan to change, comes
 * first. A run that finds no room waits for the reader for up to 50 ms, or until plb_interrupt. */

/* What was read, in columns by sequence: a reader's memory, filled by plb_ring_read. Tokens that end
 * a text (EOG, STOP) and errors are left out. */
typedef struct plb_page {
    int32_t n_steps_max;       /* room for steps, and for tokens of each sequence */
    int32_t n_steps;           /* steps that are there */
    plb_step_info * steps;     /* [n_steps_max] */
    int32_t       * n_tokens;  /* [n_seq_max]: tokens of each sequence that are there */
    llama_token   * token;     /* [n_seq_max][n_steps_max] */
    int32_t       * step;      /* [n_seq_max][n_steps_max]: the index in steps of each token */
    float         * logprob;   /* as token; this one and those below may be NULL */
    int32_t       * n_top;     /* as token */
    llama_token   * top_token; /* [n_seq_max][n_steps_max][n_logprobs_max] */
    float         * top_logprob;
} plb_page;

/* Steps published so far, once they are at least n_wanted, the reader was woken since the last wait
 * (plb_ring_flush, plb_ring_wake, a run that finds no room), or timeout_ns are over. */
int64_t plb_ring_wait(plb_engine * engine, int64_t n_wanted, int64_t timeout_ns);
/* Move the next steps, below `until` and as many as fit, from the ring to the end of a page; how
 * many. */
int32_t plb_ring_read(plb_engine * engine, int64_t until, plb_page * page);
/* Publish the last step, and wake the reader anyway. From the thread that computes. */
void    plb_ring_flush(plb_engine * engine);
/* Wake the reader. From any thread. */
void    plb_ring_wake(plb_engine * engine);
/* For the reader, between two pieces of work that keep others from planning (an interpreter's lock):
 * returns when a run goes on, or when the thread that computes has flushed because it has nothing to
 * do, at the latest after timeout_ns. */
void    plb_ring_yield(plb_engine * engine, int64_t timeout_ns);
/* Steps published so far. From any thread. */
int64_t plb_ring_count(plb_engine * engine);
/* The clock of plb_step_info.t_start_ns. */
int64_t plb_now_ns(void);

#ifdef __cplusplus
}
#endif

#endif /* PLB_RING_H */
