/* plb: the shim between Python and libllama. Pure C99; this header is also the input of the cffi
 * generator, so it holds declarations only.
 *
 * Rules of every function: it returns a code (or fills a struct), throws nothing, prints nothing,
 * and never lets libllama reach an assertion with the arguments that it was given. An engine, its
 * views and its slots belong to one thread at a time; that is the caller's duty. What benches and
 * tests need besides is in tests/plb_testing.h.
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
    PLB_E_NO_SLOT         = -1016, /* a row asks to sample, its sequence has no slot */
    PLB_E_SLOT_FINISHED   = -1017, /* a row asks to sample, its slot has finished or failed */
    PLB_E_UBATCH          = -1018, /* pooling or non-causal attention, and n_rows > n_ubatch */
    PLB_E_DECODE          = -1019, /* llama_decode threw: as its codes < -1, rows may be in memory */
    PLB_E_SAMPLING        = -1020, /* a sampling parameter is out of range */
    PLB_E_GRAMMAR         = -1021, /* the grammar does not parse */
    PLB_E_N_STEPS         = -1022, /* n_steps < 1 or > n_steps_max */
    PLB_E_NO_TOKEN        = -1023, /* a slot that has sampled nothing has no next row; see plb_slot_next */
    PLB_E_SEQ_TWICE       = -1024, /* a run names a sequence twice */
    PLB_E_STREAM          = -1025, /* plb_step on an engine whose results are read from its ring */
    PLB_E_DRAFT           = -1026, /* n_most or n_given outside 0..n_draft_max, or a drafted token
                                      outside the vocabulary */
    PLB_E_ROLLBACK        = -1027, /* n_draft_max > 0, and the context can't take so many rows back */
    /* codes of one result (plb_result.error): its request ends, the others go on */
    PLB_E_LOGITS          = -1030, /* the row's logits hold NaN or +inf, or are not there */
    PLB_E_NO_CANDIDATE    = -1031, /* every token is excluded (grammar dead end, biases) */
    PLB_E_GRAMMAR_STATE   = -1032  /* the grammar could not take the chosen token */
};

/* -- rows ------------------------------------------------------------------------------------- */
enum plb_row_flag {
    PLB_ROW_OUTPUT = 1, /* keep this row's logits: readable by llama_get_logits_ith(ctx, row) */
    PLB_ROW_SAMPLE = 2  /* sample this row with its sequence's slot (implies PLB_ROW_OUTPUT) */
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
    int32_t n_logprobs_max; /* columns of top_token/top_logprob, 0..1024 */
    int32_t n_threads;      /* threads that sample, the caller's included, 1..512 */
    int32_t all_outputs;    /* 1: the context computes embeddings, so each row is an output */
    int32_t sync;           /* 1: wait for the device at every step, for exact timings;
                               0: only when a row has an output */
    int32_t n_steps_max;    /* steps that the ring holds, 1..65536 */
    int32_t device_sampling; /* enum plb_device_sampling */
    int32_t gap_max;         /* for contexts with a stream of cells for each sequence: so many unused
                                sequences in a row get a row each where that keeps an ubatch whole
                                (native/step/gaps.hpp); 0 none */
    int32_t n_draft_max;    /* drafted rows of a sequence in a step at most, see plb_drafts, 0 to
                               PLB_DRAFT_LIMIT; 0: none ever */
    int32_t drafter;        /* enum plb_drafter */
    int32_t n_corpus;       /* PLB_DRAFTER_NGRAM: tokens of ended texts that it drafts from, too; 0: none */
    int32_t stream;         /* 0: a call overwrites what the one before it gave, and a run makes
                               n_steps_max steps at most; 1: results stay until another thread has
                               read them, see plb_ring_read */
} plb_engine_params;

/* Whether the device reduces each row of logits to the largest 128, which is what travels to the host
 * (native/device/shortlist.hpp). Greedy, or a top_k of up to 128 less the tokens that may not be chosen, with
 * top_p, min_p, temperature and seed: the same token but for the order of equal logits. A step with a
 * row that asks for more (no top_k, penalties, biases, log-probabilities, a grammar, PLB_ROW_OUTPUT)
 * is sampled from whole rows; a change between the two costs libllama a new graph and, once, three
 * times the memory for outputs. */
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
    plb_result  * finished;     /* [n_seq_max]: of a run's last step, the records with a finish and
                                   those of slots with `report` (plb_slot_next) */
} plb_views;

