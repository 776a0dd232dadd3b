"""What a step is made of, in terms of slots, and the counts of what was done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..kv import Slots


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows `start` to `start + n - 1` of one sequence's known tokens; `last`: the last known one
    is among them, so its row is sampled."""

    id: int
    slot: int
    start: int
    n: int
    last: bool


@dataclass(frozen=True, slots=True)
class Step:
    """A checked plan in terms of slots. `decode`: slots that compute the token sampled last and
    sample (int32, read-only); `chunks`: all other rows, those of hand-driven sequences included.
    `preempted`, `admitted`: (id, slot). `repeat`: how many times it may be computed before the
    policy is asked again, as long as no sequence comes or goes; more than 1 only for pure
    decoding."""

    decode: Slots
    chunks: tuple[Chunk, ...]
    preempted: tuple[tuple[int, int], ...]
    admitted: tuple[tuple[int, int], ...]
    n_rows: int
    reasons: Mapping[int, str]
    repeat: int = 1


@dataclass(slots=True)
class Counters:
    """What has been computed so far. `rows` = `decode_rows` + `prefill_rows`; `recomputed_rows`
    are the prefill rows that a preempted sequence had computed before; `tokens` = sampled; `fill`:
    how many steps have sampled so many sequences."""

    steps: int = 0
    rows: int = 0
    decode_rows: int = 0
    prefill_rows: int = 0
    recomputed_rows: int = 0
    tokens: int = 0
    admissions: int = 0
    preemptions: int = 0
    fill: dict[int, int] = field(default_factory=dict)
