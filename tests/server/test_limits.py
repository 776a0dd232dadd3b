"""What no client may do to a server: bodies that cost much, and connections that stay open."""

import socket
from contextlib import suppress
from dataclasses import replace
from typing import Any

import orjson
import pytest

from pyllamabatch.errors import ChatParseError
from pyllamabatch.llama.grammar import Grammar
from pyllamabatch.llama.model import Model
from pyllamabatch.server import run, service
from pyllamabatch.server.app import create_app
from pyllamabatch.server.bodies import (
    PARSED_HERE_BYTES,
    STOP_CHARS_MAX,
    STOPS_MAX,
    VALUES_MAX,
)
from pyllamabatch.server.conversation import Turn
from tests.support.engines import held
from tests.support.served import ANSWER, ENDLESS, SUM, SUM_CHAT, Served, running, until

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"


def test_many_values_are_refused_in_short(served: Served) -> None:
    error = served.refused(TEXT, {"prompt": [1.5] * (VALUES_MAX + 2)}, 413)
    assert error["code"] == "too_many_values"
    error = served.refused(TEXT, {"prompt": [1.5] * 5000})
    assert "values that are not allowed" in error["message"]
    assert len(error["message"]) < 100


BAD = {"type": "bogus"}  # a schema


def nested(levels: int) -> Any:
    return orjson.loads('{"a": ' * levels + "1" + "}" * levels)


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (TEXT, {"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        (TEXT, {"logit_bias": {"9" * 900: 1}}, "logit_bias"),
        (TEXT, {"stop": ["a"] * (STOPS_MAX + 1)}, "stop"),
        (TEXT, {"stop": "a" * (STOP_CHARS_MAX + 1)}, "stop"),
        (TEXT, {"unknown" * 1000: 1}, None),
        (TEXT, {"stream_options": {"unknown" * 1000: 1}}, f"stream_options.{'unknown' * 15}"[:115]),
        (MESSAGES, {"n": 2}, "n"),
        ("/v1/responses", {"n": 2, "input": SUM}, "n"),
        (MESSAGES, {"messages": [{"role": "assistant", "content": [
            {"type": "tool_use", "id": "a", "name": "b", "input": nested(300)}]}]},
         "messages[0].content.input"),
        (TEXT, {"json_schema": BAD}, "json_schema"),
        (TEXT, {"grammar": "root ::= ("}, "grammar"),
        (CHAT, {"response_format": {"type": "json_object", "schema": BAD}}, "response_format"),
        ("/v1/responses", {"input": SUM, "text": {"format": {
            "type": "json_schema", "name": "bad", "schema": BAD}}}, "text.format"),
        ("/v1/responses", {"input": []}, "input"),
        ("/v1/responses", {"instructions": "Be short.", "input": [{"role": "wizard"}]},
         "input[0].role"),
        ("/v1/responses", {"input": [{"type": "function_call_output", "call_id": "a"}]},
         "input[0].output"),
        (MESSAGES, {"output_config": {"format": {"type": "json_schema", "schema": BAD}}},
         "output_config.format"),
        (MESSAGES, {"stop_sequences": ["a"] * (STOPS_MAX + 1)}, "stop_sequences"),
        (MESSAGES, {"stop": ["a"]}, "stop"),
        (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
         "tools[0].type"),
        (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice"),
        (TEXT, {"stop_token_ids": [5, 999]}, "stop_token_ids[1]"),
        (TEXT, {"stop": 5}, "stop"),
        (TEXT, {"prompt": [1, 2, "three", 4]}, "prompt.2"),
        (TEXT, {"prompt": [[1, "two"]]}, "prompt.0.1"),
        ("/completion", {"prompt": ["a", [["b"]]]}, "prompt.1.0"),
        (CHAT, {"lora": {"a": "much"}}, "lora.a"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        ("/v1/responses", {"input": SUM, "tools": [
            {"type": "function", "name": "a"}, {"name": "b"}]}, "tools[1].type"),
        ("/v1/responses", {"input": SUM, "tools": [{"type": "web_search"}, {
            "type": "function", "name": "a", "parameters": 5}]}, "tools[1].parameters"),
        ("/v1/responses", {"input": SUM, "tools": [{"type": "web_search"}],
         "tool_choice": {"type": "web_search"}}, "tool_choice"),
        (MESSAGES, {"system": "Be short.", "messages": [{"role": "user"}]},
         "messages[0].content"),
    ],
)  # fmt: skip
def test_values_beyond_limits(served: Served, path: str, change: Any, param: str | None) -> None:
    whole = {
        TEXT: {"prompt": SUM}, CHAT: SUM_CHAT, MESSAGES: {**SUM_CHAT, "max_tokens": 5},
    }.get(path, {})  # fmt: skip
    error = served.refused(path, {**whole, **change})
    assert error["param"] == param
    assert len(error["message"]) < 1000


ROW_OF_EMPTY = {"type": "string", "pattern": "^" + "(a|b)*" * 2000 + "$"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"json_schema": ROW_OF_EMPTY, "max_tokens": 100}, "too many ways"),
        ({"logit_bias": [[token, False] for token in range(259)], "temperature": 0}, "no token"),
    ],
)
def test_what_leaves_no_token_is_the_clients_mistake(
    served: Served, change: Any, words: str
) -> None:
    error = served.refused(TEXT, {"prompt": SUM, **change})
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    last = served.events(TEXT, {"prompt": SUM, **change})[-1]  # the status has gone out
    assert last["error"] == error


