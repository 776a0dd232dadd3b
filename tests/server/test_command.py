"""Servers as the command line opens them: on a profile machine, with HTTP, streams and counters as
always, and no model; with files; and several, without the extra."""

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from pyllamabatch.cli import serve
from pyllamabatch.errors import ArgumentError, ChatTemplateError, UnsupportedOperation
from pyllamabatch.server.errors import of
from pyllamabatch.server.run import listen
from tests.support.machines import fast_profile
from tests.support.models_gguf import gguf_path
from tests.support.models_special import write_lora
from tests.support.served import running


def flags(*words: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args([*map(str, words)])


def test_it_answers_that_no_model_wrote_this(tmp_path: Path) -> None:
    with (
        serve.opened(flags("--machine", fast_profile(tmp_path), "-np", "2", "-q")) as app,
        running(app) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
        answer = client.post("/v1/chat/completions", json=chat).raise_for_status().json()
        assert "No model wrote this" in answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 30
        both = client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5})
        texts = [choice["text"] for choice in both.raise_for_status().json()["choices"]]
        assert texts == [texts[0]] * 2
        models = client.get("/v1/models").raise_for_status().json()
        assert [one["id"] for one in models["data"]] == ["fast"]
        assert models["data"][0]["meta"]["n_params"] == models["data"][0]["meta"]["size"] == 0
        assert client.get("/props").raise_for_status().json()["model_path"] == ""
        slots = client.get("/slots").raise_for_status().json()
        assert len(slots) == 2


def test_files_that_flags_name(tmp_path: Path) -> None:
    """A template, and adapters by their names."""
    template, style = tmp_path / "template.jinja", tmp_path / "style.gguf"
    template.write_text("{{ messages[0].content }}!", encoding="utf-8")
    write_lora(style)
    words: list[str | Path] = ["-m", gguf_path("llama"), "-np", "2", "-c", "512", "-t", "1", "-q"]
    words += ["--chat-template", template, "--lora", style, "--lora", f"more={style}"]
    with (
        serve.opened(flags(*words)) as app,
        running(app) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        chat = {"messages": [{"role": "user", "content": "Hello"}]}
        made = client.post("/apply-template", json=chat).raise_for_status().json()
        assert made["prompt"] == "Hello!"
        adapters = client.get("/lora-adapters").raise_for_status().json()
        assert [Path(one["path"]) for one in adapters] == [style, style]
        models = client.get("/v1/models").raise_for_status().json()["data"]
        assert [one["id"] for one in models] == [gguf_path("llama").name, "style", "more"]
        assert [client.get(f"/v1/models/{one['id']}").json() for one in models] == models
        missing = client.get("/v1/models/owner/none")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        short = {"prompt": "One", "temperature": 0, "max_tokens": 8}
        base, named, asked = (
            client.post("/v1/completions", json={**short, **body})
            .raise_for_status()
            .json()["choices"][0]["text"]
            for body in ({}, {"model": "more"}, {"model": "none", "lora": "more"})
        )
        assert base != named == asked
    twice = flags(*words, "--lora", style)
    with pytest.raises(ArgumentError, match="has this name already"), serve.opened(twice):
        pass


SERVED = """
import argparse, gc, sys, weakref
from pyllamabatch.cli import serve
from pyllamabatch.server.run import Server

def run(server):
    pointers.append(weakref.ref(server._service.model.ptr))
    server._ready()
    gc.collect()
    print(len(gc.get_objects()), gc.get_freeze_count())

pointers, Server.run_until_signal = [], run
parser = argparse.ArgumentParser()
serve.add_arguments(parser)
serve.run(parser.parse_args(sys.argv[1:]))
gc.collect()
print([pointer() for pointer in pointers])
"""


def test_what_fails_is_told_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with serve.opened(flags("--machine", fast_profile(tmp_path), "-np", "2", "-q")):
        of(ZeroDivisionError("a bug"))
    said = capsys.readouterr().err
    assert "ERROR pyllamabatch.server.errors: a request failed" in said
    assert "ZeroDivisionError: a bug" in said


def test_a_key_that_is_empty_opens_no_server(tmp_path: Path) -> None:
    """--api-key "$KEY" without KEY."""
    empty = tmp_path / "keys"
    empty.write_text("\n")
    machine = "--machine", fast_profile(tmp_path), "-q"
    for words in (["--api-key", ""], ["--api-key-file", empty]):
        given = flags(*machine, *words)
        with pytest.raises(ArgumentError, match="has no key"), serve.opened(given):
            pass


def test_a_template_that_can_not_be_read_opens_no_server(tmp_path: Path) -> None:
    """--chat-template FILE with a typing error: each chat was refused as the client's mistake."""
    given = flags("--machine", fast_profile(tmp_path), "-q", "--chat-template", tmp_path / "none")
    with pytest.raises(ChatTemplateError, match="none"), serve.opened(given):
        pass


def test_no_address_is_not_all_of_them() -> None:
    with pytest.raises(ArgumentError, match="host"):
        listen("", 0)


def test_an_address_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_what_stays_is_searched_for_no_cycles(tmp_path: Path) -> None:
    words = ["--machine", fast_profile(tmp_path), "-np", "2", "-q", "--port", "0"]
    command = [sys.executable, "-c", SERVED, *map(str, words)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts, left = said.splitlines()
    n_searched, n_frozen = map(int, counts.split())
    assert n_searched < n_frozen / 10
    assert left == "[None]"  # the model is freed: with one that is not, Metal aborts at the end


def test_several_engines_need_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedOperation, match=r"ray is missing.*pyllamabatch\[ray\]"):
        serve.run(flags("--replicas", "2", "--port", "0"))
