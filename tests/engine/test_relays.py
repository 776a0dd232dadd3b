"""asyncio: the same tokens as threads get, tasks that are cancelled, a line that is full."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Awaitable
from contextlib import aclosing
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.followers import Followers
from pyllamabatch.engine.relays import Relay
from pyllamabatch.engine.results import Chunk
from pyllamabatch.errors import ArgumentError, EngineClosed, RequestTooLong
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Plan, StepView, sarathi
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import check_idle, engine_on, greedy, held

PROMPTS = [[1, 20 + i, 30, 40] for i in range(12)]


async def collect(engine: Engine, prompt: list[int], **options: Any) -> list[int]:
    return [token.token async for token in engine.stream(prompt, greedy(), **options)]


def check_done(engine: Engine) -> None:
    """Cancels take a step."""
    assert engine.drain(30)
    check_idle(engine)


@pytest.mark.parametrize("max_waiting", [None, 1])
def test_tasks_get_what_threads_get(model: Model, max_waiting: int | None) -> None:
    with engine_on(model, max_waiting=max_waiting) as engine:
        expected = [result.tokens for result in engine.generate(PROMPTS, greedy())]
        n_threads = threading.active_count()

        async def run() -> None:
            tasks = [asyncio.create_task(collect(engine, prompt)) for prompt in PROMPTS]
            assert await asyncio.gather(*tasks) == expected
            results = await engine.agenerate(PROMPTS, greedy())
            assert [result.tokens for result in results] == expected
            assert threading.active_count() == n_threads

        asyncio.run(run())
        asyncio.run(run())  # another loop
        check_done(engine)


def test_prompts_of_one_call_come_in_together(model: Model) -> None:
    seen: list[int] = []

    class Looks:
        usual = sarathi()

        def plan(self, view: StepView) -> Plan:
            seen.append(len(view.running) + len(view.waiting))
            return self.usual.plan(view)

    with engine_on(model, policy=Looks()) as engine:
        for _ in range(5):
            del seen[:]
            asyncio.run(engine.agenerate(PROMPTS, greedy(3)))
            assert seen[0] == len(PROMPTS)
            check_done(engine)
            engine.resume()


def test_chunks_are_the_tokens_in_pieces(embedded_model: Model) -> None:
    with engine_on(embedded_model, kv_unified=True) as engine:
        params = SamplingParams(temperature=0, max_tokens=20, logprobs=1, ignore_eog=True)

        async def run() -> None:
            stream = engine.submit("Copy: hello. Copy: ", params)
            chunks = [chunk async for chunk in engine.chunks(stream)]
            result = stream.result()
            assert "".join(chunk.text for chunk in chunks) == result.text
            assert [chunk.start for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
            tokens = [t for chunk in chunks for t in stream.between(chunk.start, chunk.stop)]
            assert [token.token for token in tokens] == result.tokens
            assert [token.logprob for token in tokens] == result.logprobs
            streamed = [token async for token in engine.stream("Copy: hello. Copy: ", params)]
            assert [(t.token, t.text) for t in streamed] == [(t.token, t.text) for t in tokens]
            assert [t.logprob for t in streamed] == pytest.approx(result.logprobs, abs=1e-4)
            again = await engine.agenerate(["Copy: hello. Copy: "], params)
            assert again[0].n_cached > result.n_cached == 0
            assert result.queue_s is not None
            assert result.ttft_s is not None
            assert 0 <= result.queue_s <= result.ttft_s

        asyncio.run(run())


def test_a_follower_gets_the_chunks_in_order(model: Model) -> None:
    """Also where it makes them wait, at every other one."""
    with engine_on(model) as engine:
        expected = [result.text for result in engine.generate(PROMPTS, greedy(30))]

        async def followed(followers: Followers, prompt: list[int]) -> str:
            texts: list[str] = []
            seen = asyncio.Lock()  # held while it makes the stream wait

            async def slowly() -> None:
                async with seen:
                    await asyncio.sleep(0.001)

            def take(chunk: Chunk) -> Awaitable[None] | None:
                assert not seen.locked()
                texts.append(chunk.text)
                return slowly() if len(texts) % 2 else None

            stream = engine.submit(prompt, greedy(30))
            await followers.follow(stream, take)
            assert stream.done
            return "".join(texts)

        async def run() -> None:
            followers = engine.followers()
            tasks = (followed(followers, prompt) for prompt in PROMPTS)
            assert await asyncio.gather(*tasks) == expected

        asyncio.run(run())
        check_done(engine)


@pytest.mark.parametrize("late", [False, True])
def test_what_a_follower_raises_cancels_the_request_and_no_other(model: Model, late: bool) -> None:
    with engine_on(model) as engine, held(engine) as go_on:

        async def fail() -> None:
            raise ValueError("full")

        def take(chunk: Chunk) -> Awaitable[None] | None:
            if late:
                return fail()
            raise ValueError("full")

        async def run() -> None:
            followers = engine.followers()
            other = asyncio.create_task(collect(engine, PROMPTS[1]))
            stream = engine.submit(PROMPTS[0], greedy(500))
            with pytest.raises(ValueError, match="full"):
                await followers.follow(stream, take)
            left = engine.submit(PROMPTS[2], greedy(500))
            come = asyncio.Event()
            following = asyncio.create_task(followers.follow(left, lambda chunk: come.set()))
            await come.wait()
            following.cancel()
            with pytest.raises(asyncio.CancelledError):
                await following
            go_on.set()
            assert await other

        asyncio.run(run())
        check_done(engine)
        assert engine.stats().finished["cancelled"] == 2


def test_a_cancelled_task_cancels_its_request(model: Model) -> None:
    with engine_on(model) as engine:

        async def run() -> None:
            reading = asyncio.create_task(anext_of(engine))
            waiting = asyncio.create_task(engine.agenerate(PROMPTS, greedy(500)))
            await begun.wait()
            for task in (reading, waiting):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            async with aclosing(engine.stream(PROMPTS[0], greedy(400))) as stream:
                async for _ in stream:
                    break

        async def anext_of(engine: Engine) -> None:
            async for _ in engine.stream(PROMPTS[0], greedy(500)):
                begun.set()
                await asyncio.Event().wait()

        begun = asyncio.Event()
        with held(engine):
            asyncio.run(run())
        check_done(engine)
        assert engine.stats().finished["cancelled"] > 0
        assert engine.stats().finished["length"] < 14


def test_errors_and_deadlines(model: Model) -> None:
    engine = engine_on(model)

    async def run() -> None:
        with pytest.raises(ArgumentError):
            await collect(engine, [])
        with pytest.raises(RequestTooLong):
            await engine.agenerate([[1] * 5000], greedy())
        assert await collect(engine, PROMPTS[0], timeout=0) == []
        (late,) = await engine.agenerate([PROMPTS[0]], greedy(), timeout=0)
        assert late.finish_reason == "deadline"
        engine.close()
        with pytest.raises(EngineClosed):
            await collect(engine, PROMPTS[0])

    asyncio.run(run())


def test_closing_in_the_loop_ends_waits_for_room(model: Model) -> None:
    engine = engine_on(model, n_seq_max=1, max_waiting=1)

    async def streamed(prompt: list[int]) -> None:
        async for _ in engine.stream(prompt, greedy(500)):
            pass

    async def run() -> list[Any]:
        tasks: list[Any] = [asyncio.create_task(streamed(prompt)) for prompt in PROMPTS]
        tasks += [asyncio.create_task(engine.agenerate([one], greedy(500))) for one in PROMPTS]
        await asyncio.sleep(0)  # each comes as far as it can
        engine.close(wait=False)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with held(engine):
        ends = asyncio.run(run())
    refused = [end for end in ends if isinstance(end, EngineClosed)]
    assert len(refused) >= len(ends) - 2  # one ran, one waited for its slot


def test_an_engine_keeps_no_loop_that_is_over(model: Model) -> None:
    with engine_on(model) as engine:

        async def run() -> weakref.ref[asyncio.AbstractEventLoop]:
            await collect(engine, PROMPTS[0])
            await engine.agenerate(PROMPTS, greedy())
            return weakref.ref(asyncio.get_running_loop())

        loop = asyncio.run(run())
        check_done(engine)
        gc.collect()
        assert loop() is None


def test_a_loop_is_told_once_for_many_tasks() -> None:
    async def run() -> int:
        loop = asyncio.get_running_loop()
        relay, told = Relay(loop), 0
        call_soon = loop.call_soon_threadsafe

        def count(*args: Any) -> Any:
            nonlocal told
            told += 1
            return call_soon(*args)

        setattr(loop, "call_soon_threadsafe", count)  # noqa: B010
        pairs = [relay.future() for _ in range(50)]
        for _, wake in pairs:
            wake()
            wake()  # more than once is fine
        await asyncio.gather(*(future for future, _ in pairs))
        return told

    assert asyncio.run(run()) == 1