/* -- drafts -------------------------------------------------------------------------------------
 * Speculative decoding. Behind the next token of a slot a step of plb_run may have drafted tokens, a row
 * with an output each. The slot samples the first row, and the next one as long as the token that it
 * has sampled is the one that was drafted; what is behind is taken out of the memory again. So a slot
 * samples the same tokens from the same rows as without, with the same draws, and may sample several
 * in a step. In such a step the records of each slot are in its order, and those of different slots
 * are not in row order.
 * There are no more rows of a slot than its budget and its positions can take, none of a slot with
 * `report` (plb_slot_next), none beside n_before rows, and in a step no more than fit a ubatch. Where
 * libllama computes at once only sequences with the same number of rows (a stream of cells for each,
 * a recurrent state), all slots of a step have the same number: those that are missing hold a token
 * that is neither drafted nor sampled. A recurrent state that was taken back is whole again after the
 * next step: until then its sequence must not be copied. */
enum plb_drafter {
    PLB_DRAFTER_NONE  = 0, /* drafts are the caller's */
    PLB_DRAFTER_NGRAM = 1  /* where the caller gives none: what followed in the sequence's own tokens
                              where they last were as they are now (native/step/ngram.hpp), or in those
                              of slots that were cleared or replaced (native/step/corpus.hpp) */
};

enum { PLB_DRAFT_LIMIT = 16 };

/* Arrays of an engine with n_draft_max > 0, at the same addresses until plb_engine_free. */
typedef struct plb_drafts {
    int32_t n_draft_max;
    int32_t     * n_most;   /* [n_seq_max], the caller's: drafted rows of each sequence in a step of the
                               runs to come; 0 at first */
    int32_t     * n_given;  /* [n_seq_max], the caller's: so many tokens of `token` are drafts for the
                               first step of the next run, which sets it to 0 */
    llama_token * token;    /* [n_seq_max][n_draft_max] */
    int32_t     * n_taken;  /* [n_seq_max]: tokens that the last run has sampled of each of its slots,
                               one that failed included: as many of its rows are in the memory */
    /* [n_seq_max][n_draft_max] for the slots of the last run: how often, lately, there was a draft with
     * this many tokens (column 0: one), and how often all of them were the sampled ones. For
     * PLB_DRAFTER_NGRAM also of steps without drafted rows: it watches what would have been. For any
     * other a slot without a record has what is usual: of the slots before it, hopeful at first. */
    float       * found;
    float       * right;
    int32_t     * n_drafts;   /* [n_seq_max]: steps in which the last run had drafted rows of each slot, */
    int32_t     * n_right;    /* [n_draft_max]: drafts whose token i stays, of all slots, */
    int32_t     * n_drafted;  /* [n_seq_max]: rows of drafted tokens that the last run had of each slot, */
    int32_t     * n_accepted; /* [n_seq_max]: and how many of them stay */
    /* Prices: with them a step has as many drafted rows as give most tokens a second, at most n_most of
     * each slot; how likely a draft is to be right is known from those before it, and of
     * PLB_DRAFTER_NGRAM by how many tokens it has matched. */
    int32_t     * n_priced; /* the caller's: length of the prices, 0 (none) to n_rows_max + 1 */
    float       * seconds;  /* [n_rows_max + 1], the caller's: of a step with so many rows; 0: not allowed */
    float       * worst;    /* [n_rows_max + 1], the caller's: the same, if it takes longer than thought */
    float       * credit;   /* the caller's, and changed by a run: seconds that drafts may lose, at worst;
                               what they gain is added. Below 0 there are none */
    float       * gain;     /* the caller's: how much more tokens a second it takes to have any */
    int32_t     * n_timed;  /* [n_rows_max + 1]: steps of the last run with so many rows, those that only
                               fill up included; without drafts only such with the graph of the one before */
    int64_t     * ns_timed; /* [n_rows_max + 1]: what they took. Of those with drafts also what the next
                               one without took longer */
} plb_drafts;

