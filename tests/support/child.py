"""A test that needs a process of its own: its module runs itself as a child."""

from __future__ import annotations

import subprocess
import sys


def run_itself(file: str) -> None:
    """Run `file`, the caller's `__file__`, as a program; AssertionError with what it wrote when it
    fails."""
    done = subprocess.run(
        [sys.executable, file], capture_output=True, encoding="utf-8", timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
