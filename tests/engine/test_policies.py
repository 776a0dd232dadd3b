"""Every policy, live: the same tokens, in another order of steps."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.scheduler import Plan, Policy, StepView, fcfs, make_policy, policy_names, static
from tests.support.engines import check_idle, engine_on, greedy

TASKS = ["Copy: hello", "What is 17 + 25?", "Write in capitals: batch", "Reverse: drawer"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)


def answers(model: Model, spec: str) -> list[tuple[str, str]]:
    """Of 8 requests through 3 places, with cells for about half of them."""
    prompts = [
        model.vocab.apply_chat_template([{"role": "user", "content": task}]) for task in TASKS * 2
    ]
    policy = make_policy(spec)
    with Engine(model, n_seq_max=3, n_ctx=256, n_ubatch=16, policy=policy, n_threads=1) as engine:
        results = engine.generate(prompts, GREEDY)
        assert engine.stats().finished["stop"] == len(prompts)
    return [(result.text, result.finish_reason) for result in results]


@pytest.mark.parametrize("spec", [*policy_names(), "mlfq:quantum=2,prompt_rows=4", "slo:itl=0.001"])
def test_a_policy_does_not_change_what_is_said(embedded_model: Model, spec: str) -> None:
    said = ["hello", "42", "BATCH", "reward"]
    assert answers(embedded_model, spec) == [(text, "stop") for text in said * 2]


class Counted:
    def __init__(self, policy: Policy) -> None:
        self.policy, self.n_plans = policy, 0

    def plan(self, view: StepView) -> Plan:
        self.n_plans += 1
        return self.policy.plan(view)


def test_a_policy_that_waits_is_not_asked(embedded_model: Model) -> None:
    policy = Counted(static(size=2, wait=0.3))
    with Engine(embedded_model, n_seq_max=2, n_ctx=256, policy=policy, n_threads=1) as engine:
        alone = engine.submit("Copy: a", SamplingParams(temperature=0, max_tokens=1)).result(60)
        assert alone.n_generated == 1
        assert alone.e2el_s >= 0.3
        assert policy.n_plans <= 5
        two = [engine.submit("Copy: b", GREEDY) for _ in range(2)]
        assert [stream.result(60).n_generated > 0 for stream in two] == [True, True]


class Impatient:
    """It plans no second token before the first one was read, and is to be asked again at once."""

    def __init__(self) -> None:
        self.policy, self.read = fcfs(), False

    def plan(self, view: StepView) -> Plan:
        if not self.read and any(seq.generated for seq in view.running):
            return Plan(wake=view.now + 1e-9)
        return self.policy.plan(view)


def test_a_policy_that_waits_for_a_reader_keeps_nothing_from_it(embedded_model: Model) -> None:
    policy = Impatient()
    with (
        Engine(embedded_model, n_seq_max=2, n_ctx=256, policy=policy, n_threads=1) as engine,
        ThreadPoolExecutor(1) as pool,
    ):
        stream = engine.submit("Copy: a", GREEDY)
        first = pool.submit(next, iter(stream))
        try:
            assert first.result(30)
        finally:
            policy.read = True
        assert stream.result(60).n_generated > 0


class InTurns:
    """Those with the fewest rounds of six tokens run."""

    def plan(self, view: StepView) -> Plan:
        ranked = sorted(
            [*view.running, *view.waiting], key=lambda seq: (seq.generated // 6, seq.id)
        )
        chosen = ranked[: view.limits.n_seq_max]
        ids = {seq.id for seq in chosen}
        preempt = tuple(seq.id for seq in view.running if seq.id not in ids)
        return Plan({seq.id: seq.remaining for seq in chosen}, preempt=preempt)


def test_no_saved_state_is_lost_to_a_copy_that_waits(
    embedded_model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    """What ends is copied out of its slot, to be cached, with the step that one is swapped into."""
    prompts = [f"{i}: what is {i} + {7 * i}? And {i} times 3?" for i in range(12)]
    params = [greedy(9 + 7 * i % 20) for i in range(len(prompts))]
    options: dict[str, Any] = {"kv_unified": False, "n_batch": 256, "preemption": "swap"}
    with engine_on(embedded_model) as engine:
        expected = [result.tokens for result in engine.generate(prompts, params)]
    with engine_on(embedded_model, policy=InTurns(), **options) as engine:
        engine._core.scheduler.admission.swap.stream_seconds = 0.0  # each copy pays
        with engine._core.state:  # none starts before the last one waits
            streams = [engine.submit(*request) for request in zip(prompts, params, strict=True)]
        assert [stream.result(60).tokens for stream in streams] == expected
        counters = engine._core.scheduler.counters
        assert counters.preemptions > 0
        assert counters.loaded_tokens > 0
        assert counters.recomputed_rows == 0
        assert caplog.records == []
        check_idle(engine)
