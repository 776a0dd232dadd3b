"""One run's work and result, and the row that keeps both."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bench import schema
from bench.models import BenchModel

I32 = npt.NDArray[np.int32]
ERROR_CHARACTERS = 600  # of a failure's message, its end


@dataclass(frozen=True)
class Case:
    """What one run does."""

    model: BenchModel
    pp: int
    tg: int
    pl: int
    n_threads: int
    sampling: str  # "greedy" or "default", for the arms that sample
    seed: int
    kv_unified: bool = False  # one pool of cells, or a stream per sequence
    n_batch: int = 2048
    n_ubatch: int = 512
    n_gpu_layers: int = -1

    @property
    def n_ctx(self) -> int:
        """Room for every sequence (one token more than timed: the first sample), as streams of a
        multiple of 256 cells, so that unified and separate cells have the same total."""
        per_sequence = self.pp + self.tg + 1
        return self.pl * (-(-per_sequence // 256) * 256)

    def prompts(self, n_vocab: int, which: int = 0) -> I32:
        """Random tokens, shape (pl, pp); others for another `which`."""
        generator = np.random.default_rng([self.seed, which])
        return generator.integers(0, n_vocab, (self.pl, self.pp), dtype=np.int32)


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
class Measured:
    """Times of one run in s; `settings` are row fields that differ from the case's."""

    t_pp: float
    t_tg: float
    settings: dict[str, Any] = field(default_factory=dict)
    detail: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def failed(cls, failure: Exception | str) -> Measured:
        """No result, and why."""
        if isinstance(failure, Exception):
            failure = f"{type(failure).__name__}: {failure}"
        return cls(0.0, 0.0, error=failure[-ERROR_CHARACTERS:])


class Described(Protocol):
    """What a row says of an arm.  `includes`: what its time contains; `sampling`: whether the
    case's applies."""

    @property
    def name(self) -> str: ...
    @property
    def includes(self) -> str: ...
    @property
    def sampling(self) -> bool: ...


@dataclass(frozen=True)
class Arm:
    """A way to do the work of `decode`."""

    name: str
    includes: str
    sampling: bool
    run: Callable[[Case], Measured]


def case_row(
    bench: str,
    arm: Described,
    case: Case,
    measured: Measured,
    facts: dict[str, Any],
    run_id: str,
    repeat: int,
) -> schema.Row:
    """The row of one run; `facts`: `InProcess.facts()` and `schema.now()`."""
    settings: dict[str, Any] = {
        "n_kv_max": case.n_ctx,
        "n_batch": case.n_batch,
        "n_ubatch": case.n_ubatch,
        "flash_attn": -1,
        "kv_unified": case.kv_unified,
        "type_k": "f16",
        "type_v": "f16",
        "n_gpu_layers": case.n_gpu_layers,
        "n_threads": case.n_threads,
        "n_threads_batch": case.n_threads,
    }
    times = schema.speeds(
        pp=case.pp, tg=case.tg, pl=case.pl, t_pp=measured.t_pp, t_tg=measured.t_tg
    )
    return schema.Row(
        bench=bench,
        arm=arm.name,
        includes=arm.includes,
        run_id=run_id,
        repeat=repeat,
        sampling=case.sampling if arm.sampling else "none",
        **schema.machine(),
        model_filename=case.model.path.name,
        model_seed=case.model.seed,
        seed=case.seed,
        pp=case.pp,
        tg=case.tg,
        pl=case.pl,
        n_kv=case.pl * (case.pp + case.tg),
        detail=measured.detail,
        error=measured.error,
        **(facts | settings | measured.settings),
        **times,
    )
