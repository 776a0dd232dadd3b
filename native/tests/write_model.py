"""Writes the tiny random models of the native tests: write_model.py [LLAMA [MTP [HYBRID]]], a plain
decoder, one with layers that predict further tokens, and one that keeps a state besides."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import models_gguf, models_special

WRITERS = (
    lambda path: models_gguf.write_gguf(path, "llama"),
    models_special.write_glm4moe,
    models_special.write_qwen35,
)
for write, path in zip(WRITERS, sys.argv[1:], strict=False):
    write(Path(path))
