"""OpenMP's threads: none is left with the thread that made an engine."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.cost.where import cpu_features
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import lib


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_helpers_end_when_they_are_released() -> None:
    """In a process of its own, where no other test's thread ends meanwhile."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def check() -> None:
    lib.plb_threads_release()
    if "OPENMP" not in cpu_features():
        return  # nothing to end
    before = n_threads()
    with Model.default() as model:
        assert n_threads() == before
        with Context(model, n_ctx=256, n_threads=3, n_threads_batch=3) as context:
            batch = context.batch()
            batch.extend([1, 2, 3], 0, 0)
            context.decode(batch)
            assert n_threads() == before + 2
            lib.plb_threads_release()
            assert n_threads() == before
            context.memory.clear()
            context.decode(batch)  # they are made again
            assert n_threads() == before + 2
        with Engine(model, n_seq_max=1, n_ctx=256, n_threads=1, n_threads_batch=1) as engine:
            assert engine.generate([[1, 2]])[0].error is None
            helpers_of_this_thread = n_threads() - before - 2  # decoder and delivery
            assert helpers_of_this_thread <= 1  # the sampler's pool may have one


if __name__ == "__main__":
    check()
