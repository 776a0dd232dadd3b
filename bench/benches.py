"""The benches: one module each."""

import argparse
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

from bench.targets import Target
from bench.views import plain
from pyllamabatch.report.records import Record

BENCHES = (
    "answers",
    "beside",
    "coalesce",
    "compare",
    "decode",
    "embed",
    "fleet",
    "neighbour",
    "plan",
    "policies",
    "prefix",
    "routes",
    "same",
    "sampler",
    "scheduler",
    "serve",
    "simulator",
    "soak",
    "speculate",
    "stall",
    "start",
    "step",
    "traffic",
    "width",
)
"""`bench/NAME.py` each; a new one needs no other entry."""


class Bench(Protocol):
    """What such a module has. The first line of its docstring says what it compares.

    For the report it may have `view(records)`, Markdown of its records (else `views.plain`);
    `draw(records, path)`, their plot (`summary.draw` plots `speed_tg` over `pl`); and `NAMES`, what
    its records call it where that is not its own name.
    """

    QUICK: Mapping[str, Any]  # the defaults of its options with --quick
    TARGETS: tuple[Target, ...]  # what it is to show

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """`--quick` and `--out FILE` (JSONL to append records to) at least."""

    def main(self, options: argparse.Namespace) -> int:
        """Measure; write every record as soon as it is there; the exit status."""


def load(name: str) -> Bench:
    return cast(Bench, importlib.import_module(f"bench.{name}"))


def about(bench: Bench) -> str:
    return (bench.__doc__ or "").partition("\n")[0]


def names_of(name: str, bench: Bench) -> tuple[str, ...]:
    """What its records call it."""
    return getattr(bench, "NAMES", (name,))


def view_of(bench: Bench) -> Callable[[Sequence[Record]], str]:
    """Markdown of the records of one setting."""
    view: Callable[[Sequence[Record]], str] = getattr(bench, "view", plain)
    return view
