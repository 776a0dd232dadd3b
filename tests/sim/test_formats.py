"""Traces in files."""

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
    sizes = [(r.n_prompt, r.n_output) for r in found]
    assert sizes == [(320, 40), (1800, 12), (64, 210), (700, 90)]
    assert [r.arrival for r in found] == pytest.approx([0.0, 0.501234, 1.75, 59.75])
    assert n_common(found[0].tokens(), found[1].tokens()) == 0
    with_time_zones = load("azure_zoned.csv")  # of a later year
    assert [r.arrival for r in with_time_zones] == [0.0, 1.5, 3.0]


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
    assert (b.arrival, b.max_tokens, b.deadline) == (0.01, 200, 0.8)
    assert (b.ttft_target, b.itl_target) == (0.3, 0.04)
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
    in_words = load("sharegpt.json", count=lambda text: len(text.split()))
    assert [(r.n_prompt, r.n_output) for r in in_words] == [(7, 12), (23, 10), (16, 5)]


def test_the_first_ones_at_another_rate() -> None:
    found = load("azure.csv", n=3, rate=4.0)
    assert [r.arrival for r in found] == pytest.approx([0.0, 0.501234 / 1.75 / 2, 0.5])
    assert len(load("sharegpt.json", n=2)) == 2
    assert len(load("mooncake.jsonl", n=1)) == 1


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
TEN = '{"timestamp": 0, "input_length": 10, "output_length": 5'


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "TIMESTAMP,ContextTokens\n2026-01-05 09:30:00,5\n", "line 2"),
        ("a.csv", f"{HEAD}noon,5,5\n", "line 2"),
        ("a.csv", f"{HEAD}2026-01-05 09:30:00,0,5\n", "line 2: .*no such request"),
        ("a.csv", HEAD, "no requests"),
        ("a.jsonl", '\n{"timestamp": 0, "input_length": 5}\n', "line 2"),
        ("a.jsonl", '{"input_length": 5, "output_length": 5}\n', "timestamp"),
        ("a.jsonl", "[1, 2]\n", "line 1"),
        ("a.jsonl", "{\n", "line 1"),
        ("a.jsonl", f'{TEN}, "block_size": 5, "hash_ids": [1]}}', "1 hash_ids for 10 tokens"),
        ("a.jsonl", f'{TEN}, "max_tokens": 4}}', "max_tokens"),
        ("a.jsonl", f'{TEN}, "max_tokens": -4}}', "max_tokens"),
        ("a.jsonl", f'{TEN}, "deadline_ms": NaN}}', "line 1: .*nan ms is no time"),
        ("a.jsonl", f'{TEN}, "itl_target_ms": -5}}', "line 1: .*-5 ms is no time"),
        ("a.jsonl", TEN.replace("10", str(2**40)) + "}", "line 1: .*no such request"),
        ("a.jsonl", f'{TEN}, "ttft_target": 0.3}}', "line 1: .*ttft_target is ttft_target_ms"),
        ("a.jsonl", TEN.replace("0", "-1", 1) + "}", "line 1"),
        ("a.json", '[{"conversations": 3}]', "line 1"),
        ("a.json", "nothing", "Expecting value"),
        ("a.json", "5", "a list of conversations"),
        ("a.csv", f'{HEAD}"{"9" * 140_000}",5,5\n', "field larger"),
        ("a.txt", "", "a .csv"),
        ("none.csv", None, "No such file"),
        ("poison:rate=4", None, "or poisson, gamma, closed"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str | None, says: str) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ArgumentError, match=says):
        load_trace(str(path))


def test_many_hash_ids_stay_within_int32(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [2**60, 2**61]}
    path = tmp_path / "big.jsonl"
    path.write_text(json.dumps(row))
    (request,) = load_trace(str(path))
    assert request.tokens().dtype == np.int32
    assert len(set(request.tokens().tolist())) == 2
