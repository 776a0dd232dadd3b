"""The arms, what the time of each contains, and its processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.hosted import Hosted
from pyllamabatch.compare.loop import CHAIN
from pyllamabatch.compare.processes import Processes

_CHAIN = "libllama's sampler chain"
_FUSED = "the fused sampler"
INCLUDES = {
    "single": "one context, one sequence: Python loop of raw calls, {sampler}; no HTTP",
    "processes": (
        "a process per sequence, each with its own context, behind a round-robin router: Python "
        "loop of raw calls, {sampler}; Python's http.server in workers and router, http.client as "
        "the client, on loopback, each token sent when it is sampled"
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

Serving = Hosted | Processes
"""An arm's processes. `pids` are there before `load`; after an ArmError only `close` is left."""


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
        """With the threads of one context. Contexts that run at once divide `case.n_threads`, at
        least one each; with `oversubscribe` each has them all."""
        if self.kind not in ("processes", "contexts") or oversubscribe:
            return case
        return replace(case, n_threads=max(1, case.n_threads // case.pl))

    def open(self, case: Case, memory_limit: int = 0, verbose: bool = False) -> Serving:
        """Its processes, with nothing loaded. `case`: as `case_of` makes it; memory_limit: bytes
        of each worker of `processes`, 0 for none."""
        if self.kind == "processes":
            return Processes(case, self.sampler, memory_limit, verbose)
        return Hosted(self.kind, self.sampler, case, verbose)


def chosen(kinds: list[str], samplers: list[str]) -> list[Arm]:
    """Each kind with each sampler; the engine, which has its own, once."""
    return [
        Arm(kind, sampler)
        for kind in kinds
        for sampler in (samplers if kind != "engine" else [CHAIN])
    ]
