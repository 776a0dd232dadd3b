"""Step trace: what every step of an engine was and what it took, and its picture in a browser.

trace = engine.trace()               # the last steps, a structured NumPy array
trace["decode_ns"].mean()
to_chrome(trace, "steps.json")       # open it in https://ui.perfetto.dev or chrome://tracing"""

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
Prompt = tuple[int, int, int, int]
"""Rows of a prompt in a step: its slot, its request's id, how many, and how many fill it up."""
NO_REASONS: Mapping[int, str] = MappingProxyType({})
_COUNTS = "rows", "prefill_rows", "decode_rows", "sampled", "filled", "drafted", "accepted"


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
    - filled: rows of other sequences beside these, whose output is not read (`Stepper`'s gap_max,
      and `Padding`).
    - drafted: rows of drafted tokens, which are among `decode_rows`; accepted: of these, rows that
      were right and stay.
    - kv_used: cells that are held after the step. reused: graphs that it reused. on_device: 1
      where the device chose the candidates (`Stepper`'s device_sampling).
    - run: a number that steps of the same native call share.
    - ids, chunk, by slot, shape (slots,): the request that has rows in this step, 0 where there
      are none; and how many of its prompt, without a last one that is sampled from. prompt_filled,
      by slot: rows that make the prompt as long as others, so that they are computed together
      (`Neighbours`).
    - reasons: why the policy planned it so, a dict: text by request id, of those that were
      admitted, cut or preempted.
    - preempted: which requests were preempted before it, a dict: the slot that each had, by id."""
    return np.dtype(
        [
            *((name, np.int64) for name in ("t_start_ns", *TIMES, "python_ns", "run", "kv_used")),
            *((name, np.int32) for name in (*_COUNTS, "reused", "code", "on_device")),
            ("ids", np.int64, (n_seq_max,)),
            ("chunk", np.int32, (n_seq_max,)),
            ("prompt_filled", np.int32, (n_seq_max,)),
            ("reasons", object),
            ("preempted", object),
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
    preempted: Mapping[int, int]


class StepTrace:
    """The last `capacity` steps. Recording is cheap: the table is made when it is asked for.

    The thread that computes calls `begin`, keeps `ids` (the request in each slot) and `preempted`
    (the slots, by request, of those that were preempted since the last step), and adds to `idle_ns`
    what it waited for work since then. The thread that reads the ring calls
    `add_steps`."""

    def __init__(self, capacity: int, n_seq_max: int) -> None:
        self.ids = np.zeros(n_seq_max, dtype=np.int64)
        self.preempted: dict[int, int] = {}
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

        kv_used: cells that are held before it. Rows that fill prompts up are not among `n_rows`.
        reasons: the policy's, by request id. `decode` must not change afterwards."""
        calls, idle_ns, preempted = self._calls, self.idle_ns, self.preempted
        # The decoding slots are one array as long as none comes or goes: so are their ids.
        same = calls and calls[-1].decode is decode
        ids = calls[-1].ids if same else self.ids[decode]
        if calls and calls[-1].first == first:  # it came to nothing
            nothing = calls.pop()
            idle_ns, preempted = idle_ns + nothing.idle_ns, {**nothing.preempted, **preempted}
        calls.append(
            _Call(first, n_rows, kv_used, idle_ns, decode, ids, prompts, reasons, preempted)
        )
        self.idle_ns = 0
        self.preempted = {}
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

    def snapshot(self, n_most: int | None = None) -> Callable[[], Trace]:
        """A function that makes the table of what is there now: trace_dtype, oldest step first; of
        the last `n_most` steps."""
        most = self._capacity if n_most is None else min(n_most, self._capacity)
        with self._lock:
            n_dropped, pages = self._n_dropped, [page.table[: page.n] for page in self._pages]
        calls, first_call = list(self._calls), self._n_dropped_calls

        def table() -> Trace:
            steps = np.concatenate(pages)
            end = n_dropped + len(steps)
            n = min(len(steps), most)
            if calls:
                n = min(n, max(0, end - calls[0].first))
            table = np.zeros(n, dtype=trace_dtype(len(self.ids)))
            if n:
                _fill(table, steps[-n - 1 :], end - n, calls, first_call)
            return table

        return table


def _fill(
    table: Trace, all_steps: Trace, first_step: int, calls: list[_Call], first_call: int
) -> None:
    """Write a table of the steps from number `first_step` on. all_steps: these, and one before them
    if there is one. calls: those from number `first_call` on."""
    n, steps = len(table), all_steps[-len(table) :]
    number = first_step + np.arange(n)
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
    table["drafted"] = steps["n_drafted"]
    table["accepted"] = steps["n_accepted"]
    rows = each(call.n_rows for call in calls)
    n_done = in_call + (steps["code"] == 0)
    table["run"] = first_call + of
    table["kv_used"] = each(call.kv_used for call in calls) + rows * n_done
    table["prefill_rows"] = rows - each(len(call.decode) for call in calls)
    if steps["n_drafted"].any():
        rows = np.where(steps["n_drafted"] > 0, steps["n_rows"], rows)
        accepted = np.cumsum(steps["n_accepted"])
        starts_at = np.maximum(firsts[of] - first_step, 0)  # in the table, of each step's call
        before = np.where(starts_at > 0, accepted[starts_at - 1], 0)
        table["kv_used"] += accepted - before
    table["rows"] = rows
    table["decode_rows"] = table["rows"] - table["prefill_rows"]
    starts = np.searchsorted(number, firsts).tolist()
    for call, start, stop in zip(calls, starts, [*starts[1:], n], strict=True):
        if start == stop:
            continue
        of_call = slice(start, stop)
        table["reasons"][of_call], table["preempted"][of_call] = call.reasons, {}
        if number[start] == call.first:
            table["preempted"][start] = call.preempted
        table["ids"][of_call, call.decode] = call.ids
        for slot, id, n_prompt, n_fill in call.prompts:
            table["ids"][of_call, slot] = id
            table["chunk"][of_call, slot] = n_prompt
            table["prompt_filled"][of_call, slot] = n_fill


def to_chrome(trace: Trace, path: str | PathLike[str]) -> None:
    """Write a trace as Chrome's trace event JSON: one track of steps with their phases, one of the
    KV cells, and one track per request. Times in µs from the first step on."""
    events = [*_names(trace), *_steps(trace), *_sequences(trace), *_preemptions(trace)]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file, separators=(",", ":"))
        file.write("\n")


