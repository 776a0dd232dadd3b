"""The records of the benches: those of `pyllamabatch.report`, with the checkout's commit."""

from __future__ import annotations

from typing import Any

from bench.harness import commit
from pyllamabatch.report import facts
from pyllamabatch.report.facts import machine, now
from pyllamabatch.report.records import SCHEMA, Record, append, read, speeds

__all__ = [
    "SCHEMA",
    "Record",
    "Row",
    "append",
    "build",
    "commit",
    "machine",
    "now",
    "read",
    "speeds",
]

Row = Record


def build() -> dict[str, Any]:
    """The build's and the versions' part of a record."""
    return facts.build(commit())
