"""OutputProcessor while a run goes on: step by step on the fake machine, in threads on a real
engine."""

import threading
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import EngineClosed
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Limits
from tests.support.engine_fakes import Rig, solo
from tests.support.engines import engine_on, greedy

LIMITS = Limits(n_batch=64, n_ubatch=64, n_seq_max=4, n_cells=2048, n_cells_seq=1024)
PROMPTS = [[10 * i + 1, 2, 3] for i in range(4)]


def rig_of(n_steps_max: int = 1000) -> Rig:
    return Rig(LIMITS, n_steps_max=n_steps_max)


def long_prompts(n: int, least: int) -> list[list[int]]:
    """Prompts of requests that go on for at least so many tokens."""
    all_prompts = ([i, 2, 3] for i in range(1, 900))
    found = (p for p in all_prompts if len(solo(p, greedy(least))[0]) == least)
    return [next(found) for _ in range(n)]


def test_each_token_arrives_while_the_run_goes_on() -> None:
    rig = rig_of()
    prompts = long_prompts(3, 50)
    streams = rig.submit_all(prompts, greedy(50))
    seen: list[list[int]] = []

    def look(n: int) -> None:
        rig.deliver()
        seen.append([len(stream.tokens) for stream in streams])

    rig.machine.meanwhile = look
    rig.run()
    assert seen == [[n - 1] * 3 for n in range(1, 51)]  # of all steps before the one that goes on
    assert rig.machine.runs == [49]


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_follower_is_told_of_each_step(stop: tuple[str, ...]) -> None:
    """Also where the processor looks for stop strings, and has taken the tokens for that."""
    rig = rig_of()
    stream = rig.submit(long_prompts(1, 50)[0], greedy(50, stop=stop))
    told, seen = 0, 0
    steps: list[tuple[int, int]] = []

    def tell() -> None:
        nonlocal told
        told += 1

    def look(n: int) -> None:
        nonlocal seen
        rig.deliver()
        chunk = stream._chunk_from(seen)
        seen = seen if chunk is None else chunk.stop
        steps.append((told, seen))

    stream._follow(tell)
    rig.machine.meanwhile = look
    rig.run()
    assert steps == [(n - 1, n - 1) for n in range(1, 51)]
    assert stream.done
    assert told == steps[-1][0] + 1  # of the end, too


def test_a_stop_string_in_the_middle_of_a_long_run_ends_it_after_that_step() -> None:
    rig = rig_of()
    prompts = long_prompts(2, 60)
    tokens = solo(prompts[0], greedy(60))[0]
    at = next(i for i in range(20, 60) if tokens[i] not in tokens[:i] and tokens[i] > 99)
    stop = f" {tokens[at]} "
    stream = rig.submit(prompts[0], greedy(60, stop=(stop,)))
    other = rig.submit(prompts[1], greedy(60))
    rig.machine.meanwhile = lambda n: rig.deliver()
    rig.run()
    assert stream.wait(0).finish_reason == "stop"
    assert stream.tokens == tokens[: at + 1]
    assert stream.text == "".join(f"{t} " for t in tokens[:at])[:-1]
    assert rig.machine.runs[0] == at + 1  # the step that was going on when it was found is the last
    assert rig.core.output_processor.n_dropped == 1
    assert other.tokens == solo(prompts[1], greedy(60))[0]
    assert rig.n_tokens == at + 1 + 60
    assert rig.scheduler.accounting.used == rig.scheduler.accounting.cached


def test_a_stop_string_that_is_found_after_the_end() -> None:
    """It was not read until the budget was used up: the text still ends where it should."""
    rig = rig_of()
    prompt = long_prompts(1, 60)[0]
    tokens = solo(prompt, greedy(60))[0]
    stream = rig.submit(prompt, greedy(60, stop=(f"{tokens[30]} ",)))
    first = next(i for i, t in enumerate(tokens) if f"{t} ".endswith(f"{tokens[30]} "))
    rig.run()
    assert stream.wait(0).finish_reason == "stop"
    assert len(stream.tokens) == first + 1 == rig.n_tokens
    assert rig.finished == {"stop": 1}


@pytest.mark.parametrize("n_room", [1, 2, 7])
def test_a_full_ring_holds_up_the_run_and_loses_nothing(n_room: int) -> None:
    rig = rig_of()
    rig.machine.n_room = n_room
    streams = rig.submit_all(PROMPTS, greedy(40))
    cancelled = rig.submit(long_prompts(1, 300)[0], greedy(300))
    for _ in range(40):
        rig.turn()
    cancelled.cancel()
    rig.run()
    for stream, prompt in zip(streams, PROMPTS, strict=True):
        result = stream.wait(0)
        assert (result.tokens, result.finish_reason) == solo(prompt, greedy(40))
    assert cancelled.wait(0).finish_reason == "cancelled"
    rig.check_solo()
    assert max(rig.machine.runs) <= n_room


