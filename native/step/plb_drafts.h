/* Drafts: several tokens of a sequence in a step. A part of plb.h. */
#ifndef PLB_DRAFTS_H
#define PLB_DRAFTS_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

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
    int32_t     * n_lacks;    /* [n_seq_max]: known tokens that a draft model has to compute before it can
                                 draft, where those are more than it lacks in any step; 0 where none drafts
                                 for the sequence */
    /* Prices: with them a step has as many drafted rows as give most tokens a second, at most n_most of
     * each slot; how likely a draft is to be right is known from those before it, and of
     * PLB_DRAFTER_NGRAM by how many tokens it has matched. */
    int32_t     * n_priced; /* the caller's: length of the prices, 0 (none) to n_rows_max + 1 */
    float       * seconds;  /* [n_rows_max + 1], the caller's: of a step with so many rows; 0: not allowed */
    float       * worst;    /* [n_rows_max + 1], the caller's: the same, if it takes longer than thought */
    float       * credit;   /* the caller's, and changed by a run: seconds that drafts may lose, at worst;
                               what they gain is added. Below 0 there are none */
    float       * gain;     /* the caller's: how much more tokens a second it takes to have any */
    float       * new_graph; /* the caller's: seconds that a step takes longer where it has not as many rows
                               as the last one with drafts. Where that is much, a step has rows that only
                               fill up, within n_most, rather than a new graph */
    int32_t     * n_timed;  /* [n_rows_max + 1]: steps of the last run with so many rows, those that only
                               fill up included; without drafts only such with the graph of the one before,
                               and where a new graph takes long none with or just behind one */
    int64_t     * ns_timed; /* [n_rows_max + 1]: what they take together at their mean speed. Of those
                               with drafts also what the next one without took longer */
} plb_drafts;

/* PLB_E_ARGUMENT for an engine without drafts. */
int32_t plb_engine_drafts(plb_engine * engine, plb_drafts * out);

/* Tokens that can be taken back at the end of a sequence with a recurrent state: the context's n_rs_seq;
 * 0 where libllama may take an old snapshot for it (vendor/patches/state-rolled-back.patch). */
int32_t plb_max_rollback(const struct llama_context * ctx);

/* What the steps before have left. n_rows: of the last one with drafts, whose graph is there; 0: there was
 * none. owed: seconds that new graphs took, and no step has paid for yet. missed: seconds that others than
 * this one would have gained until now. */
typedef struct plb_draft_graph {
    int32_t n_rows;
    float   owed;
    float   missed;
} plb_draft_graph;

/* What a step of plb_run decides by its prices, for what simulates it: of n_slots slots, of which each
 * could have n_drafted[i] drafted rows, how many it has. chance: [n_slots][n_draft_max], that so many and
 * one more are right, none larger than the one before. width: rows of the step without drafts. even: all
 * slots have the same number of rows. graph: `missed` changes. n_rows: of this step, those that only fill up
 * included. Of `prices` it reads n_draft_max, n_priced, seconds, worst,
 * credit, gain and new_graph, and n_priced is at least 1. */
int32_t plb_draft_rows(const plb_drafts * prices, int32_t n_slots, const int32_t * n_drafted,
                       const float * chance, int32_t width, int32_t even, int32_t * chosen,
                       plb_draft_graph * graph, int32_t * n_rows);

/* The first token from `first` on whose text is not the same in both, of those that both have; -1:
 * there is none. */
int32_t plb_vocab_differs(const struct llama_vocab * a, const struct llama_vocab * b, llama_token first);

/* A second, smaller model with the same vocabulary, in an engine of its own: without `stream`, with as
 * many sequences or more, and room for a row of each in a step. Its sequence i follows sequence i of the engine that
 * it drafts for, and its slots are what drafts need: the caller sets none. Both engines must outlive
 * it, and belong to the same thread.
 * Either vocabulary may have more tokens at its end. One that the target lacks ends a draft; a sequence
 * with one that this model lacks has no drafts.
 * With `mtp` it is the target's own model, loaded with load_mtp: the first of its layers that predict
 * further tokens. They start from the hidden state of the token before, of which the target's context
 * gives those of all rows then. While it is attached, they are read as the target's steps compute them;
 * where others have computed a token, zeros take the place of its state. */
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
 * these slots have no drafts, now and later. plb_draft_model_begin lets one have drafts again. PLB_E_SEQ
 * and PLB_E_SEQ_TWICE refuse the call, which has changed nothing but the drafts that were there. */
int32_t plb_draft_model_draft(plb_draft_model * self, const llama_seq_id * slots, int32_t n_slots);
/* 1: from now on plb_run of the target asks it before each of its steps, and the caller need not.
 * 0: no more. */
int32_t plb_draft_model_attach(plb_draft_model * self, int32_t attached);

#ifdef __cplusplus
}
#endif

#endif /* PLB_DRAFTS_H */
