"""Two sequences in one batch, with llama.cpp's own functions and nothing else.

`lib` is libllama, unguarded: every function has its C name and its C arguments.
"""

from pyllamabatch.models import default_model_path
from pyllamabatch.raw import ffi, lib

lib.plb_log_install()  # llama.cpp's log goes to a ring, not to the standard error
lib.llama_backend_init()
path = str(default_model_path()).encode()
model = lib.llama_model_load_from_file(path, lib.llama_model_default_params())
vocab = lib.llama_model_get_vocab(model)
params = lib.llama_context_default_params()
params.n_ctx, params.n_seq_max, params.kv_unified = 512, 2, True
ctx = lib.llama_init_from_model(model, params)
batch = lib.llama_batch_init(256, 0, 1)  # 256 rows, each of one sequence


def add(token: int, pos: int, seq_id: int, logits: bool) -> int:
    """Add a row. Returns its index, which finds its logits after the decode."""
    row = batch.n_tokens
    batch.token[row], batch.pos[row], batch.logits[row] = token, pos, logits
    batch.n_seq_id[row], batch.seq_id[row][0] = 1, seq_id
    batch.n_tokens += 1
    return row


def likeliest(row: int) -> int:
    logits = ffi.unpack(lib.llama_get_logits_ith(ctx, row), lib.llama_vocab_n_tokens(vocab))
    return logits.index(max(logits))


# Prefill: the rows of both prompts in one decode, with logits for the last row of each. The
# embedded model has a token for each byte, so a text's bytes are its tokens.
template = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
prompts = [template.format(text).encode() for text in ("Copy: hello", "What is 17 + 25?")]
tokens = ffi.new("llama_token[]", 256)
n_past, rows = {}, {}
for seq_id, text in enumerate(prompts):
    n = lib.llama_tokenize(vocab, text, len(text), tokens, 256, True, True)
    rows[seq_id] = [add(tokens[pos], pos, seq_id, pos == n - 1) for pos in range(n)][-1]
    n_past[seq_id] = n

# Decode: a row for each sequence that goes on.
answers = dict.fromkeys(rows, b"")
while rows and lib.llama_decode(ctx, batch) == 0:
    batch.n_tokens, chosen = 0, {seq_id: likeliest(row) for seq_id, row in rows.items()}
    rows = {s: add(t, n_past[s], s, True) for s, t in chosen.items() if t < 256}  # else: the end
    for seq_id in rows:
        answers[seq_id] += bytes([chosen[seq_id]])
        n_past[seq_id] += 1
print(*(answer.decode() for answer in answers.values()), sep="\n")
lib.llama_batch_free(batch), lib.llama_free(ctx), lib.llama_model_free(model)
