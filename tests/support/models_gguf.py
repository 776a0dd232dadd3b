"""Tiny random-weight GGUF models in several architectures, for the tests.

`gguf_path(architecture)` writes the file once per process and returns its path.  A model has three
or four layers, 64 wide, and a vocabulary of a few hundred pieces with byte fallback, so any text
tokenizes.  Weights are drawn from a seed that depends on the architecture only: the files are the
same everywhere.

The weights are scaled so that the tests can tell right from wrong:

- logits have a standard deviation of about 4, so a tie between the best two is implausible;
- sublayers write as much into the residual stream as the embedding does and attention is sharp,
  so the next token depends on the context and not on the last token alone: a sequence that reads
  a neighbour's cells goes astray at once;
- the output rows of the control tokens are zero (logit 0, far below the maximum): a greedy
  continuation never ends by accident.  A `logit_bias` brings the end of text when a test wants it.
"""

import atexit
import functools
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

N_EMBD = 64
N_HEAD = 4
N_HEAD_KV = 2
HEAD_DIM = N_EMBD // N_HEAD
N_FF = 128
N_CTX_TRAIN = 2048
N_EXPERT, N_EXPERT_USED, N_FF_EXPERT = 8, 2, 64
SSM_CONV, SSM_STATE, SSM_RANK, SSM_INNER = 4, 16, 4, 2 * N_EMBD
CONV_CACHE = 4  # lfm2: tokens that a short convolution sees
SLIDING_WINDOW = 24  # gemma3: prompts in tests must be longer for the window to matter
ROPE_BASE = 10000.0
LOGIT_STD = 4.0
CONTROL_TOKENS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
UNK, BOS, EOS, IM_START, IM_END = range(len(CONTROL_TOKENS))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


STATEFUL = ("mamba", "conv")  # layers that keep a state instead of cells


@dataclass(frozen=True)
class Architecture:
    """What sets one architecture apart: its layers and what its memory can do."""

    name: str  # the key `general.architecture`
    layers: tuple[str, ...]  # "attention", "window" (sliding), "mamba" or "conv", in order
    bias: bool = False  # biases on Q, K and V
    qk_norm: bool = False  # RMS norm of Q and K per head
    post_norm: bool = False  # norms after attention and after the feed-forward
    experts: bool = False
    feed_forward: bool = True
    dt_b_c_norm: bool = False  # norms inside the mamba layers
    n_spare: int = 0  # tokens beside those of `vocabulary()`

    @property
    def recurrent(self) -> bool:
        """No layer keeps KV cells."""
        return all(layer in STATEFUL for layer in self.layers)

    @property
    def hybrid(self) -> bool:
        """Some layers keep KV cells and some a recurrent state."""
        return not self.recurrent and any(layer in STATEFUL for layer in self.layers)

    @property
    def window(self) -> int:
        """Positions that the sliding-window layers see, 0 without such layers."""
        return SLIDING_WINDOW if "window" in self.layers else 0


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", ("attention",) * 3),
        Architecture("qwen2", ("attention",) * 3, bias=True),
        Architecture(
            "gemma3", ("window", "attention", "window", "attention"), qk_norm=True, post_norm=True
        ),
        Architecture("qwen3moe", ("attention",) * 3, qk_norm=True, experts=True),
        Architecture("mamba", ("mamba",) * 3, feed_forward=False),
        Architecture("jamba", ("mamba", "attention", "mamba", "attention"), dt_b_c_norm=True),
        # a hybrid whose state can be rolled back (n_rs_seq), unlike the two before
        Architecture("lfm2", ("conv", "attention", "conv", "attention"), qk_norm=True),
    )
}
"""Every architecture the tests know, by its GGUF name."""

WORDS = """
the and that for with you this have from are not was but all can one out has
key value name word code secret answer say hello world red green blue
""".split()  # noqa: SIM905 (a list of words reads better as text)


