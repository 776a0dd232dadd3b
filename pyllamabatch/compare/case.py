"""One run's work, what does it and what came of it, for `compare` and for the benches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.report import facts as of_machine
from pyllamabatch.report.records import Record, speeds
from pyllamabatch.step.sampling_params import SamplingParams

I32 = npt.NDArray[np.int32]
ERROR_CHARACTERS = 600  # of a failure's message, its end


@dataclass(frozen=True)
class ModelFile:
    """`seed`: of random weights; None for any other file."""

    path: Path
    seed: int | None = None


@dataclass(frozen=True)
class Case:
    """What one run does: `pl` sequences of `pp` prompt tokens and `tg` timed ones each."""

    model: ModelFile
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
    n_cells: int = 0  # KV cells for each sequence; 0: as many as it needs
    machine: str = ""  # a profile machine (`pyllamabatch.machine`), in place of this one
    speculate: str = ""  # of the engine: what it drafts from, by name

    @property
    def n_ctx(self) -> int:
        """Cells for all sequences: prompt, first sample and timed tokens of each, as a multiple of
        256, so that unified and separate cells have the same total."""
        per_sequence = self.n_cells or self.pp + self.tg + 1
        return self.pl * (-(-per_sequence // 256) * 256)

    def prompts(self, n_vocab: int, which: int = 0, n: int | None = None) -> I32:
        """Random tokens, shape (n, pp): a prompt for each sequence, or `n` of them. Another
        `which` gives others."""
        generator = np.random.default_rng([self.seed, which])
        shape = (self.pl if n is None else n, self.pp)
        return generator.integers(0, n_vocab, shape, dtype=np.int32)

    def context_params(self) -> dict[str, Any]:
        """The keywords of `Engine` and `Context`."""
        return {
            "n_seq_max": self.pl,
            "n_ctx": self.n_ctx,
            "n_batch": self.n_batch,
            "n_ubatch": self.n_ubatch,
            "n_threads": self.n_threads,
            "n_threads_batch": self.n_threads,
            "kv_unified": self.kv_unified,
        }


def sampling_params(sampling: str, seed: int, max_tokens: int) -> SamplingParams:
    """`sampling`: "greedy" or "default"; never ends before `max_tokens`."""
    extra: dict[str, Any] = {"temperature": 0.0} if sampling == "greedy" else {}
    return SamplingParams(max_tokens=max_tokens, ignore_eog=True, seed=seed, **extra)


def request_body(sampling: str) -> dict[str, Any]:
    """The same as a body of llama-server's `/completion`."""
    return {
        "temperature": 0.0 if sampling == "greedy" else 0.8,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.05,
        "ignore_eos": True,
    }


@dataclass(frozen=True)
class Measured:
    """Times of one run in s. `settings`: fields of the record that differ from the case's."""

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


@dataclass(frozen=True)
class Arm:
    """A way to do the work. `includes`: what its time contains. `run`: does a case, or opens what
    does it. `sampling`: whether it samples as the case says."""

    name: str
    includes: str
    run: Callable[..., Any]
    sampling: bool = True


def record_of(
    bench: str,
    arm: Arm,
    case: Case,
    measured: Measured,
    facts: dict[str, Any],
    run_id: str,
    repeat: int,
) -> Record:
    """`facts`: of the build, the model and the moment (`report.facts`)."""
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
    return Record(
        bench=bench,
        arm=arm.name,
        includes=arm.includes,
        run_id=run_id,
        repeat=repeat,
        sampling=case.sampling if arm.sampling else "none",
        **of_machine.machine(),
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
        **speeds(pp=case.pp, tg=case.tg, pl=case.pl, t_pp=measured.t_pp, t_tg=measured.t_tg),
    )
