"""What comes between a front and a replica, without Ray."""

import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import orjson
import pytest
from fastapi import FastAPI

from pyllamabatch.cluster.call import Head, RoutedCall, answer, head_line, head_of, routed_by
from pyllamabatch.cluster.gpus import n_gpus, share
from pyllamabatch.cluster.joined import summed
from pyllamabatch.scheduler.router import BYTES_PER_TOKEN, PrefixAffinity
from pyllamabatch.server.errors import install
from tests.server.conftest import served  # noqa: F401  # a fixture
from tests.support.engines import held
from tests.support.served import ENDLESS, SUM_CHAT, Served, until

JSON = [(b"content-type", b"application/json")]


def call(path: str, values: Any, method: str = "POST") -> RoutedCall:
    return RoutedCall(method, path, b"", JSON, orjson.dumps(values))


@pytest.mark.parametrize("blocks", [False, True])
def test_a_stamp_of_each_request_does_not_change_where_it_goes(blocks: bool) -> None:
    def prefix(stamp: str) -> bytes:
        text = f"x-anthropic-billing-header: cc_version=2.1.1; cch={stamp};"
        system = [{"type": "text", "text": text}, {"type": "text", "text": "Be short."}]
        asked = {"system": system if blocks else text + "Be short.", "messages": []}
        return routed_by(orjson.dumps(asked))[0]

    assert prefix("a5145") == prefix("0b7e1")
    for other in (b'["a"]', b'[{"type":"text"}]'):  # for the replica to refuse
        assert routed_by(b'{"system": %b}' % other)[0] == other


def test_conversations_are_routed_by_what_they_begin_with() -> None:
    system = {"role": "system", "content": "You are a zoologist. " * 8}
    first = [system, {"role": "user", "content": "Zebras?"}]
    second = [*first, {"role": "assistant", "content": "Striped."}]
    one, key = routed_by(orjson.dumps({"messages": first, "prompt_cache_key": "zoo"}))
    other, _ = routed_by(orjson.dumps({"stream": True, "messages": second}))
    assert key == "zoo"
    assert other.startswith(one[:-1])
    assert routed_by(b'{"prompt": "a b", "model": "x"}') == (b"a b", "")
    assert routed_by(b'{"prompt": ["a", 2]}') == (b'["a",2]', "")
    tokens, _ = routed_by(b'{"prompt": [1, 70000, -1]}')
    assert len(tokens) == 3 * BYTES_PER_TOKEN
    assert np.frombuffer(tokens, "<i4").tolist() == [1, 70000, -1]
    assert routed_by(b'{"prompt": [4294967296]}') == (b"[4294967296]", "")
    deep = b'{"messages": %b}' % (b"[" * 400 + b"]" * 400)
    assert routed_by(b"not JSON") == routed_by(b"[1]") == routed_by(deep) == (b"", "")
    router = PrefixAffinity(unit=BYTES_PER_TOKEN)
    prompts = [RoutedCall("POST", "/", b"", [], b"", prefix).prompt() for prefix in (one, other)]
    assert len(prompts[0]) > 16 * router.unit
    assert (prompts[0][:-1] == prompts[1][: len(prompts[0]) - 1]).all()


async def written(app: Any, call: RoutedCall) -> tuple[Head, bytes]:
    async with aclosing(answer(app, call)) as parts:
        head, *body = [part async for part in parts]
    assert isinstance(head, tuple)
    return head, b"".join(part for part in body if isinstance(part, bytes))


def test_a_replica_answers_as_the_server_does(served: Served) -> None:  # noqa: F811
    app = served.server.config.app
    (status, _), body = asyncio.run(written(app, call("/v1/chat/completions", SUM_CHAT)))
    assert status == 200
    assert orjson.loads(body)["choices"] == served.ok("/v1/chat/completions", SUM_CHAT)["choices"]
    (status, _), body = asyncio.run(written(app, call("/v1/completions", {"promt": 1})))
    assert status == 400
    assert "prompt" in orjson.loads(body)["error"]["message"]
    (status, _), body = asyncio.run(written(app, call("/health", None, "GET")))
    assert (status, body) == (200, b'{"status":"ok"}')


