"""Tiny GGUF files of other kinds than `models_gguf`'s: a table of positions (gpt2), an encoder
(bert), layers that predict further tokens (mimo2, glm4moe, and behind recurrent ones qwen35),
compressed keys (deepseek4), and a LoRA for a model of `models_gguf`."""

import functools
from pathlib import Path

import gguf
import numpy as np

from tests.support.models_gguf import (
    BOS,
    CONTROL_TOKENS,
    EOS,
    LOGIT_STD,
    N_CTX_TRAIN,
    N_EMBD,
    N_EXPERT,
    N_EXPERT_USED,
    N_FF,
    N_FF_EXPERT,
    N_HEAD,
    N_VOCAB,
    ROPE_BASE,
    SLIDING_WINDOW,
    UNK,
    FloatArray,
    Weights,
    finish,
    folder,
    vocabulary,
)

N_POSITIONS = 32


def _writer(path: Path, architecture: str, n_layer: int = 1) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_block_count(n_layer)
    writer.add_head_count(N_HEAD)
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
    writer.add_context_length(N_POSITIONS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_tensor("token_embd.weight", w.matrix(N_VOCAB, N_EMBD))
    writer.add_tensor("position_embd.weight", w.matrix(N_POSITIONS, N_EMBD))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        _norm(writer, w, name)
    _products(writer, w, attn_qkv=(3 * N_EMBD, N_EMBD))
    finish(writer)


def write_bert(path: Path, *, reranker: bool = False) -> None:
    """`reranker`: with a head that gives one score."""
    writer, w = _writer(path, "bert"), Weights(3)
    writer.add_context_length(N_POSITIONS)
    writer.add_layer_norm_eps(1e-5)
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


def _decoder(writer: gguf.GGUFWriter) -> None:
    width = N_EMBD // N_HEAD
    writer.add_context_length(N_CTX_TRAIN)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_rope_dimension_count(width)
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_add_bos_token(True)


def write_mimo2(
    path: Path, *, n_nextn: int = 1, writes: float = 0.05, stripped: bool = False, seed: int = 5
) -> None:
    """A decoder (mimo2) with `n_nextn` layers behind two others, that predict further tokens.

    The next token depends mostly on the last one, in the decoder and in the layers behind it alike,
    so that these are often right. `writes` scales what the decoder's layers add to that; those
    behind it add four times as much, which depends on the hidden states that they start from.
    `stripped`: these are named, and not in the file.
    """
    n_layer = 2 + n_nextn
    writer, w = _writer(path, "mimo2", n_layer), Weights(seed)
    _decoder(writer)
    writer.add_sliding_window(SLIDING_WINDOW)
    writer.add_sliding_window_pattern([i == 0 for i in range(n_layer)])
    writer.add_expert_feed_forward_length(N_FF)
    writer.add_nextn_predict_layers(n_nextn)
    tensors = {"token_embd.weight": w.matrix(N_VOCAB, N_EMBD, gain=np.sqrt(N_EMBD))}
    for i in range(n_layer):
        is_nextn = i >= n_layer - n_nextn
        if is_nextn and stripped:
            continue
        gain = writes * (4 if is_nextn else 1)
        layer = {
            "attn_norm.weight": w.around(1.0, N_EMBD),
            "attn_qkv.weight": w.matrix(3 * N_EMBD, N_EMBD, gain=1.6),
            "attn_output.weight": w.matrix(N_EMBD, N_EMBD, gain=1.5 * gain),
            "ffn_norm.weight": w.around(1.0, N_EMBD),
            **_feed_forward(w, 1.5 * gain),
        }
        if is_nextn:
            layer |= _predicts(w, gain)
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    _end(writer, w, tensors)


def write_glm4moe(path: Path, *, writes: float = 0.08) -> None:
    """As `write_mimo2`, with experts, and one layer that predicts; libllama has the hidden states
    of all rows of a batch there, be they asked for or not."""
    n_layer, n_ff = 3, N_FF_EXPERT
    writer, w = _writer(path, "glm4moe", n_layer), Weights(6)
    _decoder(writer)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_EXPERT_USED)
    writer.add_expert_feed_forward_length(n_ff)
    writer.add_expert_shared_count(1)
    writer.add_nextn_predict_layers(1)
    tensors = {"token_embd.weight": w.matrix(N_VOCAB, N_EMBD, gain=np.sqrt(N_EMBD))}
    for i in range(n_layer):
        gain = 1.5 * writes * (4 if i == n_layer - 1 else 1)
        layer = {
            "attn_norm.weight": w.around(1.0, N_EMBD),
            "attn_q.weight": w.matrix(N_EMBD, N_EMBD, gain=1.6),
            "attn_k.weight": w.matrix(N_EMBD, N_EMBD, gain=1.6),
            "attn_v.weight": w.matrix(N_EMBD, N_EMBD, gain=1.6),
            "attn_output.weight": w.matrix(N_EMBD, N_EMBD, gain=gain),
            "post_attention_norm.weight": w.around(1.0, N_EMBD),
            "ffn_gate_inp.weight": w.matrix(N_EXPERT, N_EMBD, gain=3.0),
            "exp_probs_b.bias": w.around(0.0, N_EXPERT),
            "ffn_gate_exps.weight": w.matrix(N_EXPERT, n_ff, N_EMBD, gain=1.5),
            "ffn_up_exps.weight": w.matrix(N_EXPERT, n_ff, N_EMBD, gain=1.5),
            "ffn_down_exps.weight": w.matrix(N_EXPERT, N_EMBD, n_ff, gain=gain),
            "ffn_gate_shexp.weight": w.matrix(n_ff, N_EMBD, gain=1.5),
            "ffn_up_shexp.weight": w.matrix(n_ff, N_EMBD, gain=1.5),
            "ffn_down_shexp.weight": w.matrix(N_EMBD, n_ff, gain=gain),
        }
        if i == n_layer - 1:
            layer |= _predicts(w, 4 * writes)
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    _end(writer, w, tensors)


