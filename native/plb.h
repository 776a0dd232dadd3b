/* plb: the shim between Python and libllama. Pure C99; this header is also the input of the cffi
 * generator, so it holds declarations only.
 *
 * Rules of every function: it returns a code (or fills a struct), throws nothing, prints nothing,
 * and never lets libllama reach an assertion with the arguments that it was given. An engine, its
 * views and its slots belong to one thread at a time; that is the caller's duty. What benches and
 * tests need besides is in tests/plb_testing.h, and in no wheel.
 *
 * One step, seen from the caller:
 *     write rows 0..n-1 into views.token/pos/seq/flags; plb_step(engine, n);
 *     read views.info->n_results records in views.results.
 * Steady decoding needs no rows from the caller: plb_run makes them of the slots, for several steps,
 * and another thread reads what they gave while it goes on (plb_ring_wait, plb_ring_read).
 */
#ifndef PLB_H
#define PLB_H

#include <stdbool.h>
#include <stdint.h>

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -- codes ------------------------------------------------------------------------------------
 * 0 is success. Values from -999 to 999 are llama_decode's own (1 no KV slot, 2 aborted, -1 invalid
 * batch, < -1 fatal). Ours start at -1000: what was asked is refused, nothing has been decoded
 * (but see PLB_E_DECODE), no slot has changed. */
enum plb_code {
    PLB_OK                = 0,
    PLB_E_ARGUMENT        = -1000, /* NULL pointer or a number out of range */
    PLB_E_MEMORY          = -1001, /* out of host memory */
    PLB_E_EXCEPTION       = -1002, /* libllama threw; plb_last_error has the text */
    PLB_E_NO_DECODER      = -1003, /* the context has no memory (encoder or embedding model) */
    PLB_E_N_ROWS          = -1010, /* n_rows < 1 or > n_rows_max */
    PLB_E_TOKEN           = -1011, /* token id outside 0..n_vocab-1 */
    PLB_E_SEQ             = -1012, /* sequence id outside 0..n_seq_max-1 */
    PLB_E_POS             = -1013, /* position outside 0..n_pos_max-1 */
    PLB_E_FLAGS           = -1014, /* unknown bit in a row's flags */
    PLB_E_N_OUTPUTS       = -1015, /* more output rows than n_outputs_max */
    PLB_E_NO_SLOT         = -1016, /* the sequence has no slot: to sample, to copy, to take, ... */
    PLB_E_SLOT_FINISHED   = -1017, /* a row asks to sample, its slot has finished or failed */
    PLB_E_UBATCH          = -1018, /* pooling or non-causal attention, and n_rows > n_ubatch */
    PLB_E_DECODE          = -1019, /* llama_decode threw, or libllama does not remove rows: as its codes
                                      < -1, rows may be in memory */
    PLB_E_SAMPLING        = -1020, /* a sampling parameter is out of range; a slot of another model, or
                                      with more log-probabilities than the engine has room for */
    PLB_E_GRAMMAR         = -1021, /* the grammar does not parse */
    PLB_E_N_STEPS         = -1022, /* n_steps < 1 or > n_steps_max */
    PLB_E_NO_TOKEN        = -1023, /* a slot that has sampled nothing has no next row; see plb_slot_next */
    PLB_E_SEQ_TWICE       = -1024, /* a run, or a call for drafts, names a sequence twice */
    PLB_E_STREAM          = -1025, /* plb_step on an engine whose results are read from its ring */
    PLB_E_DRAFT           = -1026, /* n_most or n_given outside 0..n_draft_max, or a drafted token
                                      outside the vocabulary */
    PLB_E_ROLLBACK        = -1027, /* n_draft_max > 0, and the context can't take so many rows back; a
                                      draft model that can't take any back */
    /* codes of one result (plb_result.error): its request ends, the others go on */
    PLB_E_LOGITS          = -1030, /* the row's logits hold NaN or +inf, or are not there */
    PLB_E_NO_CANDIDATE    = -1031, /* grammar and biases exclude every token, or ask for too much */
    PLB_E_GRAMMAR_STATE   = -1032  /* the grammar could not take the chosen token */
};