def test_nothing_is_sent_before_the_first_token(served: Served) -> None:  # noqa: F811
    app = served.server.config.app
    chat = call("/v1/chat/completions", {**SUM_CHAT, "stream": True})

    async def first_part() -> bytes | Head:
        async with aclosing(answer(app, chat)) as parts:
            await anext(parts)
            return await anext(parts)

    part = asyncio.run(first_part())
    assert isinstance(part, bytes)
    events = [
        orjson.loads(line[6:]) for line in part.split(b"\n\n") if line and b"DONE" not in line
    ]
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert deltas[1]["content"]


def test_who_asks_how_far_a_prompt_is_hears_it_before(served: Served) -> None:  # noqa: F811
    app, told = served.server.config.app, {"stream": True, "return_progress": True}
    chat = call("/v1/chat/completions", {**SUM_CHAT, **told})

    async def first_part() -> bytes | Head:
        async with aclosing(answer(app, chat)) as parts:
            await anext(parts)
            return await anext(parts)

    until(lambda: served.engine.stats().running == 0)
    with held(served.engine, 0):
        part = asyncio.run(first_part())
    assert isinstance(part, bytes)
    assert b'"role":"assistant"' in part
    assert b'"content":"' not in part


def test_who_leaves_is_cancelled(served: Served) -> None:  # noqa: F811
    until(lambda: served.engine.stats().running == 0)  # also what another test has left
    before = served.engine.stats().finished["cancelled"]
    endless = call("/v1/completions", {**ENDLESS, "stream": True})

    async def leave() -> None:
        async with aclosing(answer(served.server.config.app, endless)) as parts:
            await anext(parts)
            await anext(parts)

    with held(served.engine):
        asyncio.run(leave())
        until(lambda: served.engine.stats().finished["cancelled"] == before + 1)


def test_a_head_on_its_way() -> None:
    head = 200, [(b"content-type", b"text/plain"), (b"x-name", "Z\u00fcrich".encode("latin-1"))]
    line = head_line(head)
    assert line.index(b"\n") == len(line) - 1
    assert head_of(line) == head


def test_an_error_of_the_application_is_raised() -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        asyncio.run(written(broken, call("/", {})))


def test_a_bug_that_was_answered_is_an_answer() -> None:
    """Starlette sends it, and raises it again."""
    broken = FastAPI()
    install(broken)

    @broken.post("/")
    def fail() -> None:
        raise ValueError("a bug")

    (status, _), body = asyncio.run(written(broken, call("/", {})))
    assert status == 500
    assert orjson.loads(body)["error"]["message"] == "ValueError: a bug"


def test_metrics_of_two_servers() -> None:
    text = b'# TYPE n counter\nn %d.0\nuse_perc %.1f\nh_bucket{le="0.1"} %d.0\n'
    text += b"n_max %d.0\nslots_per_decode %d.0\nright_per_pos_total %d.0\n"
    first, other = text % (1, 0.2, 3, 70, 1, 2), text % (4, 0.6, 5, 50, 4, 3)
    assert summed([first, other]).decode().splitlines() == [
        "# TYPE n counter", "n 5.0", "use_perc 0.4", 'h_bucket{le="0.1"} 8.0',
        "n_max 70.0", "slots_per_decode 2.5", "right_per_pos_total 5.0",
    ]  # fmt: skip


def test_a_metric_is_in_one_piece() -> None:
    """The format asks for that, also where replicas have different labels."""
    texts = [b'# TYPE n counter\nn{a="%d"} 1.0\n# TYPE m gauge\nm 1.0\n' % i for i in (0, 1)]
    assert summed(texts).decode().splitlines() == [
        "# TYPE n counter", 'n{a="0"} 1.0', 'n{a="1"} 1.0', "# TYPE m gauge", "m 2.0"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("replicas", "each", "n"), [(2, 1, 2), (3, 0.6, 3), (4, 0.5, 2), (2, 0, 0)]
)
def test_gpus_of_a_profile_machine(replicas: int, each: float, n: int) -> None:
    assert n_gpus(replicas, each) == n


def test_replicas_share_gpus_so_that_all_have_room() -> None:
    assert [share(n, 2) for n in (1, 2, 3, 4, 5)] == [1, 1, 0.5, 0.5, 0.3333]
    assert share(3, 0) == 0
    for gpus in range(1, 9):
        for replicas in range(1, 257):
            assert n_gpus(replicas, share(replicas, gpus)) <= gpus
