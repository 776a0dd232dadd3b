/* Slots: what sampling knows of a request. A part of plb.h. */
#ifndef PLB_SLOTS_H
#define PLB_SLOTS_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

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

#ifdef __cplusplus
}
#endif

#endif /* PLB_SLOTS_H */
