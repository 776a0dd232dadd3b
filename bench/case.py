"""What one run does (`Case`), what does it (`Arm`), and the cases of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.models import BenchModel
from pyllamabatch.compare.case import I32, Case, Described, Measured, ModelFile, record_of

__all__ = ["I32", "Arm", "Case", "Described", "Measured", "cases_of", "record_of"]

NO_MODEL = BenchModel(Path(), "", None)
NO_CONTEXT: dict[str, Any] = {"n_kv_max": 0, "type_k": "", "type_v": "", "n_gpu_layers": 0}
"""Settings (`Measured.settings`) of a run without a context."""


@dataclass(frozen=True)
class Arm:
    """A way to do the work of a bench. `includes`: what its time contains; `sampling`: whether it
    samples as the case says."""

    name: str
    includes: str
    run: Callable[[Any], Measured]
    sampling: bool = True


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
