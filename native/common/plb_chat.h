/* Pieces of tokens, JSON schemas, chat templates and answers. A part of plb.h. */
#ifndef PLB_CHAT_H
#define PLB_CHAT_H

#include "plb.h"

#ifdef __cplusplus
extern "C" {
#endif

/* -- text ---------------------------------------------------------------------------------------
 * The bytes that tokens stand for, one after the other: those of token i are
 * out[offsets[i]] .. out[offsets[i + 1] - 1], offsets has n + 1 entries. Special tokens give nothing.
 * Returns the bytes of all, and has written nothing behind `size` when they are more; or
 * PLB_E_ARGUMENT, PLB_E_TOKEN, PLB_E_MEMORY, PLB_E_EXCEPTION. */
int64_t plb_pieces(const struct llama_vocab * vocab, const llama_token * tokens, int32_t n,
                   char * out, int64_t size, int64_t * offsets);

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
 * markers, prefill, thinking_start, thinking_ends}, tokens as ids. markers: before one of these, or
 * at the end, content and thoughts end. *parser reads the answers to this prompt. */
char * plb_chat_render(const plb_chat_template * self, const char * request, plb_chat_parser ** parser);
/* The message {role, content, reasoning_content, tool_calls} in an answer. partial: more may follow. */
char * plb_chat_parse(const plb_chat_parser * parser, const char * text, size_t size, bool partial);
void   plb_chat_parser_free(plb_chat_parser * parser);

#ifdef __cplusplus
}
#endif

#endif /* PLB_CHAT_H */
