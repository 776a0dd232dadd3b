"""A thread for each client, all let go at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pyllamabatch.compare.workload import RequestTimes, Timings, Workload
from pyllamabatch.errors import PyllamabatchError

T = TypeVar("T")


def ask_all(
    workload: Workload, ask: Callable[[int], Iterable[object]], give_up: Callable[[], None]
) -> Timings:
    """Each client asks when its request comes. `ask(i)`: the tokens of the i-th request. The time
    starts when the clients are let go. `give_up`: as for `at_once`."""
    requests = [RequestTimes() for _ in workload.arrivals]

    def client(i: int, began: float) -> None:
        requests[i].arrived = began + workload.arrivals[i]
        sleep_until(requests[i].arrived)
        note(requests[i], ask(i))

    began, _ = at_once(len(requests), client, give_up)
    return Timings(began, requests)


def note(one: RequestTimes, tokens: Iterable[object]) -> None:
    """When each token comes, and what ends them early."""
    try:
        for _ in tokens:
            one.times.append(time.perf_counter())
    except PyllamabatchError as error:
        one.error = str(error)


def at_once(
    n: int, work: Callable[[int, float], T], give_up: Callable[[], None]
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


def sleep_until(moment: float) -> None:
    """`moment`: of perf_counter."""
    time.sleep(max(0.0, moment - time.perf_counter()))