/* What a step of plb_run decides by its prices, for what simulates it: of n_slots slots, of which each
 * could have n_drafted[i] drafted rows, how many it has. chance: [n_slots][n_draft_max], that so many and
 * one more are right, none larger than the one before. width: rows of the step without drafts. even: all
 * slots have the same number of rows. Of `prices` it reads n_draft_max, n_priced, seconds, worst, credit
 * and gain, and n_priced is at least 1. */
int32_t plb_draft_rows(const plb_drafts * prices, int32_t n_slots, const int32_t * n_drafted,
                       const float * chance, int32_t width, int32_t even, int32_t * chosen);

/* A second, smaller model with the same vocabulary, in an engine of its own: without `stream`, with as
 * many sequences, and for as many rows in a step. Its sequence i follows sequence i of the engine that
 * it drafts for, and its slots are what drafts need: the caller sets none. Both engines must outlive
 * it, and belong to the same thread. */
typedef struct plb_draft_model plb_draft_model;

/* PLB_E_ARGUMENT when the engines do not suit each other, or the target has no drafts;
 * PLB_E_ROLLBACK for a model with a recurrent state. */
int32_t plb_draft_model_new(plb_engine * model, plb_engine * target, plb_draft_model ** out);
void    plb_draft_model_free(plb_draft_model * self);
/* The sequence's slot is set, and these are all tokens that it knows, the next row's included. In a
 * pool of cells it goes on from what the memory has of them, in whichever sequence. */
int32_t plb_draft_model_begin(plb_draft_model * self, int32_t seq, const llama_token * tokens,
                              int32_t n_tokens);
/* It drafts no more for this sequence. What its memory holds may serve the next one. */
int32_t plb_draft_model_end(plb_draft_model * self, int32_t seq);
/* The drafts for the next run of these slots: of each as many tokens as plb_drafts.n_most says, its
 * model's most likely ones, up to one that ends a text. First its memory is brought to where each
 * sequence is now: what was rejected is taken out, what it lacks is computed. One that lacks more than
 * fits its share of a batch has drafts when it has caught up, some calls later. Where there are no
 * cells, what other slots left is forgotten, and then the longest sequence has drafts no more.
 * Returns 0 or a code as plb_step: 1 when sequences were given up for want of cells; for any other one
 * these slots have no drafts, now and later. plb_draft_model_begin lets one have drafts again. */
int32_t plb_draft_model_draft(plb_draft_model * self, const llama_seq_id * slots, int32_t n_slots);
/* 1: from now on plb_run of the target asks it before each of its steps, and the caller need not.
 * 0: no more. */
int32_t plb_draft_model_attach(plb_draft_model * self, int32_t attached);

plb_engine_params plb_engine_default_params(void);

/* The context must outlive the engine's last plb_step; plb_engine_free may come after it. A context
 * that is to be used on without the engine needs plb_engine_detach first, which takes back what device
 * sampling has attached to it; the engine can go on as well. */
int32_t plb_engine_new(struct llama_context * ctx, const plb_engine_params * params, plb_engine ** out);
void    plb_engine_free(plb_engine * engine);
int32_t plb_engine_detach(plb_engine * engine);
/* From now on another context of the same model, made with the same parameters, whose memory is empty;
 * the one before may be gone already. Slots, views and what was recorded stay. PLB_E_ARGUMENT, and
 * nothing has changed, when it is of another size. */
int32_t plb_engine_rebind(plb_engine * engine, struct llama_context * ctx);
int32_t plb_engine_views(plb_engine * engine, plb_views * out);
/* PLB_E_ARGUMENT for an engine without drafts. */
int32_t plb_engine_drafts(plb_engine * engine, plb_drafts * out);

/* Text of the engine's last failure, valid until its next call; "" when there was none. */
const char * plb_last_error(const plb_engine * engine);
/* A fixed text for a code of ours or of llama_decode. */
const char * plb_code_text(int32_t code);
/* The llama.cpp that was compiled in: "b11549", or "own checkout". */
const char * plb_llama_cpp_build(void);