def vocabulary(n_spare: int = 0) -> tuple[list[str], list[float], list[int]]:
    """Pieces, scores and types of a small SentencePiece vocabulary: control tokens, 256 bytes,
    printable ASCII, and the prefixes of a few words, longer pieces scoring higher; `n_spare` more
    that no text needs."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    characters = [*(chr(c) for c in range(33, 127)), "\u2581"]
    prefixes = {("\u2581" + word)[:n] for word in WORDS for n in range(2, len(word) + 2)}
    merged = sorted(prefixes, key=lambda piece: (-len(piece), piece))
    spare = [f"\u2581spare{i}" for i in range(n_spare)]
    pieces = [*CONTROL_TOKENS, *bytes_, *merged, *characters, *spare]
    types = [
        gguf.TokenType.UNKNOWN,
        *[gguf.TokenType.CONTROL] * (len(CONTROL_TOKENS) - 1),
        *[gguf.TokenType.BYTE] * len(bytes_),
        *[gguf.TokenType.NORMAL] * (len(merged) + len(characters) + n_spare),
    ]
    first_normal = len(CONTROL_TOKENS) + len(bytes_)
    scores = [0.0] * first_normal + [-float(i) for i in range(len(pieces) - first_normal)]
    return pieces, scores, [int(t) for t in types]


N_VOCAB = len(vocabulary()[0])


class Weights:
    """Random tensors, by shape; the last axis is the one that a product sums over."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def matrix(self, *shape: int, gain: float = 1.0) -> FloatArray:
        """Normal with the deviation that keeps the size of a unit-sized input, times `gain`."""
        values: FloatArray = self._random.standard_normal(shape, dtype=np.float32)
        values *= np.float32(gain / np.sqrt(shape[-1]))
        return values

    def around(self, centre: float, n: int, spread: float = 0.1) -> FloatArray:
        values: FloatArray = self._random.standard_normal(n, dtype=np.float32)
        values *= np.float32(spread)
        values += np.float32(centre)
        return values


def tensors(arch: Architecture, seed: int) -> Iterator[tuple[str, FloatArray]]:
    """Names and values of all tensors, in the order of the file."""
    w = Weights(seed)
    scaled_later = arch.name == "gemma3"  # its graph multiplies the embedding by sqrt(n_embd)
    yield (
        "token_embd.weight",
        w.matrix(N_VOCAB + arch.n_spare, N_EMBD, gain=1.0 if scaled_later else np.sqrt(N_EMBD)),
    )
    for i, layer in enumerate(arch.layers):
        block = f"blk.{i}."
        yield block + "attn_norm.weight", w.around(1.0, N_EMBD)
        write = {"mamba": _mamba, "conv": _conv}.get(layer, _attention)
        for name, value in write(arch, w):
            yield block + name, value
        if arch.feed_forward:
            for name, value in _feed_forward(arch, w):
                yield block + name, value
    final_norm = "token_embd_norm" if arch.name == "lfm2" else "output_norm"
    yield final_norm + ".weight", w.around(1.0, N_EMBD)
    output = w.matrix(N_VOCAB + arch.n_spare, N_EMBD, gain=LOGIT_STD)
    output[: len(CONTROL_TOKENS)] = 0.0
    yield "output.weight", output


def _attention(arch: Architecture, w: Weights) -> Iterator[tuple[str, FloatArray]]:
    n_kv = HEAD_DIM * N_HEAD_KV
    yield "attn_q.weight", w.matrix(N_EMBD, N_EMBD, gain=1.6)
    yield "attn_k.weight", w.matrix(n_kv, N_EMBD, gain=1.6)
    yield "attn_v.weight", w.matrix(n_kv, N_EMBD, gain=1.5)
    if arch.bias:
        yield "attn_q.bias", w.around(0.0, N_EMBD, spread=0.5)
        yield "attn_k.bias", w.around(0.0, n_kv, spread=0.5)
        yield "attn_v.bias", w.around(0.0, n_kv, spread=0.5)
    yield "attn_output.weight", w.matrix(N_EMBD, N_EMBD, gain=1.5)
    if arch.qk_norm:
        yield "attn_q_norm.weight", w.around(1.6, HEAD_DIM)
        yield "attn_k_norm.weight", w.around(1.6, HEAD_DIM)
    if arch.post_norm:
        yield "post_attention_norm.weight", w.around(1.0, N_EMBD)


def _mamba(arch: Architecture, w: Weights) -> Iterator[tuple[str, FloatArray]]:
    yield "ssm_in.weight", w.matrix(2 * SSM_INNER, N_EMBD, gain=1.5)
    yield "ssm_conv1d.weight", w.matrix(SSM_INNER, SSM_CONV, gain=1.5)
    yield "ssm_conv1d.bias", w.around(0.0, SSM_INNER)
    yield "ssm_x.weight", w.matrix(SSM_RANK + 2 * SSM_STATE, SSM_INNER, gain=2.0)
    if arch.dt_b_c_norm:
        yield "ssm_dt_norm.weight", w.around(1.0, SSM_RANK)
        yield "ssm_b_norm.weight", w.around(1.0, SSM_STATE)
        yield "ssm_c_norm.weight", w.around(1.0, SSM_STATE)
    yield "ssm_dt.weight", w.matrix(SSM_INNER, SSM_RANK)
    yield "ssm_dt.bias", w.around(-1.5, SSM_INNER, spread=0.5)
    decay = np.linspace(0.05, 1.0, SSM_STATE, dtype=np.float32)  # slow channels: long memory
    yield "ssm_a", np.tile(-decay, (SSM_INNER, 1))
    yield "ssm_d", w.around(1.0, SSM_INNER)
    yield "ssm_out.weight", w.matrix(N_EMBD, SSM_INNER, gain=2.0)


