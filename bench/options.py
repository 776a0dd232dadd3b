"""What the command lines of the benches have in common."""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from bench.cache import RESULTS
from pyllamabatch.report.disturbed import UNWATCHED
from pyllamabatch.report.facts import machine
from pyllamabatch.report.meters import others_are_known

MODEL, N_CORES = "qwen2-0.5b", machine()["n_cores"]


def add_model(
    parser: argparse.ArgumentParser, model: str = MODEL, kv: str = "streams", threads: int = N_CORES
) -> None:
    """The arguments are defaults."""
    add_file(parser, model, threads)
    parser.add_argument(
        "--kv",
        choices=["streams", "unified"],
        default=kv,
        help="cells of every arm: a stream per sequence (llama.cpp's own default), or shared",
    )


def add_file(parser: argparse.ArgumentParser, model: str = MODEL, threads: int = N_CORES) -> None:
    """As `add_model`, where no option says what cells the arms have: `kv` is for the parser's own
    defaults."""
    parser.add_argument("--model", default=model, help="a shape, 'default' or a GGUF file")
    parser.add_argument("--threads", type=int, default=threads)
    parser.add_argument("--gpu-layers", type=int, default=-1, help="-1 is libllama's default")


def add_work(parser: argparse.ArgumentParser, prompt_tokens: int, tokens: int) -> None:
    """The arguments are defaults."""
    parser.add_argument(
        "--prompt-tokens", type=positive, default=prompt_tokens, help="per sequence"
    )
    parser.add_argument("--tokens", type=positive, default=tokens, help="timed per sequence")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")


def add_run(parser: argparse.ArgumentParser, repeats: int = 1) -> None:
    """`repeats`: the default; 1 where a bench has no repeats."""
    parser.add_argument("--repeats", type=positive, default=repeats, help="runs of each arm")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a small form: about a minute")
    parser.add_argument(
        "--undisturbed",
        type=cores,
        metavar="CORES",
        help="wait until others use fewer cores than this, and repeat runs that they disturb",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="S",
        help="start no run after so many seconds; the records until then stay",
    )
    parser.add_argument(
        "--out", type=Path, help="JSONL file to append to, or a folder for it (bench/results)"
    )


def cores(word: str) -> float:
    """That others may use. ArgumentTypeError where it can't be known what they do."""
    if not others_are_known():
        raise argparse.ArgumentTypeError(UNWATCHED)
    return float(word)


def numbers(words: str) -> list[int]:
    """`1,4,16` as numbers; SystemExit for anything else."""
    try:
        values = [int(word) for word in words.split(",")]
    except ValueError:
        values = [0]
    if min(values) < 1:
        raise SystemExit(f"{words}: numbers of 1 or more, comma separated")
    return values


def positive(word: str) -> int:
    """A number as `numbers` has them."""
    (value,) = numbers(word)
    return value


class Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=Named)


def choose(names: str, arms: Sequence[T]) -> list[T]:
    """The arms that are named, comma separated; all of them for ""."""
    known = {arm.name: arm for arm in arms}
    chosen = names.split(",") if names else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"--arms {','.join(unknown)}: not one of {', '.join(known)}")
    return [known[name] for name in chosen]


def out_file(options: argparse.Namespace, bench: str, subject: str, gpu: str = "") -> Path:
    """`--out` when that is a .jsonl file, else a file in that folder, named after the bench, its
    subject and the machine (the GPU, or the system and its cores)."""
    out: Path = options.out or RESULTS
    if out.suffix == ".jsonl":
        return out
    where = gpu or f"{sys.platform} {machine()['n_cores']}core"
    tag = re.sub(r"[^a-z0-9.]+", "-", where.lower()).strip("-")
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