/* -- rows ------------------------------------------------------------------------------------- */
enum plb_row_flag {
    PLB_ROW_OUTPUT = 1, /* keep this row's logits: readable by llama_get_logits_ith(ctx, row) */
    PLB_ROW_SAMPLE = 2  /* sample this row with its sequence's slot: whole rows of logits need not be there,
                           and they lie elsewhere in a step with n_filled */
};

enum plb_finish {
    PLB_FINISH_NONE   = 0, /* goes on */
    PLB_FINISH_EOG    = 1, /* the token is one of the vocabulary's end-of-generation tokens */
    PLB_FINISH_STOP   = 2, /* the token is one of the request's stop token ids */
    PLB_FINISH_LENGTH = 3, /* the token is the last one of the budget */
    PLB_FINISH_ERROR  = 4  /* no token: see plb_result.error */
};

/* One sampled row. The token that ends a text (EOG, STOP) is in the record, but not part of the text.
 * 32 bytes. */
typedef struct plb_result {
    int32_t seq;
    int32_t row;     /* its row in the batch */
    int32_t token;   /* -1 on error */
    int32_t index;   /* how many tokens this slot had generated before this one */
    int32_t finish;  /* enum plb_finish */
    int32_t error;   /* 0, or a code from PLB_E_LOGITS on */
    int32_t n_top;   /* valid entries in this result's row of top_token/top_logprob */
    float   logprob; /* NaN unless the slot asked for log-probabilities */
} plb_result;

/* What one step did, for the caller and for the step trace. Times in ns. */
typedef struct plb_step_info {
    int64_t t_start_ns;   /* steady clock at entry */
    int64_t build_ns;     /* checks and batch */
    int64_t decode_ns;    /* llama_decode, until it returned */
    int64_t sync_ns;      /* waiting for the device (0 when there was nothing to wait for) */
    int64_t sample_ns;    /* all sampled rows */
    int64_t n_reused;     /* graphs reused by the context so far, this step included */
    int32_t code;         /* what plb_step returned */
    int32_t n_rows;
    int32_t n_outputs;
    int32_t n_results;    /* records of this step, 0 when code is not 0 */
    int32_t first_result; /* index of its first record in plb_views.results */
    int32_t bad_row;      /* the row that a code <= PLB_E_TOKEN speaks of, else -1 */
    int32_t on_device;    /* 1: the device chose the candidates that were sampled from */
    int32_t n_filled;     /* rows that it had besides, see gap_max and plb_run's n_pad */
    int32_t n_drafted;    /* rows of drafted tokens, see plb_drafts; n_rows counts them */
    int32_t n_accepted;   /* of these, rows that a token was sampled behind: they stay */
} plb_step_info;

enum plb_stop {
    PLB_STOP_STEPS     = 0, /* all steps are done, or as many as there are positions for */
    PLB_STOP_FINISH    = 1, /* a slot has finished or failed in the last step */
    PLB_STOP_INTERRUPT = 2, /* plb_interrupt was called */
    PLB_STOP_CODE      = 3, /* the step after the last one returned a code other than 0 */
    PLB_STOP_FULL      = 4  /* the ring is full, and no reader came for as long as a run waits */
};

/* What one run did. */
typedef struct plb_run_info {
    int64_t n_recorded; /* steps that were tried since the engine was made, this run's included */
    int64_t n_reused;   /* graphs that this run has reused */
    int64_t ns;         /* from the start of its first step to the end of its last one */
    int64_t first_ns;   /* to the end of its first one */
    int32_t code;       /* what plb_run returned */
    int32_t stop;       /* enum plb_stop: why there are no more steps */
    int32_t n_steps;    /* steps done */
    int32_t n_results;  /* records of all of them */
    int32_t n_finished; /* records in plb_views.finished: of the last step */
    int32_t n_drafted;  /* as in plb_step_info, of all steps */
    int32_t n_accepted;
    int64_t n_rows;     /* rows of all steps, drafted ones included */
    int64_t catch_up_ns; /* of `ns`, for what a draft model lacked of sequences that it had not followed */
    int32_t draft_code; /* the last one of the draft model that was not 0 */
} plb_run_info;

/* -- engine ----------------------------------------------------------------------------------- */
typedef struct plb_engine plb_engine;
typedef struct plb_slot   plb_slot;

