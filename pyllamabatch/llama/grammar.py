"""Grammar: what a generated text must look like, and from where on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pyllamabatch.errors import ArgumentError, integer


@dataclass(frozen=True)
class Grammar:
    """A grammar as GBNF text with start rule `root`, and how it begins.

    - lazy: the text is free until a trigger, and the grammar's from there on: one of
      `trigger_tokens`, or a match of one of `trigger_patterns` (regular expressions of C++; the
      grammar starts with the first group that matched, or else with the match). A pattern with
      repetitions, anchors, word boundaries or back references is searched for in the last 512 bytes
      of the answer and what the new token adds; `^` is the start of the answer. A pattern has at
      most 16384 bytes, with `a{n}` written out n times, and groups in 256 levels.
    - prefill: tokens at the end of the prompt that the grammar describes, too. Not for a lazy one.
    - thinking_start, thinking_ends: token sequences around thoughts, in which a lazy grammar is not
      triggered. It may begin with one of the ends.

    Raises `ArgumentError` for patterns that are no texts, and tokens that are no ids."""

    text: str
    lazy: bool = False
    trigger_patterns: tuple[str, ...] = ()
    trigger_tokens: tuple[int, ...] = ()
    prefill: tuple[int, ...] = ()
    thinking_start: tuple[int, ...] = ()
    thinking_ends: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        values: dict[str, object] = {
            name: _tokens(name, getattr(self, name))
            for name in ("trigger_tokens", "prefill", "thinking_start")
        }
        values["trigger_patterns"] = patterns = _listed("trigger_patterns", self.trigger_patterns)
        for pattern in patterns:
            if not isinstance(pattern, str) or "\0" in pattern or not _is_utf8(pattern):
                raise ArgumentError("trigger_patterns", pattern, "texts in UTF-8, without NUL")
        ends = _listed("thinking_ends", self.thinking_ends)
        values["thinking_ends"] = tuple(_tokens("thinking_ends", end) for end in ends)
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Grammar:
        """From `dataclasses.asdict`, also when that went through JSON."""
        return cls(**{name: _frozen(value) for name, value in fields.items()})


def _listed(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ArgumentError(name, value, "must be a sequence, not a text")
    return tuple(value)


def _tokens(name: str, value: object) -> tuple[int, ...]:
    return tuple(integer(name, token, 0, 2**31 - 1) for token in _listed(name, value))


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _frozen(value: Any) -> Any:
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    return tuple(map(_frozen, value))
