"""Grammar: what a generated text must look like, and from where on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grammar:
    """A grammar as GBNF text with start rule `root`, and how it begins.

    - lazy: the text is free until a trigger, and the grammar's from there on: one of
      `trigger_tokens`, or a match of one of `trigger_patterns` (regular expressions of C++; the
      grammar starts with the first group that matched, or else with the match). A pattern with
      repetitions, anchors, word boundaries or back references is searched for in the last 512 bytes
      of the answer and what the new token adds; `^` is the start of the answer. A pattern has at
      most 32768 bytes, and groups in 256 levels.
    - prefill: tokens at the end of the prompt that the grammar describes, too. Not for a lazy one.
    - thinking_start, thinking_ends: token sequences around thoughts, in which a lazy grammar is not
      triggered. It may begin with one of the ends."""

    text: str
    lazy: bool = False
    trigger_patterns: tuple[str, ...] = ()
    trigger_tokens: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    thinking_start: tuple[int, ...] = ()
    thinking_ends: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Grammar:
        """From `dataclasses.asdict`, also when that went through JSON."""
        return cls(**{name: _frozen(value) for name, value in fields.items()})


def _frozen(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return tuple(map(_frozen, value))