def write_qwen35(path: Path, *, writes: float = 0.02) -> None:
    """As `write_mimo2`, with a recurrent layer (gated delta net) before one of attention, and one
    layer that predicts."""
    n_layer, width, n_group, n_state = 3, N_EMBD // N_HEAD, 2, 16
    inner, mixed = n_state * N_HEAD, n_state * (N_HEAD + 2 * n_group)
    writer, w = _writer(path, "qwen35", n_layer), Weights(7)
    _decoder(writer)
    writer.add_rope_dimension_sections([width // 4, width // 8, width // 8, 0])
    writer.add_full_attention_interval(2)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(inner)
    writer.add_ssm_state_size(n_state)
    writer.add_ssm_time_step_rank(N_HEAD)
    writer.add_ssm_group_count(n_group)
    writer.add_nextn_predict_layers(1)
    tensors = {"token_embd.weight": w.matrix(N_VOCAB, N_EMBD, gain=np.sqrt(N_EMBD))}
    for i in range(n_layer):
        gain = 1.5 * writes * (4 if i == n_layer - 1 else 1)
        if i == 0:
            layer = {
                "attn_qkv.weight": w.matrix(mixed, N_EMBD, gain=1.5),
                "attn_gate.weight": w.matrix(inner, N_EMBD, gain=1.5),
                "ssm_conv1d.weight": w.matrix(mixed, 4, gain=1.5),
                "ssm_dt.bias": w.around(-1.5, N_HEAD, spread=0.5),
                "ssm_a": -np.linspace(0.05, 1.0, N_HEAD, dtype=np.float32),
                "ssm_beta.weight": w.matrix(N_HEAD, N_EMBD),
                "ssm_alpha.weight": w.matrix(N_HEAD, N_EMBD),
                "ssm_norm.weight": w.around(1.0, n_state),
                "ssm_out.weight": w.matrix(N_EMBD, inner, gain=gain),
            }
        else:
            layer = {
                "attn_q.weight": w.matrix(2 * N_EMBD, N_EMBD, gain=1.6),
                "attn_k.weight": w.matrix(N_EMBD, N_EMBD, gain=1.6),
                "attn_v.weight": w.matrix(N_EMBD, N_EMBD, gain=1.6),
                "attn_q_norm.weight": w.around(1.6, width),
                "attn_k_norm.weight": w.around(1.6, width),
                "attn_output.weight": w.matrix(N_EMBD, N_EMBD, gain=gain),
            }
        layer |= {
            "attn_norm.weight": w.around(1.0, N_EMBD),
            "post_attention_norm.weight": w.around(1.0, N_EMBD),
            **_feed_forward(w, gain),
        }
        if i == n_layer - 1:
            layer |= _predicts(w, 4 * writes)
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    _end(writer, w, tensors)


def write_deepseek4(path: Path) -> None:
    """Three layers with keys of single tokens, of four and of 128 together: the last two beside
    a window, and libllama does not say which cells of theirs are in use."""
    ratios, width, low, n_lanes, wide_index = (0, 4, 128), N_EMBD, N_EMBD // 2, 4, 2 * N_EMBD
    writer, w = _writer(path, "deepseek4", len(ratios)), Weights(8)
    _decoder(writer)
    writer.add_context_length(16 * N_CTX_TRAIN)
    writer.add_head_count_kv(1)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_sliding_window(SLIDING_WINDOW)
    writer.add_expert_count(N_EXPERT)
    writer.add_expert_used_count(N_EXPERT_USED)
    writer.add_expert_feed_forward_length(N_FF_EXPERT)
    writer.add_expert_shared_count(1)
    for name, value in {
        "attention.q_lora_rank": low,
        "attention.output_lora_rank": low,
        "attention.output_group_count": 2,
        "attention.indexer.head_count": N_HEAD,
        "attention.indexer.key_length": wide_index,  # as wide as a head it is divided by zero
        "attention.indexer.top_k": 64,
        "hyper_connection.count": n_lanes,  # no other number is computed
        "hyper_connection.sinkhorn_iterations": 3,
        "hash_layer_count": 0,
        "expert_gating_func": 4,
    }.items():
        writer.add_uint32(f"deepseek4.{name}", value)
    for name, number in {
        "attention.compress_rope_freq_base": ROPE_BASE,
        "hyper_connection.epsilon": 1e-6,
        "expert_weights_scale": 1.0,
        "swiglu_clamp_exp": 10.0,
    }.items():
        writer.add_float32(f"deepseek4.{name}", number)
    writer.add_bool("deepseek4.expert_weights_norm", True)
    writer.add_array("deepseek4.attention.compress_ratios", list(ratios))

    def lanes(name: str, n_out: int, n_scales: int) -> dict[str, FloatArray]:
        return {
            f"{name}_fn.weight": w.matrix(n_out, n_lanes * N_EMBD),
            f"{name}_base.weight": w.around(0.0, n_out),
            f"{name}_scale.weight": np.ones(n_scales, np.float32),
        }

    def compressor(name: str, width: int, ratio: int) -> dict[str, FloatArray]:
        wide = width * (2 if ratio == 4 else 1)
        return {
            f"{name}_kv.weight": w.matrix(wide, N_EMBD),
            f"{name}_gate.weight": w.matrix(wide, N_EMBD),
            f"{name}_ape.weight": w.matrix(ratio, wide),
            f"{name}_norm.weight": w.around(1.0, width),
        }

    tensors = {"token_embd.weight": w.matrix(N_VOCAB, N_EMBD, gain=np.sqrt(N_EMBD))}
    tensors |= lanes("output_hc", n_lanes, 1)
    for i, ratio in enumerate(ratios):
        layer = {
            "attn_norm.weight": w.around(1.0, N_EMBD),
            "attn_sinks.weight": w.around(0.0, N_HEAD),
            "attn_q_a.weight": w.matrix(low, N_EMBD),
            "attn_q_a_norm.weight": w.around(1.0, low),
            "attn_q_b.weight": w.matrix(N_HEAD * width, low, gain=1.6),
            "attn_kv.weight": w.matrix(width, N_EMBD, gain=1.6),
            "attn_kv_a_norm.weight": w.around(1.0, width),
            "attn_output_a.weight": w.matrix(2 * low, N_HEAD * width // 2),
            "attn_output_b.weight": w.matrix(N_EMBD, 2 * low),
            **lanes("hc_attn", (2 + n_lanes) * n_lanes, 3),
            **lanes("hc_ffn", (2 + n_lanes) * n_lanes, 3),
            "ffn_norm.weight": w.around(1.0, N_EMBD),
            "ffn_gate_inp.weight": w.matrix(N_EXPERT, N_EMBD, gain=3.0),
            "exp_probs_b.bias": w.around(0.0, N_EXPERT),
            "ffn_gate_exps.weight": w.matrix(N_EXPERT, N_FF_EXPERT, N_EMBD),
            "ffn_up_exps.weight": w.matrix(N_EXPERT, N_FF_EXPERT, N_EMBD),
            "ffn_down_exps.weight": w.matrix(N_EXPERT, N_EMBD, N_FF_EXPERT),
            "ffn_gate_shexp.weight": w.matrix(N_FF_EXPERT, N_EMBD),
            "ffn_up_shexp.weight": w.matrix(N_FF_EXPERT, N_EMBD),
            "ffn_down_shexp.weight": w.matrix(N_EMBD, N_FF_EXPERT),
        }
        if ratio:
            layer |= compressor("attn_compressor", width, ratio)
        if ratio == 4:
            layer |= {
                "indexer.proj.weight": w.matrix(N_HEAD, N_EMBD),
                "indexer.attn_q_b.weight": w.matrix(N_HEAD * wide_index, low),
                **compressor("indexer_compressor", wide_index, ratio),
            }
        tensors |= {f"blk.{i}.{name}": value for name, value in layer.items()}
    _end(writer, w, tensors)


def _end(writer: gguf.GGUFWriter, w: Weights, tensors: dict[str, FloatArray]) -> None:
    for name, value in (tensors | _output(w)).items():
        writer.add_tensor(name, value)
    finish(writer)


def _feed_forward(w: Weights, gain: float) -> dict[str, FloatArray]:
    return {
        "ffn_gate.weight": w.matrix(N_FF, N_EMBD, gain=1.5),
        "ffn_up.weight": w.matrix(N_FF, N_EMBD, gain=1.5),
        "ffn_down.weight": w.matrix(N_EMBD, N_FF, gain=gain),
    }


def _predicts(w: Weights, gain: float) -> dict[str, FloatArray]:
    """What a layer has besides that predicts: the token's part stays what it is."""
    state = w.matrix(N_EMBD, N_EMBD, gain=gain)
    ones = np.ones(N_EMBD, np.float32)
    return {
        "nextn.eh_proj.weight": np.concatenate((np.diag(ones), state), axis=1),
        "nextn.enorm.weight": ones,
        "nextn.hnorm.weight": ones,
    }


def _output(w: Weights) -> dict[str, FloatArray]:
    """No control token is ever the most likely one."""
    output = w.matrix(N_VOCAB, N_EMBD, gain=LOGIT_STD)
    output[: len(CONTROL_TOKENS)] = 0.0
    return {"output_norm.weight": np.ones(N_EMBD, np.float32), "output.weight": output}


@functools.cache
def mimo2_path() -> Path:
    """One whose layer is right for every fourth of its tokens: written once, removed at exit."""
    path = folder() / "tiny-mimo2.gguf"
    write_mimo2(path, writes=0.02)
    return path


@functools.cache
def qwen35_path(writes: float = 0.02) -> Path:
    """Written once, removed at exit."""
    path = folder() / f"tiny-qwen35-{writes}.gguf"
    write_qwen35(path, writes=writes)
    return path
