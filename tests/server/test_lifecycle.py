"""Who may ask, who leaves, a queue that is full, and the end."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from pyllamabatch.engine.embedding_core import EmbeddingCore
from pyllamabatch.errors import ContextCreateError, KvCacheFull
from pyllamabatch.llama.model import Model
from pyllamabatch.server import answer, run
from pyllamabatch.server.app import create_app
from pyllamabatch.server.errors import of
from pyllamabatch.server.options import ServerOptions
from pyllamabatch.server.run import Server, listen
from tests.support.engines import held
from tests.support.faults import set_fault
from tests.support.served import (
    ANSWER,
    ENDLESS,
    SUM,
    SUM_CHAT,
    Served,
    running,
    serving,
    until,
)

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_cancelled(served: Served, stream: bool) -> None:
    before = served.engine.stats()
    with held(served.engine):
        body = json.dumps({**ENDLESS, "stream": stream, "n": 2})
        address = served.server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address, timeout=60) as connection:
            head = f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall((head + body).encode())
            if stream:
                assert connection.recv(1)  # the head comes with the first tokens
            until(lambda: served.engine.stats().running == 2)
        until(lambda: served.engine.stats().running == 0)
    after = served.engine.stats()
    assert after.finished["cancelled"] == before.finished["cancelled"] + 2
    assert after.kv_used == 0
    assert served.ok(TEXT, {"prompt": SUM, "max_tokens": 2})


def test_streams_pass_through_middleware(served: Served) -> None:
    """Also what gives each part to another task, as starlette's own base class does."""
    app = create_app(served.engine)

    async def named(request: Any, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["X-Name"] = "passed"
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=named)
    body = {**ENDLESS, "max_tokens": 40}
    with (
        running(app) as server,
        httpx.stream("POST", f"{server.url}{TEXT}", json={**body, "stream": True}) as response,
    ):
        assert response.headers["X-Name"] == "passed"
        events = [line[6:] for line in response.iter_lines() if line]
    assert events.pop() == "[DONE]"
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert text == served.ok(TEXT, body)["choices"][0]["text"]


@pytest.fixture
def small(embedded_model: Model) -> Iterator[Served]:
    options = ServerOptions(
        api_keys=["first key", "second", "clé à"],
        cors_origins=["https://page.example"],
        body_bytes_max=2000,
        drain_timeout=20,
    )
    with serving(embedded_model, options, n_seq_max=1, max_waiting=1) as served:
        served.client.headers["Authorization"] = "Bearer second"
        yield served


