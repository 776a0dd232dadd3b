"""`python -m bench all`: every bench, each in a process of its own."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from bench.benches import BENCHES
from bench.cache import REPOSITORY, RESULTS
from bench.models import resolve
from bench.tools import tool

QUICK_MODEL = "qwen2-0.5b"
QUICK_LIMIT_S = 600.0
QUICK_RESULTS = REPOSITORY / "build" / "bench"
TOOLS = ("llama-batched-bench", "llama-server")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="each in a small form")
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help=f"end all of it after so many seconds (--quick {QUICK_LIMIT_S:g}), not counting the "
        "tools and the model, which are made first",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the JSONL files (bench/results; --quick build/bench)"
    )


def main(options: argparse.Namespace) -> int:
    """One that fails or ends with the process it runs in leaves its records, and the others go on;
    the status is 1 then."""
    folder: Path = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    limit = options.limit or (QUICK_LIMIT_S if options.quick else float("inf"))
    for name in TOOLS:
        tool(name)
    resolve(QUICK_MODEL)
    began = time.monotonic()
    failed = []
    for name in BENCHES:
        left = limit - (time.monotonic() - began)
        words = [name, *(["--quick"] if options.quick else []), "--out", str(folder)]
        print(f"\n== {' '.join(words)}", flush=True)
        if left <= 0 or _run(words, left) != 0:
            failed.append(name)
    print(f"\n{time.monotonic() - began:.0f} s, records in {folder}")
    if failed:
        print(f"not complete: {', '.join(failed)}")
    return int(bool(failed))


def _run(words: list[str], seconds: float) -> int:
    with subprocess.Popen([sys.executable, "-m", "bench", *words], cwd=REPOSITORY) as child:
        try:
            return child.wait(None if seconds == float("inf") else seconds)
        except subprocess.TimeoutExpired:
            print(f"{words[0]}: the time for all benches is over")
            child.terminate()  # it ends its servers and keeps its records
            return child.wait()
        except BaseException:
            child.terminate()
            raise
