"""Step trace: what every step of an engine was and what it took, and its picture in a browser.

trace = engine.trace()               # the last steps, a structured NumPy array
trace["decode_ns"].mean()
to_chrome(trace, "steps.json")       # open it in https://ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._step import STEP_DTYPE
from .device.cost import CostModel
from .kv import Slots
from .scheduler import Chunk, Step

Trace = npt.NDArray[np.void]

PHASES = ("build", "decode", "sync", "sample")
_TIMES = tuple(f"{phase}_ns" for phase in PHASES)


def trace_dtype(n_seq_max: int) -> np.dtype[np.void]:
    """One step. Times in ns.

    - t_start_ns: when it began, on a steady clock whose zero means nothing.
    - build_ns, decode_ns, sync_ns, sample_ns: checks and batch; llama_decode; waiting for the
      device; sampling.
    - python_ns: from the end of the step before to the beginning of this one, without the time in
      which there was nothing to do; next to nothing within a run.
    - rows = prefill_rows + decode_rows; sampled: rows that gave a token (or a failure).
    - kv_used: cells that are held after the step. reused: graphs that it reused.
    - run: a number that steps of the same native call share.
    - ids, chunk, by slot, shape (n_seq_max,): whose request has rows in this step, 0 where there
      are none; and how many rows of known tokens, 0 when it decodes.
    """
    return np.dtype(
        [
            ("t_start_ns", np.int64),
            *((name, np.int64) for name in _TIMES),
            ("python_ns", np.int64),
            ("run", np.int64),
            ("kv_used", np.int64),
            ("rows", np.int32),
            ("prefill_rows", np.int32),
            ("decode_rows", np.int32),
            ("sampled", np.int32),
            ("reused", np.int32),
            ("ids", np.int64, (n_seq_max,)),
            ("chunk", np.int32, (n_seq_max,)),
        ]
    )


class _Call(NamedTuple):
    """What the steps of one native call have in common."""

    n: int
    n_rows: int
    kv_used: int  # before
    idle_ns: int  # before
    decode: Slots
    ids: npt.NDArray[np.int64]  # of `decode`
    chunks: tuple[Chunk, ...]


class StepTrace:
    """The last `capacity` steps. Recording is cheap, the table is made when it is asked for.

    `ids`: the request in each slot, by slot, kept by whoever places requests. `idle_ns`: since the
    last step, added to by whoever waits. `cost`: a cost model to refine by what is recorded.
    """

    def __init__(self, capacity: int, n_seq_max: int, cost: CostModel | None = None) -> None:
        self._cost = cost
        self.ids = np.zeros(n_seq_max, dtype=np.int64)
        self.idle_ns = 0
        self._capacity = capacity
        self._ring = np.zeros(capacity + 1, dtype=STEP_DTYPE)  # and the step before them
        self._calls: deque[_Call] = deque()
        self._n_kept = 0  # steps of `_calls`
        self._n_calls = 0  # of all time
        self._n = 0  # steps of all time

    def record(self, step: Step, steps: Trace, kv_used: int) -> None:
        """`steps`: what the native call says of each of its steps (STEP_DTYPE), all of them
        `step`; `kv_used`: cells that were held before it."""
        n, decode, calls = len(steps), step.decode, self._calls
        # Who decodes is one array until somebody comes or goes (Scheduler): so are their ids.
        same = calls and calls[-1].decode is decode
        ids = calls[-1].ids if same else self.ids[decode]
        calls.append(_Call(n, step.n_rows, kv_used, self.idle_ns, decode, ids, step.chunks))
        self.idle_ns = 0
        self._n_calls += 1
        self._n_kept += n
        while self._n_kept - calls[0].n >= self._capacity:
            self._n_kept -= calls.popleft().n
        self._write(steps)
        if self._cost is not None and n:
            self._observe(self._cost, step, steps, kv_used)

    def _observe(self, cost: CostModel, step: Step, steps: Trace, kv_used: int) -> None:
        """The steps of one call, on average, to the cost model."""
        n, last, n_decode = len(steps), steps[-1].item(), len(step.decode)
        ns = last[0] + sum(last[1 : 1 + len(_TIMES)]) - int(steps["t_start_ns"][0])
        kv = kv_used + step.n_rows * (n - 1) / 2
        prefill = step.n_rows - n_decode
        cost.observe(step.n_rows, prefill, kv, n_decode + len(step.chunks), ns * 1e-9 / n)

    def _write(self, steps: Trace) -> None:
        size = len(self._ring)
        self._n += len(steps)
        steps = steps[-size:]
        at = (self._n - len(steps)) % size
        first = min(len(steps), size - at)
        self._ring[at : at + first] = steps[:first]
        if first < len(steps):
            self._ring[: len(steps) - first] = steps[first:]

    def snapshot(self) -> Callable[[], Trace]:
        """What is kept now; the table (trace_dtype, oldest step first) is made by calling it."""
        size = len(self._ring)
        at = self._n % size if self._n > size else 0
        steps = np.concatenate((self._ring[at : self._n], self._ring[:at]))
        calls, n, n_calls = list(self._calls), min(self._n, self._capacity), self._n_calls
        n_kept, n_seq_max = self._n_kept, len(self.ids)
        return lambda: _table(steps, calls, n, n_kept, n_calls - len(calls), n_seq_max)


def _table(
    steps: Trace, calls: list[_Call], n: int, n_kept: int, first_call: int, n_seq_max: int
) -> Trace:
    """`steps`: the last n and the one before them, if there was one; `calls`: of `n_kept` steps, of
    which the last n are wanted; `first_call`: the number of the first."""
    sizes = np.array([call.n for call in calls], dtype=np.int64)
    ends = np.cumsum(sizes)

    def each(values: Iterable[int]) -> npt.NDArray[np.int64]:
        """A value of every call, for every step of it that is wanted."""
        return np.repeat(np.fromiter(values, np.int64, len(calls)), sizes)[n_kept - n :]

    table = np.zeros(n, dtype=trace_dtype(n_seq_max))
    before, steps = steps[: len(steps) - n], steps[len(steps) - n :]
    for name in ("t_start_ns", *_TIMES):
        table[name] = steps[name]
    in_call = np.arange(n_kept - n, n_kept) - each(ends - sizes)
    idle = np.where(in_call == 0, each(call.idle_ns for call in calls), 0)
    all_steps = np.concatenate((before, steps)) if len(before) else steps
    end = all_steps["t_start_ns"] + np.sum([all_steps[name] for name in _TIMES], axis=0)
    gaps = all_steps["t_start_ns"][1:] - end[:-1]
    table["python_ns"][n - len(gaps) :] = np.maximum(gaps - idle[n - len(gaps) :], 0)
    n_reused = int(before["n_reused"][-1]) if len(before) else 0
    table["reused"] = np.diff(steps["n_reused"], prepend=n_reused)
    table["sampled"] = steps["n_results"]
    rows = each(call.n_rows for call in calls)
    table["run"] = each(range(first_call, first_call + len(calls)))
    table["kv_used"] = each(call.kv_used for call in calls) + rows * (in_call + 1)
    table["rows"] = rows
    table["decode_rows"] = each(len(call.decode) for call in calls)
    table["prefill_rows"] = table["rows"] - table["decode_rows"]
    for call, end_of_call in zip(calls, (ends - (n_kept - n)).tolist(), strict=True):
        of_call = slice(max(0, end_of_call - call.n), end_of_call)
        table["ids"][of_call, call.decode] = call.ids
        for chunk in call.chunks:
            table["ids"][of_call, chunk.slot] = chunk.id
            table["chunk"][of_call, chunk.slot] = chunk.n
    return table


def to_chrome(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a trace as Chrome's trace event JSON: one track of steps with their phases, one of the
    KV cells, and one track per request. Times in µs from the first step on."""
    events = [*_names(trace), *_steps(trace), *_sequences(trace)]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, separators=(",", ":"))
        file.write("\n")


