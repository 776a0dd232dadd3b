"""An engine gives up host memory while there is pressure, and takes it again afterwards."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.memory_watch import MemoryWatch
from pyllamabatch.errors import ContextCreateError, EngineClosed
from pyllamabatch.kv import SwapSpace
from pyllamabatch.llama import limits
from pyllamabatch.llama.limits import memory_parts
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.pressure import Pressure
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engines import check_idle, engine_on, greedy, held
from tests.support.made_up_costs import Linear
from tests.support.models_gguf import gguf_path

NORMAL, WARNING, CRITICAL = Pressure


def test_pressure_moves_states_to_files(tmp_path: Path) -> None:
    space = SwapSpace(100, tmp_path)
    space.put(1, b"state")
    levels = iter([NORMAL, WARNING, CRITICAL, CRITICAL, NORMAL])
    commands: list[Callable[[], None]] = []
    shrunk: list[Pressure] = []
    watch = MemoryWatch(
        space, commands.append, lambda: shrunk.append(watch.pressure), read=lambda: next(levels)
    )
    found = []
    for _ in range(5):
        watch.look()
        assert len(commands) <= 1
        while commands:
            commands.pop()()
        space.put(2, b"another")
        found.append((space.used, space.n_bytes, len(list(tmp_path.iterdir()))))
    assert found == [(12, 100, 0), (0, 0, 2), (0, 0, 2), (0, 0, 2), (7, 100, 1)]
    assert shrunk == [CRITICAL] * 2
    assert (space.take(1), space.take(2)) == (b"state", b"another")


def test_without_room_for_files_they_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    space = SwapSpace(100, tmp_path / "missing")
    space.put(1, b"state")
    watch = MemoryWatch(space, lambda command: command(), lambda: None, read=lambda: CRITICAL)
    with caplog.at_level(logging.WARNING, logger="pyllamabatch"):
        watch.look()
    assert "memory pressure: critical" in caplog.text
    assert "saved states stay in memory" in caplog.text
    assert space.take(1) == b"state"


def test_it_looks_until_the_core_ends() -> None:
    stop, answered = threading.Event(), threading.Event()
    core = threading.Thread(target=stop.wait)
    core.start()
    watch = MemoryWatch(
        SwapSpace(0), lambda command: answered.set(), lambda: None, read=lambda: CRITICAL,
        seconds=0.001,
    )  # fmt: skip
    thread = watch.start(core)
    assert answered.wait(60)
    stop.set()
    core.join()
    thread.join(60)
    assert not thread.is_alive()


def told_to_shrink(engine: Engine) -> None:
    """It has carried that out."""
    done = threading.Event()
    engine._core.commands.post(engine._core.shrink)
    engine._core.commands.post(done.set)
    assert done.wait(60)


def bytes_of_cells(engine: Engine) -> int:
    with engine._core.state:  # in which it takes out what no request has any more
        return sum(part.context for part in memory_parts(engine._context))


@pytest.mark.parametrize("options", [{}, {"kv_unified": False}, {"device_sampling": True}], ids=str)
def test_without_requests_an_engine_needs_few_cells(
    tiny_llama_path: Path, options: dict[str, Any]
) -> None:
    prompts = [[1, *range(10, 30)], [1, *range(40, 90)]]
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=8192, **options) as engine:
        expected = [result.tokens for result in engine.generate(prompts, greedy(20))]
        before = bytes_of_cells(engine)
        for _ in range(2):
            check_idle(engine)
            for _ in range(2):
                told_to_shrink(engine)
            assert bytes_of_cells(engine) <= before / 8 + 2**16
            assert engine.n_ctx == 8192
            results = engine.generate(prompts, greedy(20))
            assert [result.tokens for result in results] == expected
            assert bytes_of_cells(engine) == before
            with engine.sequence(greedy()) as one:
                one.prompt(prompts[0])
                told_to_shrink(engine)
                assert bytes_of_cells(engine) == before
                assert [one.sample().token for _ in range(3)] == expected[0][:3]
        told_to_shrink(engine)
        with engine.sequence(greedy()) as one:  # the first to come
            one.prompt(prompts[0])
            assert one.sample().token == expected[0][0]
        told_to_shrink(engine)
        engine.sequence(greedy()).close()
        assert engine._core._shrunk  # and is closed so


def test_cells_stay_while_a_request_is_open(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=8192) as engine:
        before = bytes_of_cells(engine)
        with held(engine):
            stream = engine.submit([1, 5, 6], greedy(100))
            next(iter(stream))
            told_to_shrink(engine)
            assert not engine._core._shrunk
        assert len(stream.wait().tokens) == 100
        assert bytes_of_cells(engine) == before


def test_few_cells_are_no_use_where_few_would_stay(tiny_llama_path: Path) -> None:
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=256) as engine:
        told_to_shrink(engine)
        assert not engine._core._shrunk
        assert len(engine.generate([[1, 5]], greedy(3))[0].tokens) == 3


def test_a_recurrent_model_has_no_cells_to_give_up() -> None:
    prompt = [1, *range(10, 60)]
    with Model(gguf_path("mamba")) as model, engine_on(model, n_ctx=8192) as engine:
        engine.generate([prompt], greedy(5))
        cached = check_idle(engine).kv_cached
        assert cached > 0
        told_to_shrink(engine)
        assert not engine._core._shrunk
        assert check_idle(engine).kv_cached == cached


def test_cells_stay_for_a_request_that_has_just_come(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=8192) as engine:
        context = engine._context
        made, make = [], context._make

        def counted() -> Any:
            made.append(context._native.n_ctx)
            return make()

        monkeypatch.setattr(context, "_make", counted)
        with engine._core.state:  # both are taken together
            engine._core.commands.post(engine._core.shrink)
            stream = engine.submit([1, 5, 6], greedy(3))
        assert len(stream.wait().tokens) == 3
        assert not made


each_way_to_ask = pytest.mark.parametrize(
    "ask",
    [
        lambda engine: list(engine.submit([1, 5], greedy(3))),
        lambda engine: engine.sequence().prompt([1, 5]),
    ],
    ids=["request", "sequence"],
)


@each_way_to_ask
def test_memory_that_others_have_taken_meanwhile_fails_what_needs_it(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Engine], object]
) -> None:
    """And the engine is as it was: the next request finds the cells once they can be had."""
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=8192) as engine:
        context = engine._context
        before, make, wanted = bytes_of_cells(engine), context._make, context._native.n_ctx

        def make_small_ones() -> Any:
            if context._native.n_ctx == wanted:
                raise ContextCreateError("no memory left")
            return make()

        told_to_shrink(engine)
        for at, name, barren, text in (
            (context, "_make", make_small_ones, "no memory left"),
            (limits, "host_available", lambda: 0, "GiB are available"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(at, name, barren)
                for _ in range(2):
                    with pytest.raises(ContextCreateError, match=text):
                        ask(engine)
                assert engine._core._shrunk
                assert bytes_of_cells(engine) <= before / 8 + 2**16
                check_idle(engine)
        assert len(engine.generate([[1, 5]], greedy(3))[0].tokens) == 3
        assert bytes_of_cells(engine) == before
        assert engine.n_ctx == 8192


def test_a_sequence_that_is_not_restored_is_as_it_was(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(tiny_llama_path) as model, engine_on(model, n_ctx=8192) as engine:
        with engine.sequence(greedy()) as one:
            one.prompt([1, 5, 6])
            data = one.snapshot()
        told_to_shrink(engine)
        monkeypatch.setattr(limits, "host_available", lambda: 0)
        with engine.sequence(SamplingParams(seed=7)) as other:
            with pytest.raises(ContextCreateError, match="GiB are available"):
                other.restore(data)
            assert (other.params.seed, other.params.temperature, other.tokens) == (7, 0.8, [])


@pytest.mark.parametrize("room", [True, False])
def test_a_pool_whose_memory_was_given_up_is_streams_again_with_a_request_at_most(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """And a pool as before where there is no room for streams."""
    cost: Any = Linear()
    options: dict[str, Any] = {"n_ctx": 8192, "cost": cost}
    with Model(tiny_llama_path) as model, engine_on(model, **options) as engine:
        context, way = engine._context, engine._core.scheduler._way_back
        assert way is not None
        make = context._make

        def made() -> Any:
            if not (room or context._native.kv_unified):
                raise ContextCreateError("no memory left")
            return make()

        engine.generate([[1, *range(10, 110)] * 25], greedy(3))
        assert engine.limits.unified
        before = bytes_of_cells(engine)
        monkeypatch.setattr(context, "_make", made)
        with engine._core.state:
            monkeypatch.setattr(way, "pays", lambda n: way.counts and n == 0)  # none is cached
        for _ in range(2):
            told_to_shrink(engine)
            check_idle(engine)
            assert engine._core._shrunk
            assert engine.limits.unified
            assert bytes_of_cells(engine) <= before / 8 + 2**16
        for _ in range(3):
            assert len(engine.generate([[1, 5]], greedy(3))[0].tokens) == 3
            check_idle(engine)
            assert context.capabilities.unified == engine.limits.unified == (not room)
        assert engine.stats().layout_changes == (2 if room else 3)
        assert len(engine.generate([[1, *range(10, 110)] * 25], greedy(3))[0].tokens) == 3


@each_way_to_ask
def test_memory_that_others_have_taken_meanwhile_ends_the_engine(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Engine], object]
) -> None:
    def barren(*_: Any) -> Any:
        raise ContextCreateError("no memory left")

    with Model(tiny_llama_path) as model:
        engine = engine_on(model, n_ctx=8192)
        told_to_shrink(engine)
        monkeypatch.setattr(engine._context, "_make", barren)
        with pytest.raises((ContextCreateError, EngineClosed), match="no memory left"):
            ask(engine)
        engine.close()
