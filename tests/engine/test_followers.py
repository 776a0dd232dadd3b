"""Followers: a text that is written token by token is the text that chunks have."""

import asyncio
import json
import random
from functools import partial
from typing import Any

import pytest

from pyllamabatch.engine.followers import Followers, TextWriter
from pyllamabatch.engine.relays import Relay
from pyllamabatch.engine.results import Chunk
from pyllamabatch.step.ring_reader import Page
from tests.engine.test_stream import PIECES as PIECES_OF
from tests.engine.test_stream import Told, push, stream
from tests.support.connections import Connection, bodies

PIECES = (
    b" word", b'"\n', b"", b"\x00", "é".encode(), "é".encode()[:1], "é".encode()[1:], b"\xff",
    "🦙".encode()[:2], "🦙".encode()[2:], b"\xf0\x9f",
)  # fmt: skip


def escaped(text: str) -> bytes:
    return json.dumps(text).encode()[1:-1]


def push_known(made: Told, *pieces: bytes) -> None:
    """As `push`, of tokens whose texts are known to native code."""
    page = made._page
    assert page is not None
    for token, piece in enumerate(pieces, 100 + int(page.n_tokens[1])):
        PIECES_OF[token] = piece
        made._texts(escaped).learn(token)
    push(made, *pieces)


def written(news: list[list[bytes]], turn_at: int, *, plain: bool, **options: Any) -> list[bytes]:
    """What a follower writes when these pieces come one list after the other."""
    parts: list[bytes] = []

    async def run() -> None:
        made, way = stream(**options), await Connection.make()
        gaps: list[int] = []
        followers = Followers(Relay(asyncio.get_running_loop()), lambda seconds, n: gaps.append(n))
        sink = partial(way.sink, b"<", b">")
        writer = TextWriter(b"<", b">", escaped, way.write_part, sink)
        task = asyncio.create_task(
            followers.follow(made, writer if plain else lambda chunk: writer(chunk))
        )
        await asyncio.sleep(0)
        for i, pieces in enumerate(news):
            (push_known if i % 3 else push)(made, *pieces)
            followers._tell()
            if i == turn_at:  # before the loop has looked
                made._turn_to(page := Page(2, 64, 3))
            elif i == turn_at + 3:  # it leaves its slot, which another stream has for a while
                made._turn_to(None)
                page.token[1, page.n_tokens[1]] = 100
                page.n_tokens[1] += 1
                page.show()
                followers._tell()
                if i % 2:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                made._begin(page, 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert sum(gaps) <= sum(map(len, news))
        made._finish("stop")
        await task
        await asyncio.sleep(0)
        parts.extend(bodies(way.come()))
        await way.close()
        text = made.wait(0).text
        assert b"".join(parts).replace(b"><", b"") == b"<" + escaped(text) + b">" or not text
        assert made.wait(0).tokens == made.tokens

    asyncio.run(run())
    return parts


@pytest.mark.parametrize("options", [{}, {"logprobs": 1}, {"stop": ("rd",), "min_tokens": 9}])
def test_a_writer_gets_what_chunks_have(options: dict[str, Any]) -> None:
    draw = random.Random(1)
    for _ in range(200):
        sizes = (draw.choice((0, 1, 1, 1, 2, 3)) for _ in range(draw.randrange(1, 16)))
        news = [draw.choices(PIECES, k=size) for size in sizes]
        made = partial(written, news, draw.randrange(16), **options)
        assert made(plain=True) == made(plain=False)


def test_a_token_alone_needs_no_chunk() -> None:
    asked = 0

    async def run() -> None:
        nonlocal asked
        made, way = stream(), await Connection.make()
        look = made._chunk_from

        def counted(index: int) -> Chunk | None:
            nonlocal asked
            asked += 1
            return look(index)

        made._chunk_from = counted  # type: ignore[method-assign]
        followers = Followers(Relay(asyncio.get_running_loop()), lambda seconds, n: None)
        writer = TextWriter(b"", b"", escaped, way.write_part, partial(way.sink, b"", b""))
        task = asyncio.create_task(followers.follow(made, writer))
        await asyncio.sleep(0)
        for _ in range(20):
            push_known(made, b" word")
            followers._tell()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        made._finish("stop")
        await task
        assert list(bodies(way.come())) == [b" word"] * 20
        await way.close()

    asyncio.run(run())
    assert asked == 3  # before the first token, for it, and for the end