def test_what_a_sampler_throws_is_not_the_clients_mistake(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token begins a grammar that has no place for it."""
    grammar = Grammar('root ::= "~"', lazy=True, trigger_patterns=(ANSWER[0],))
    monkeypatch.setattr(service, "with_prompt", lambda params, _: replace(params, grammar=grammar))
    error = served.refused(CHAT, {**SUM_CHAT, "temperature": 0}, 500)
    assert "empty grammar stack" in error["message"]
    assert error["type"] == "server_error"
    last = served.events(CHAT, {**SUM_CHAT, "temperature": 0})[-1]
    assert last["error"] == error


def test_what_was_submitted_is_cancelled_when_no_answer_can_be_made(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(turn: Turn) -> None:
        raise ChatParseError("a", "no reader")

    monkeypatch.setattr(Turn, "reader", fail)
    until(lambda: served.engine.stats().running == 0)
    before = served.engine.stats().finished["cancelled"]
    body = {**SUM_CHAT, "ignore_eos": True, "max_tokens": 400, "n": 2}
    with held(served.engine):
        assert "no reader" in served.refused(CHAT, body, 500)["message"]
        until(lambda: served.engine.stats().finished["cancelled"] == before + 2)


def test_stops_of_the_template_are_no_stop_sequences(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = (ANSWER[1:],)
    monkeypatch.setattr(service, "with_prompt", lambda params, _: replace(params, stop=stop))
    for given, reason, word in (
        ([], "end_turn", None),
        ([ANSWER[1:]], "stop_sequence", ANSWER[1:]),
    ):
        body = {**SUM_CHAT, "max_tokens": 20, "stop_sequences": given}
        answer = served.ok(MESSAGES, body)
        assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, word)
        assert answer["content"][0]["text"] == ANSWER[:1]


def test_samples_count_the_cached_tokens_of_a_prompt_once(served: Served) -> None:
    body = {**ENDLESS, "prompt": "zebras count " * 12, "max_tokens": 2, "n": 3}
    usage = served.ok(TEXT, body)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] < usage["prompt_tokens"] // 3


@pytest.mark.parametrize(
    "sent",
    [b"FOO\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: abc\r\n\r\n"],
)
def test_what_is_no_http_gets_an_error_of_the_one_form(served: Served, sent: bytes) -> None:
    host, _, port = served.url.rpartition("/")[2].partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in head.lower()
    error = orjson.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")


@pytest.mark.parametrize(("seconds", "n_signals"), [(0.2, 1), (3600, 2)])
def test_an_open_body_does_not_hold_up_the_end(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, seconds: float, n_signals: int
) -> None:
    monkeypatch.setattr(run, "CLOSE_SECONDS", seconds)
    with running(create_app(embedded_model)) as server:
        address = server.servers[0].sockets[0].getsockname()
        loop = server.servers[0].get_loop()
        with socket.create_connection(address, timeout=60) as connection:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
            connection.sendall(head.encode())
            until(lambda: server.server_state.tasks)
            for _ in range(n_signals):
                loop.call_soon_threadsafe(server.end)
            with suppress(ConnectionResetError):
                assert len(connection.recv(1)) < 2  # it ends, with a 500 or without a word


def test_long_work_is_done_apart(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    service: Any = served.server._service
    apart, n_apart = service.apart, 0

    async def counted(call: Any) -> Any:
        nonlocal n_apart
        n_apart += 1
        return await apart(call)

    monkeypatch.setattr(service, "apart", counted)
    long = "a" * 5000
    for path, short, body in (
        ("/tokenize", {"content": "a"}, {"content": long, "with_pieces": True}),
        ("/detokenize", {"tokens": [40]}, {"tokens": [40] * 3000}),
        ("/apply-template", SUM_CHAT, {"messages": [{"role": "user", "content": long}]}),
    ):
        before = n_apart
        served.ok(path, short)
        assert n_apart == before
        assert served.ok(path, body)
        assert n_apart == before + 1
    before = n_apart
    served.refused(TEXT, {"prompt": SUM, "user": "a" * PARSED_HERE_BYTES, "top_k": "no"})
    assert n_apart == before + 1


def test_messages_count_alike_at_both_ends_and_fail_in_their_form(served: Served) -> None:
    long = "giraffes add " * 12 + SUM
    body = {"messages": [{"role": "user", "content": long}], "max_tokens": 5, "temperature": 0}
    for _ in range(2):  # the second finds the prompt cached
        events = served.events(MESSAGES, body)
        first, last = events[0]["message"]["usage"], events[-2]["usage"]
        assert [events[0]["type"], events[-2]["type"]] == ["message_start", "message_delta"]
        assert {**first, "output_tokens": last["output_tokens"]} == last
    assert last["cache_read_input_tokens"] > 0
    for path, outer in ((MESSAGES, "error"), (CHAT, None)):
        assert served.post(path, {"messages": 1}).json().get("type") == outer


def test_a_field_of_several_types_says_all_that_it_may_be(served: Served) -> None:
    error = served.refused(TEXT, {"prompt": 5})
    assert "valid string or should be a valid list" in error["message"]
