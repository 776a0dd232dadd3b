"""What the command lines of the benches have in common."""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Protocol, TypeVar

from bench import schema
from bench.cache import RESULTS


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="qwen2-0.5b", help="a shape, 'default' or a GGUF file")
    parser.add_argument("--threads", type=int, default=schema.machine()["n_cores"])
    parser.add_argument("--gpu-layers", type=int, default=-1, help="-1 is libllama's default")
    parser.add_argument(
        "--kv",
        choices=["streams", "unified"],
        default="streams",
        help="cells of every arm: a stream per sequence (llama.cpp's own default), or shared",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small form: about a minute")
    parser.add_argument(
        "--undisturbed",
        type=float,
        metavar="CORES",
        help="wait until others use fewer cores than this, and repeat runs that they disturb",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="start no run after so many seconds; the rows until then stay",
    )
    parser.add_argument(
        "--out", type=Path, help="JSONL file to append to, or a folder for it (bench/results)"
    )


def numbers(words: str) -> list[int]:
    """`1,4,16` as numbers; SystemExit for anything else."""
    try:
        values = [int(word) for word in words.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise SystemExit(f"{words}: numbers of 1 or more, comma separated")
    return values


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def choose(names: str, arms: list[T]) -> list[T]:
    """The arms that are named, comma separated; all of them for ""."""
    if not names:
        return arms
    known = {arm.name: arm for arm in arms}
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise SystemExit(f"--arms {','.join(unknown)}: not one of {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def out_file(options: argparse.Namespace, bench: str, subject: str, gpu: str = "") -> Path:
    """`--out` when that is a .jsonl file, else a file in that folder, named after the bench, its
    subject and the machine (the GPU, or the system and its cores)."""
    out: Path = options.out or RESULTS
    if out.suffix == ".jsonl":
        return out
    machine = gpu or f"{sys.platform} {schema.machine()['n_cores']}core"
    tag = re.sub(r"[^a-z0-9.]+", "-", machine.lower()).strip("-")
    return out / f"{'-'.join(word for word in (bench, subject, tag) if word)}.jsonl"


class Budget:
    """Says once when the time for more runs is over."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._said = False

    def spent(self) -> bool:
        if self._end is None or time.monotonic() < self._end:
            return False
        if not self._said:
            print("the budget is spent: no more runs", file=sys.stderr)
        self._said = True
        return True
