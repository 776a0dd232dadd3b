"""The live batch page: steps as its script reads them, from a running engine or a recorded trace.

A step is a JSON object:

- at, ms: when it began and what it took, in ms; the clock's zero means nothing. phases: build,
  decode, sync, sample, and the Python before it, in ms.
- rows = prefill + decode, sampled, filled, drafted, accepted, kv_used, reused, code: as in
  `pyllamabatch.step.trace`.
- lanes: [slot, request, prompt rows (0: it decodes)] of each request with rows in it.
- preempted: [slot, request] of each that was preempted before it. padded: slots of `filled`.
  prompt_filled: [slot, rows] of each prompt that is filled up.
- reasons: the policy's, by request."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import pairwise
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError
from ...step.ring_reader import PHASES, TIMES
from ...step.trace import Trace

Step = dict[str, Any]
_SAME = ("rows", "sampled", "filled", "drafted", "accepted", "kv_used", "reused", "code")
_COUNTS = {"prefill": "prefill_rows", "decode": "decode_rows"} | {name: name for name in _SAME}
"""Names of a step's counts: the page's, and the trace's."""


def steps_of(trace: Trace) -> list[Step]:
    """The steps of an engine's trace. Their lanes are int64 arrays of shape (n, 3): lists for each
    lane would take long to make."""
    times = trace[[*TIMES, "python_ns"]].tolist()
    counts = trace[[*_COUNTS.values()]].tolist()
    at, slots = np.nonzero(trace["ids"])
    found = np.stack([slots, trace["ids"][at, slots], trace["chunk"][at, slots]], 1)
    ends = np.searchsorted(at, np.arange(len(trace) + 1)).tolist()
    lanes = [found[start:end] for start, end in pairwise(ends)]
    fills: list[list[list[int]]] = [[] for _ in lanes]
    for i, slot in np.argwhere(trace["prompt_filled"]).tolist():
        fills[i].append([slot, int(trace["prompt_filled"][i, slot])])
    columns = (trace[name].tolist() for name in ("t_start_ns", "reasons", "preempted"))
    return [
        _step(start / 1e6, [ns / 1e6 for ns in took], count, lane, fill, why, taken)
        for took, count, lane, fill, start, why, taken in zip(
            times, counts, lanes, fills, *columns, strict=True
        )
    ]


def _step(
    at: float,
    phases: Sequence[float],
    counts: Sequence[int],
    lanes: npt.ArrayLike,
    prompt_filled: list[list[int]],
    reasons: Mapping[Any, str],
    preempted: Mapping[int, int],
) -> Step:
    named = dict(zip(_COUNTS, counts, strict=True))
    return {
        "at": round(at, 3),
        "ms": round(sum(phases[:4]), 3),
        "phases": [round(ms, 3) for ms in phases],
        **named,
        "lanes": lanes,
        "prompt_filled": prompt_filled,
        "preempted": [[slot, id] for id, slot in preempted.items()],
        "padded": padded(lanes, named["decode"], named["filled"]),
        "reasons": {str(id): text for id, text in reasons.items()},
    }


def padded(lanes: npt.ArrayLike, n_decode: int, n_filled: int) -> list[int]:
    """Slots of the rows that fill up a step beside `n_decode` others, as many of each slot
    (native/step/gaps.hpp): all gaps between slots that decode, and if that is not enough all slots
    from the first one on. Where it is too much, wide gaps are left open. Where none decodes each
    lane is a row of a prompt, which counts as one that does."""
    if not n_filled:
        return []
    rows = np.array(lanes, np.int64).reshape(-1, 3)
    slots = np.sort(rows[(rows[:, 2] == 0) | (n_decode == 0), 0]).tolist()
    if not slots:
        return []
    n = n_filled * len(slots) // (n_decode or len(slots))
    if n >= (n_between := slots[-1] - slots[0] + 1 - len(slots)):
        first = 0 if n > n_between else slots[0]
        return sorted(set(range(first, first + len(slots) + n)).difference(slots))
    gaps = [range(slot + 1, after) for slot, after in pairwise(slots)]
    found: list[int] = []
    for gap in sorted(gaps, key=len):
        found += gap if len(found) + len(gap) <= n else ()
    return sorted(found)


def recorded(path: str | PathLike[str]) -> list[Step]:
    """The steps of a file that `to_chrome` wrote (`generate --trace`, `simulate --steps`).
    ArgumentError for another file, OSError for one that can't be read."""
    limit = "must be a file that `generate --trace` or `simulate --steps` wrote"
    with open(path, encoding="utf-8") as file:
        try:
            return _of_events(json.load(file)["traceEvents"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            why = f"{type(error).__name__}: {error}"  # its repr may have the whole file
            raise ArgumentError("FILE", str(path), f"{limit}: {why}") from None


def _of_events(events: Sequence[Mapping[str, Any]]) -> list[Step]:
    """In the file a step comes behind the Python before it, and before its phases."""
    steps: list[Step] = []
    python_ms = 0.0
    for event in events:
        name, args = event["name"], event.get("args", {})
        if name == "python":
            python_ms = event["dur"] / 1e3
        elif name == "step":
            counts = [args.get(count, 0) for count in _COUNTS.values()]
            why = {
                id.removeprefix("request "): text for id, text in args.get("reasons", {}).items()
            }
            steps.append(_step(event["ts"] / 1e3, [0.0] * 5, counts, [], [], why, {}))
            steps[-1] |= {"ms": round(event["dur"] / 1e3, 3)}
            steps[-1]["phases"][4] = round(python_ms, 3)
            python_ms = 0.0
        elif name == "preempted":
            steps[args["step"]]["preempted"].append([args["slot"], event["tid"]])
        elif "slot" in args:
            kind, _, n = name.partition(" ")
            lane = [args["slot"], event["tid"], int(n) if kind == "prefill" else 0]
            steps[args["step"]]["lanes"].append(lane)
            if n_fill := args.get("prompt_filled"):
                steps[args["step"]]["prompt_filled"].append([args["slot"], n_fill])
        elif name in PHASES:
            steps[-1]["phases"][PHASES.index(name)] = round(event["dur"] / 1e3, 3)
    if not steps:
        raise ValueError("it has no steps")
    for step in steps:
        step["padded"] = padded(step["lanes"], step["decode"], step["filled"])
    return steps


def page(steps: Sequence[Step] | None = None, title: str = "pyllamabatch") -> str:
    """The page as one HTML text. With `steps` it shows these, without a server."""
    html, style, script = (_text(name) for name in ("page.html", "page.css", "page.js"))
    data = "null"
    if steps is not None:
        data = json.dumps({"title": title, "steps": list(steps)}).replace("<", "\\u003c")
    parts = {"STYLE": style, "SCRIPT": script, "RECORDED": data}
    for name, text in parts.items():
        html = html.replace(f"/*{name}*/", text)
    return html


def _text(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
