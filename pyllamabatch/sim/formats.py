"""Traces in files: Azure's CSV, Mooncake's JSONL and our superset of it, ShareGPT's JSON.

docs/how-to/simulate.md says what their fields mean."""

import csv
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from pyllamabatch.errors import ArgumentError
from pyllamabatch.sim.workload import (
    DRAWN,
    LATEST,
    LONGEST,
    Piece,
    TraceRequest,
    acceptance_of,
    draw,
)

BLOCK = 512  # tokens that a hash id of Mooncake's stands for
CHARACTERS = 4  # of a token, where there is no vocabulary to count with

Count = Callable[[str], int]
Row = dict[str, Any]


def count_characters(text: str) -> int:
    """Tokens of a text, roughly."""
    return max(1, round(len(text) / CHARACTERS))


def load_trace(
    spec: str,
    *,
    seed: int = 0,
    n: int | None = None,
    rate: float | None = None,
    count: Count = count_characters,
) -> list[TraceRequest]:
    """The requests of a file, or drawn: see `workload.draw`.

    `n`: the first so many. `rate`: requests (conversations) a second, instead of the trace's own:
    a file's times are stretched, and those of a file that has none drawn. `count`: tokens of a text
    (ShareGPT). ArgumentError says what is wrong, and in which line."""
    if n is not None and n < 1:
        raise ArgumentError("requests", n, "at least 1")
    if rate is not None and not 0 < rate < 1e9:
        raise ArgumentError("rate", rate, "requests a second, more than 0")
    if seed < 0:
        raise ArgumentError("seed", seed, "at least 0")
    if spec.partition(":")[0] in DRAWN:
        if rate is not None:
            raise ArgumentError("rate", rate, "an option of the trace: poisson:rate=…")
        return draw(spec, seed)[:n]
    path, requests, lines = Path(spec), list[TraceRequest](), _Lines()
    if path.suffix not in (".csv", ".jsonl", ".json"):
        raise ArgumentError("trace", spec, f"a .csv, .jsonl, .json, or {', '.join(DRAWN)}")
    items: Iterable[Any]
    read: Callable[[Any], list[TraceRequest]]
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                items, first, read = csv.DictReader(file), 2, lines.azure
            elif path.suffix == ".jsonl":
                items, first, read = file, 1, lines.mooncake
            else:
                talks = _Talks(count, rate or 1.0, seed)
                items, first, read = json.load(file), 1, talks.sharegpt
                if not isinstance(items, list):
                    raise ArgumentError("trace", spec, "a list of conversations")
            for number, item in enumerate(items, first):
                try:
                    requests += read(item)
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    detail = f"line {number}: {type(error).__name__}: {error}"
                    raise ArgumentError("trace", spec, detail) from None
                if n is not None and len(requests) >= n:
                    break
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ArgumentError("trace", spec, str(error)) from None
    if not requests:
        raise ArgumentError("trace", spec, "has no requests")
    if rate is None or path.suffix == ".json":
        return requests[:n]
    return at_rate(requests[:n], rate)


def at_rate(requests: list[TraceRequest], rate: float) -> list[TraceRequest]:
    """Their arrivals stretched so that `rate` come in a second; those after another stay so."""
    times = [request.arrival for request in requests if request.after is None]
    first, span = min(times), max(times) - min(times)
    scale = (len(times) - 1) / rate / span if span else 0.0
    return [
        r if r.after is not None else replace(r, arrival=(r.arrival - first) * scale)
        for r in requests
    ]


def _seconds(milliseconds: Any) -> float:
    seconds = float(milliseconds) / 1e3
    if not 0 <= seconds < LATEST:
        raise ValueError(f"{milliseconds} ms is no time from 0 on")
    return seconds


_OPTIONAL: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "max_tokens": ("max_tokens", int),
    "priority": ("priority", int),
    "tenant": ("tenant", str),
    "deadline_ms": ("deadline", _seconds),
    "ttft_target_ms": ("ttft_target", _seconds),
    "itl_target_ms": ("itl_target", _seconds),
    "acceptance": ("acceptance", float),
}
"""Field of a line → field of `TraceRequest`, and how it is read."""

_IN_MS = {name for name, _ in _OPTIONAL.values()} - _OPTIONAL.keys()