/* -- slots: one per sequence id ------------------------------------------------------------------
 * A slot is everything that sampling knows of a request: its sampler, what it has generated, its
 * budget, and the row that it would decode next. */
/* Where a grammar begins, with the semantics of llama_sampler_init_grammar_lazy_patterns and of
 * llama-server. Not lazy: it has accepted the tokens of `prefill` (the end of the prompt) at the first
 * token. Lazy: it begins with a token of `tokens`, or where one of `patterns` (regular expressions)
 * matches the text so far; not between the tokens `thinking_start` and one of `thinking_ends`. */
typedef struct plb_grammar_start {
    int32_t lazy;
    int32_t n_patterns;
    int32_t n_tokens;
    int32_t n_prefill;
    int32_t n_thinking_start;
    int32_t n_thinking_ends; /* tokens of all of them; behind each end stands LLAMA_TOKEN_NULL */
    const char * const * patterns;
    const llama_token * tokens;
    const llama_token * prefill;
    const llama_token * thinking_start;
    const llama_token * thinking_ends;
} plb_grammar_start;

typedef struct plb_sampling {
    int32_t  max_tokens;        /* >= 1: tokens to generate */
    int32_t  min_tokens;        /* until then EOG and stop tokens are excluded */
    float    temperature;       /* 0 = greedy */
    int32_t  top_k;             /* <= 0 off */
    float    top_p;             /* 1 off */
    float    min_p;             /* 0 off */
    float    typical_p;         /* 1 off */
    float    repeat_penalty;    /* 1 off */
    float    frequency_penalty; /* 0 off */
    float    presence_penalty;  /* 0 off */
    int32_t  penalty_last_n;    /* 0 off, -1 the whole context */
    uint32_t seed;              /* LLAMA_DEFAULT_SEED = a random one (see plb_slot_info.seed) */
    int32_t  n_logprobs;        /* -1 none, 0 the chosen token's, n also the n most likely ones */
    int32_t  ignore_eog;        /* 1: EOG tokens are excluded throughout */
    int32_t  n_logit_bias;
    int32_t  n_stop_tokens;
    int32_t  path;              /* enum plb_path */
    const llama_logit_bias * logit_bias;  /* added to the logits; -INFINITY excludes */
    const llama_token      * stop_tokens;
    const char             * grammar;     /* GBNF with start rule "root"; NULL none */
    const plb_grammar_start * grammar_start; /* NULL: at the first token */
} plb_sampling;

/* Which code samples; the token is the same (native/sampling/fused.hpp says where it need not be). */
enum plb_path {
    PLB_PATH_AUTO  = -1, /* asked for only: fused where it can, else the chain */
    PLB_PATH_CHAIN = 0,  /* a chain of libllama samplers */
    PLB_PATH_FUSED = 1   /* the fused sampler: no grammar, no typical_p */
};

typedef struct plb_slot_info {
    int32_t  active;      /* 1: a slot is set and neither finished nor failed */
    int32_t  finish;      /* enum plb_finish of the last result */
    int32_t  error;
    int32_t  path;        /* enum plb_path */
    int32_t  n_generated;
    int32_t  n_left;      /* budget left */
    int32_t  next_token;  /* the row that continues this sequence; -1: none yet */
    int32_t  next_pos;
    uint32_t seed;        /* the seed in use, also when it was drawn at random */
    int32_t  n_logprobs;
    int32_t  n_draws;     /* random numbers that it has taken since it was seeded */
} plb_slot_info;

plb_sampling plb_sampling_default(void);

/* prompt: tokens that came before, oldest first, for the penalties (the grammar does not see them).
 * A slot that was there is replaced; on failure it stays. */
int32_t plb_slot_set(plb_engine * engine, int32_t seq, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt);
/* The same slot outside of the engine, for plb_slot_put: what it costs to make (a grammar) and to
 * refuse is paid before the request has a sequence. Any thread may call it, also while the engine's
 * own thread is in plb_step; error (NULL or n_error bytes) gets the text of a failure. */
int32_t plb_slot_new(const plb_engine * engine, const plb_sampling * sampling,
                     const llama_token * prompt, int32_t n_prompt, plb_slot ** out,
                     char * error, int32_t n_error);
