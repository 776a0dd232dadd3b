"""Models for the benches: random weights in a real shape, written on demand into the cache."""

import os
import sys
import zlib
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from bench.cache import cache_folder
from bench.shapes import SHAPES, Shape, TensorSpec
from bench.tools import vocabulary_file
from pyllamabatch.compare.case import ModelFile
from pyllamabatch.llama import runtime
from pyllamabatch.llama.host import usable_cores, whole_file
from pyllamabatch.models import CATALOGUE, default_model_path, fetch
from pyllamabatch.raw import ffi, lib

SEED = 20260101
ROWS_AT_ONCE = 4096  # of a matrix while its values are drawn: bounds the memory in use


def resolve(name: str) -> ModelFile:
    """The model that `--model NAME` means: a shape's name (written and quantised to Q4_K_M
    in the cache folder), `default` (the embedded model), a name of `models.fetch`, or a GGUF
    file."""
    if name in SHAPES:
        return ModelFile(quantised(SHAPES[name], "Q4_K_M"), SEED)
    if name == "default":
        return ModelFile(Path(default_model_path()))
    path = Path(name)
    if name in CATALOGUE and not path.exists():
        return ModelFile(fetch(name))
    if not path.is_file():
        known = ", ".join([*SHAPES, *CATALOGUE, "default"])
        raise SystemExit(f"--model {name}: no such file, and not one of {known}")
    return ModelFile(path)


def quantised(shape: Shape, file_type: str, *, seed: int = SEED) -> Path:
    """The path of `shape` with random weights in `file_type` (Q4_K_M, Q8_0, F16 …)."""
    folder = cache_folder("models")
    path = folder / f"{shape.name}-{file_type}-seed{seed}.gguf"
    if path.is_file():
        return path
    print(f"writing {path} (once; {shape.n_params / 1e6:.0f} M parameters) …", file=sys.stderr)
    half = folder / f"{shape.name}-F16-seed{seed}.gguf"
    made = not half.is_file()
    if made:
        with whole_file(half) as part:
            write_f16(shape, part, vocabulary_file(shape.vocabulary), seed=seed)
    if file_type == "F16":
        return half
    with whole_file(path) as part:
        quantise(half, part, file_type)
    if made:
        half.unlink()
    return path


def write_f16(shape: Shape, path: Path, vocabulary: Path, *, seed: int = SEED) -> None:
    """Writes matrices as F16 and vectors as F32, one tensor in memory at a time. `vocabulary`: a
    GGUF file whose `tokenizer.*` entries are copied."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    _write_hyperparameters(writer, shape)
    _copy_vocabulary(writer, vocabulary, shape.n_vocab)
    specs = list(shape.tensors())
    for spec in specs:
        vector = len(spec.shape) == 1
        dtype: np.dtype[np.generic] = np.dtype(np.float32 if vector else np.float16)
        writer.add_tensor_info(spec.name, spec.shape, dtype, spec.n_values * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for spec in specs:
        writer.write_tensor_data(random_tensor(spec, seed))
    writer.close()


def random_tensor(spec: TensorSpec, seed: int) -> npt.NDArray[np.float32] | npt.NDArray[np.float16]:
    """The values of one tensor: they depend on its name, or on that of the one that it is like, and
    the seed."""
    random = np.random.default_rng([seed, zlib.crc32((spec.like or spec.name).encode())])
    if len(spec.shape) == 1:
        vector: npt.NDArray[np.float32] = random.standard_normal(spec.shape, dtype=np.float32)
        vector *= np.float32(0.02)
        vector += np.float32(1.0 if spec.norm else 0.0)
        vector *= np.float32(spec.scale)
        return vector
    matrix = np.empty(spec.shape, np.float16)
    for first in range(0, len(matrix), ROWS_AT_ONCE):
        rows = matrix[first : first + ROWS_AT_ONCE]
        rows[:] = random.standard_normal(rows.shape, dtype=np.float32) / np.sqrt(spec.shape[-1])
    return np.roll(matrix, 1, axis=0) if spec.like else matrix


def _write_hyperparameters(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_name(f"{shape.name} random weights")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_context_length(shape.n_ctx_train)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    if shape.sliding_window:
        writer.add_sliding_window(shape.sliding_window)
        pattern = [(i + 1) % shape.sliding_pattern != 0 for i in range(shape.n_layer)]
        writer.add_sliding_window_pattern(pattern)


def _copy_vocabulary(writer: gguf.GGUFWriter, source: Path, n_vocab: int) -> None:
    for key, field in gguf.GGUFReader(source).fields.items():
        if key.startswith("tokenizer."):
            value, kinds = field.contents(), field.types
            if key == "tokenizer.ggml.tokens" and len(value) != n_vocab:
                raise ValueError(f"{source} has {len(value)} tokens, the shape says {n_vocab}")
            writer.add_key_value(key, value, kinds[0], kinds[1] if len(kinds) > 1 else None)


def quantise(source: Path, target: Path, file_type: str, *, n_threads: int = 0) -> None:
    """libllama's own quantisation, through a raw call.

    Raises RuntimeError when libllama refuses (it says why in its log).
    """
    params = ffi.new("llama_model_quantize_params *", lib.llama_model_quantize_default_params())
    params.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread = n_threads or usable_cores()
    runtime.ensure()
    code = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params)
    if code != 0:
        raise RuntimeError(f"llama_model_quantize({source}, {file_type}) returned {code}")