def _conv(arch: Architecture, w: Weights) -> Iterator[tuple[str, FloatArray]]:
    yield "shortconv.conv.weight", w.matrix(N_EMBD, CONV_CACHE, gain=1.5)
    yield "shortconv.in_proj.weight", w.matrix(3 * N_EMBD, N_EMBD, gain=1.5)
    yield "shortconv.out_proj.weight", w.matrix(N_EMBD, N_EMBD, gain=1.5)


def _feed_forward(arch: Architecture, w: Weights) -> Iterator[tuple[str, FloatArray]]:
    yield "ffn_norm.weight", w.around(1.0, N_EMBD)
    if arch.experts:
        yield "ffn_gate_inp.weight", w.matrix(N_EXPERT, N_EMBD, gain=3.0)
        yield "ffn_gate_exps.weight", w.matrix(N_EXPERT, N_FF_EXPERT, N_EMBD, gain=1.5)
        yield "ffn_up_exps.weight", w.matrix(N_EXPERT, N_FF_EXPERT, N_EMBD, gain=1.5)
        yield "ffn_down_exps.weight", w.matrix(N_EXPERT, N_EMBD, N_FF_EXPERT, gain=1.5)
    else:
        yield "ffn_gate.weight", w.matrix(N_FF, N_EMBD, gain=1.5)
        yield "ffn_up.weight", w.matrix(N_FF, N_EMBD, gain=1.5)
        yield "ffn_down.weight", w.matrix(N_EMBD, N_FF, gain=1.5)
    if arch.post_norm:
        yield "post_ffw_norm.weight", w.around(1.0, N_EMBD)


def write_gguf(
    path: Path, architecture: str | Architecture, *, file_type: str = "f32", seed: int | None = None
) -> None:
    """Writes one model: a known architecture by name, or a variant of one.

    `file_type` is the type of the matrices: f32, f16, q8_0 or q4_0.
    """
    arch = ARCHITECTURES[architecture] if isinstance(architecture, str) else architecture
    if seed is None:
        seed = zlib.crc32(arch.name.encode())
    writer = gguf.GGUFWriter(path, arch.name)
    _write_hyperparameters(writer, arch, file_type)
    _write_vocabulary(writer, arch.n_spare)
    for name, value in tensors(arch, seed):
        _add_tensor(writer, name, value, file_type)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_hyperparameters(writer: gguf.GGUFWriter, arch: Architecture, file_type: str) -> None:
    writer.add_name(f"tiny random {arch.name}")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[file_type]])
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(len(arch.layers))
    writer.add_feed_forward_length(N_FF if arch.feed_forward else 0)
    writer.add_layer_norm_rms_eps(1e-5)
    if not arch.recurrent:
        writer.add_head_count(N_HEAD)
        kv = [0 if layer in STATEFUL else N_HEAD_KV for layer in arch.layers]
        writer.add_head_count_kv(kv if arch.hybrid else N_HEAD_KV)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_rope_freq_base(ROPE_BASE)
        writer.add_rope_dimension_count(HEAD_DIM)
    else:
        writer.add_head_count(0)
    if "mamba" in arch.layers:
        writer.add_ssm_conv_kernel(SSM_CONV)
        writer.add_ssm_inner_size(SSM_INNER)
        writer.add_ssm_state_size(SSM_STATE)
        writer.add_ssm_time_step_rank(SSM_RANK)
    if "conv" in arch.layers:
        writer.add_shortconv_l_cache(CONV_CACHE)
    if arch.window:
        writer.add_sliding_window(arch.window)
        writer.add_sliding_window_pattern([layer == "window" for layer in arch.layers])
    if arch.experts:
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(N_EXPERT_USED)
        writer.add_expert_feed_forward_length(N_FF_EXPERT)


def _write_vocabulary(writer: gguf.GGUFWriter, n_spare: int) -> None:
    pieces, scores, types = vocabulary(n_spare)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(IM_END)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
_STAYS_F32 = ("norm", "bias", "ssm_a", "ssm_d", "conv1d", "shortconv.conv", "ffn_gate_inp")


def _add_tensor(writer: gguf.GGUFWriter, name: str, value: FloatArray, file_type: str) -> None:
    fits_blocks = file_type in ("f32", "f16") or value.shape[-1] % 32 == 0
    if file_type == "f32" or any(part in name for part in _STAYS_F32) or not fits_blocks:
        writer.add_tensor(name, value)
    else:
        kind = gguf.GGMLQuantizationType[file_type.upper()]
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


@functools.cache
def folder() -> Path:
    folder = tempfile.mkdtemp(prefix="pyllamabatch-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def gguf_path(architecture: str, file_type: str = "f32") -> Path:
    """The path of the tiny model, written at the first call and removed at exit."""
    path = folder() / f"tiny-{architecture}-{file_type}.gguf"
    write_gguf(path, architecture, file_type=file_type)
    return path
