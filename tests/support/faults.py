"""Decodes that fail on purpose (native/tests/plb_testing.h): not in a wheel's compiled module."""

from typing import Any

from pyllamabatch.raw import lib
from pyllamabatch.step.stepper import Stepper


def set_fault(
    stepper: Stepper | Any, countdown: int, code: int, n_rows: int = -1, n_times: int = 1
) -> None:
    """The `countdown`-th decode from now on, and those behind it, `n_times` in all, compute the
    first `n_rows` of their rows (-1: all) and report `code`. 0, 0: no fault."""
    engine, _ = stepper._open()
    assert lib.plb_fault_set(engine, countdown, code, n_rows, n_times) == 0
