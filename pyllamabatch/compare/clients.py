"""A thread for each client, all let go at the same moment."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


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
