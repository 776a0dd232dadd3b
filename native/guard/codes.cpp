// Fixed texts: one per code, and the build.
#include "plb.h"

const char * plb_code_text(int32_t code) {
    switch (code) {
        case PLB_OK:                return "ok";
        case PLB_E_ARGUMENT:        return "NULL pointer or a number out of range";
        case PLB_E_MEMORY:          return "out of memory";
        case PLB_E_EXCEPTION:       return "libllama threw";
        case PLB_E_NO_DECODER:      return "this context has no memory to decode into: "
                                           "an encoder or embedding model generates nothing";
        case PLB_E_N_ROWS:          return "n_rows below 1 or above the context's n_batch";
        case PLB_E_TOKEN:           return "token id outside the vocabulary";
        case PLB_E_SEQ:             return "sequence id outside the context's n_seq_max";
        case PLB_E_POS:             return "position that is negative or beyond what the model can take";
        case PLB_E_FLAGS:           return "unknown bit in the row's flags";
        case PLB_E_N_OUTPUTS:       return "more output rows than the context's n_outputs_max";
        case PLB_E_NO_SLOT:         return "the sequence has no slot";
        case PLB_E_SLOT_FINISHED:   return "the sequence's slot has finished";
        case PLB_E_UBATCH:          return "pooling and non-causal attention take n_ubatch rows "
                                           "at most";
        case PLB_E_DECODE:          return "llama_decode threw";
        case PLB_E_SAMPLING:        return "a sampling parameter is out of range";
        case PLB_E_GRAMMAR:         return "the grammar does not parse";
        case PLB_E_N_STEPS:         return "n_steps below 1 or above the engine's n_steps_max";
        case PLB_E_NO_TOKEN:        return "the sequence's slot has sampled nothing yet";
        case PLB_E_SEQ_TWICE:       return "the sequence is named twice";
        case PLB_E_STREAM:          return "the engine's results are read from its ring: plb_run";
        case PLB_E_DRAFT:           return "n_most or n_given outside 0..n_draft_max, or a drafted "
                                           "token outside the vocabulary";
        case PLB_E_ROLLBACK:        return "drafts need a context that can take their rows back: for a "
                                           "recurrent state one pool of cells, and n_rs_seq of "
                                           "n_draft_max or more";
        case PLB_E_LOGITS:          return "the row's logits are missing or hold NaN or +inf";
        case PLB_E_NO_CANDIDATE:    return "no token is left to choose";
        case PLB_E_GRAMMAR_STATE:   return "the grammar could not take the chosen token";
        case 1:                     return "no KV cells for this batch";
        case 2:                     return "decode was aborted";
        case -1:                    return "libllama rejected the batch";
        default:                    return code < -1 && code > -1000 ? "the backend failed"
                                                                     : "unknown code";
    }
}

const char * plb_llama_cpp_build(void) {
    return PLB_LLAMA_CPP_BUILD;
}
