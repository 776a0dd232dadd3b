"""Runs that other processes do not disturb."""

import time
from collections.abc import Callable, Sequence

from bench.case import Measured
from pyllamabatch.report.meters import OtherCores

SETTLE_S = 2.0  # others must be quiet for this long before a run starts


def undisturbed(
    run: Callable[[], Measured], limit: float | None, pids: Sequence[int] = ()
) -> Measured:
    """What `run` returns; its `other_cpu` is the cores that others used meanwhile, where `run` does
    not say it: it knows the processes that it has started.

    With a `limit` the run waits until others use fewer cores, and is made again, as often as it
    takes, when they used more while it ran.
    """
    while True:
        if limit is not None:
            wait_for_quiet(limit)
        watch = OtherCores(pids)
        measured = run()
        others = measured.detail.setdefault("other_cpu", round(watch.used(), 3))
        if limit is None or others <= limit:
            return measured


def wait_for_quiet(limit: float) -> None:
    """Until others use at most so many cores for `SETTLE_S`."""
    others = limit + 1
    while others > limit:
        watch = OtherCores()
        time.sleep(SETTLE_S)
        others = watch.used()
