"""Traces in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv.radix_tree import n_common
from pyllamabatch.sim import TraceRequest, load_trace

SAMPLES = Path(__file__).parent / "samples"


def load(name: str, **options: object) -> list[TraceRequest]:
    return load_trace(str(SAMPLES / name), **options)  # type: ignore[arg-type]


def test_azure() -> None:
    found = load("azure.csv")
    assert [(r.n_prompt, r.n_output) for r in found] == [
        (320, 40),
        (1800, 12),
        (64, 210),
        (700, 90),
    ]
    assert [r.arrival for r in found] == pytest.approx([0.0, 0.501234, 1.75, 59.75])
    assert n_common(found[0].tokens(), found[1].tokens()) == 0


def test_azure_of_a_later_year_has_time_zones() -> None:
    assert [r.arrival for r in load("azure_zoned.csv")] == [0.0, 1.5, 3.0]


def test_mooncake_shares_what_its_hash_ids_say() -> None:
    a, b, c, d = load("mooncake.jsonl")
    assert [r.arrival for r in (a, b, c, d)] == [0.0, 1.5, 1.5, 4.0]
    for request in (a, b, c, d):
        assert len(request.tokens()) == request.n_prompt
    assert n_common(a.tokens(), b.tokens()) == 1024
    assert n_common(a.tokens(), c.tokens()) == 512
    assert n_common(a.tokens(), d.tokens()) == 0
    assert n_common(a.tokens(5), a.tokens(9)) == 1305


def test_our_own_fields() -> None:
    a, b, c = load("ours.jsonl")
    assert (a.priority, a.tenant, a.after, a.max_tokens) == (2, "red", None, 0)
    assert (b.arrival, b.max_tokens, b.deadline, b.itl_target) == (0.01, 200, 0.8, 0.04)
    assert (c.after, c.arrival) == (a.id, 0.25)
    assert n_common(a.tokens(), c.tokens()) == 100
    assert n_common(a.tokens(), b.tokens()) == 0


def test_a_conversation_goes_on_with_what_was_answered() -> None:
    first, second, other = load("sharegpt.json", rate=10.0, seed=3)
    assert (second.after, second.arrival) == (first.id, 0.0)
    assert other.after is None
    assert other.arrival > first.arrival > 0
    everything = first.tokens(first.n_output)
    assert n_common(everything, second.tokens()) == first.n_prompt + first.n_output
    assert n_common(everything, other.tokens()) == 0
    assert other.n_prompt == 11 + 9
    assert load("sharegpt.json", rate=10.0, seed=3) == [first, second, other]


def test_texts_are_counted_with_a_vocabulary_where_there_is_one() -> None:
    found = load("sharegpt.json", count=lambda text: len(text.split()))
    assert [(r.n_prompt, r.n_output) for r in found] == [(7, 12), (23, 10), (16, 5)]


def test_the_first_ones_at_another_rate() -> None:
    found = load("azure.csv", n=3, rate=4.0)
    assert [r.arrival for r in found] == pytest.approx([0.0, 0.501234 / 1.75 / 2, 0.5])
    assert len(load("sharegpt.json", n=2)) == 2
    assert len(load("mooncake.jsonl", n=1)) == 1


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n2026-01-05 09:30:00,5\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,5\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2026-01-05 09:30:00,0,5\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("a.jsonl", '\n{"timestamp": 0, "input_length": 5}\n', "line 2"),
        ("a.jsonl", '{"input_length": 5, "output_length": 5}\n', "timestamp"),
        ("a.jsonl", "[1, 2]\n", "line 1"),
        ("a.jsonl", "{\n", "line 1"),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1]}',
            "1 hash_ids for 600 tokens",
        ),
        (
            "a.jsonl",
            '{"timestamp": 0, "input_length": 6, "output_length": 5, "max_tokens": 4}',
            "max_tokens",
        ),
        ("a.jsonl", '{"timestamp": -1, "input_length": 6, "output_length": 5}', "line 1"),
        ("a.json", '[{"conversations": 3}]', "line 1"),
        ("a.json", "nothing", "Expecting value"),
        ("a.txt", "", "a .csv"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str, says: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=says):
        load_trace(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="No such file"):
        load_trace(str(tmp_path / "none.csv"))


def test_many_hash_ids_stay_within_int32(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [2**60, 2**61]}
    path = tmp_path / "big.jsonl"
    path.write_text(json.dumps(row))
    (request,) = load_trace(str(path))
    assert request.tokens().dtype == np.int32
    assert len(set(request.tokens().tolist())) == 2
