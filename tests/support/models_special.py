"""Tiny GGUF files of other kinds than `models_gguf`'s: a table of positions (gpt2), an encoder
(bert), and a LoRA for a model of `models_gguf`."""

from __future__ import annotations

from pathlib import Path

import gguf

from tests.support.models_gguf import N_EMBD, N_FF, N_HEAD, N_VOCAB, Weights, finish, vocabulary

N_POSITIONS = 32


def _writer(path: Path, architecture: str) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(N_POSITIONS)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(1)
    writer.add_head_count(N_HEAD)
    writer.add_layer_norm_eps(1e-5)
    pieces, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    return writer


def _norm(writer: gguf.GGUFWriter, w: Weights, name: str) -> None:
    writer.add_tensor(f"{name}.weight", w.around(1.0, N_EMBD))
    writer.add_tensor(f"{name}.bias", w.around(0.0, N_EMBD))


def _products(writer: gguf.GGUFWriter, w: Weights, **shapes: tuple[int, int]) -> None:
    """Of the one block, with biases; `shapes`: of those beside what every model has."""
    shapes |= {
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_up": (N_FF, N_EMBD),
        "ffn_down": (N_EMBD, N_FF),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"blk.0.{name}.weight", w.matrix(*shape))
        writer.add_tensor(f"blk.0.{name}.bias", w.around(0.0, shape[0]))


def write_gpt2(path: Path) -> None:
    writer, w = _writer(path, "gpt2"), Weights(2)
    writer.add_tensor("token_embd.weight", w.matrix(N_VOCAB, N_EMBD))
    writer.add_tensor("position_embd.weight", w.matrix(N_POSITIONS, N_EMBD))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        _norm(writer, w, name)
    _products(writer, w, attn_qkv=(3 * N_EMBD, N_EMBD))
    finish(writer)


def write_bert(path: Path, *, reranker: bool = False) -> None:
    """`reranker`: with a head that gives one score."""
    writer, w = _writer(path, "bert"), Weights(3)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.RANK if reranker else gguf.PoolingType.MEAN)
    writer.add_token_type_count(1)
    writer.add_tensor("token_embd.weight", w.matrix(N_VOCAB, N_EMBD))
    writer.add_tensor("position_embd.weight", w.matrix(N_POSITIONS, N_EMBD))
    for name in ("token_embd_norm", "blk.0.attn_output_norm", "blk.0.layer_output_norm"):
        _norm(writer, w, name)
    square = (N_EMBD, N_EMBD)
    _products(writer, w, attn_q=square, attn_k=square, attn_v=square)
    if reranker:
        for name, shape in {"cls": square, "cls.output": (1, N_EMBD)}.items():
            writer.add_tensor(f"{name}.weight", w.matrix(*shape))
            writer.add_tensor(f"{name}.bias", w.around(0.0, shape[0]))
    finish(writer)


def write_lora(path: Path, architecture: str = "llama", width: int = N_EMBD, seed: int = 4) -> None:
    """A rank 4 change of the first layer's query and output projections."""
    writer, w = gguf.GGUFWriter(path, architecture), Weights(seed)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_name("tiny lora")
    for name in ("attn_q", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight.lora_a", w.matrix(4, width))
        writer.add_tensor(f"blk.0.{name}.weight.lora_b", w.matrix(width, 4))
    finish(writer)
