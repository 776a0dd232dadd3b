"""Which thread runs the steps: the core thread, or one that asks for a token."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.lone_decode import LoneDecode
from pyllamabatch.engine.sequence import Sequence
from pyllamabatch.engine.signals import DeferredSignals
from pyllamabatch.errors import EngineClosed, EngineDraining, QueueFull, SamplingError
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Window
from pyllamabatch.step.types import Finish
from tests.support import engines as support
from tests.support.engines import check_idle, greedy
from tests.support.served import until

PROMPT = [1, 20, 30, 40, 50]
N = 24
engine_on = partial(support.engine_on, n_ctx=1024)


def drive(sequence: Sequence, n: int) -> list[int]:
    return [sequence.sample().token for _ in range(n)]


def prompted(engine: Engine, sequence: Sequence) -> None:
    """And the core thread, which has computed it, leads no more."""
    sequence.prompt(PROMPT)
    until(lambda: not engine._core.commands._led)


@contextmanager
def leaders(engine: Engine, before: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """The thread of each native call; `before` is called in front of it."""
    stepper: Any = engine._core._stepper
    compute, threads = stepper.compute, []

    def computed(*args: Any) -> Any:
        before()
        threads.append(threading.get_ident())
        return compute(*args)

    stepper.compute = computed
    try:
        yield threads
    finally:
        del stepper.compute


def test_a_lone_owner_runs_its_own_steps(model: Model) -> None:
    with engine_on(model) as engine, leaders(engine) as threads:
        expected = engine.submit(PROMPT, greedy(N)).result(60).tokens
        before = engine.stats()
        with engine.sequence(greedy()) as sequence:
            prompted(engine, sequence)
            del threads[:]
            assert drive(sequence, N) == expected
            assert set(threads) == {threading.get_ident()}
            stats = engine.stats()  # what is not accounted yet is in them, too
            assert stats.tokens - before.tokens == N
            assert stats.steps - before.steps == N + 1
            (state,) = [slot for slot in engine.slots() if slot.request is not None]
            assert (state.computed, state.generated) == (len(PROMPT) + N - 1, N)
            core: Any = engine._core
            core._stepper.flush()
            until(lambda: core.output_processor._n_read == core._stepper.n_recorded)
            assert engine.trace()["decode_rows"].tolist() == [*[1] * N, 0, *[1] * N]
        assert engine.submit(PROMPT, greedy(N)).result(60).tokens == expected
        check_idle(engine)


def test_no_thread_waits_for_room_that_it_makes(model: Model) -> None:
    """What an owner's thread calls while it leads, such as a stream's `on_prompt`."""
    asked: list[Any] = []

    def submit_two() -> None:
        if threading.current_thread() is threading.main_thread() and not asked:
            asked.append(engine.submit(PROMPT, greedy(2)))
            with pytest.raises(QueueFull):
                engine.submit(PROMPT, greedy(2))

    with engine_on(model, max_waiting=1) as engine, leaders(engine, submit_two) as threads:
        with engine.sequence(greedy()) as sequence:
            prompted(engine, sequence)
            del threads[:], asked[:]
            sequence.sample()
            assert threads[0] == threading.get_ident()
        assert len(asked) == 1
        assert asked[0].result(60).finish_reason == "length"
        check_idle(engine)


@pytest.mark.parametrize("kv_unified", [False, True])
def test_whatever_comes_between_two_of_its_tokens(model: Model, kv_unified: bool) -> None:
    """Requests, forks, snapshots and a step back; the tokens are those of one that has none."""
    with engine_on(model, kv_unified=kv_unified) as engine:
        expected = engine.submit(PROMPT, greedy(N)).result(60).tokens
        with engine.sequence(greedy()) as sequence:
            sequence.prompt(PROMPT)
            given = drive(sequence, 6)
            assert engine.submit(PROMPT, greedy(N)).result(60).tokens == expected
            given += drive(sequence, 4)
            with sequence.fork() as fork:
                assert fork.tokens == PROMPT + given
                both = [[s.sample().token for _ in range(3)] for s in (fork, sequence)]
            assert both[0] == both[1]
            given += both[1]
            data = sequence.snapshot()
            given += drive(sequence, 3)
            with engine.sequence() as restored:
                restored.restore(data)
                assert [restored.sample().token for _ in range(3)] == given[-3:]
            sequence.trim(len(PROMPT) + len(given) - 2)
            given[-2:] = drive(sequence, N - len(given) + 2)
            assert given == expected
            assert sequence.position == len(PROMPT) + N
        check_idle(engine)


def test_an_owner_takes_no_step_for_left_that_another_thread_is_counting(model: Model) -> None:
    """`stats` accounts for its steps at any moment."""
    left = []

    class Seen(LoneDecode):
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            left.append(self._n_left - self._n)

    with engine_on(model) as engine, engine.sequence(greedy()) as sequence:
        prompted(engine, sequence)
        drive(sequence, 5)
        lone = engine._core._lone
        assert lone._n > 1
        before = lone._n_left - lone._n
        lone.__class__ = Seen
        engine.stats()
        assert lone._n == 0
        assert max(left) <= before
        assert left[-1] == before


def test_owners_and_requests_at_once(model: Model) -> None:
    """Each sequence has the tokens that it has alone, whichever thread leads."""
    with engine_on(model, gather=Window(1e-3)) as engine:
        prompts = [[1, 10 + i, 20, 30] for i in range(4)]
        expected = [engine.submit(prompt, greedy(N)).result(60).tokens for prompt in prompts]

        def own(prompt: list[int]) -> list[int]:
            with engine.sequence(greedy()) as sequence:
                sequence.prompt(prompt)
                return drive(sequence, N)

        def request(prompt: list[int]) -> list[int]:
            return engine.submit(prompt, greedy(N)).result(60).tokens

        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                asked = [pool.submit(how, p) for p in prompts for how in (own, request)]
                assert [one.result(60) for one in asked] == [t for t in expected for _ in (0, 1)]
        check_idle(engine)


def test_ctrl_c_in_the_thread_that_leads(model: Model) -> None:
    """It is raised behind the step, and nothing is broken."""
    with engine_on(model) as engine:
        expected = engine.submit(PROMPT, greedy(N)).result(60).tokens
        for at in range(4):  # in front of a step of either kind
            countdown = iter(range(at, -N, -1))

            def press(countdown: Iterator[int] = countdown) -> None:
                if next(countdown) == 0:
                    signal.raise_signal(signal.SIGINT)

            with engine.sequence(greedy()) as sequence:
                prompted(engine, sequence)
                with leaders(engine, press) as threads, pytest.raises(KeyboardInterrupt):
                    drive(sequence, N)
                assert threads[-1] == threading.get_ident()
                known = sequence.position - len(PROMPT)
                assert known in (at, at + 1)
                rest = drive(sequence, N - known)
                assert sequence.tokens == PROMPT + expected
                assert rest == expected[known:]
        check_idle(engine)


def test_handlers_wait_until_the_block_is_left() -> None:
    heard: list[str] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        raise TimeoutError(heard[-1])

    def press(signals: DeferredSignals) -> None:
        with signals as noted:
            signal.raise_signal(signal.SIGUSR1)
            assert heard == ["noted"]
            assert [number for number, _ in noted] == [signal.SIGUSR1]

    numbers = (signal.SIGALRM, signal.SIGUSR1)
    before = [signal.signal(number, hear) for number in numbers]
    signals = DeferredSignals(lambda: heard.append("noted"))
    try:
        with pytest.raises(TimeoutError, match="SIGUSR1"):
            press(signals)
        assert heard == ["noted", "SIGUSR1"]
        assert [signal.getsignal(number) for number in numbers] == [hear, hear]
        with signals as noted:
            assert not noted
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_another_thread_defers_nothing() -> None:
    def leave() -> bool:
        with DeferredSignals(lambda: None) as noted:
            return signal.getsignal(signal.SIGINT) is signal.default_int_handler and not noted

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(leave).result()


def test_a_token_that_can_not_be_chosen(model: Model) -> None:
    with engine_on(model) as engine, engine.sequence(greedy()) as sequence:
        sequence.prompt(PROMPT)
        given = drive(sequence, 3)
        stepper: Any = engine._core._stepper
        compute = stepper.compute

        def refuse(*args: Any) -> Any:
            run = compute(*args)
            return run._replace(results=[(slot, -1, Finish.ERROR, 0.0) for slot, *_ in run.results])

        tokens = engine.stats().tokens
        stepper.compute = refuse
        with pytest.raises(SamplingError):
            sequence.sample()
        del stepper.compute
        assert sequence.tokens == PROMPT + given
        assert engine.stats().tokens == tokens
        given += drive(sequence, N - 3)
        assert given == engine.submit(PROMPT, greedy(N)).result(60).tokens


def test_a_bug_in_the_thread_that_leads_closes_the_engine(model: Model) -> None:
    def bug() -> None:
        raise RuntimeError("a bug")

    with engine_on(model) as engine:
        sequence = engine.sequence(greedy())
        sequence.prompt(PROMPT)
        sequence.sample()
        with leaders(engine, bug), pytest.raises((RuntimeError, EngineClosed)):
            sequence.sample()
        with pytest.raises(EngineClosed, match="a bug"):
            engine.submit(PROMPT, greedy(2))
        engine._core.thread.join(30)
        assert not engine._core.thread.is_alive()


@pytest.mark.parametrize("n", [0, 3])
def test_closed_or_drained_between_two_tokens(model: Model, n: int) -> None:
    with engine_on(model) as engine, engine.sequence(greedy()) as sequence:
        sequence.prompt(PROMPT)
        given = drive(sequence, n)
        assert engine.drain(10)
        with pytest.raises(EngineDraining):
            sequence.sample()
        engine.resume()
        given.append(sequence.sample().token)
        assert sequence.tokens == PROMPT + given
        engine.close()
        with pytest.raises(EngineClosed):
            sequence.sample()


def test_a_close_ends_the_step_of_an_owner(model: Model) -> None:
    """The engine is closed while another thread leads: the core thread waits until it has left."""
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(30)

    engine = engine_on(model)
    sequence = engine.sequence(greedy())
    sequence.prompt(PROMPT)
    sequence.sample()
    with leaders(engine, wait), ThreadPoolExecutor(2) as pool:
        asked = pool.submit(sequence.sample)
        assert inside.wait(30)
        closed = pool.submit(engine.close, wait=False)
        time.sleep(0.01)
        assert not closed.done()
        go_on.set()
        closed.result(30)
        with suppress(EngineClosed):  # or its token, whichever came first
            asked.result(30)
