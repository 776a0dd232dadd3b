"""simulate: a trace through replicas of an engine, in virtual time."""

import copy
import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf

from pyllamabatch.errors import ArgumentError, PyllamabatchError, RequestTooLong, integer
from pyllamabatch.scheduler import Policy, make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.scheduler.policy import check_policy
from pyllamabatch.scheduler.router import DEFAULT_ROUTER, REPORT_SECONDS, make_router
from pyllamabatch.sim.formats import at_rate
from pyllamabatch.sim.metrics import Load, Outcome, summarise
from pyllamabatch.sim.replica import EngineSpec, SimulatedReplica
from pyllamabatch.sim.workload import TraceRequest
from pyllamabatch.step.trace import Trace

WAITS_MOST = 10_000


class SimulationStuck(PyllamabatchError):
    """Requests wait for ever: the policy does not run them."""


@dataclass(frozen=True, slots=True)
class Simulated:
    """A run. outcomes: in the order in which requests ended or were rejected. loads: of each
    replica. traces: its last steps, as `Engine.trace` has them, a request by its id + 1; none where
    they were not asked for."""

    policy: str
    outcomes: tuple[Outcome, ...]
    loads: tuple[Load, ...]
    traces: tuple[Trace, ...] = ()

    def summary(self, slo: Mapping[str, float] | None = None) -> dict[str, float]:
        """See `metrics.summarise`."""
        return summarise(self.outcomes, self.loads, slo or {})


def simulate(
    requests: Iterable[TraceRequest],
    spec: EngineSpec,
    policy: str | Policy | Callable[[], Policy] = DEFAULT,
    *,
    n_replicas: int = 1,
    router: str = DEFAULT_ROUTER,
    n_trace: int = 0,
) -> Simulated:
    """Run `requests` on `n_replicas` engines. policy: a name with options (see `make_policy`), a
    policy, of which each replica has a copy, or a function that makes one for each. n_trace: how
    many of each replica's last steps are recorded.

    The same arguments give the same run, to the last bit. A request that can never fit is rejected;
    those after it arrive as if it had ended at once. Raises SimulationStuck when the policy leaves
    requests waiting for ever, or waits WAITS_MOST times while nothing else happens, PlanError when
    it breaks a rule."""
    n_replicas = integer("n_replicas", n_replicas, 1, 10_000)
    n_trace = integer("n_trace", n_trace, 0, 2**24)
    routing = make_router(router)
    name, make = _named(policy)
    outcomes: list[Outcome] = []
    followers: dict[int, list[TraceRequest]] = {}  # by the request after which they arrive
    count = itertools.count()
    arrivals: list[tuple[float, int, TraceRequest]] = []

    def ended(outcome: Outcome) -> None:
        now = outcome.arrival if outcome.rejected else outcome.end
        outcomes.append(outcome)
        for request in followers.pop(outcome.id, ()):
            heapq.heappush(arrivals, (now + request.arrival, next(count), request))

    ids = set()
    for request in requests:
        if request.id in ids:
            raise ArgumentError("requests", request.id, "every id once")
        ids.add(request.id)
        if request.after is None:
            heapq.heappush(arrivals, (request.arrival, next(count), request))
        else:
            followers.setdefault(request.after, []).append(request)
    for unknown in followers.keys() - ids:
        raise ArgumentError("after", unknown, "the id of another request")
    replicas = [SimulatedReplica(spec, make(), ended, i, n_trace) for i in range(n_replicas)]
    n_waits = 0  # of policies, since something happened
    due = [inf] * n_replicas  # when each replica has its next step
    report_at = -inf  # when they are to say what routers know of them
    while (arrivals or min(due) < inf) and n_waits < WAITS_MOST:
        step_at, arrives_at = min(due), arrivals[0][0] if arrivals else inf
        if min(step_at, arrives_at) >= report_at:
            for replica in replicas:
                replica.report()
            report_at = (min(step_at, arrives_at) // REPORT_SECONDS + 1) * REPORT_SECONDS
        if arrives_at <= step_at:
            now, _, request = heapq.heappop(arrivals)
            size = request.n_prompt, request.n_output
            try:  # they are all alike; a router asks for tokens, which may be very many
                replicas[0].check_fits(request)
            except RequestTooLong:
                ended(Outcome(request.id, now, *size, rejected=True))
                continue
            i = routing.choose(request.tokens, {r.index: r.seen for r in replicas})
            replicas[i].submit(request, now)
            due[i], n_waits = max(now, replicas[i].next), 0
        else:
            i = due.index(step_at)
            replicas[i].step(step_at)
            due[i] = replicas[i].next
            n_waits = 0 if replicas[i].computes or due[i] == inf else n_waits + 1
    n_left = sum(replica.n_open for replica in replicas) + sum(map(len, followers.values()))
    if n_left:
        raise SimulationStuck(f"{name} leaves {n_left} requests waiting for ever")
    recorders = [replica.recorder for replica in replicas]
    traces = tuple(one.trace.snapshot()() for one in recorders if one is not None)
    return Simulated(name, tuple(outcomes), tuple(replica.load for replica in replicas), traces)


def _named(policy: str | Policy | Callable[[], Policy]) -> tuple[str, Callable[[], Policy]]:
    """Its name, and what makes one for each replica."""
    if isinstance(policy, str):
        return policy, partial(make_policy, policy)
    if callable(policy):
        return getattr(policy, "__name__", repr(policy)), policy
    return type(policy).__name__, partial(copy.deepcopy, check_policy(policy, policy))


def at_load(
    requests: Sequence[TraceRequest],
    spec: EngineSpec,
    policy: str | Policy | Callable[[], Policy],
    load: float,
    *,
    n_replicas: int = 1,
    router: str = DEFAULT_ROUTER,
) -> list[TraceRequest]:
    """Their arrivals stretched to `load` times the capacity of such engines: the requests a second
    that end when all of them arrive at once. Raises ArgumentError."""
    if not 0 < load < 100:
        raise ArgumentError("load", load, "a share of the engine's capacity, 0.6 say")
    if any(request.after is not None for request in requests):
        raise ArgumentError("load", load, "arrivals of a trace without sessions")
    at_once = [replace(request, arrival=0.0, deadline=None) for request in requests]
    run = simulate(at_once, spec, policy, n_replicas=n_replicas, router=router)
    if not (capacity := run.summary().get("requests_per_s", 0.0)):
        raise ArgumentError("load", load, "a trace with requests that fit the engine")
    return at_rate(list(requests), load * capacity)
