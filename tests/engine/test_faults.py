"""What the engine does when something goes wrong: a request that is not hit gets its own tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.errors import (
    ContextCreateError,
    DecodeAborted,
    DecodeError,
    EngineClosed,
    FatalDecodeError,
    InvalidBatch,
    KvCacheFull,
    PlanError,
    PyllamabatchError,
    SamplingError,
)
from pyllamabatch.kv import Sharing, SwapChoice
from pyllamabatch.llama.lora import LoraSet
from pyllamabatch.scheduler import Limits, Plan, StepView, sarathi
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engine_fakes import Rig

LIMITS = Limits(n_batch=16, n_ubatch=8, n_seq_max=4, n_cells=64, n_cells_seq=64)


def params(max_tokens: int = 10, **options: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)  # type: ignore[arg-type]


def prompts(n: int, length: int = 5) -> list[list[int]]:
    return [list(range(10 * i + 1, 10 * i + 1 + length)) for i in range(n)]


def test_the_fake_itself_runs_everything_as_if_alone() -> None:
    rig = Rig(LIMITS)
    for prompt in prompts(7):
        rig.submit(prompt, params())
    rig.run()
    rig.check_solo()
    assert (
        rig.core.output_processor.finished["length"] + rig.core.output_processor.finished["stop"]
        == 7
    )
    assert rig.scheduler.counters.preemptions == 0


def test_preempted_requests_get_the_same_tokens() -> None:
    rig = Rig(LIMITS)
    for prompt in prompts(6):
        rig.submit(prompt, params(40))
    rig.run()
    rig.check_solo()
    assert rig.scheduler.counters.preemptions > 0
    assert rig.core.output_processor.finished["error"] == 0


@pytest.mark.parametrize("step", range(1, 11))
def test_no_cells_at_any_step_preempts_and_ends_none(step: int) -> None:
    rig = Rig(LIMITS, lambda n: 1 if n == step else None)
    for prompt in prompts(3):
        rig.submit(prompt, params())
    rig.run()
    rig.check_solo()
    assert rig.core.output_processor.finished["error"] == 0
    assert rig.scheduler.counters.preemptions == 1


def test_no_cells_several_times_in_a_row_sheds_one_after_the_other() -> None:
    rig = Rig(LIMITS, lambda n: 1 if 4 <= n <= 6 else None)
    for prompt in prompts(4):
        rig.submit(prompt, params())
    rig.run()
    rig.check_solo()
    assert rig.core.output_processor.finished["error"] == 0
    assert rig.scheduler.counters.preemptions == 3


def test_no_cells_for_a_request_that_is_alone_is_its_error() -> None:
    rig = Rig(LIMITS, lambda n: 1 if n in (2, 3) else None)
    stream = rig.submit(prompts(1)[0], params())
    rig.run()
    with pytest.raises(KvCacheFull):
        stream.result(0)
    again = rig.submit(prompts(1)[0], params())
    rig.run()
    rig.check_solo()
    assert again.wait(0).finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("code", "kind"),
    [(2, DecodeAborted), (-1, InvalidBatch), (-2, FatalDecodeError), (-3, FatalDecodeError)],
)
@pytest.mark.parametrize("sharing", [Sharing(), Sharing(trim=True)])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_failed_decode_fails_its_rows_only(
    step: int, sharing: Sharing, code: int, kind: type[DecodeError]
) -> None:
    faulty = (step,) if code == -1 else (step, step + 1)
    rig = Rig(LIMITS, lambda n: code if n in faulty else None, sharing=sharing)
    early = [rig.submit(prompt, params()) for prompt in prompts(2)]
    for _ in range(step + (code != -1)):
        rig.turn()
    rig.settle()
    for stream in early:
        with pytest.raises(kind) as error:
            stream.result(0)
        assert error.value.code == code
    assert early[0].wait(0).error is not early[1].wait(0).error
    late = [rig.submit(prompt, params()) for prompt in prompts(3)]
    rig.run()
    rig.check_solo()
    assert all(stream.wait(0).finish_reason in ("stop", "length") for stream in late)
    assert rig.core.output_processor.finished["error"] == 2


@pytest.mark.parametrize("code", [-2, -3, -1019])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_fresh_context_takes_the_place_of_one_that_fails_twice(step: int, code: int) -> None:
    """Five requests on four slots: those that ran come before the one that waited."""
    rig = Rig(LIMITS, lambda n: code if n in (step, step + 1) else None, max_restarts=2)
    for prompt in prompts(5):
        rig.submit(prompt, params())
    for _ in range(step + 1):
        running = rig.scheduler.running_ids()
        rig.turn()
    assert rig.machine.n_renewed == rig.core.recovery.n_restarts == 1
    assert rig.machine.cells == {}
    assert rig.scheduler.accounting.used == 0
    assert [view.id for view in rig.scheduler.view(0).waiting][: len(running)] == list(running)
    rig.run()
    rig.check_solo()
    assert rig.core.output_processor.finished["error"] == 0


def test_a_request_that_breaks_every_context_ends_and_the_others_go_on() -> None:
    def fault(n: int) -> int | None:
        rows = rig.machine.rows
        return -3 if 900 in rows.token[: rig.machine.n_now] else None

    rig = Rig(LIMITS, fault, max_restarts=2)
    before = [rig.submit(prompt, params(20)) for prompt in prompts(2)]
    for _ in range(4):
        rig.turn()
    poison = rig.submit([5, 900, 6], params())
    after = rig.submit(prompts(3)[2], params())
    rig.run()
    assert rig.machine.n_renewed == 2
    with pytest.raises(FatalDecodeError):
        poison.result(0)
    rig.check_solo()
    for stream in (*before, after):  # those that were in its last step, too, have what is right
        assert stream.wait(0).finish_reason in ("stop", "length", "error")
    rig.submit(prompts(1)[0], params())
    rig.run()
    rig.check_solo()
    assert rig.machine.n_renewed == 2


def test_without_a_fresh_context_every_request_is_told() -> None:
    rig = Rig(LIMITS, lambda n: -3 if n in (3, 4) else None, max_restarts=2)
    rig.machine.barren = True
    streams = [rig.submit(prompt, params()) for prompt in prompts(6)]
    rig.core.start()
    for stream in streams:
        with pytest.raises(ContextCreateError, match=r"backend failed.*no memory left"):
            stream.result(10)
    rig.core.close(wait=True, timeout=10)
    with pytest.raises(EngineClosed, match="no memory left"):
        rig.submit(prompts(1)[0], params())


@pytest.mark.parametrize("sharing", [Sharing(), Sharing(trim=True)])
@pytest.mark.parametrize("code", [2, -2, -3, -1019])
@pytest.mark.parametrize("step", range(1, 9))
def test_a_step_that_fails_once_is_tried_again(step: int, code: int, sharing: Sharing) -> None:
    rig = Rig(LIMITS, lambda n: code if n == step else None, sharing=sharing)
    for prompt in prompts(3):
        rig.submit(prompt, params())
    rig.run()
    rig.check_solo()
    assert rig.core.output_processor.finished["error"] == 0


class FirstTwoOnly:
    """FCFS, but from the sixth plan on it runs only two of three sequences for a while."""

    def __init__(self) -> None:
        self._usual, self._n_plans = sarathi(), 0

    def plan(self, view: StepView) -> Plan:
        self._n_plans += 1
        return Plan({1: 1, 2: 1}) if 6 <= self._n_plans <= 9 else self._usual.plan(view)


def test_sequences_outside_of_a_failed_batch_go_on_from_what_the_cache_holds() -> None:
    rig = Rig(LIMITS, lambda n: -3 if n in (8, 9) else None, FirstTwoOnly())
    for prompt in prompts(3):
        rig.submit(prompt, params(20))
    while rig.machine.n_steps < 7:
        rig.turn()
    slot = rig.scheduler.slot(3)
    assert slot is not None
    rig.machine.cells[slot].pop()  # libllama lost a cell of the third one as well
    rig.run()
    rig.check_solo()
    reasons = [request.stream.wait(0).finish_reason for request in rig.requests]
    assert reasons[:2] == ["error", "error"]
    assert reasons[2] in ("stop", "length")
    assert rig.scheduler.counters.preemptions == 1


def test_an_exception_of_the_step_fails_its_rows_only() -> None:
    rig = Rig(LIMITS, lambda n: PyllamabatchError("llama_decode threw") if n == 3 else None)
    stream = rig.submit(prompts(1)[0], params())
    for _ in range(3):
        rig.turn()
    rig.settle()
    with pytest.raises(PyllamabatchError, match="llama_decode threw"):
        stream.result(0)
    rig.submit(prompts(1)[0], params())
    rig.run()
    rig.check_solo()


def test_a_row_that_can_not_be_sampled_ends_its_request_only() -> None:
    rig = Rig(LIMITS)
    for prompt in prompts(3):
        rig.submit(prompt, params())
    rig.turn()
    rig.turn()
    rig.machine.failing.add(1)
    rig.run()
    rig.check_solo()
    reasons = [request.stream.wait(0).finish_reason for request in rig.requests]
    assert reasons[1] == "error"
    assert "error" not in (reasons[0], reasons[2])
    with pytest.raises(SamplingError, match="nothing to choose for 1"):
        rig.requests[1].stream.result(0)
    assert rig.n_tokens == sum(
        len(request.stream.tokens) + (request.stream.wait(0).finish_reason == "stop")
        for request in rig.requests
    )


def test_a_step_is_one_call_for_each_set_of_adapters() -> None:
    """And the one that is applied already comes first, so that there is one change for each two."""
    rig = Rig(LIMITS, n_steps_max=100, loras=("a", "b"))
    sets: list[LoraSet] = [(), (("a", 1.0),), (), (("a", 0.5), ("b", 1.0))]
    for prompt, lora in zip(prompts(4, 3), sets, strict=True):
        rig.submit(prompt, params(12), lora)
    rig.run()
    rig.check_solo()
    assert rig.core.output_processor.finished["error"] == rig.scheduler.counters.preemptions == 0
    assert max(rig.machine.runs) == 8  # no request waits for longer
    assert len(rig.machine.runs) == 6  # behind a turn of prompts
    assert rig.machine.n_applied == 6  # not nine


def test_none_starts_from_what_other_adapters_have_computed() -> None:
    sharing = Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=3)
    limits = replace(LIMITS, n_cells=400, n_cells_seq=400)
    rig = Rig(limits, sharing=sharing, loras=("a", "b"))
    prompt = list(range(1, 41))
    for lora in ((), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),)):
        rig.submit(prompt, params(4), lora)
        rig.run()
        assert rig.scheduler.counters.prefix_tokens == 0
    rig.submit([*prompt, 7], params(4), (("a", 1.0),))
    rig.run()
    assert rig.scheduler.counters.prefix_tokens == 40
    rig.check_solo()


class Stubborn:
    """A policy that answers with the same plan whatever it sees."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def plan(self, view: StepView) -> Plan:
        return self._plan


