/* Calls of libllama that must not end the process, its log, and what it holds. A part of plb.h. */
#ifndef PLB_GUARD_H
#define PLB_GUARD_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

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
/* What the calling thread has logged as a warning or an error since its last mark, and why guarded
 * calls have failed, which is not logged: newest part. */
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

/* This process, and the ends of what was made in `process`. In a forked child nothing is freed: the
 * threads that would be waited for are not there, and what is a device's is the parent's. */
int64_t plb_process(void);
void    plb_model_free(int64_t process, struct llama_model * model);
void    plb_lora_free(int64_t process, struct llama_adapter_lora * lora);
void    plb_context_free(int64_t process, struct llama_context * ctx);

#ifdef __cplusplus
}
#endif

#endif /* PLB_GUARD_H */
