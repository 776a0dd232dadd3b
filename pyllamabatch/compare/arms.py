"""The arms, and what the time of each contains. `Arm.run` opens it."""

from pyllamabatch.compare import hosted
from pyllamabatch.compare.case import Arm, Case
from pyllamabatch.compare.hosted import Hosted
from pyllamabatch.compare.processes import OverHttp, Processes
from pyllamabatch.compare.replicas import Replicas

Serving = Hosted | OverHttp
"""An arm's processes. `pids` are there before `load`, and may be more after it; after an ArmError
only `close` is left."""

_LOOP = "Python loop of raw calls, libllama's sampler chain"
_SERVED = "the HTTP of `pyllamabatch serve` and http.client on loopback, tokens as they come"
EACH_ITS_OWN = ("processes", "replicas", "contexts")
"""Arms with a context for each sequence."""
ARMS = {
    arm.name: arm
    for arm in (
        Arm("single", f"one context, one sequence: {_LOOP}; no HTTP", hosted.contexts),
        Arm(
            "processes",
            f"a process per sequence, each with an engine of its own, {_SERVED}, behind a router "
            "that gives a connection to each in turn",
            Processes,
        ),
        Arm("contexts", f"a context and a thread per sequence: {_LOOP}; no HTTP", hosted.contexts),
        Arm(
            "shared",
            f"one context, one batch per step: {_LOOP} for each row in turn; no HTTP",
            hosted.shared,
        ),
        Arm(
            "engine",
            "Engine: scheduling, decode, its own choice of sampler (on the device where that is "
            "cheaper), text, a client thread per request that reads token by token; no HTTP",
            hosted.engine,
        ),
    )
}

ON_RAY = Arm(
    "replicas",
    f"a Ray Serve replica per sequence, each with an engine of its own, {_SERVED}, behind the "
    "router of `serve --replicas`",
    Replicas,
)
"""An arm that is run where it is asked for: it wants the extra `ray`, and starts a cluster."""


def threads_of(arm: Arm, case: Case, oversubscribe: bool) -> int:
    """Of one context. Contexts that run at once divide `case.n_threads`, at least one each; with
    `oversubscribe` each has them all."""
    if arm.name not in EACH_ITS_OWN or oversubscribe:
        return case.n_threads
    return max(1, case.n_threads // case.pl)


def opened(arm: Arm, case: Case, memory_limit: int, verbose: bool) -> Serving:
    """Its processes, with nothing loaded. `case`: with the threads of one context; memory_limit:
    bytes of each worker of `processes`, 0 for none."""
    if arm.run is Processes:
        return Processes(case, memory_limit, verbose)
    if arm.run is Replicas:
        return Replicas(case, verbose)
    return Hosted(arm.run, case, verbose)
