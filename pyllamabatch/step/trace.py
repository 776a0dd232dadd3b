"""Step trace: what every step of an engine was and what it took, and its picture in a browser.

trace = engine.trace()               # the last steps, a structured NumPy array
trace["decode_ns"].mean()
to_chrome(trace, "steps.json")       # open it in https://ui.perfetto.dev or chrome://tracing
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.step.ring_reader import PHASES, TIMES, StepTable
from pyllamabatch.step.types import I32

Trace = npt.NDArray[np.void]
Prompt = tuple[int, int, int]
"""Rows of a prompt in a step: its slot, its request's id, how many."""
NO_REASONS: Mapping[int, str] = MappingProxyType({})


def trace_dtype(n_seq_max: int) -> np.dtype[np.void]:
    """One step. Times in ns.

    - t_start_ns: when it began, on a steady clock whose zero means nothing.
    - code: 0, or why it was not computed. Then its rows are in no counter, and only its times and
      the rows that it would have had are here.
    - build_ns, decode_ns, sync_ns, sample_ns: checks and batch; llama_decode; waiting for the
      device; sampling.
    - python_ns: from the end of the step before to the start of this one, without the time in
      which there was nothing to do: what the device waits for. Next to nothing within a run.
    - rows = prefill_rows + decode_rows; sampled: rows that gave a token (or a failure).
    - filled: rows of unused sequences beside these, so that those around them are computed
      together (`Stepper`'s gap_max).
    - kv_used: cells that are held after the step. reused: graphs that it reused. on_device: 1
      where the device chose the candidates (`Stepper`'s device_sampling).
    - run: a number that steps of the same native call share.
    - ids, chunk, by slot, shape (slots,): the request that has rows in this step, 0 where there
      are none; and how many rows of known tokens, 0 when it decodes.
    - reasons: why the policy planned it so, a dict: text by request id, of those that were
      admitted, cut or preempted.
    """
    return np.dtype(
        [
            ("t_start_ns", np.int64),
            *((name, np.int64) for name in TIMES),
            ("python_ns", np.int64),
            ("run", np.int64),
            ("kv_used", np.int64),
            ("rows", np.int32),
            ("prefill_rows", np.int32),
            ("decode_rows", np.int32),
            ("sampled", np.int32),
            ("filled", np.int32),
            ("reused", np.int32),
            ("code", np.int32),
            ("on_device", np.int32),
            ("ids", np.int64, (n_seq_max,)),
            ("chunk", np.int32, (n_seq_max,)),
            ("reasons", object),
        ]
    )


class _Call(NamedTuple):
    """What the steps of one native call have in common."""

    first: int  # the number of its first step
    n_rows: int
    kv_used: int  # before
    idle_ns: int  # before
    decode: I32  # slots
    ids: npt.NDArray[np.int64]  # of `decode`
    prompts: Sequence[Prompt]
    reasons: Mapping[int, str]


class StepTrace:
    """The last `capacity` steps. Recording is cheap: the table is made when it is asked for.

    The thread that computes calls `begin`, keeps `ids` (the request in each slot) and adds to
    `idle_ns` what it waited for work since the last step. The thread that reads the ring calls
    `add_steps`.
    """

    def __init__(self, capacity: int, n_seq_max: int) -> None:
        self.ids = np.zeros(n_seq_max, dtype=np.int64)
        self.idle_ns = 0
        self._capacity = capacity
        self._calls: deque[_Call] = deque()
        self._n_dropped_calls = 0
        self._pages: deque[StepTable] = deque()
        self._n_dropped = 0  # steps of pages that were dropped
        self._lock = threading.Lock()  # guards the two

    def begin(
        self,
        first: int,
        n_rows: int,
        kv_used: int,
        decode: I32,
        prompts: Sequence[Prompt] = (),
        reasons: Mapping[int, str] = NO_REASONS,
    ) -> None:
        """The steps from number `first` on decode these slots, and the first has rows of prompts.

        kv_used: cells that are held before it. reasons: the policy's, by request id. `decode` must
        not change afterwards.
        """
        calls, idle_ns = self._calls, self.idle_ns
        # The decoding slots are one array as long as none comes or goes: so are their ids.
        same = calls and calls[-1].decode is decode
        ids = calls[-1].ids if same else self.ids[decode]
        if calls and calls[-1].first == first:  # it came to nothing
            idle_ns += calls.pop().idle_ns
        calls.append(_Call(first, n_rows, kv_used, idle_ns, decode, ids, prompts, reasons))
        self.idle_ns = 0
        while len(calls) > 1 and calls[1].first <= first - self._capacity:
            calls.popleft()
            self._n_dropped_calls += 1

    def add_steps(self, steps: StepTable) -> None:
        """A page that is being filled, after the one before it, which is full."""
        with self._lock:
            pages = self._pages
            pages.append(steps)
            # the wanted ones and one before them, without the newest page, which is empty yet
            while sum(page.n for page in pages) - pages[0].n > self._capacity:
                self._n_dropped += pages.popleft().n

    def snapshot(self) -> Callable[[], Trace]:
        """A function that makes the table of what is there now: trace_dtype, oldest step first."""
        with self._lock:
            n_dropped, pages = self._n_dropped, [(page.table, page.n) for page in self._pages]
        calls, first_call = list(self._calls), self._n_dropped_calls
        capacity, n_seq_max = self._capacity, len(self.ids)

        def table() -> Trace:
            steps = np.concatenate([table[:n] for table, n in pages])
            return _table(steps, n_dropped, calls, first_call, capacity, n_seq_max)

        return table