_ENGINE, _REQUESTS = 1, 2  # "processes": groups of tracks


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    for pid, name in ((_ENGINE, "engine"), (_REQUESTS, "requests")):
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_name", "pid": _ENGINE, "tid": 1, "args": {"name": "steps"}}
    for id in np.unique(trace["ids"][trace["ids"] > 0]).tolist():
        args = {"name": f"request {id}"}
        yield {"ph": "M", "name": "thread_name", "pid": _REQUESTS, "tid": id, "args": args}


def _slice(
    pid: int, tid: int, name: str, start_ns: int, ns: int, args: dict[str, int] | None = None
) -> dict[str, Any]:
    event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start_ns / 1e3, "dur": ns / 1e3}
    return event if args is None else {**event, "args": args}


def _starts(trace: Trace) -> list[int]:
    starts: list[int] = (trace["t_start_ns"] - trace["t_start_ns"][:1]).tolist()
    return starts


def _steps(trace: Trace) -> Iterator[dict[str, Any]]:
    shown = ("rows", "prefill_rows", "decode_rows", "sampled", "kv_used", "reused", "run")
    columns = [trace[name].tolist() for name in shown]
    phases = [trace[name].tolist() for name in _TIMES]
    gaps = trace["python_ns"].tolist()
    for i, start in enumerate(_starts(trace)):
        times = [phase[i] for phase in phases]
        args = {name: column[i] for name, column in zip(shown, columns, strict=True)}
        if i > 0 and gaps[i] > 0:
            yield _slice(_ENGINE, 1, "python", start - gaps[i], gaps[i])
        yield _slice(_ENGINE, 1, "step", start, sum(times), args)
        at = start
        for name, ns in zip(PHASES, times, strict=True):
            yield _slice(_ENGINE, 1, name, at, ns)
            at += ns
        yield {
            "ph": "C",
            "pid": _ENGINE,
            "tid": 0,
            "name": "KV cells",
            "ts": at / 1e3,
            "args": {"used": args["kv_used"]},
        }


def _sequences(trace: Trace) -> Iterator[dict[str, Any]]:
    took = np.sum([trace[name] for name in _TIMES], axis=0)
    where = np.nonzero(trace["ids"])
    columns = (
        trace["ids"][where].tolist(),
        trace["chunk"][where].tolist(),
        where[0].tolist(),
        where[1].tolist(),
    )
    starts = _starts(trace)
    for id, chunk, i, slot in zip(*columns, strict=True):
        name = f"prefill {chunk}" if chunk else "decode"
        yield _slice(_REQUESTS, id, name, starts[i], int(took[i]), {"slot": slot, "step": i})
