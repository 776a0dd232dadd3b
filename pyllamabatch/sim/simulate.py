"""simulate: a trace through replicas of an engine, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf

from ..errors import ArgumentError, PyllamabatchError, RequestTooLong
from ..scheduler import Policy, make_policy
from ..scheduler.policies import DEFAULT
from .metrics import Load, Outcome, summarise
from .replica import Machine, Replica
from .router import make_router
from .workload import Request


class SimulationStuck(PyllamabatchError):
    """Requests wait and nothing will ever happen: the policy does not run them."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run. outcomes: in the order in which requests ended or were rejected. points: of each
    replica (s, requests that run, that wait, cells of running ones), thinned out."""

    policy: str
    outcomes: tuple[Outcome, ...]
    loads: tuple[Load, ...]
    points: tuple[tuple[tuple[float, int, int, int], ...], ...]

    def summary(self, slo: Mapping[str, float] | None = None) -> dict[str, float]:
        """See `metrics.summarise`."""
        return summarise(self.outcomes, self.loads, slo or {})


def simulate(
    requests: Iterable[Request],
    machine: Machine,
    policy: str | Callable[[], Policy] = DEFAULT,
    *,
    n_replicas: int = 1,
    router: str = "least-outstanding",
) -> Simulated:
    """Run `requests` on `n_replicas` engines with that policy each: a name with options (see
    `make_policy`), or what makes one.

    The same arguments give the same run, to the last bit. A request that can never fit is rejected,
    those after it come as if it had ended at once. Raises SimulationStuck when the policy leaves
    requests waiting for ever, PlanError when it breaks a rule."""
    if n_replicas < 1:
        raise ArgumentError("replicas", n_replicas, "at least 1")
    choose = make_router(router)
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", repr(policy))
    outcomes: list[Outcome] = []
    waiting: dict[int, list[Request]] = {}  # by whom they come after
    count = itertools.count()
    arrivals: list[tuple[float, int, Request]] = []

    def ended(outcome: Outcome, now: float) -> None:
        outcomes.append(outcome)
        for request in waiting.pop(outcome.id, ()):
            heapq.heappush(arrivals, (now + request.arrival, next(count), request))

    ids = set()
    for request in requests:
        if request.id in ids:
            raise ArgumentError("requests", request.id, "every id once")
        ids.add(request.id)
        if request.after is None:
            arrivals.append((request.arrival, next(count), request))
        else:
            waiting.setdefault(request.after, []).append(request)
    heapq.heapify(arrivals)

    replicas = [
        Replica(
            machine,
            make_policy(policy) if isinstance(policy, str) else policy(),
            lambda outcome: ended(outcome, outcome.end),
            i,
        )
        for i in range(n_replicas)
    ]
    turns = [inf] * n_replicas  # when each is to be called
    while True:
        turn = min(turns)
        if arrivals and arrivals[0][0] <= turn:
            now, _, request = heapq.heappop(arrivals)
            i = choose(request, replicas)
            try:
                replicas[i].submit(request, now)
            except RequestTooLong:
                rejected = Outcome(
                    request.id, now, request.n_prompt, request.n_output, rejected=True
                )
                ended(rejected, now)
                continue
            turns[i] = max(now, replicas[i].next)
        elif turn < inf:
            i = turns.index(turn)
            replicas[i].turn(turn)
            turns[i] = replicas[i].next
        else:
            break
    n_left = sum(replica.n_open for replica in replicas) + sum(map(len, waiting.values()))
    if n_left:
        raise SimulationStuck(f"{name} leaves {n_left} requests waiting for ever")
    return Simulated(
        name,
        tuple(outcomes),
        tuple(replica.finished() for replica in replicas),
        tuple(tuple(replica.points) for replica in replicas),
    )
