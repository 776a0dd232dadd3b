"""Which replica a request goes to, of several that share the traffic."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv import RadixTree
from pyllamabatch.kv.prefix_cache import MIN_PREFIX
from pyllamabatch.sim.replica import Replica
from pyllamabatch.sim.workload import TraceRequest

Router = Callable[[TraceRequest, Sequence[Replica]], int]
"""The index of the replica that takes it. Called once for each request, at its arrival."""


def round_robin() -> Router:
    """One after the other."""
    turns = itertools.count()
    return lambda request, replicas: next(turns) % len(replicas)


def least_outstanding(request: TraceRequest, replicas: Sequence[Replica]) -> int:
    """The one with the fewest requests that have not ended; the first of several."""
    return min(range(len(replicas)), key=lambda i: replicas[i].n_open)


class PrefixAffinity:
    """The replica of the request with the longest common prefix, of the last `memory` requests; the
    least busy replica where that has over `slack` requests fewer."""

    def __init__(self, slack: int = 8, memory: int = 4096) -> None:
        self.slack = slack
        self.memory = memory
        self._tree = RadixTree()
        self._went: OrderedDict[int, int] = OrderedDict()  # request -> replica

    def __call__(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        tokens = request.tokens()
        chosen = least = least_outstanding(request, replicas)
        for id, n in self._tree.matches(tokens):
            if n >= MIN_PREFIX:
                chosen = self._went[id]
            break
        if replicas[chosen].n_open - replicas[least].n_open > self.slack:
            chosen = least
        self._tree.insert(request.id, tokens)
        self._went[request.id] = chosen
        if len(self._went) > self.memory:
            self._tree.remove(self._went.popitem(last=False)[0])
        return chosen


ROUTERS: dict[str, Callable[[], Router]] = {
    "round-robin": round_robin,
    "least-outstanding": lambda: least_outstanding,
    "prefix-affinity": PrefixAffinity,
}


def make_router(name: str) -> Router:
    """ArgumentError names those that there are."""
    if name not in ROUTERS:
        raise ArgumentError("router", name, f"one of {', '.join(ROUTERS)}")
    return ROUTERS[name]()