typedef struct plb_engine_params {
    int32_t n_outputs_max;  /* the n_outputs_max that the context was made with; 0 = n_batch */
    int32_t n_outputs_per_seq; /* its n_outputs_max_per_seq: where a step has more drafted rows of a sequence,
                                  the host samples them */
    int32_t n_logprobs_max; /* columns of top_token/top_logprob, 0..1024 */
    int32_t n_threads;      /* threads that sample, the caller's included, 1..512 */
    int32_t all_outputs;    /* 1: the context computes embeddings, so each row is an output */
    int32_t sync;           /* 1: wait for the device at every step, for exact timings;
                               0: only when a row has an output */
    int32_t n_steps_max;    /* steps that the ring holds, 1..65536 */
    int32_t device_sampling; /* enum plb_device_sampling */
    int32_t gap_max;         /* for contexts with a stream of cells for each sequence, or a recurrent
                                state: so many unused sequences in a row get a row each where that keeps an ubatch whole
                                (native/step/gaps.hpp); 0 none */
    int32_t n_draft_max;    /* drafted rows of a sequence in a step at most, see plb_drafts, 0 to
                               PLB_DRAFT_LIMIT; 0: none ever */
    int32_t drafter;        /* enum plb_drafter */
    int32_t n_corpus;       /* PLB_DRAFTER_NGRAM: tokens of ended texts that it drafts from, too; 0: none */
    int32_t stream;         /* 0: a call overwrites what the one before it gave, and a run makes
                               n_steps_max steps at most; 1: results stay until another thread has
                               read them, see plb_ring_read */
    int32_t mtp;            /* 1: the context is of LLAMA_CONTEXT_TYPE_MTP, see plb_draft_model */
} plb_engine_params;

/* Whether the device reduces each row of logits to the largest 128, which is what travels to the host
 * (native/device/shortlist.hpp). Greedy, or a top_k of up to 128 less the tokens that may not be chosen, with
 * top_p, min_p, temperature and seed: the same token but for the order of equal logits. A step with a
 * row that asks for more (no top_k, penalties, biases, log-probabilities, a grammar, PLB_ROW_OUTPUT)
 * is sampled from whole rows; a change between the two costs libllama a new graph and, once, three
 * times the memory for outputs. Drafted rows (plb_drafts) are sampled there as far as the context has
 * so many outputs for a sequence. */
enum plb_device_sampling {
    PLB_DEVICE_SAMPLING_AUTO = -1, /* where it is cheaper (native/device/placement.hpp); never on a CPU */
    PLB_DEVICE_SAMPLING_OFF  = 0,
    PLB_DEVICE_SAMPLING_ON   = 1   /* wherever a step allows it, on any backend */
};

/* Memory of the engine, valid and at the same addresses until plb_engine_free. */
typedef struct plb_views {
    int32_t n_rows_max;     /* rows that fit a step: the context's n_batch */
    int32_t n_results_max;  /* records that fit results: n_seq_max * n_steps_max (without `stream`
                               times 1 + n_draft_max), or n_outputs_max */
    int32_t n_logprobs_max;
    int32_t n_seq_max;
    int32_t n_vocab;
    int32_t n_pos_max;      /* positions that the model can take */
    int32_t n_steps_max;    /* steps that fit the ring */
    /* rows, n_rows_max each: the caller writes; plb_run overwrites those of its slots */
    llama_token  * token;
    llama_pos    * pos;
    llama_seq_id * seq;
    uint8_t      * flags;
    /* results */
    plb_result  * results;      /* [n_results_max] */
    llama_token * top_token;    /* [n_results_max][n_logprobs_max], most likely first */
    float       * top_logprob;  /* [n_results_max][n_logprobs_max] */
    plb_step_info * info;       /* the last step, done or not */
    plb_step_info * steps;      /* [n_steps_max]: without `stream` the steps of the last call, the
                                   one that failed included */
    plb_result  * finished;     /* [n_outputs_max]: of a run's last step, the records with a finish and
                                   those of slots with `report` (plb_slot_next) */
} plb_views;

plb_engine_params plb_engine_default_params(void);

/* The context must outlive the engine's last plb_step; plb_engine_free may come after it, and frees
 * nothing in a forked child (plb_context_free). A context that is to be used on without the engine
 * needs plb_engine_detach first, which takes back what device sampling has attached to it; the engine
 * can go on as well. */
