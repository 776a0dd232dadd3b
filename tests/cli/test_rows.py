"""What `generate` makes of its input lines."""

from __future__ import annotations

import json

import pytest

from pyllamabatch.cli.rows import BadLine, Request, digest, read_rows

OPTIONS = frozenset({"temperature", "stop", "stop_token_ids", "logit_bias", "max_tokens"})


def read(*lines: bytes) -> list[Request | BadLine]:
    return list(read_rows(lines, OPTIONS))


def one(**data: object) -> Request | BadLine:
    (row,) = read(json.dumps(data).encode())
    return row


def test_the_three_kinds_of_input() -> None:
    assert one(id="a", prompt="hello") == Request(1, "a", prompt="hello")
    assert one(tokens=[1, 2]) == Request(1, 1, tokens=[1, 2])
    messages = [{"role": "user", "content": "hi"}]
    assert one(id=7, messages=messages) == Request(1, 7, messages=messages)


def test_blank_lines_count_and_a_byte_order_mark_does_not() -> None:
    rows = read(b'\xef\xbb\xbf{"prompt": "a"}\r\n', b"\n", b'  {"prompt": "b"}\n', b"")
    assert [(row.line, row.id) for row in rows] == [(1, 1), (3, 3)]
    assert all(isinstance(row, Request) for row in rows)


def test_options_take_the_types_of_sampling_params() -> None:
    row = one(
        prompt="a",
        temperature=0,
        stop="x",
        stop_token_ids=[3],
        logit_bias={"5": 1},
        note="mine",
        max_tokens=None,
    )
    assert isinstance(row, Request)
    assert row.options == {
        "temperature": 0,
        "stop": ("x",),
        "stop_token_ids": (3,),
        "logit_bias": {5: 1.0},
    }
    assert row.ignored == ("note",)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "not a JSON object"),
        (b"3", "not a JSON object"),
        (b"{}", "needs one of"),
        (b'{"prompt": null}', "needs one of"),
        (b'{"prompt": "a", "tokens": [1]}', "only one"),
        (b'{"prompt": 1}', "prompt: must be a string"),
        (b'{"tokens": "1 2"}', "tokens: must be a list"),
        (b'{"tokens": [1, true]}', "tokens: must be a list"),
        (b'{"tokens": [1.0]}', "tokens: must be a list"),
        (b'{"messages": []}', "messages: must be a list"),
        (b'{"messages": ["hi"]}', "role and content"),
        (b'{"messages": [{"role": "user"}]}', "role and content"),
        (b'{"id": 1.5, "prompt": "a"}', "id: must be"),
        (b'{"id": true, "prompt": "a"}', "id: must be"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"1": null}}', "logit_bias"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"tokens": [' + b"9" * 5000 + b"]}", "not usable JSON"),
    ],
)
def test_bad_lines(line: bytes, problem: str) -> None:
    rows = read(b'{"prompt": "before"}', line, b'{"prompt": "after"}')
    assert [type(row) for row in rows] == [Request, BadLine, Request]
    bad = rows[1]
    assert isinstance(bad, BadLine)
    assert bad.line == bad.id == 2
    assert problem in bad.problem


def test_a_bad_line_keeps_its_id() -> None:
    row = one(id="x", prompt=1)
    assert isinstance(row, BadLine)
    assert row.id == "x"


def test_digest_is_stable_and_sees_every_part() -> None:
    assert digest("a", {"y": 1, "x": (2,)}) == digest("a", {"x": [2], "y": 1})
    assert digest("a", 1) != digest("a", 2)
    assert digest(b"\xff") != digest(b"\xfe")
