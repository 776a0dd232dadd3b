"""Processes that tests start and wait for."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

Done = subprocess.CompletedProcess[str]


def ended(
    command: Sequence[str | Path], seconds: float = 300, cwd: Path | None = None, **environment: str
) -> Done:
    """The command, done, with what it wrote. `environment`: beside that of the tests.
    TimeoutExpired, and it is killed, where it takes longer."""
    return subprocess.run(
        [str(word) for word in command], env={**os.environ, **environment}, cwd=cwd,
        capture_output=True, encoding="utf-8", timeout=seconds, check=False,
    )  # fmt: skip


def python(*arguments: str, seconds: float = 300, cwd: Path | None = None) -> Done:
    return ended([sys.executable, *arguments], seconds, cwd)


def run_itself(file: str) -> None:
    """Run `file`, the caller's `__file__`, as a program; AssertionError with what it wrote when it
    fails."""
    done = python(file, seconds=240)
    assert done.returncode == 0, done.stderr