def test_limits_of_a_small_server(small: Served) -> None:
    # keys
    bare = httpx.Client(base_url=small.url)
    assert bare.get("/health").status_code == 200
    for headers in ({}, {"Authorization": "Bearer thrid"}, {"X-Api-Key": "secon"}):
        response = bare.post(TEXT, json={"prompt": SUM}, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["type"] == "authentication_error"
    assert bare.get("/v1/models", headers={"X-Api-Key": "first key"}).status_code == 200
    sent = "Bearer clé à".encode()
    assert bare.get("/v1/models", headers={b"Authorization": sent}).status_code == 200
    # bodies
    too_large = b'{"prompt": "' + b"a" * 3000 + b'"}'
    for content in (too_large, iter([too_large[:1500], too_large[1500:]])):
        response = small.client.post(TEXT, content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    # other pages
    for origin, allowed in (("https://page.example", "https://page.example"), ("http://x", None)):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,x-one"
        response = bare.options(TEXT, headers=asked)
        assert response.headers["access-control-allow-headers"] == "authorization,x-one"
        assert response.headers.get("access-control-allow-origin") == allowed
        response = small.client.get("/v1/models", headers={"Origin": origin})
        assert response.headers.get("access-control-allow-origin") == allowed
    # more than may wait come in together while none waits
    assert len(small.ok(TEXT, {"prompt": [SUM] * 3, "max_tokens": 2, "n": 2})["choices"]) == 6
    # one runs, one waits, and no more
    with (
        held(small.engine) as go_on,
        small.client.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        with small.client.stream("POST", TEXT, json={**ENDLESS, "stream": True}) as waiting:
            until(lambda: small.engine.stats().waiting == 1)
            response = small.post(TEXT, {"prompt": SUM})
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "queue_full"
            # the end begins: what is open is finished
            small.server.servers[0].get_loop().call_soon_threadsafe(small.server.end)
            until(lambda: small.engine.draining)
            response = small.post(TEXT, {"prompt": SUM})
            assert response.status_code == 503
            assert "retry-after" in response.headers
            assert bare.get("/health").status_code == 503
            go_on.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
            assert [line for line in waiting.iter_lines() if line][-1] == "data: [DONE]"


def test_command_drains_at_a_signal() -> None:
    command = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-t", "1", "-np", "2"]
    environment = {**os.environ, "PYLLAMABATCH_API_KEY": "a"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].rstrip(",")
        headers = {"Authorization": "Bearer a"}
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            body = {**SUM_CHAT, "stream": True, "max_tokens": 400, "ignore_eos": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                *_, last, done = [line for line in lines if line]
        assert done == "data: [DONE]"
        assert json.loads(last[6:])["choices"][0]["finish_reason"] == "length"
        assert process.wait(30) == 0


def test_a_second_signal_cuts_off_what_is_open() -> None:
    """Without a word but that it has ended."""
    command = [sys.executable, "-m", "pyllamabatch", "serve", "--port", "0", "-t", "1", "-np", "1"]
    with subprocess.Popen(
        [*command, "-c", "60000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().split()[1].rstrip(",")
        with httpx.Client(base_url=url, timeout=60) as client:
            body = {**ENDLESS, "stream": True, "max_tokens": 50_000}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                until(lambda: client.get("/health").status_code == 503)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.ProtocolError):
                    list(lines)
        _, said = process.communicate(timeout=30)
        assert process.returncode == 0
        assert said.splitlines() == ["pyllamabatch: drained"]


def test_signals_where_loops_have_no_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows. Those that were there before come back."""
    before = signal.getsignal(signal.SIGTERM)
    ended: list[object] = []
    monkeypatch.setattr(Server, "end", lambda server: ended.append(server))

    async def serve(server: Server) -> None:
        monkeypatch.setattr(
            type(asyncio.get_running_loop()), "add_signal_handler", loop_of_windows, raising=False
        )
        with server.capture_signals():
            signal.raise_signal(signal.SIGTERM)
            while not ended:
                await asyncio.sleep(0)

    def loop_of_windows(*_: object) -> None:
        raise NotImplementedError

    with listen("127.0.0.1", 0) as listening:
        server = Server(lambda: None, listening, service=SimpleNamespace(draining=False))
        asyncio.run(serve(server))
    assert ended == [server]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit there")
@pytest.mark.parametrize(
    ("soft", "hard", "asked"),
    [(256, 4096, [4096]), (256, None, [10240]), (None, None, []), (4096, 4096, [])],
)
def test_a_server_may_open_as_many_files_as_the_system_lets_it(
    monkeypatch: pytest.MonkeyPatch, soft: int | None, hard: int | None, asked: list[int]
) -> None:
    """None: no limit. A Mac takes that of the hard one alone."""
    import resource

    limits = tuple(resource.RLIM_INFINITY if n is None else n for n in (soft, hard))
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: given.append(both))
    monkeypatch.setattr(Server, "run", lambda server, sockets: None)
    with listen("127.0.0.1", 0) as listening:
        Server(lambda: None, listening, service=SimpleNamespace()).run_until_signal()
    assert given == [(n, limits[1]) for n in asked]


@pytest.mark.parametrize(("seconds", "status"), [(60, 200), (0, 503)])
def test_the_end_waits_for_embeddings(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch, seconds: float, status: int
) -> None:
    """As long as it waits for completions. What it cuts off is told so."""
    inside, go_on, compute = threading.Event(), threading.Event(), EmbeddingCore._compute

    def held_up(core: EmbeddingCore, taken: Any) -> None:
        inside.set()
        assert go_on.wait(60)
        compute(core, taken)

    monkeypatch.setattr(EmbeddingCore, "_compute", held_up)
    monkeypatch.setattr(run, "CLOSE_SECONDS", 0.2)
    options = ServerOptions(embeddings=True, drain_timeout=seconds)
    with (
        running(create_app(embedded_model, options)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        answered = pool.submit(client.post, "/v1/embeddings", json={"input": "a"})
        assert inside.wait(60)
        server.servers[0].get_loop().call_soon_threadsafe(server.end)
        if status == 200:
            refused = client.post("/v1/embeddings", json={"input": "b"})
            assert refused.json()["error"]["code"] == "draining"
            go_on.set()
        response = answered.result(60)
        go_on.set()
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["code"] == "closed"


def test_where_one_choice_fails_no_other_writes_any_more() -> None:
    ended = []

    async def fails() -> Any:
        raise ValueError("no token")

    async def goes_on() -> Any:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)  # it may have to clean up
            ended.append(True)

    with pytest.raises(ValueError, match="no token"):
        asyncio.run(answer._all([goes_on(), fails()]))
    assert ended


def test_what_has_no_cells_now_may_come_again(
    embedded_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that gave its cells up, and does not get them back: others may free some."""
    with serving(embedded_model) as small:
        core = small.engine._core
        states = core._device.states
        monkeypatch.setattr(core, "_shrunk", True)
        monkeypatch.setattr(states, "grow", lambda: ContextCreateError("no memory"), raising=False)
        for path, body in ((TEXT, {"prompt": SUM}), (CHAT, SUM_CHAT)):
            response = small.post(path, body)
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
            error = response.json()["error"]
            assert (error["code"], error["type"]) == ("out_of_memory", "unavailable_error")
            (event,) = [e["error"] for e in small.events(path, body) if "error" in e]
            assert event == error
        monkeypatch.undo()
        assert small.ok(CHAT, SUM_CHAT)["choices"][0]["message"]["content"] == ANSWER


def test_what_ends_an_engine_is_logged_and_does_not_come_again(
    embedded_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """A decode fails, and there is no fresh context."""
    with serving(embedded_model) as small:
        context = small.engine._stepper._context
        assert context is not None
        context._native.n_seq_max = 100_000  # libllama refuses
        set_fault(small.engine._stepper, 1, -3, 0, 2)
        error = small.refused(TEXT, {"prompt": SUM}, 500)
        assert error["type"] == "server_error"
        assert "no fresh context" in error["message"]
        assert "a request failed" in caplog.messages
        late = small.post(TEXT, {"prompt": SUM})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "closed")
        assert "retry-after" not in late.headers


def test_a_sequence_alone_that_finds_no_cells_is_a_bug() -> None:
    """The accounting has them, so it was not refused before."""
    assert of(KvCacheFull(1)).status == 500
