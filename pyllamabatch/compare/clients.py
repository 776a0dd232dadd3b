"""A thread for each client, all let go at the same moment."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyllamabatch.compare.workload import BURST, RequestTimes, Timings, Workload
from pyllamabatch.errors import PyllamabatchError

T = TypeVar("T")
Ask = Callable[[int, int], Iterable[object]]
"""From a client and a request to the request's tokens."""


def ask_all(
    workload: Workload,
    n_clients: int,
    ask: Ask,
    *,
    let_go: Callable[[], object] = lambda: None,
    give_up: Callable[[], object] = lambda: None,
) -> Timings:
    """Each client takes the next request when it comes and is free for it.

    The time starts when the clients are let go. In a burst each has one request and waits for the
    others after its first token: `let_go()` and the start of the time come when all have theirs.
    `give_up`: as for `at_once`."""
    requests = [RequestTimes() for _ in workload.arrivals]
    left = iter(range(len(requests)))
    timings = Timings(0.0, requests)

    def start() -> None:
        timings.begin = time.perf_counter()
        let_go()

    all_there = threading.Barrier(n_clients, action=start)

    def client(k: int, began: float) -> None:
        for i in left:
            one = requests[i]
            one.arrived = began + workload.arrivals[i]
            time.sleep(max(0.0, one.arrived - time.perf_counter()))
            try:
                for _ in ask(k, i):
                    one.times.append(time.perf_counter())
                    if workload.protocol == BURST and len(one.times) == 1:
                        all_there.wait()
            except threading.BrokenBarrierError:
                one.error = "another request failed before the time started"
            except PyllamabatchError as error:
                one.error = str(error)
                all_there.abort()
            except BaseException:
                all_there.abort()
                raise

    began, _ = at_once(n_clients, client, give_up)
    timings.begin = timings.begin or began
    return timings


def at_once(
    n: int, work: Callable[[int, float], T], give_up: Callable[[], object]
) -> tuple[float, list[T]]:
    """`work(i, began)` for i = 0 to n - 1, on a thread each. Returns `began`, when they were let
    go (perf_counter, s), and their results. Where one raises, or this thread is interrupted,
    `give_up()` must end what the others wait for."""
    began = 0.0

    def stamp() -> None:
        nonlocal began
        began = time.perf_counter()

    ready = threading.Barrier(n, action=stamp)

    def client(i: int) -> T:
        ready.wait()
        return work(i, began)

    with ThreadPoolExecutor(n) as threads:
        try:
            results = list(threads.map(client, range(n)))
        except BaseException:
            ready.abort()
            give_up()
            raise
    return began, results