def load_acceptance(path: str | PathLike[str]) -> list[float]:
    """Of each request that `pyllamabatch generate` wrote a result of (`acceptance_of`), 0 for one
    without drafts; those that failed are left out. ArgumentError where none had any."""
    found: list[float | None] = []
    number = 0
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            number += 1
            row = json.loads(line) if line.strip() else None
            if row is not None and row["finish_reason"] != "error":
                found.append(acceptance_of(row["n_drafts"], row["n_drafted"], row["n_accepted"]))
    except (ValueError, KeyError, TypeError) as error:
        limit = f"line {number}: must be what `generate` wrote: {type(error).__name__}: {error}"
        raise ArgumentError("acceptance", str(path), limit) from None
    if not any(share is not None for share in found):
        raise ArgumentError("acceptance", str(path), "must have requests with drafts")
    return [share or 0.0 for share in found]


class _Lines:
    """Azure's and Mooncake's requests, one a line. Raises what Python raises for a wrong one."""

    def __init__(self) -> None:
        self._n = 0
        self._start: datetime | None = None
        self._pieces: dict[Any, int] = {}
        self._sessions: dict[Any, int] = {}  # the last request of each

    def azure(self, line: Row) -> list[TraceRequest]:
        time = _time(line["TIMESTAMP"])
        self._start = self._start or time
        row = {"input_length": line["ContextTokens"], "output_length": line["GeneratedTokens"]}
        return [self._request((time - self._start).total_seconds(), row)]

    def mooncake(self, line: str) -> list[TraceRequest]:
        if not line.strip():
            return []
        row = json.loads(line)
        after = self._sessions.get(row["session_id"]) if "session_id" in row else None
        time = row["timestamp"] if after is None else row.get("delay", 0)
        found = self._request(_seconds(time), row, after)
        if "session_id" in row:
            self._sessions[row["session_id"]] = found.id
        return [found]

    def _request(self, arrival: float, row: Row, after: int | None = None) -> TraceRequest:
        n_prompt, n_output = int(row["input_length"]), int(row["output_length"])
        if not (1 <= n_prompt <= LONGEST and 1 <= n_output <= LONGEST and 0 <= arrival < LATEST):
            raise ValueError(f"no such request: {n_prompt} and {n_output} tokens at {arrival} s")
        more = {
            name: read(row[field])
            for field, (name, read) in _OPTIONAL.items()
            if row.get(field) is not None
        }
        for name in _IN_MS & row.keys():
            raise ValueError(f"{name} is {name}_ms in a trace")
        block, ids = int(row.get("block_size", BLOCK)), row.get("hash_ids") or ()
        if ids and (block < 1 or len(ids) != -(-n_prompt // block)):
            raise ValueError(f"{len(ids)} hash_ids for {n_prompt} tokens in blocks of {block}")
        content = [
            (self._piece(block, each), min(block, n_prompt - i * block))
            for i, each in enumerate(ids)
        ]
        own, answer = self._piece("prompt", self._n), self._piece("answer", self._n)
        content = content or [(own, n_prompt)]
        self._n += 1
        return TraceRequest(
            self._n - 1, arrival, n_prompt, n_output, tuple(content), answer, after, **more
        )

    def _piece(self, *what: Any) -> int:
        return self._pieces.setdefault(what, len(self._pieces))


def _time(text: str) -> datetime:
    """Date and time with any number of digits for the second, as UTC unless it says otherwise."""
    found = re.fullmatch(r"(.*?)(?:\.(\d*))?(Z|[+-]\d\d:\d\d)?", text.strip())
    assert found is not None  # whatever the text is
    seconds, digits, zone = found.groups(default="")
    zone = "+00:00" if zone in ("", "Z") else zone
    return datetime.fromisoformat(f"{seconds}.{digits[:6]:0<6}{zone}")


class _Talks:
    """ShareGPT's conversations: a request for each answer."""

    def __init__(self, count: Count, rate: float, seed: int) -> None:
        self._count, self._rate, self._rng = count, rate, np.random.default_rng(seed)
        self._now, self._n, self._n_pieces = 0.0, 0, 0

    def sharegpt(self, talk: Any) -> list[TraceRequest]:
        self._now += float(self._rng.exponential(1 / self._rate))
        turns = [(str(turn["from"]), str(turn["value"])) for turn in talk["conversations"]]
        found: list[TraceRequest] = []
        content: list[Piece] = []
        for who, text in turns:
            piece, n_tokens = self._n_pieces, self._count(text)
            self._n_pieces += 1
            if who in ("gpt", "assistant") and content:
                after = found[-1].id if found else None
                arrival = self._now if after is None else 0.0
                n_prompt = sum(n for _, n in content)
                found.append(
                    TraceRequest(self._n, arrival, n_prompt, n_tokens, tuple(content), piece, after)
                )
                self._n += 1
            content.append((piece, n_tokens))
        return found
