"""What the engine does when something goes wrong: a request that is not hit gets its own tokens."""

from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.stats import slots_of, stats_of
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import (
    ContextCreateError,
    EngineClosed,
    FatalDecodeError,
    PlanError,
    PyllamabatchError,
)
from pyllamabatch.kv import Sharing
from pyllamabatch.llama.lora import LoraSet
from pyllamabatch.scheduler import Limits, Plan, StepView, sarathi
from tests.support.engine_fakes import Rig
from tests.support.engines import greedy

LIMITS = Limits(n_batch=16, n_ubatch=8, n_seq_max=4, n_cells=64, n_cells_seq=64)


def prompts(n: int, length: int = 5) -> list[list[int]]:
    return [list(range(10 * i + 1, 10 * i + 1 + length)) for i in range(n)]


@pytest.mark.parametrize("code", [-2, -1019])
@pytest.mark.parametrize("step", [1, 2, 5, 8])
def test_a_fresh_context_takes_the_place_of_one_that_fails_twice(step: int, code: int) -> None:
    """Five requests on four slots: those that ran come before the one that waited."""
    rig = Rig(LIMITS, lambda n: code if n in (step, step + 1) else None, max_restarts=2)
    rig.submit_all(prompts(5), greedy(10))
    for _ in range(step + 1):
        running = rig.scheduler.running_ids()
        rig.turn()
    assert rig.machine.n_renewed == rig.core.recovery.n_restarts == 1
    assert rig.machine.cells == {}
    assert rig.scheduler.accounting.used == 0
    assert [view.id for view in rig.scheduler.view(0).waiting][: len(running)] == list(running)
    rig.run()
    rig.check_solo()
    assert "error" not in rig.finished


def test_a_request_that_breaks_every_context_ends_and_the_others_go_on() -> None:
    def fault(n: int) -> int | None:
        rows = rig.machine.rows
        return -3 if 900 in rows.token[: rig.machine.n_now] else None

    rig = Rig(LIMITS, fault, max_restarts=2)
    before = rig.submit_all(prompts(2), greedy(20))
    for _ in range(4):
        rig.turn()
    poison = rig.submit([5, 900, 6], greedy(10))
    after = rig.submit(prompts(3)[2], greedy(10))
    rig.run()
    assert rig.machine.n_renewed == 2
    with pytest.raises(FatalDecodeError):
        poison.result(0)
    rig.check_solo()
    for stream in (*before, after):  # those that were in its last step, too, have what is right
        assert stream.wait(0).finish_reason in ("stop", "length", "error")
    rig.submit(prompts(1)[0], greedy(10))
    rig.run()
    rig.check_solo()
    assert rig.machine.n_renewed == 2


class FirstTwoOnly:
    """FCFS, but from the sixth plan on it runs only two of three sequences for a while."""

    def __init__(self) -> None:
        self._usual, self._n_plans = sarathi(), 0

    def plan(self, view: StepView) -> Plan:
        self._n_plans += 1
        return Plan({1: 1, 2: 1}) if 6 <= self._n_plans <= 9 else self._usual.plan(view)


def test_sequences_outside_of_a_failed_batch_go_on_from_what_the_cache_holds() -> None:
    rig = Rig(LIMITS, lambda n: -3 if n in (8, 9) else None, FirstTwoOnly())
    rig.submit_all(prompts(3), greedy(20))
    while rig.machine.n_steps < 7:
        rig.turn()
    slot = rig.scheduler.slot(3)
    assert slot is not None
    rig.machine.cells[slot].pop()  # libllama lost a cell of the third one as well
    rig.run()
    rig.check_solo()
    assert rig.reasons[:2] == ["error", "error"]
    assert rig.reasons[2] in ("stop", "length")
    assert rig.scheduler.counters.preemptions == 1


def test_a_step_is_one_call_for_each_set_of_adapters() -> None:
    """And the one that is applied already comes first, so that there is one change for each two."""
    rig = Rig(LIMITS, n_steps_max=100, loras=("a", "b"))
    sets: list[LoraSet] = [(), (("a", 1.0),), (), (("a", 0.5), ("b", 1.0))]
    for prompt, lora in zip(prompts(4, 3), sets, strict=True):
        rig.submit(prompt, greedy(12), lora)
    rig.run()
    rig.check_solo()
    assert "error" not in rig.finished
    assert rig.scheduler.counters.preemptions == 0
    assert max(rig.machine.runs) == 8  # no request waits for longer
    assert len(rig.machine.runs) == 6  # behind a turn of prompts
    assert rig.machine.n_applied == 6  # not nine


