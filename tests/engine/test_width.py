"""An engine whose streams take turns: the same tokens, no long waits, and what it learns of it."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

from pyllamabatch.cost.kernels import Kernels, Regime
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.prior import CPU, Sizes
from pyllamabatch.cost.step_cost import NO_COST, NewGraph, StepCost
from pyllamabatch.engine.cost_observer import CostObserver
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import Limits, Step
from pyllamabatch.scheduler.padding import Padding
from pyllamabatch.scheduler.policies.width import TRIAL
from pyllamabatch.scheduler.step import PromptChunk
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.types import Run

N, EDGE, TOKENS = 10, 8, 48


class Edge(CostModel):
    """As measured on a device where 9 rows take three times as long as 8; it learns nothing."""

    def __init__(self) -> None:
        known = Kernels((Regime(1), Regime(EDGE + 1)))
        prior = CostModel.prior(known, Sizes(1e6, 1e6), CPU, 32)
        self.__dict__ |= prior.__dict__
        self.calibrated, self.error = True, (0.01, 0.05)

    def predict(self, rows: int, prefill: int = 0, kv: float = 0, n_seqs: int = 1) -> float:
        return 0.002 if rows <= EDGE else 0.006

    def observe(self, *what: float) -> None:
        pass

    def observe_switch(self, seconds: float) -> None:
        pass


def made(model: Model, policy: str, cost: Any) -> tuple[list[list[int]], Any]:
    prompts = [f"Copy: word{i} and more" for i in range(N)]
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eog=True)
    sizes: dict[str, Any] = {"n_seq_max": N, "n_ctx": 2048, "n_threads": 1, "n_threads_batch": 1}
    with Engine(model, policy=policy, cost=cost, speculate=None, **sizes) as engine:
        results = engine.generate(prompts, params)
        return [result.tokens for result in results], engine.trace()


def test_turns_change_no_token_and_none_waits_for_long(embedded_model: Model) -> None:
    expected, _ = made(embedded_model, "sarathi", None)
    tokens, trace = made(embedded_model, "device-aware", Edge())
    assert tokens == expected
    steady = trace[trace["prefill_rows"] == 0]
    # All have a row while prompts are computed, and in a trial; then 8 of 10 at a time.
    assert (steady["rows"] == N).sum() == TRIAL
    assert (steady["rows"] == EDGE).sum() >= (TOKENS - TRIAL) * N // EDGE - 12
    assert set(steady["rows"][TRIAL:-10]) == {EDGE}
    for slot in range(N):
        at = (steady["ids"][:, slot] != 0).nonzero()[0]
        assert max(after - before for before, after in pairwise(at)) <= 2


def test_all_at_once_where_it_is_not_measured(embedded_model: Model) -> None:
    cost = Edge()
    cost.calibrated = False
    _, trace = made(embedded_model, "device-aware", cost)
    assert trace[trace["prefill_rows"] == 0]["rows"].max() == N


class Learner(StepCost):
    def __init__(self, new_graph: NewGraph = NO_COST) -> None:
        self.new_graph = new_graph
        self.steps: list[tuple[int, float]] = []
        self.switches: list[float] = []

    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 0.003

    def observe(
        self, rows: int, prefill: int, kv: float, n_seqs: int, seconds: float, n_steps: int = 1
    ) -> None:
        self.steps.append((rows, seconds))

    def observe_switch(self, seconds: float) -> None:
        self.switches.append(seconds)


def scheduler(cost: Learner, attention: Any, limits: Limits) -> Any:
    return SimpleNamespace(
        cost=cost,
        attention=attention,
        limits=limits,
        prefilled=lambda *step: None,
        padding=Padding(limits, possible=True),
    )


Call = tuple[list[int], Run]


def call(slots: list[int], n: int, n_reused: int, ms: float, first_ms: float) -> Call:
    return slots, Run(0, n, n_reused, ms / 1e3, (), first_ms / 1e3)


PAIR, TRIO = [0, 1], [0, 1, 2]
MEASURED = NewGraph(0.002, 0.004)  # 2 ms for a new graph, and 4 ms in the two steps behind it


class Observed(NamedTuple):
    """Calls that follow each other without a pause, `n_prompt` rows of a prompt beside each of
    them, in `shapes` if not all at once, which take `deeper` seconds for their depth; what is
    learnt: rows and ms of steps, ms of switches."""

    calls: list[Call]
    steps: list[tuple[int, float]]
    switches: list[float] | None = None
    new_graph: NewGraph = NO_COST
    n_prompt: int = 0
    shapes: list[tuple[int, int, float, int]] | None = None
    deeper: float = 0.0


OBSERVED = {
    # A step's own time is without its graph, and unknown where there is no other step.
    "a switch costs what its first step took longer": Observed(
        [
            call([0, 1, 2], 10, 9, 39, 12),  # a graph for 9 ms
            call([1, 2, 3], 10, 9, 38, 11),
            call([2, 3, 4], 10, 10, 30, 3),  # the same graph
            call([3, 4, 5], 1, 0, 10, 10),  # 7 ms more than predicted
        ],
        [(3, 3)] * 3,
        [8, 0, 7],
    ),
    "what new graphs were measured to take is no part of a step": Observed(
        [
            call(TRIO, 10, 9, 36, 5),
            call(PAIR, 3, 2, 15, 5),
            call(TRIO, 2, 1, 10, 5),
            call(PAIR, 1, 0, 5, 5),
            call(PAIR, 10, 10, 34, 5),
        ],
        [(3, 3), (2, 3), (3, 3), (2, 3), (2, 3)],
        new_graph=MEASURED,
    ),
    "nor those of two ubatches, one of which is there the second time": Observed(
        [call(PAIR, 1, 0, 7, 7), call(PAIR, 1, 1, 5, 5)],
        [(12, 3)] * 2,
        new_graph=MEASURED,
        n_prompt=10,
    ),
    "nor what a deep prompt takes for its depth": Observed(
        [call(PAIR, 1, 1, 5, 5)], [(12, 3)], n_prompt=10, deeper=0.002
    ),
    "what settles in a later call is no part of its step": Observed(
        [call(PAIR, 1, 0, 5, 5), *(call(PAIR, 1, 1, ms, ms) for ms in (5, 5, 3))],
        [(2, 3)] * 4,
        new_graph=MEASURED,
    ),
    "nor in a call of several": Observed(
        [call(PAIR, 2, 1, 10, 5), call(PAIR, 3, 3, 11, 5)], [(2, 3)] * 2, new_graph=MEASURED
    ),
    "of a batch in parts only the switch is learnt": Observed(
        [call([0, 2], 1, 0, 5, 5), call([1, 3], 1, 0, 7, 7)],
        [],
        [1],  # two steps of 3 ms would be 6
        shapes=[(1, 0, 50.0, 1)] * 2,
    ),
    "more or fewer rows are no switch": Observed(
        [
            call(TRIO, 10, 9, 39, 12),
            call(TRIO, 10, 10, 30, 3),
            call([0, 1, 2, 3], 10, 9, 38, 11),
            call([0, 1, 3], 1, 0, 11, 11),
        ],
        [(3, 3), (3, 3), (4, 3), (3, 11)],
        [],
    ),
    "steps with drafted rows tell nothing, nor is it a switch behind them": Observed(
        [
            call(TRIO, 10, 10, 30, 3),
            (TRIO, Run(0, 10, 9, 0.09, (), 0.03, n_rows=60, n_drafted=30)),
            call([1, 2, 3], 10, 9, 38, 11),
        ],
        [(3, 3), (3, 3)],
        [],
    ),
}


Tell = Callable[[CostObserver, Step, Run], None]


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch) -> Tell:
    """An observer of calls that follow each other without a pause."""
    now = 0.0

    def tell(observe: CostObserver, step: Step, run: Run) -> None:
        nonlocal now
        now += run.seconds
        observe(step, run)

    monkeypatch.setattr("pyllamabatch.engine.cost_observer.perf_counter", lambda: now)
    return tell


@pytest.mark.parametrize("case", OBSERVED.values(), ids=OBSERVED)
def test_what_is_learnt_of_calls(case: Observed, tell: Tell) -> None:
    cost = Learner(case.new_graph)
    attention = SimpleNamespace(
        cells=lambda step, ahead: 100 + step.n_rows * ahead,
        shapes=lambda step, kv: case.shapes or [step.shape(kv)],
        deeper=lambda step, kv: case.deeper,
    )
    chunks = (PromptChunk(9, 9, 0, case.n_prompt),) if case.n_prompt else ()
    observe = CostObserver(scheduler(cost, attention, Limits(8, 8, 8, 64, 8, unified=False)))
    for slots, run in case.calls:
        n_rows = len(slots) + case.n_prompt
        step = Step(np.array(slots, np.int32), chunks, (), (), n_rows, {}, run.n_steps)
        tell(observe, step, run)
    learnt = [(rows, 1e3 * seconds) for rows, seconds in cost.steps]
    np.testing.assert_allclose(learnt, case.steps, rtol=1e-6)
    if case.switches is not None:
        assert [1e3 * s for s in cost.switches] == pytest.approx(case.switches, abs=1e-6)


def test_what_a_prompt_behind_others_takes_is_learnt_with_the_step_that_waits_for_it(
    tell: Tell,
) -> None:
    """The device has all but 1 ms of it still to do when the decode's tokens are there."""
    cost = Learner(NewGraph(0.002))
    shapes = iter([[(3, 0, 50.0, 3), (40, 40, 0.0, 1)], [(4, 0, 90.0, 4)], [(4, 0, 94.0, 4)]])
    attention = SimpleNamespace(
        cells=lambda *_: 0.0, shapes=lambda *_: next(shapes), deeper=lambda *_: 0.0
    )
    observe = CostObserver(
        scheduler(cost, attention, Limits(64, 64, 8, 64, 8, unified=False)), asynchronous=True
    )
    chunks = (PromptChunk(9, 3, 0, 40),)
    behind = Step(np.arange(3, dtype=np.int32), chunks, (), (), 43, {}, behind=True)
    tell(observe, behind, Run(0, 1, 1, 0.004, (), 0.004))  # 3 ms of it the decode's
    after = Step(np.arange(4, dtype=np.int32), (), (), (), 4, {})
    tell(observe, after, Run(0, 1, 1, 0.008, (), 0.008))  # 5 ms of it the prompt's
    tell(observe, after, Run(0, 1, 1, 0.003, (), 0.003))
    learnt = [(rows, 1e3 * seconds) for rows, seconds in cost.steps]
    np.testing.assert_allclose(learnt, [(40, 6.0), (4, 3.0)], rtol=1e-6)


def test_what_a_switch_costs_is_followed() -> None:
    cost = Edge()
    cost.new_graph = NewGraph(0.005, 0.0)
    assert cost.switch == 0.0
    cost.switch = None
    CostModel.observe_switch(cost, 0.008)
    assert cost.switch == 0.008
    CostModel.observe_switch(cost, 0.004)
    assert cost.switch == pytest.approx(0.007)
    # disturbed: twice what is known, or a new graph's
    CostModel.observe_switch(cost, 0.5)
    assert cost.switch == pytest.approx(0.75 * 0.007 + 0.25 * 0.014)
    cost.switch = None
    CostModel.observe_switch(cost, 0.5)
    assert cost.switch == pytest.approx(0.01)
    # where graphs cost nothing there is nothing to compare it with
    cost.switch = 0.0
    CostModel.observe_switch(cost, 0.004)
    assert cost.switch == pytest.approx(0.001)
