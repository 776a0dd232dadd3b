/* plb_testing: what tests and benches need of the shim besides plb.h. An engine calls none of it. */
#ifndef PLB_TESTING_H
#define PLB_TESTING_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -- faults on purpose --------------------------------------------------------------------------
 * The countdown-th decode from now on (1: the next one) computes the first n_rows of its rows only
 * (-1: all of them) and reports this code, other than 0; so do those after it, n_times (1 or more) in
 * all. With code PLB_E_DECODE all rows are computed, and waiting for them logs an error, as where a
 * Mac's GPU has failed. countdown 0: no fault. One fault at a time. */
int32_t plb_fault_set(plb_engine * engine, int32_t countdown, int32_t code, int32_t n_rows,
                      int32_t n_times);

/* -- the sampler by itself ----------------------------------------------------------------------
 * Sampling without a context: slots 0..n_slots-1 that choose from rows of logits of the caller's, as
 * the slots of an engine do. No vocabulary, so no end-of-generation tokens and no grammar. */
typedef struct plb_rows plb_rows;

int32_t plb_rows_new(int32_t n_vocab, int32_t n_slots, int32_t n_logprobs_max, int32_t n_threads,
                     plb_rows ** out);
void    plb_rows_free(plb_rows * rows);
int32_t plb_rows_threads(const plb_rows * rows);
int32_t plb_rows_set(plb_rows * rows, int32_t slot, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt);
/* Row i, n_vocab logits from logits + i * stride on, with slot i: results[i], and
 * [i][n_logprobs_max] of the top arrays (NULL where no slot asks for log-probabilities). The rows
 * change meanwhile and are as before afterwards. PLB_E_SLOT_FINISHED when one has finished. */
int32_t plb_rows_sample(plb_rows * rows, int32_t n, float * logits, int64_t stride,
                        plb_result * results, llama_token * top_token, float * top_logprob);
/* Text of the last failure. */
const char * plb_rows_error(const plb_rows * rows);
/* One plain vectorised scan for the maximum, the yardstick of the benches; n a multiple of 64. */
float        plb_rows_maximum(const float * logits, int32_t n);
/* The instruction set that was chosen for this machine, or by PLB_SIMD in the environment. */
const char * plb_rows_simd(void);

#ifdef __cplusplus
}
#endif

#endif /* PLB_TESTING_H */
