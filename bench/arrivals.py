"""What `bench traffic` asks for, and when: a closed loop, or requests that come by themselves."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bench.case import Case
from bench.serve import run_all_in
from bench.targets import Figure
from pyllamabatch.report.records import Record

ALL_IN: dict[str, Any] = {"pp": 256, "tg": 128, "n_cells": 0}
"""Tokens of each sequence, of the tool that says what a device can do."""


@dataclass(frozen=True)
class Load(Case):
    """share: of the requests in a second that the device can do; 0: clients ask again when they
    have their answer. rate: requests in a second, then. busy: processes beside that compute."""

    share: float = field(kw_only=True, default=0.0)
    rate: float = field(kw_only=True, default=0.0)
    busy: int = field(kw_only=True, default=0)

    @property
    def detail(self) -> dict[str, float]:
        """What a record says of it."""
        found = {"load": self.share, "rate": self.rate, "busy": float(self.busy)}
        return {name: value for name, value in found.items() if value}

    def arrivals(self, n: int, which: int) -> list[float]:
        """When `n` requests come, in seconds: a Poisson process."""
        generator = np.random.default_rng([self.seed, which, n])
        times: list[float] = np.cumsum(generator.exponential(1 / self.rate, n)).tolist()
        return times


def loads_of(case: Case, words: str, busy: int) -> Iterator[Load]:
    """The closed loop for ""; else Poisson arrivals at these shares, comma separated, of what
    llama-batched-bench does with all at once. SystemExit for other words."""
    values = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    closed = Load(**values, busy=busy)
    if not words:
        yield closed
        return
    shares = [float(word) for word in words.split(",") if word.replace(".", "", 1).isdigit()]
    if len(shares) < words.count(",") + 1 or min(shares) <= 0:
        raise SystemExit(f"--loads {words}: shares above 0, comma separated")
    all_in = run_all_in(replace(case, **ALL_IN))
    for share in shares:
        yield replace(closed, share=share, rate=share * case.pl / all_in.t_tg)


def kind_of(record: Record) -> str:
    """In words: "closed loop", "Poisson, 0.8 of all-in, 1 busy beside"."""
    share, busy = record.detail.get("load"), record.detail.get("busy")
    words = [f"Poisson, {share:g} of all-in" if share else "closed loop"]
    return ", ".join(words + ([f"{busy:.0f} busy beside"] if busy else []))


def quiet(figure: Figure) -> Figure:
    """Of closed loops, and nothing beside them."""
    return lambda records: figure([r for r in records if kind_of(r) == "closed loop"])


def beside(figure: Figure) -> Figure:
    """Of closed loops beside one busy process."""
    return lambda records: figure(
        [r for r in records if kind_of(r) == "closed loop, 1 busy beside"]
    )


def kinds_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each kind, in their order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(kind_of(record), []).append(record)
    return found