class Stubborn:
    """A policy that answers with the same plan whatever it sees."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, view: StepView) -> Plan:
        return self._plan


@pytest.mark.parametrize(
    ("policy", "fault", "kind", "says"),
    [
        (Stubborn(Plan({99: 1})), None, PlanError, "99"),
        (Stubborn(Plan()), None, PlanError, None),
        (None, RuntimeError("out of order"), RuntimeError, "out of order"),
        (None, KeyboardInterrupt(), EngineClosed, None),
        (None, -3, ContextCreateError, "backend failed.*no memory left"),
    ],
    ids=["bad plan", "empty plan", "bug", "interrupt", "no fresh context"],
)
def test_the_thread_never_dies_silently(
    policy: Stubborn | None,
    fault: BaseException | int | None,
    kind: type[Exception],
    says: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = Rig(LIMITS, lambda n: fault, policy, max_restarts=2)
    rig.machine.barren = True
    streams = rig.submit_all(prompts(6), greedy(10))
    rig.core.start()
    for stream in streams:
        stream.wait(10)
    for stream in streams * 3:  # each time with the lines where it came from, and no more
        with pytest.raises(kind, match=says) as raised:
            stream.result(10)
        places = [one.name for one in raised.traceback]
        assert places.count("result") == 1
        assert ("step" in places) == (kind is not EngineClosed)
    rig.core.close(wait=True, timeout=10)
    assert rig.machine.closed
    assert rig.finished == {"error": 6}
    stats = stats_of(rig.core)
    assert (stats.submitted, stats.waiting, stats.running) == (6, 0, 0)
    assert not any(state.request for state in slots_of(rig.core))
    with pytest.raises(EngineClosed, match=r"its thread ended with") as closed:
        rig.submit(prompts(1)[0], greedy(10))
    assert closed.value.__cause__ is rig.core.commands.error
    assert "a step failed" in caplog.text


def test_an_error_that_a_reader_has_raised_is_the_next_one_s_without_its_lines() -> None:
    rig = Rig(LIMITS, lambda n: RuntimeError("out of order"))
    streams = rig.submit_all(prompts(6), greedy(10))

    def read(stream: Stream) -> None:
        with suppress(RuntimeError):
            stream.result(0)

    for stream in streams:
        stream.add_done_callback(read)  # before the next one ends
    rig.core.start()
    for stream in streams:
        stream.wait(10)
    rig.core.close(wait=True, timeout=10)
    for stream in streams:
        with pytest.raises(RuntimeError) as raised:
            stream.result(0)
        places = [one.name for one in raised.traceback]
        assert "step" in places
        assert (places.count("result"), places.count("read")) == (1, 0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 40)),
        st.tuples(st.just("turn"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.just(0)),
    ),
    max_size=30,
)
THROWN = PyllamabatchError("llama_decode threw")
faults = st.dictionaries(
    st.integers(1, 60), st.sampled_from([1, 2, -1, -2, -2, THROWN]), max_size=8
)


@settings(max_examples=150)
@given(
    operations,
    faults,
    st.sampled_from(
        [
            LIMITS,
            Limits(n_batch=3, n_ubatch=2, n_seq_max=3, n_cells=40, n_cells_seq=40),
            Limits(n_batch=64, n_ubatch=8, n_seq_max=6, n_cells=45, n_cells_seq=45),
            Limits(16, 8, 3, n_cells=150, n_cells_seq=50, unified=False),
        ]
    ),
    st.sampled_from([1, 2, 7, 100]),
    st.sampled_from(
        [
            Sharing(),
            Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=3),
            Sharing(copy_whole=True, n_cached=3),
            Sharing(trim=True, window=20),
        ]
    ),
    st.sampled_from(["recompute", "swap"]),
    st.sampled_from(["", "", "stubborn", "lossy"]),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([(), (), ("a",), ("a", "b")]),
)
def test_any_mix_of_arrivals_cancels_and_faults(
    operations: list[tuple[str, int, int]],
    faults: dict[int, object],
    limits: Limits,
    n_steps_max: int,
    sharing: Sharing,
    preemption: str,
    memory: str,
    max_restarts: int,
    loras: tuple[str, ...],
) -> None:
    """Four prompts at a time begin alike. `memory`: it refuses all copies and states
    ("stubborn"), or makes empty ones without a word, so everything has to be computed after all.
    `loras`: adapters that requests have in turn, after one that has none."""
    if not limits.unified:
        n_slots = limits.n_seq_max + sharing.n_cached
        limits = replace(limits, n_cells=n_slots * limits.n_cells_seq)
    rig = Rig(
        limits, faults.get, n_steps_max=n_steps_max, sharing=sharing, swap=preemption,
        max_restarts=max_restarts, loras=loras,
    )  # fmt: skip
    choices: list[LoraSet] = [(), *(((name, 1.0),) for name in loras)]
    rig.machine.stubborn, rig.machine.lossy = memory == "stubborn", memory == "lossy"
    for name, a, b in operations:
        if name == "submit":
            max_tokens = min(b, limits.n_cells_seq - a + 1)
            prompt = [len(rig.requests) // 4 * 31 + i for i in range(a)]
            rig.submit(prompt, greedy(max_tokens), choices[len(rig.requests) % len(choices)])
        elif name == "turn":
            for _ in range(a):
                rig.turn()
        elif a < len(rig.requests):
            rig.requests[a].stream.cancel()
    rig.run()
    rig.check_end()
    assert rig.finished == Counter(rig.reasons)
    assert faults or "error" not in rig.finished
