"""Runs that other processes do not disturb."""

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.report.meters import OtherCores, others_are_known

T = TypeVar("T")
SETTLE_S = 2.0  # others must be quiet for this long before a run starts


def undisturbed(
    run: Callable[[], T], limit: float | None, pids: Sequence[int] = ()
) -> tuple[T, float]:
    """What `run` returns, and the cores that others used meanwhile.

    With a `limit` the run waits until others use fewer cores, and is made again, as often as it
    takes, when they used more while it ran.
    """
    while True:
        if limit is not None:
            wait_for_quiet(limit)
        watch = OtherCores(pids)
        result, others = run(), watch.used()
        if limit is None or others <= limit:
            return result, others


def wait_for_quiet(limit: float) -> None:
    """Until others use at most so many cores for `SETTLE_S`.

    UnsupportedOperation without psutil.
    """
    if not others_are_known():
        raise UnsupportedOperation(
            "only psutil knows when others are quiet: pip install 'pyllamabatch[compare]'"
        )
    others = limit + 1
    while others > limit:
        watch = OtherCores()
        time.sleep(SETTLE_S)
        others = watch.used()