@pytest.mark.parametrize(
    ("policy", "fault", "kind"),
    [
        (Stubborn(Plan({99: 1})), None, PlanError),
        (Stubborn(Plan()), None, PlanError),
        (None, RuntimeError("out of order"), RuntimeError),
        (None, KeyboardInterrupt(), EngineClosed),
    ],
    ids=["bad plan", "empty plan", "bug", "interrupt"],
)
def test_the_thread_never_dies_silently(
    policy: Stubborn | None, fault: BaseException | None, kind: type[Exception]
) -> None:
    rig = Rig(LIMITS, lambda n: fault, policy)
    streams = [rig.submit(prompt, params()) for prompt in prompts(6)]
    rig.core.start()
    for stream in streams:
        with pytest.raises(kind):
            stream.result(10)
    rig.core.close(wait=True, timeout=10)
    assert rig.machine.closed
    assert rig.core.output_processor.finished["error"] == 6
    with pytest.raises(EngineClosed, match=r"its thread ended with"):
        rig.submit(prompts(1)[0], params())


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 40)),
        st.tuples(st.just("turn"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.just(0)),
    ),
    max_size=30,
)
faults = st.dictionaries(st.integers(1, 60), st.sampled_from([1, 2, -1, -2, -2]), max_size=8)


@settings(max_examples=150, deadline=None)
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
    faults: dict[int, int],
    limits: Limits,
    n_steps_max: int,
    sharing: Sharing,
    preemption: Any,
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
        limits,
        faults.get,
        n_steps_max=n_steps_max,
        sharing=sharing,
        swap=SwapChoice(preemption),
        max_restarts=max_restarts,
        loras=loras,
    )
    choices: list[LoraSet] = [(), *(((name, 1.0),) for name in loras)]
    rig.machine.stubborn, rig.machine.lossy = memory == "stubborn", memory == "lossy"
    for name, a, b in operations:
        if name == "submit":
            max_tokens = min(b, limits.n_cells_seq - a + 1)
            prompt = [len(rig.requests) // 4 * 31 + i for i in range(a)]
            rig.submit(prompt, params(max_tokens), choices[len(rig.requests) % len(choices)])
        elif name == "turn":
            for _ in range(a):
                rig.turn()
        elif a < len(rig.requests):
            rig.requests[a].stream.cancel()
    rig.run()
    rig.check_solo()
    rig.check()
    rig.scheduler.drop_cached()
    rig.core.kv.flush()
    rig.check()
    assert rig.machine.cells == {}
    assert len(rig.space) == 0
    reasons = Counter(request.stream.wait(0).finish_reason for request in rig.requests)
    assert {k: v for k, v in rig.core.output_processor.finished.items() if v} == dict(reasons)
    if not faults:
        assert reasons["error"] == 0
