"""Drain, stop, resume: nothing comes in, what is inside ends, and the engine is as good as new."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, Cancelled, EngineClosed, EngineDraining
from pyllamabatch.llama.model import Model
from tests.support.engines import engine_on, greedy, held
from tests.support.served import until

PROMPT = [1, 20, 30, 40]


def check_usable(engine: Engine) -> None:
    """Drained, nothing is left in it; resumed, it works."""
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.submitted == sum(stats.finished.values())
    assert engine.draining
    engine.resume()
    assert not engine.draining
    assert engine.submit(PROMPT, greedy()).result(30).finish_reason == "length"


def test_what_is_open_is_finished_and_nothing_new_comes_in(model: Model) -> None:
    with engine_on(model) as engine:
        streams = [engine.submit(PROMPT, greedy(30)) for _ in range(10)]
        assert engine.drain()
        assert [stream.done for stream in streams] == [True] * 10
        assert {stream.wait(0).finish_reason for stream in streams} == {"length"}
        for refused in (
            lambda: engine.submit(PROMPT, greedy()),
            lambda: engine.submit_all([PROMPT], greedy(), 2),
            lambda: engine.generate([PROMPT], greedy()),
        ):
            with pytest.raises(EngineDraining):
                refused()
        assert engine.stats().submitted == 10
        assert engine.drain(30)  # twice is fine
        check_usable(engine)


def test_it_waits_no_longer_than_it_is_told_and_cancels_nothing(model: Model) -> None:
    with engine_on(model) as engine:
        with held(engine):
            streams = [engine.submit(PROMPT, greedy(500)) for _ in range(8)]
            assert not engine.drain(0.01)
            assert engine.draining
        assert {stream.result(60).finish_reason for stream in streams} == {"length"}
        assert engine.drain()
        check_usable(engine)
        with pytest.raises(ArgumentError, match="timeout"):
            engine.drain(-1)
        assert not engine.draining


def test_an_engine_that_did_nothing_yet_is_quiet_at_once(model: Model) -> None:
    with engine_on(model) as engine:
        assert engine.drain(30)
        check_usable(engine)


def test_stop_cancels_what_is_open_and_the_engine_goes_on_afterwards(model: Model) -> None:
    with engine_on(model) as engine:
        with held(engine):
            streams = [engine.submit(PROMPT, greedy(500)) for _ in range(8)]
            next(iter(streams[0]))
            engine.stop()
        assert {stream.wait(0).finish_reason for stream in streams} == {"cancelled"}
        assert streams[0].tokens
        check_usable(engine)


def test_resume_lets_those_go_who_wait_for_the_end(model: Model) -> None:
    with engine_on(model) as engine, ThreadPoolExecutor(1) as pool, held(engine):
        stream = engine.submit(PROMPT, greedy(1000))
        waiting = pool.submit(engine.drain)
        until(lambda: engine.draining)
        engine.resume()
        assert not waiting.result(30)
        assert not stream.done
        stream.cancel()


def test_those_who_wait_for_room_are_told(model: Model) -> None:
    with (
        engine_on(model, n_seq_max=1, max_waiting=1) as engine,
        ThreadPoolExecutor(2) as pool,
        held(engine) as go_on,
    ):
        running = engine.submit(PROMPT, greedy(1000))
        next(iter(running))
        in_line = engine.submit(PROMPT, greedy(2))
        blocked = pool.submit(engine.submit, PROMPT, greedy(2))

        async def stream() -> None:
            async for _ in engine.stream(PROMPT, greedy(2)):
                pass

        in_loop = pool.submit(asyncio.run, stream())
        until(lambda: engine._core.commands._room_calls and blocked.running())
        assert not engine.drain(0)
        for future in (blocked, in_loop):
            with pytest.raises(EngineDraining):
                future.result(30)
        running.cancel()
        go_on.set()
        assert engine.drain(30)
        assert in_line.wait(0).finish_reason == "length"
        check_usable(engine)


def test_sequences_keep_what_they_have(model: Model) -> None:
    with engine_on(model) as engine, engine.sequence(greedy()) as seq, engine.sequence() as other:
        seq.prompt(PROMPT)
        first = seq.sample().token
        assert engine.drain(30)
        before = seq.tokens
        for refused in (seq.sample, lambda: seq.prompt([50]), seq.fork):
            with pytest.raises(EngineDraining):
                refused()
        assert seq.tokens == before == [*PROMPT, first]
        saved = seq.snapshot()
        other.restore(saved)
        seq.trim(2)
        with pytest.raises(EngineDraining):
            other.sample()
        engine.resume()
        second = other.sample().token
        seq.trim(0)
        seq.prompt(PROMPT)
        assert [seq.sample().token, seq.sample().token] == [first, second]


@pytest.mark.parametrize("cancel", [False, True])
def test_calls_that_are_under_way_are_waited_for_or_cancelled(model: Model, cancel: bool) -> None:
    with engine_on(model, n_ubatch=16, n_batch=16) as engine, ThreadPoolExecutor(1) as pool:
        began, go_on = threading.Event(), threading.Event()
        stepper: Any = engine._core._stepper
        compute = stepper.compute

        def slow(*args: Any) -> Any:
            began.set()
            assert go_on.wait(30)
            return compute(*args)

        with engine.sequence(greedy()) as seq:
            stepper.compute = slow
            call = pool.submit(seq.prompt, [1, *range(10, 200)])
            assert began.wait(30)
            assert not engine.drain(0.01)
            if cancel:
                stopping = threading.Thread(target=engine.stop)
                stopping.start()
                until(lambda: engine._core.commands._commands)
                go_on.set()
                stopping.join(30)
                with pytest.raises(Cancelled):
                    call.result(30)
                assert seq.position == 0
            else:
                go_on.set()
                assert engine.drain(30)
                call.result(30)
                assert seq.position == 191
            check_usable(engine)


def test_a_callback_of_a_stream_does_not_wait_for_itself(model: Model) -> None:
    with engine_on(model) as engine:
        answers: list[bool] = []
        done = threading.Event()

        def drain(_: object) -> None:
            answers.append(engine.drain())
            done.set()

        with engine._core.state:
            engine.submit(PROMPT, greedy(3)).add_done_callback(drain)
        assert done.wait(30)
        assert len(answers) == 1
        assert engine.drain(30)
        check_usable(engine)


def test_close_ends_a_drain(model: Model) -> None:
    engine = engine_on(model)
    with ThreadPoolExecutor(1) as pool, held(engine):
        engine.submit(PROMPT, greedy(1000))
        waiting = pool.submit(engine.drain)
        until(lambda: engine.draining)
        engine.close(wait=False)
        assert waiting.result(30)
    assert engine.drain(0)
    with pytest.raises(EngineClosed):
        engine.submit(PROMPT, greedy())
    with pytest.raises(EngineClosed):
        engine.resume()


def test_a_closed_engine_is_drained_whatever_is_asked_of_it(model: Model) -> None:
    engine = engine_on(model)
    seq = engine.sequence(greedy())
    seq.prompt(PROMPT)
    for end in (engine.close, seq.close, seq.cancel, lambda: engine.close(wait=False)):
        end()
        assert engine.drain(0)


def test_asyncio(model: Model) -> None:
    async def run(engine: Engine) -> None:
        with held(engine):
            streams = [engine.submit(PROMPT, greedy(500)) for _ in range(8)]
            assert not await engine.adrain(0.01)
            with pytest.raises(EngineDraining):
                await engine.agenerate([PROMPT], greedy())
        assert await engine.adrain()
        assert {stream.wait(0).finish_reason for stream in streams} == {"length"}
        engine.resume()
        with held(engine):
            streams = [engine.submit(PROMPT, greedy(500)) for _ in range(8)]
            task = asyncio.create_task(engine.adrain())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await engine.astop()
        assert {stream.wait(0).finish_reason for stream in streams} == {"cancelled"}

    with engine_on(model) as engine:
        asyncio.run(run(engine))
        check_usable(engine)


def test_longer_than_a_system_can_wait_is_as_long_as_it_takes(model: Model) -> None:
    """As "never" is written: a computer's clock ends some hundred years from now."""
    never = 1e12
    with engine_on(model, n_seq_max=1, max_waiting=1, patience=never) as engine:
        with engine.sequence(greedy()) as idle:
            idle.prompt(PROMPT)
            first = engine.submit(PROMPT, greedy(3))  # waits for the slot
            with held(engine), ThreadPoolExecutor(1) as pool:
                second = pool.submit(engine.submit, PROMPT, greedy(3), queue_timeout=never)
                idle.close()
                assert len(second.result(60).result(60).tokens) == 3
        assert len(first.result(never).tokens) == 3
        assert engine.submit(PROMPT, greedy(3)).wait(float("inf")).n_generated == 3
        assert engine.drain(never)
        with pytest.raises(ArgumentError, match="timeout=-1"):
            engine.close(timeout=-1)
        assert not engine.closed
        engine.close(timeout=never)