int32_t plb_engine_new(struct llama_context * ctx, const plb_engine_params * params, plb_engine ** out);
void    plb_engine_free(plb_engine * engine);
int32_t plb_engine_detach(plb_engine * engine);
/* From now on another context of the same model, made with the same parameters, whose memory is empty;
 * the one before may be gone already. Slots, views and what was recorded stay. PLB_E_ARGUMENT, and
 * nothing has changed, when it is of another size. */
int32_t plb_engine_rebind(plb_engine * engine, struct llama_context * ctx);
int32_t plb_engine_views(plb_engine * engine, plb_views * out);

/* Text of the engine's last failure, valid until its next call; "" when there was none. */
const char * plb_last_error(const plb_engine * engine);
/* A fixed text for a code of ours or of llama_decode. */
const char * plb_code_text(int32_t code);
/* The llama.cpp that was compiled in: "b11549", or "own checkout". */
const char * plb_llama_cpp_build(void);

/* -- step -------------------------------------------------------------------------------------
 * Checks the rows, decodes them, samples each row with PLB_ROW_SAMPLE in row order, writes the
 * results and the info. Returns 0, llama_decode's code, or one of ours; other than 0 nothing was
 * sampled and no slot has changed (what the KV cache holds then: see llama_decode).
 * Several rows of one sequence may be sampled in one step: each continues the slot of the one
 * before; after a finish the later ones give no result.
 * Nothing is allocated here. libllama allocates in llama_decode (its copy of the batch, a graph that
 * is not reused) and in some samplers (penalties, grammar, typical, top_k above 128, top_p and min_p
 * without top_k); greedy and the default chain do not.
 * Log-probabilities are a log-softmax of the row's raw logits over the whole vocabulary, before
 * biases, penalties, grammar and truncation. */
int32_t plb_step(plb_engine * engine, int32_t n_rows);

/* -- run --------------------------------------------------------------------------------------
 * Up to n_steps steps without coming back: in each, every sequence of slots (all different, each with
 * a slot that has a next token and has not finished) computes its slot's next token and samples. As
 * n_steps times plb_step with those rows, in their order; a step is done whole. With drafts
 * (plb_drafts) a step may bring a slot further than that.
 * n_before rows of the caller's own (prompts), written at 0 and behind, come before those in the one
 * step of a run with n_steps = 1; n_slots may be 0 then. They may be of the same sequences. Where they
 * are of others, none of them gives an output and plb_computes_behind says 1, they are a batch of their
 * own behind that of the slots, whose results do not wait for its last ubatch. When it fails, with any
 * code, the slots' rows are in the memory, and nothing was sampled.
 * n_pad > 0, for contexts with a stream of cells for each sequence: every sequence below it has a row
 * in each step, so that the graph stays the same when sequences come and go. What such a row leaves in
 * the memory is removed; where there is no room for it, or a state holds tokens already, which can't be
 * removed alone, there is none.
 * It ends early after a step in which a slot finished, after a step during which plb_interrupt was
 * called, and at a step that plb_step would return a code other than 0 for: that code is returned, and
 * the steps before it, their results included, are valid. So it ends, with PLB_E_DECODE, where libllama
 * does not take back rows of rejected drafts: they are in the memory behind those of the last step. The
 * records of all steps lie in results one after the other; steps[i].first_result is the first one of
 * step i.
 * Nothing is allocated here either, however many steps (and see plb_step for libllama). */
int32_t plb_computes_behind(const struct llama_context * ctx); /* where sequences have streams of cells;
                                        never with a llama.cpp that has not our patches */
int32_t plb_run(plb_engine * engine, int32_t n_before, const llama_seq_id * slots, int32_t n_slots,
                int32_t n_pad, int32_t n_steps, plb_run_info * out);
/* End the run that is going on, or when there is none the next one, after the step that it is in.
 * From any thread, until plb_engine_free. The run that ends takes the interrupt back: none is lost, and
 * a caller that looks for news after every run has seen what was there before the interrupt. A run
 * makes at least one step, unless it ends with PLB_STOP_FULL. */
void plb_interrupt(plb_engine * engine);

#ifdef __cplusplus
}
#endif

/* -- its parts, by the rooms that they are of ----------------------------------------------------- */
#include "common/plb_chat.h"
#include "guard/plb_guard.h"
#include "sampling/plb_slots.h"
#include "step/plb_drafts.h"
#include "step/plb_ring.h"
#include "server/plb_send.h"

#endif /* PLB_H */