int32_t plb_slot_clear(plb_engine * engine, int32_t seq); /* fine when there is none */
/* dst becomes a copy of src, its draws, penalties and grammar state included (fork). */
int32_t plb_slot_copy(plb_engine * engine, int32_t src, int32_t dst);
/* New random draws from here on, so that forks part. */
int32_t plb_slot_reseed(plb_engine * engine, int32_t seq, uint32_t seed);
/* Take a slot out of the engine and put it under any sequence id later (preemption). put takes
 * ownership and replaces; a slot that was taken and is not put back goes to plb_slot_free. */
int32_t plb_slot_take(plb_engine * engine, int32_t seq, plb_slot ** out);
int32_t plb_slot_put(plb_engine * engine, int32_t seq, plb_slot * slot);
void    plb_slot_free(plb_slot * slot);
/* The row that a run computes next for this slot, as if it had sampled `token` for position `pos`: the
 * last token of a prompt. report: not 0, each of its results is among plb_views.finished. */
int32_t plb_slot_next(plb_engine * engine, int32_t seq, llama_token token, llama_pos pos,
                      int32_t report);
/* A new slot as if it had sampled these tokens, with as many random numbers, and next_pos were the
 * position of the last of them: a saved sequence goes on as it would have. PLB_E_GRAMMAR_STATE when
 * the grammar could not have been there. */
int32_t plb_slot_replay(plb_slot * slot, const llama_token * tokens, int32_t n_tokens,
                        int32_t n_draws, int32_t next_pos);
/* What a slot has generated, oldest first: *out is valid until the slot changes. Returns how many. */
int32_t plb_slot_tokens(const plb_slot * slot, const llama_token ** out);
int32_t plb_slot_get_info(plb_engine * engine, int32_t seq, plb_slot_info * out);
/* Why the slot's last result was an error; "" when it was not. Valid until the slot changes. */
const char * plb_slot_error(plb_engine * engine, int32_t seq);

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
 * step of a run with n_steps = 1; n_slots may be 0 then. They may be of the same sequences.
 * n_pad > 0, for contexts with a stream of cells for each sequence: every sequence below it has a row
 * in each step, so that the graph stays the same when sequences come and go. What such a row leaves in
 * the memory is removed; where there is no room for it there is none.
 * It ends early after a step in which a slot finished, after a step during which plb_interrupt was
 * called, and at a step that plb_step would return a code other than 0 for: that code is returned, and
 * the steps before it, their results included, are valid. The records of all steps lie in results one
 * after the other; steps[i].first_result is the first one of step i.
 * Nothing is allocated here either, however many steps (and see plb_step for libllama). */
int32_t plb_run(plb_engine * engine, int32_t n_before, const llama_seq_id * slots, int32_t n_slots,
                int32_t n_pad, int32_t n_steps, plb_run_info * out);
/* End the run that is going on, or when there is none the next one, after the step that it is in.
 * From any thread, until plb_engine_free. The run that ends takes the interrupt back: none is lost, and
 * a caller that looks for news after every run has seen what was there before the interrupt. A run
 * makes at least one step, unless it ends with PLB_STOP_FULL. */
void plb_interrupt(plb_engine * engine);

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

/* Steps published so far, once they are at least n_wanted, plb_ring_flush was called since the last
 * wait, or timeout_ns are over. */
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

/* -- text ---------------------------------------------------------------------------------------
 * The bytes that tokens stand for, one after the other: those of token i are
 * out[offsets[i]] .. out[offsets[i + 1] - 1], offsets has n + 1 entries. Special tokens give nothing.
 * Returns the bytes of all, and has written nothing behind `size` when they are more; or
 * PLB_E_ARGUMENT, PLB_E_TOKEN, PLB_E_MEMORY, PLB_E_EXCEPTION. */
int64_t plb_pieces(const struct llama_vocab * vocab, const llama_token * tokens, int32_t n,
                   char * out, int64_t size, int64_t * offsets);

