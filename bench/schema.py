"""The rows of the benches: those of `pyllamabatch compare`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pyllamabatch.compare import facts
from pyllamabatch.compare.facts import machine, now
from pyllamabatch.compare.row import SCHEMA, Row, append, read, speeds

__all__ = ["SCHEMA", "Row", "append", "build", "commit", "machine", "now", "read", "speeds"]


@cache
def commit() -> str:
    """Of the checkout that the bench is run from, which need not be the installed package's."""
    return facts.commit(Path(__file__))


def build() -> dict[str, Any]:
    """The build's and the versions' part of a row."""
    return facts.build(commit())