def test_a_run_that_found_no_room_is_tried_again() -> None:
    rig = rig_of()
    rig.machine.n_room = 3
    rig.submit(PROMPTS[0], greedy(40))
    for _ in range(9):
        rig.core.step()
        rig.check()
    assert rig.machine.runs[-5:] == [0] * 5
    assert len(rig.machine.recorded) == 3
    rig.run()
    assert rig.requests[0].stream.wait(0).tokens == solo(PROMPTS[0], greedy(40))[0]


def test_more_steps_than_a_page_has_room_for_and_late_readers() -> None:
    rig = rig_of()
    prompts = long_prompts(2, 700)
    streams = rig.submit_all(prompts, greedy(700))
    rig.machine.meanwhile = lambda n: rig.deliver() if n % 150 == 0 else None
    rig.run()
    for stream, prompt in zip(streams, prompts, strict=True):
        assert stream.tokens == solo(prompt, greedy(700))[0]
        assert [token.token for token in stream] == stream.tokens


def test_an_output_thread_that_fails_ends_every_request() -> None:
    rig = rig_of()
    streams = rig.submit_all(PROMPTS * 3, greedy(40))
    rig.machine.read = None  # type: ignore[assignment,method-assign]
    rig.core.start()
    for stream in streams:
        with pytest.raises(TypeError, match="not callable"):
            stream.result(10)
    rig.core.close(wait=True, timeout=10)
    assert rig.machine.closed
    assert rig.finished == {"error": len(streams)}
    with pytest.raises(EngineClosed, match="its thread ended with TypeError"):
        rig.submit(PROMPTS[0], greedy(40))


def test_a_stream_whose_end_fails_ends_with_the_others() -> None:
    rig = rig_of()
    streams, fetch = rig.submit_all(PROMPTS, greedy(4)), list[Any]()

    def pieces_of(tokens: list[int]) -> list[bytes]:
        if not fetch:
            fetch.append(tokens)
            raise MemoryError
        return [b"" for _ in tokens]

    for stream in streams:
        stream._pieces_of = pieces_of
    rig.core.start()
    for stream in streams:
        assert isinstance(stream.wait(60).error, MemoryError)
    rig.core.close(wait=True, timeout=10)
    assert rig.core.commands.all_ended


def test_an_engine_delivers_while_its_run_goes_on(model: Model) -> None:
    # Without a cost model, which busy cores may teach that a shorter plan is faster.
    with Engine(model, n_seq_max=2, n_ctx=8192, n_threads=1, cost=None) as engine:
        params = greedy(4000)
        streams = engine.submit_n([1, 20], params, 2)
        counters, first = engine._core.scheduler.counters, list[int]()
        for token in streams[0]:
            first.append(token.token)
            if len(first) > counters.steps + 50:  # whose run has not come back
                break
        stats = engine.stats()
        assert stats.steps >= len(first) - 1
        assert stats.rows == stats.decode_rows + stats.prefill_rows
        assert stats.kv_used >= len(first)
        assert (stats.running, stats.waiting) == (2, 0)
        assert len(streams[1].tokens) > 0
        for stream in streams:
            stream.cancel()
            assert stream.result(30).finish_reason == "cancelled"
        assert streams[0].tokens[: len(first)] == first
        assert engine.stats().tokens == sum(len(stream.tokens) for stream in streams)


def test_readers_and_waiters_and_lookers_at_once(model: Model) -> None:
    """Every reader, however often it looks, sees the first of the same tokens."""
    with engine_on(model) as engine:
        params = greedy(200, logprobs=2)
        expected = engine.generate([[1, 20], [1, 30]], params)
        streams = [engine.submit(prompt, params) for prompt in ([1, 20], [1, 30])]
        read: dict[int, list[int]] = {}
        wrong: list[int] = []

        def look(i: int) -> None:
            while not streams[i].done:
                tokens = streams[i].tokens
                if tokens != expected[i].tokens[: len(tokens)]:
                    wrong.append(i)
                if not expected[i].text.startswith(streams[i].text):
                    wrong.append(i)

        def iterate(i: int, key: int) -> None:
            read[key] = [token.token for token in streams[i]]

        threads = [threading.Thread(target=iterate, args=(k % 2, k)) for k in range(6)]
        threads += [threading.Thread(target=look, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        results = [stream.result(60) for stream in streams]
        for thread in threads:
            thread.join(60)
        assert [r.tokens for r in results] == [r.tokens for r in expected]
        for result, alike in zip(results, expected, strict=True):
            assert result.logprobs == pytest.approx(alike.logprobs, abs=1e-2)
            assert [len(top) for top in result.top_logprobs or ()] == [2] * 200
        assert read == {k: expected[k % 2].tokens for k in range(6)}
        assert not wrong
