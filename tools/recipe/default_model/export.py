"""Write the trained weights as a GGUF file that llama.cpp loads.

``python -m tools.recipe.default_model.export build/model.pt build/model.gguf``
``python -m tools.recipe.default_model.export build/draft.pt build/draft.gguf --type Q5_0``
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from torch import Tensor

from . import tokenizer
from .model import ModelConfig


def config_of(weights: dict[str, Tensor]) -> ModelConfig:
    """The shape that these weights have."""
    n_layer = sum(name.endswith("attn_norm.weight") for name in weights)
    return ModelConfig(n_layer=n_layer, n_ff=len(weights["blk.0.ffn_gate.weight"]))


def add_metadata(writer: GGUFWriter, config: ModelConfig) -> None:
    """Describe the model and the shape of its graph."""
    draft = config.n_layer < ModelConfig().n_layer
    writer.add_name("pyllamabatch default" + (" draft" if draft else ""))
    writer.add_description(
        "Recall, copy, reverse, upper-case, sort, arithmetic, counting, short Q&A"
    )
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.n_vocab)


def add_vocabulary(writer: GGUFWriter) -> None:
    """Describe the tokenizer of ``tokenizer.py`` as a byte-level BPE without usable merges."""
    texts = tokenizer.token_texts()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types(
        [
            TokenType.CONTROL if token in tokenizer.CONTROL_TOKENS else TokenType.NORMAL
            for token in range(len(texts))
        ]
    )
    writer.add_token_merges(tokenizer.MERGES)
    writer.add_bos_token_id(tokenizer.END_OF_TEXT)
    writer.add_eos_token_id(tokenizer.IM_END)
    writer.add_eot_token_id(tokenizer.IM_END)
    writer.add_pad_token_id(tokenizer.END_OF_TEXT)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(tokenizer.CHAT_TEMPLATE)


def add_weights(writer: GGUFWriter, weights: dict[str, Tensor], kind: GGMLQuantizationType) -> None:
    """Add the tensors under the names they already have, matrices as ``kind``, norms as float32."""
    for name, weight in weights.items():
        values = weight.float().numpy()
        if weight.dim() == 2:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights", type=Path, help="model.pt of the training step")
    parser.add_argument("gguf", type=Path, help="the file to write")
    parser.add_argument(
        "--type", choices=("Q8_0", "Q5_0", "F16"), default="Q8_0", help="of the matrices"
    )
    args = parser.parse_args()

    writer = GGUFWriter(args.gguf, "llama")
    kind = GGMLQuantizationType[args.type]
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{args.type}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    weights = torch.load(args.weights, map_location="cpu", weights_only=True)
    add_metadata(writer, config_of(weights))
    add_vocabulary(writer)
    add_weights(writer, weights, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{args.gguf}: {args.gguf.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
