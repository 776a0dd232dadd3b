"""Real model shapes with random weights: names and sizes of every tensor, no values.

A bench needs the work that a model makes, not its knowledge: same layers, same widths, same
vocabulary, so the same bytes to read and the same products to compute.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: rows first, as NumPy has it (GGUF lists the sizes the other way round)."""

    name: str
    shape: tuple[int, ...]
    norm: bool = False  # around one; else a bias (1-D) or a matrix
    scale: float = 1.0  # of all values
    like: str = ""  # another tensor, whose rows it has, each one further on

    @property
    def n_values(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with grouped-query attention."""

    name: str
    architecture: str  # llama.cpp's name
    vocabulary: str  # models/ggml-vocab-NAME.gguf in llama.cpp's tree
    n_vocab: int
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_ctx_train: int
    rope_base: float
    rms_eps: float
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norm: bool = False
    sliding_window: int = 0
    sliding_pattern: int = 0  # every so many layers one attends to all
    branch_scale: float = 1.0  # of what a layer adds, by its post norms
    counts: bool = False  # the output matrix has the embedding's rows, each one further on
    source: str = ""  # where these sizes are from

    def tensors(self) -> Iterator[TensorSpec]:
        """All tensors in file order; without an output matrix it is the embedding's (tied)."""
        n_q, n_kv = self.n_head * self.head_dim, self.n_head_kv * self.head_dim
        yield TensorSpec("token_embd.weight", (self.n_vocab, self.n_embd))
        for i in range(self.n_layer):
            block = f"blk.{i}."
            yield TensorSpec(block + "attn_norm.weight", (self.n_embd,), norm=True)
            for part, rows in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                yield TensorSpec(f"{block}{part}.weight", (rows, self.n_embd))
                if self.qkv_bias:
                    yield TensorSpec(f"{block}{part}.bias", (rows,))
            yield TensorSpec(block + "attn_output.weight", (self.n_embd, n_q))
            if self.qk_norm:
                yield TensorSpec(block + "attn_q_norm.weight", (self.head_dim,), norm=True)
                yield TensorSpec(block + "attn_k_norm.weight", (self.head_dim,), norm=True)
            if self.post_norm:
                yield self._post_norm(block + "post_attention_norm.weight")
            yield TensorSpec(block + "ffn_norm.weight", (self.n_embd,), norm=True)
            yield TensorSpec(block + "ffn_gate.weight", (self.n_ff, self.n_embd))
            yield TensorSpec(block + "ffn_up.weight", (self.n_ff, self.n_embd))
            yield TensorSpec(block + "ffn_down.weight", (self.n_embd, self.n_ff))
            if self.post_norm:
                yield self._post_norm(block + "post_ffw_norm.weight")
        yield TensorSpec("output_norm.weight", (self.n_embd,), norm=True)
        if self.counts:
            yield TensorSpec("output.weight", (self.n_vocab, self.n_embd), like="token_embd.weight")

    def _post_norm(self, name: str) -> TensorSpec:
        return TensorSpec(name, (self.n_embd,), norm=True, scale=self.branch_scale)

    @property
    def n_params(self) -> int:
        return sum(tensor.n_values for tensor in self.tensors())


QWEN2_0_5B = Shape(
    name="qwen2-0.5b",
    architecture="qwen2",
    vocabulary="qwen2",
    n_vocab=151936,
    n_layer=24,
    n_embd=896,
    n_head=14,
    n_head_kv=2,
    head_dim=64,
    n_ff=4864,
    n_ctx_train=32768,
    rope_base=1e6,
    rms_eps=1e-6,
    qkv_bias=True,
    source="config.json of Qwen2-0.5B",
)
GEMMA3_1B = Shape(
    name="gemma3-1b",
    architecture="gemma3",
    vocabulary="gemma-4",
    n_vocab=262144,
    n_layer=26,
    n_embd=1152,
    n_head=4,
    n_head_kv=1,
    head_dim=256,
    n_ff=6912,
    n_ctx_train=32768,
    rope_base=1e6,
    rms_eps=1e-6,
    qk_norm=True,
    post_norm=True,
    sliding_window=512,
    sliding_pattern=6,
    source="config.json of Gemma 3 1B; its vocabulary's size, Gemma 4's pieces",
)
COUNTS = replace(GEMMA3_1B, name="gemma3-1b-counts", branch_scale=1 / 256, counts=True)
"""Its layers add next to nothing to a token's embedding, and the output matrix has that in the row
of the next token: after token 7 the most likely one is 8, by far, however the sums are rounded."""

SHAPES = {shape.name: shape for shape in (QWEN2_0_5B, GEMMA3_1B, COUNTS)}
