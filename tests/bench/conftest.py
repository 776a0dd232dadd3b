"""What the tests of the benches have in common."""

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from bench.__main__ import main
from bench.case import Case, ModelFile
from pyllamabatch.report.records import Record, read
from tests.support.models_gguf import gguf_path

Run = Callable[..., tuple[int, list[Record]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`python -m bench WORDS`: its exit status and its records."""

    def run(*words: str) -> tuple[int, list[Record]]:
        out = tmp_path_factory.mktemp("bench") / "records.jsonl"
        status = main([*words, "--out", str(out)])
        return status, list(read(out))

    return run


@pytest.fixture(scope="module")
def case() -> Case:
    """Three sequences of a tiny model."""
    model = ModelFile(gguf_path("llama"), 1)
    return Case(model=model, pp=9, tg=5, pl=3, n_threads=1, sampling="greedy", seed=2)


def options(**changes: Any) -> argparse.Namespace:
    """What `add_run` adds, as far as a loop over runs asks."""
    values = {"command": "serve", "repeats": 2, "budget": None, "undisturbed": None}
    return argparse.Namespace(**values | changes)