/* -- memory ------------------------------------------------------------------------------------ */
/* Bytes in buffers of one type; of a no_alloc model, bytes that there would be. */
typedef struct plb_memory_part {
    char    buffer_type[64];
    char    device[64]; /* its name; "" when the type has none */
    int32_t host;       /* 1: memory that the CPU can use */
    int64_t model;      /* weights */
    int64_t context;    /* KV cells, recurrent states */
    int64_t compute;    /* graphs; the buffer of the outputs is not among them */
} plb_memory_part;

/* How many parts there are (also when there is room for fewer), or a code. */
int32_t plb_memory_breakdown(const struct llama_context * ctx, plb_memory_part * parts, int32_t n_parts);

/* -- log --------------------------------------------------------------------------------------- */
/* libllama's and ggml's log goes to a ring of fixed size, from any thread; nothing is printed. */
void plb_log_install(void);              /* once, before anything else logs */
void plb_log_set_level(int32_t level);   /* enum ggml_log_level; what is below is dropped */
/* The oldest fragment (not 0-terminated; a line ends with \n): returns its size, 0 when there is
 * none. dropped: fragments lost to a full ring since the last call. */
int32_t plb_log_drain(char * buf, int32_t size, int32_t * level, int64_t * dropped);
/* What the calling thread has logged as a warning or an error since its last mark, newest part. */
void    plb_log_mark(void);
int32_t plb_log_errors(char * buf, int32_t size);

/* -- guarded calls -----------------------------------------------------------------------------
 * Calls that read a file or a blob: a failed assertion of libllama inside them, on the calling
 * thread, is a failure (NULL or 0, its text in plb_log_errors) instead of the end of the process
 * (native/guard/guard.cpp). */
void plb_guard_install(void); /* once */
struct llama_model   * plb_model_load(const char ** paths, size_t n_paths, struct llama_model_params params);
struct llama_context * plb_context_new(struct llama_model * model, struct llama_context_params params);
struct llama_adapter_lora * plb_lora_load(struct llama_model * model, const char * path);
size_t plb_state_seq_set(struct llama_context * ctx, const uint8_t * src, size_t size, llama_seq_id seq);
/* The GBNF grammar (root "root") of the JSON texts that a schema allows, by llama.cpp's own
 * converter; NULL, and why in plb_log_errors, for one that it can't express whole. The caller
 * bounds the schema's depth. To be freed with plb_text_free. */
char * plb_json_schema_to_gbnf(const char * schema);
void   plb_text_free(char * text);

/* -- chats ---------------------------------------------------------------------------------------
 * llama.cpp's own chat templates (Jinja) and parsers of answers, guarded as the calls above: NULL,
 * and why in plb_log_errors. Texts that they return are JSON and are freed with plb_text_free. A
 * template and a parser may be used by several threads at once. The caller bounds how deep the JSON
 * that it gives is nested. */
typedef struct plb_chat_template plb_chat_template;
typedef struct plb_chat_parser   plb_chat_parser;

/* source: Jinja, or a name that llama_chat_builtin_templates gives; NULL: the model's own template.
 * The model must outlive it. */
plb_chat_template * plb_chat_template_new(const struct llama_model * model, const char * source);
void   plb_chat_template_free(plb_chat_template * self);
/* {source, capabilities: {name: bool}, supports_thinking} */
char * plb_chat_template_info(const plb_chat_template * self);
/* request: {messages, tools, tool_choice, parallel_tool_calls, json_schema, grammar, reasoning_format,
 * enable_thinking, add_generation_prompt, continue_final_message, template_kwargs}, all but the
 * first optional, in the words of llama-server's API. Returns {prompt, format, grammar, grammar_lazy,
 * trigger_patterns, trigger_tokens, preserved_tokens, preserved_texts, stops, generation_prompt,
 * prefill, thinking_start, thinking_ends}, tokens as ids. *parser reads the answers to this prompt. */
char * plb_chat_render(const plb_chat_template * self, const char * request, plb_chat_parser ** parser);
/* The message {role, content, reasoning_content, tool_calls} in an answer. partial: more may follow. */
char * plb_chat_parse(const plb_chat_parser * parser, const char * text, size_t size, bool partial);
void   plb_chat_parser_free(plb_chat_parser * parser);
#ifdef __cplusplus
}
#endif

#endif /* PLB_H */