def _table(
    steps: Trace,
    first_step: int,
    calls: list[_Call],
    first_call: int,
    capacity: int,
    n_seq_max: int,
) -> Trace:
    """`steps`: those from number `first_step` on; `calls`: those from number `first_call` on."""
    n = min(len(steps), capacity)
    if calls:
        n = min(n, max(0, first_step + len(steps) - calls[0].first))
    table = np.zeros(n, dtype=trace_dtype(n_seq_max))
    if n == 0:
        return table
    number = first_step + len(steps) - n + np.arange(n)
    all_steps = steps[-n - 1 :]  # one before them, if there is one
    steps = steps[-n:]
    firsts = np.array([call.first for call in calls], dtype=np.int64)
    of = np.searchsorted(firsts, number, side="right") - 1  # the call of each step

    def each(values: Iterable[int]) -> npt.NDArray[np.int64]:
        """A value of every call, for every step."""
        return np.fromiter(values, np.int64, len(calls))[of]

    for name in ("t_start_ns", *TIMES, "code", "on_device"):
        table[name] = steps[name]
    in_call = number - firsts[of]
    idle = np.where(in_call == 0, each(call.idle_ns for call in calls), 0)
    end = all_steps["t_start_ns"] + np.sum([all_steps[name] for name in TIMES], axis=0)
    gaps = all_steps["t_start_ns"][1:] - end[:-1]
    table["python_ns"][n - len(gaps) :] = np.maximum(gaps - idle[n - len(gaps) :], 0)
    reused = np.diff(all_steps["n_reused"], prepend=all_steps["n_reused"][:1])
    if len(all_steps) == n:  # from the very first step on
        reused[0] = steps["n_reused"][0]
    table["reused"] = reused[-n:]
    table["sampled"] = steps["n_results"]
    table["filled"] = steps["n_filled"]
    rows = each(call.n_rows for call in calls)
    n_done = in_call + (steps["code"] == 0)
    table["run"] = first_call + of
    table["kv_used"] = each(call.kv_used for call in calls) + rows * n_done
    table["rows"] = rows
    table["decode_rows"] = each(len(call.decode) for call in calls)
    table["prefill_rows"] = table["rows"] - table["decode_rows"]
    starts = np.searchsorted(number, firsts).tolist()
    for call, start, stop in zip(calls, starts, [*starts[1:], n], strict=True):
        if start == stop:
            continue
        of_call = slice(start, stop)
        table["reasons"][of_call] = call.reasons
        table["ids"][of_call, call.decode] = call.ids
        for slot, id, n_prompt in call.prompts:
            table["ids"][of_call, slot] = id
            table["chunk"][of_call, slot] = n_prompt
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
    pid: int, tid: int, name: str, start_ns: int, ns: int, args: dict[str, Any] | None = None
) -> dict[str, Any]:
    event = {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": start_ns / 1e3, "dur": ns / 1e3}
    return event if args is None else {**event, "args": args}


def _starts(trace: Trace) -> list[int]:
    starts: list[int] = (trace["t_start_ns"] - trace["t_start_ns"][:1]).tolist()
    return starts


def _steps(trace: Trace) -> Iterator[dict[str, Any]]:
    shown = ("rows", "prefill_rows", "decode_rows", "sampled", "kv_used", "reused", "run", "code")
    columns = [trace[name].tolist() for name in shown]
    phases = [trace[name].tolist() for name in TIMES]
    gaps, reasons = trace["python_ns"].tolist(), trace["reasons"].tolist()
    for i, start in enumerate(_starts(trace)):
        times = [phase[i] for phase in phases]
        args: dict[str, Any] = {
            name: column[i] for name, column in zip(shown, columns, strict=True)
        }
        if reasons[i]:
            args["reasons"] = {f"request {id}": text for id, text in reasons[i].items()}
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
    took = np.sum([trace[name] for name in TIMES], axis=0)
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
