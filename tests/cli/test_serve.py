"""What `pyllamabatch serve` makes of its flags."""

import argparse
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from pyllamabatch.cli import serve
from pyllamabatch.errors import ArgumentError


@pytest.mark.parametrize(
    ("offloaded", "asked", "threads"),
    [(0.0, None, 3), (0.5, None, 3), (1.0, None, None), (0.0, 5, 5), (1.0, 5, 5)],
)
def test_replicas_share_the_cores_that_compute(
    offloaded: float, asked: int | None, threads: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a device computes all layers, each has the one thread that this takes."""
    found: list[int | None] = []

    def opened(model: Any, args: argparse.Namespace, n_seq_max: int, **options: Any) -> Any:
        found.append(args.threads)
        return nullcontext()

    model = nullcontext(SimpleNamespace(offloaded=offloaded))
    monkeypatch.setattr(serve, "load_model", lambda args, quiet: model)
    monkeypatch.setattr(serve, "open_engine", opened)
    monkeypatch.setattr("pyllamabatch.server.app.create_app", lambda *given: given)
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args([] if asked is None else ["-t", str(asked)])
    with serve.opened(args, 3):
        assert found == [threads]


@pytest.mark.parametrize("words", [["--temperature", "-3"], ["--drain-timeout", "-1"]])
def test_what_is_wrong_is_said_before_a_model_is_loaded(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(serve, "load_model")
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    name = words[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ArgumentError, match=name), serve.opened(parser.parse_args(words)):
        pass


def test_blanks_in_a_list_are_of_no_origin() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    options = serve._options(parser.parse_args(["--cors-origins", "http://a, http://b,"]))
    assert options.cors_origins == ["http://a", "http://b"]


def test_a_seed_is_that_of_each_request() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    said = " ".join(parser.format_help().split())
    assert "--seed S each of them draws with this one (random seeds)" in said
    assert "line i" not in said
