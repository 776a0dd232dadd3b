"""Writes the tiny random model of the native tests: write_model.py FILE."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support import models_gguf

models_gguf.write_gguf(Path(sys.argv[1]), "llama")
