"""One run's work and result (`pyllamabatch.compare.case`), and the cases of a command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bench.models import BenchModel
from pyllamabatch.compare.case import I32, Case, Described, Measured
from pyllamabatch.compare.case import record_of as case_row

__all__ = ["I32", "Arm", "Case", "Described", "Measured", "case_row", "cases_of"]


def cases_of(
    options: argparse.Namespace, model: BenchModel, pp: int, tg: int, each: Iterable[int]
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


@dataclass(frozen=True)
class Arm:
    """A way to do the work of `decode`."""

    name: str
    includes: str
    sampling: bool
    run: Callable[[Case], Measured]
