// Tokens to text.
#include "step/engine.hpp"

using namespace plb;

int64_t plb_pieces(const llama_vocab * vocab, const llama_token * tokens, int32_t n, char * out,
                   int64_t size, int64_t * offsets) {
    if (vocab == nullptr || n < 0 || size < 0 || offsets == nullptr || (n > 0 && tokens == nullptr) ||
        (size > 0 && out == nullptr)) {
        return PLB_E_ARGUMENT;
    }
    const int32_t n_vocab = llama_vocab_n_tokens(vocab);
    const bool has_text = llama_vocab_type(vocab) != LLAMA_VOCAB_TYPE_NONE;
    for (int32_t i = 0; i < n; ++i) {
        if (tokens[i] < 0 || tokens[i] >= n_vocab) {
            return PLB_E_TOKEN;
        }
    }
    char ignored[TEXT_BYTES];
    int64_t at = 0;
    const int32_t code = guarded(ignored, [&] {
        for (int32_t i = 0; i < n; ++i) {
            offsets[i] = at;
            if (!has_text) {
                continue;
            }
            const int32_t room = (int32_t) std::clamp<int64_t>(size - at, 0, INT32_MAX);
            char none = 0;
            const int32_t bytes = llama_token_to_piece(vocab, tokens[i], room > 0 ? out + at : &none,
                                                       room, 0, false);
            at += bytes < 0 ? -(int64_t) bytes : bytes;
        }
    });
    offsets[n] = at;
    return code ? code : at;
}
