"""Traces in files: Azure's CSV, Mooncake's JSONL and our superset of it, ShareGPT's JSON.

- `.csv`: Azure's public LLM inference traces: TIMESTAMP (date and time), ContextTokens,
  GeneratedTokens.
- `.jsonl`: Mooncake's: a JSON object a line, with timestamp (ms), input_length, output_length
  (tokens) and hash_ids, one for each 512 tokens of the prompt: prompts with the same first ids
  share a prefix. Ours may also have block_size (instead of 512), max_tokens, priority, tenant,
  deadline_ms (from its arrival), itl_target_ms, session_id and delay (ms). A request of a session
  arrives that long after the one before it has ended, and needs no timestamp.
- `.json`: ShareGPT's: a list of {"conversations": [{"from": "human"|"gpt", "value": text}, …]}.
  Each answer is a request, whose prompt is the conversation so far. It arrives when the one before
  has ended. The starts of conversations are drawn: `rate` of them a second.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from pyllamabatch.errors import ArgumentError
from pyllamabatch.sim.workload import DRAWN, Piece, TraceRequest, draw

BLOCK = 512  # tokens that a hash id of Mooncake's stands for
CHARACTERS = 4  # of a token, where there is no vocabulary to count with

Count = Callable[[str], int]


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
    if spec.partition(":")[0] in DRAWN:
        if rate is not None:
            raise ArgumentError("rate", rate, "an option of the trace: poisson:rate=…")
        return draw(spec, seed)[:n]
    path = Path(spec)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                requests = list(_azure(file, spec, n))
            elif path.suffix == ".jsonl":
                requests = list(_mooncake(file, spec, n))
            elif path.suffix == ".json":
                requests = _sharegpt(json.load(file), spec, n, count, rate or 1.0, seed)
                rate = None
            else:
                raise ArgumentError("trace", spec, f"a .csv, .jsonl, .json, or {', '.join(DRAWN)}")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArgumentError("trace", spec, str(error)) from None
    if not requests:
        raise ArgumentError("trace", spec, "has no requests")
    return requests if rate is None else at_rate(requests, rate)


def at_rate(requests: list[TraceRequest], rate: float) -> list[TraceRequest]:
    """Their arrivals stretched so that `rate` come in a second; those after another stay so."""
    times = [request.arrival for request in requests if request.after is None]
    first, span = min(times), max(times) - min(times)
    scale = (len(times) - 1) / rate / span if span else 0.0
    return [
        r if r.after is not None else replace(r, arrival=(r.arrival - first) * scale)
        for r in requests
    ]


def _azure(lines: Iterator[str], name: str, n: int | None) -> Iterator[TraceRequest]:
    start: datetime | None = None
    for i, row in enumerate(csv.DictReader(lines)):
        if i == n:
            return
        try:
            at = _time(row["TIMESTAMP"])
            n_prompt, n_output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise _wrong(name, i + 2, error) from None
        start = start or at
        arrival = (at - start).total_seconds()
        yield _request(name, i + 2, i, arrival, n_prompt, n_output, ((2 * i, n_prompt),), 2 * i + 1)


def _time(text: str) -> datetime:
    """Date and time with any number of digits for the second, as UTC unless it says otherwise."""
    text = text.strip().replace("Z", "+00:00")
    seconds, point, rest = text.partition(".")
    digits = len(rest) - len(rest.lstrip("0123456789"))
    if point:
        text = f"{seconds}.{rest[:digits][:6].ljust(6, '0')}{rest[digits:]}"
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)


def _mooncake(lines: Iterator[str], name: str, n: int | None) -> Iterator[TraceRequest]:
    pieces: dict[Any, int] = {}
    sessions: dict[Any, int] = {}
    i = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if i == n:
            return
        try:
            row = json.loads(line)
            n_prompt, n_output = int(row["input_length"]), int(row["output_length"])
            after = sessions.get(row["session_id"]) if "session_id" in row else None
            time = row["timestamp"] if after is None else row.get("delay", 0)
            block = int(row.get("block_size", BLOCK))
            ids = row.get("hash_ids") or ()
            if ids and (block < 1 or len(ids) != -(-n_prompt // block)):
                raise ValueError(f"{len(ids)} hash_ids for {n_prompt} tokens in blocks of {block}")
            content: list[Piece] = []
            left = n_prompt
            for hash_id in ids:
                number_of = pieces.setdefault((block, hash_id), len(pieces))
                content.append((number_of, min(block, left)))
                left -= block
            own = pieces.setdefault(("prompt", i), len(pieces))
            answer = pieces.setdefault(("answer", i), len(pieces))
            deadline, target = row.get("deadline_ms"), row.get("itl_target_ms")
            request = _request(
                name,
                number,
                i,
                float(time) / 1e3,
                n_prompt,
                n_output,
                tuple(content) or ((own, n_prompt),),
                answer,
                after=after,
                max_tokens=int(row.get("max_tokens", 0)),
                priority=int(row.get("priority", 0)),
                tenant=str(row.get("tenant", "")),
                deadline=None if deadline is None else float(deadline) / 1e3,
                itl_target=None if target is None else float(target) / 1e3,
            )
        except ArgumentError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _wrong(name, number, error) from None
        if "session_id" in row:
            sessions[row["session_id"]] = i
        i += 1
        yield request


def _sharegpt(
    data: Any, name: str, n: int | None, count: Count, rate: float, seed: int
) -> list[TraceRequest]:
    found: list[TraceRequest] = []
    n_pieces = 0
    rng = np.random.default_rng(seed)
    now = 0.0
    for number, talk in enumerate(data, 1):
        content: list[Piece] = []
        after: int | None = None
        now += float(rng.exponential(1 / rate))
        try:
            turns = [(str(t["from"]), str(t["value"])) for t in talk["conversations"]]
        except (KeyError, TypeError) as error:
            raise _wrong(name, number, error) from None
        for who, text in turns:
            piece, n_tokens = n_pieces, count(text)
            n_pieces += 1
            if who in ("gpt", "assistant") and content:
                id = len(found)
                if id == n:
                    return found
                n_prompt = sum(n for _, n in content)
                arrival = now if after is None else 0.0
                found.append(
                    TraceRequest(
                        id, arrival, n_prompt, n_tokens, tuple(content), piece, after=after
                    )
                )
                after = id
            content.append((piece, n_tokens))
    return found


def _request(
    name: str,
    line: int,
    id: int,
    arrival: float,
    n_prompt: int,
    n_output: int,
    content: tuple[Piece, ...],
    answer: int,
    **more: Any,
) -> TraceRequest:
    if n_prompt < 1 or n_output < 1 or not 0 <= arrival < 1e12:
        detail = f"{n_prompt} and {n_output} tokens at {arrival} s"
        raise ArgumentError("trace", name, f"line {line}: no such request: {detail}")
    if 0 < more.get("max_tokens", 0) < n_output:
        raise ArgumentError("trace", name, f"line {line}: max_tokens below output_length")
    return TraceRequest(id, arrival, n_prompt, n_output, content, answer, **more)


def _wrong(name: str, line: int, error: Exception) -> ArgumentError:
    return ArgumentError("trace", name, f"line {line}: {type(error).__name__}: {error}")
