"""Writes the tiny random models of the native tests: write_model.py LLAMA MTP, a plain decoder and
one with layers that predict further tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import models_gguf, models_special

models_gguf.write_gguf(Path(sys.argv[1]), "llama")
models_special.write_glm4moe(Path(sys.argv[2]))
