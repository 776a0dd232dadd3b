"""The default model in PyTorch: a llama whose weights llama.cpp takes without any permutation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokenizer import N_VOCAB


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the model; widths are multiples of 32, as Q8_0 blocks need."""

    n_vocab: int = N_VOCAB
    n_ctx: int = 2048
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 512
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def rope_table(config: ModelConfig) -> Tensor:
    """Cosines and sines by position, float32, shape ``(n_ctx, head_dim / 2, 2)``."""
    exponent = torch.arange(0, config.head_dim, 2) / config.head_dim
    angle = torch.outer(torch.arange(config.n_ctx).float(), config.rope_base**-exponent)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs of ``x`` (batch, head, position, head_dim) by their position."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).type_as(x)


class Block(nn.Module):
    """One pre-norm layer: grouped-query attention, then SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, kv_width = config.n_embd, config.n_head_kv * config.head_dim
        self.head_dim = config.head_dim
        self.attn_norm = nn.RMSNorm(width, config.norm_eps)
        self.attn_q = nn.Linear(width, width, bias=False)
        self.attn_k = nn.Linear(width, kv_width, bias=False)
        self.attn_v = nn.Linear(width, kv_width, bias=False)
        self.attn_output = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, config.norm_eps)
        self.ffn_gate = nn.Linear(width, config.n_ff, bias=False)
        self.ffn_up = nn.Linear(width, config.n_ff, bias=False)
        self.ffn_down = nn.Linear(config.n_ff, width, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        h = self.attn_norm(x)
        q, k, v = (
            projection(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.attn_q, self.attn_k, self.attn_v)
        )
        attended = F.scaled_dot_product_attention(
            rotate(q, table), rotate(k, table), v, is_causal=True, enable_gqa=True
        )
        x = x + self.attn_output(attended.transpose(1, 2).flatten(-2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    """Token ids ``(batch, position)`` to logits ``(batch, position, n_vocab)``.

    The embedding is also the output matrix. Modules are named as the GGUF tensors are.
    """

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.n_vocab, config.n_embd)
        self.blk = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.output_norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.register_buffer("rope", rope_table(config), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn_output.weight", "ffn_down.weight"))
                depth = (2 * config.n_layer) ** -0.5 if residual else 1.0
                nn.init.normal_(weight, std=0.02 if "embd" in name else depth * 0.5 / 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embd(tokens)
        table = self.rope[: tokens.shape[1]]
        for block in self.blk:
            x = block(x, table)
        return F.linear(self.output_norm(x), self.token_embd.weight)