_ENGINE, _REQUESTS = 1, 2  # "processes": groups of tracks
_ARGUMENTS = (*_COUNTS, "kv_used", "reused", "run", "code")


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    def name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
        return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": name}}

    yield name("process", _ENGINE, 0, "engine")
    yield name("process", _REQUESTS, 0, "requests")
    yield name("thread", _ENGINE, 1, "steps")
    for id in np.unique(trace["ids"][trace["ids"] > 0]).tolist():
        yield name("thread", _REQUESTS, id, f"request {id}")


def _event(
    kind: str, pid: int, tid: int, name: str, start_ns: int, **more: object
) -> dict[str, Any]:
    return {"ph": kind, "pid": pid, "tid": tid, "name": name, "ts": start_ns / 1e3, **more}


def _starts(trace: Trace) -> list[int]:
    starts: list[int] = (trace["t_start_ns"] - trace["t_start_ns"][:1]).tolist()
    return starts


def _steps(trace: Trace) -> Iterator[dict[str, Any]]:
    all_args = (dict(zip(_ARGUMENTS, row, strict=True)) for row in trace[[*_ARGUMENTS]].tolist())
    all_times = trace[[*TIMES]].tolist()
    before = zip(trace["python_ns"].tolist(), trace["reasons"].tolist(), strict=True)
    for at, args, times, (gap, reasons) in zip(
        _starts(trace), all_args, all_times, before, strict=True
    ):
        if reasons:
            args["reasons"] = {f"request {id}": text for id, text in reasons.items()}
        if at > 0 and gap > 0:
            yield _event("X", _ENGINE, 1, "python", at - gap, dur=gap / 1e3)
        yield _event("X", _ENGINE, 1, "step", at, dur=sum(times) / 1e3, args=args)
        for name, ns in zip(PHASES, times, strict=True):
            yield _event("X", _ENGINE, 1, name, at, dur=ns / 1e3)
            at += ns
        yield _event("C", _ENGINE, 0, "KV cells", at, args={"used": args["kv_used"]})


def _sequences(trace: Trace) -> Iterator[dict[str, Any]]:
    took = np.sum([trace[name] for name in TIMES], axis=0).tolist()
    steps, slots = np.nonzero(trace["ids"])
    columns = (trace[name][steps, slots].tolist() for name in ("ids", "chunk", "prompt_filled"))
    starts = _starts(trace)
    for id, chunk, n_fill, i, slot in zip(*columns, steps.tolist(), slots.tolist(), strict=True):
        name, args = f"prefill {chunk}" if chunk else "decode", {"slot": slot, "step": i}
        if n_fill:
            args["prompt_filled"] = n_fill
        yield _event("X", _REQUESTS, id, name, starts[i], dur=took[i] / 1e3, args=args)


def _preemptions(trace: Trace) -> Iterator[dict[str, Any]]:
    starts = _starts(trace)
    for i, preempted in enumerate(trace["preempted"].tolist()):
        for id, slot in preempted.items():
            args = {"slot": slot, "step": i}
            yield _event("i", _REQUESTS, id, "preempted", starts[i], s="t", args=args)
