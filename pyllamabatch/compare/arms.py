"""The arms, and how the comparison opens and asks them: each in processes of its own."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import Child, interrupts_later
from pyllamabatch.compare.host import PROBE
from pyllamabatch.compare.job import Job, Outcome
from pyllamabatch.compare.loop import CHAIN
from pyllamabatch.errors import PyllamabatchError

START_S = 300.0  # a model of many gigabytes from a cold disk

_CHAIN = "libllama's sampler chain"
_FUSED = "the fused sampler"
INCLUDES = {
    "single": "one context, one sequence: Python loop of raw calls, {sampler}; no HTTP",
    "processes": (
        "a process per sequence, each its own context and KV folder, behind a round-robin router: "
        "Python loop of raw calls, {sampler}; Python's http.server in workers and router, "
        "http.client as the client, on loopback, each token sent when it is sampled"
    ),
    "contexts": "a context and a thread per sequence: Python loop of raw calls, {sampler}; no HTTP",
    "shared": (
        "one context, one batch per step: Python loop of raw calls, {sampler} for each row in "
        "turn; no HTTP"
    ),
    "engine": (
        "Engine: scheduling, decode, its own choice of sampler (on the device where that is "
        "cheaper), text, a client thread per request that reads token by token; no HTTP"
    ),
}
NAMES = tuple(INCLUDES)


class ArmError(PyllamabatchError):
    """An arm could not be opened or run."""


@dataclass(frozen=True)
class Arm:
    """`kind`: one of NAMES. `sampler`: CHAIN or FUSED; the engine has its own, under CHAIN."""

    kind: str
    sampler: str = CHAIN
    sampling: bool = True

    @property
    def name(self) -> str:
        return self.kind if self.sampler == CHAIN else f"{self.kind} {self.sampler}"

    @property
    def includes(self) -> str:
        return INCLUDES[self.kind].format(sampler=_CHAIN if self.sampler == CHAIN else _FUSED)

    def case_of(self, case: Case, oversubscribe: bool) -> Case:
        """With its threads: `case.n_threads` are divided among contexts that run at once, at least
        one for each; `oversubscribe`: each has them all."""
        if self.kind not in ("processes", "contexts") or oversubscribe:
            return case
        return replace(case, n_threads=max(1, case.n_threads // case.pl))


class Serving(Protocol):
    """An arm's processes. `pids` are there before anything is loaded."""

    pids: list[int]

    def load(self) -> None:
        """Load the model and make the contexts. ArmError, ChildFailed."""

    def run(self, job: Job, limit_s: float) -> Outcome:
        """ArmError, ChildFailed; after that it is of no use any more."""

    def close(self) -> None:
        """End the processes; closing twice is fine."""


class Hosted:
    """An arm in one process (`host.py`)."""

    def __init__(self, kind: str, sampler: str, case: Case, verbose: bool) -> None:
        self._setup = {"arm": kind, "sampler": sampler, "case": case.to_json(), "verbose": verbose}
        self._child = Child("pyllamabatch.compare.host", loud=verbose)
        self.pids = [self._child.pid]

    def load(self) -> None:
        self.ready()

    def ready(self) -> dict[str, Any]:
        self._child.tell(json.dumps(self._setup))
        ready: dict[str, Any] = answer(self._child, START_S)["ready"]
        return ready

    def run(self, job: Job, limit_s: float) -> Outcome:
        self._child.tell(job.to_json())
        return Outcome.from_json(json.dumps(answer(self._child, limit_s)))

    def close(self) -> None:
        self._child.stop()


def answer(child: Child, limit_s: float) -> dict[str, Any]:
    """The child's next line of JSON. ArmError when it says that something failed."""
    values: dict[str, Any] = json.loads(child.answer(limit_s))
    if "error" in values:
        raise ArmError(values["error"])
    return values


def probe(case: Case, verbose: bool) -> dict[str, Any]:
    """What rows say of the build and the model. ArmError when the file can't be loaded."""
    with ExitStack() as stack:
        with interrupts_later():
            hosted = Hosted(PROBE, CHAIN, case, verbose)
            stack.callback(hosted.close)
        return hosted.ready()


def chosen(kinds: list[str], samplers: list[str]) -> list[Arm]:
    """Every kind with every sampler, the engine (which has its own) once."""
    return [
        Arm(kind, sampler)
        for kind in kinds
        for sampler in (samplers if kind != "engine" else [CHAIN])
    ]
