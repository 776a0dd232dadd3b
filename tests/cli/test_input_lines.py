"""What `generate` makes of its input lines."""

import json
from typing import Any

import pytest

from pyllamabatch.cli.input_lines import InputLine, digest, read_lines


def one(*, ignore_unknown: bool = False, **data: object) -> InputLine:
    (line,) = read_lines([json.dumps(data).encode()], ignore_unknown=ignore_unknown)
    return line


def test_the_three_kinds_of_input() -> None:
    assert one(id="a", prompt="hello") == InputLine(1, "a", "hello", "prompt")
    assert one(tokens=[1, 2]) == InputLine(1, 1, [1, 2], "tokens")
    messages = [{"role": "user", "content": "hi"}]
    assert one(id=7, messages=messages) == InputLine(1, 7, messages, "messages")


def test_blank_lines_count_and_a_byte_order_mark_does_not() -> None:
    lines = list(
        read_lines([b'\xef\xbb\xbf{"prompt": "a"}\r\n', b"\n", b'  {"prompt": "b"}\n', b""])
    )
    assert [(line.number, line.id, line.problem) for line in lines] == [(1, 1, ""), (3, 3, "")]


def test_sampling_fields() -> None:
    line = one(prompt="a", temperature=0, stop="x", logit_bias={"5": 1}, max_tokens=None)
    assert line.options == {"temperature": 0, "stop": "x", "logit_bias": {5: 1.0}}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("temp", "'temp' (temperature?)"),
        ("max_new_tokens", "'max_new_tokens' (max_tokens?)"),
        ("repetition_penalty", "'repetition_penalty' (repeat_penalty?)"),
        ("n", "'n';"),
    ],
)
def test_an_unknown_field_names_the_nearest_one(name: str, says: str) -> None:
    data: dict[str, Any] = {"id": "x", "prompt": "a", name: 1}
    assert says in one(**data).problem
    ignored = one(ignore_unknown=True, **data)
    assert ignored == InputLine(1, "x", "a", "prompt")


@pytest.mark.parametrize(
    ("raw", "problem"),
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
        (b'{"id": 1.5, "prompt": "a"}', "id: must be"),
        (b'{"id": true, "prompt": "a"}', "id: must be"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
        (b'{"prompt": "a", "logit_bias": {"1": null}}', "logit_bias"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"tokens": [' + b"9" * 5000 + b"]}", "not usable JSON"),
    ],
)
def test_bad_lines(raw: bytes, problem: str) -> None:
    lines = list(read_lines([b'{"prompt": "before"}', raw, b'{"prompt": "after"}']))
    assert [bool(line.problem) for line in lines] == [False, True, False]
    assert lines[1].number == lines[1].id == 2
    assert problem in lines[1].problem


def test_a_bad_line_keeps_its_id() -> None:
    assert one(id="x", prompt=1).id == "x"


def test_digest_is_stable_and_sees_every_part() -> None:
    assert digest("a", {"y": 1, "x": (2,)}) == digest("a", {"x": [2], "y": 1})
    assert digest("a", 1) != digest("a", 2)
