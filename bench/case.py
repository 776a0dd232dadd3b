"""The cases of a command line, and what runs without a model have in common."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyllamabatch.compare.case import I32, Arm, Case, Measured, ModelFile, record_of

__all__ = ["I32", "Arm", "Case", "Measured", "ModelFile", "cases_of", "record_of"]

NO_MODEL = ModelFile(Path())
NO_CONTEXT: dict[str, Any] = {"n_kv_max": 0, "type_k": "", "type_v": "", "n_gpu_layers": 0}
"""Settings (`Measured.settings`) of a run without a context."""


def cases_of(
    options: argparse.Namespace, model: ModelFile, pp: int, tg: int, each: Iterable[int]
) -> list[Case]:
    """A case for each number of sequences, by the options of `add_model` and --sampling."""
    return [
        Case(
            model=model,
            pp=pp,
            tg=tg,
            pl=pl,
            n_threads=options.threads,
            sampling=options.sampling,
            seed=options.seed,
            kv_unified=options.kv == "unified",
            n_gpu_layers=options.gpu_layers,
        )
        for pl in each
    ]
