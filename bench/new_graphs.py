"""Why steps of a trace needed new graphs."""

from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.step.trace import Trace

WHY_NEW = ("prompt", "samplers", "rows", "slots", "cells")


def why_new(trace: Trace) -> npt.NDArray[np.str_]:
    """Why each step of `trace` needed a new graph, one of `WHY_NEW`; "" where it needed none.

    A step with rows of a prompt needs one of its own. One that decodes is compared with the last
    such step: candidates were chosen in another place, there were more or fewer rows, or rows of
    other slots. Where nothing of that is so, attention has come to other cells: libllama counts
    them in steps of 256 (src/llama-kv-cache.cpp: `get_n_kv`), or its memory was changed."""
    why = np.full(len(trace), "", dtype=f"U{max(map(len, WHY_NEW))}")
    new = (trace["reused"] == 0) & (trace["code"] == 0)
    prompt = trace["prefill_rows"] > 0
    why[new & prompt] = "prompt"
    at = np.flatnonzero(~prompt & (trace["code"] == 0))
    if not len(at):
        return why
    steps = trace[at]
    used, rows = steps["ids"] > 0, steps["decode_rows"] + steps["filled"]
    place, full = steps["on_device"], steps["filled"] == 0

    def changed(column: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        differs = column[1:] != column[:-1]
        return np.concatenate(([True], differs if differs.ndim == 1 else differs.any(axis=1)))

    reasons = (changed(place), changed(rows), changed(used) & full)
    why[at] = np.select(reasons, WHY_NEW[1:4], WHY_NEW[4])
    why[~new] = ""
    return why
