"""Speculation in virtual time: the engine's own decision, and what comes of it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import shipped_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_prompts
from pyllamabatch.scheduler import Step
from pyllamabatch.scheduler.view import Prices
from pyllamabatch.sim import (
    EngineSpec,
    Simulated,
    TraceRequest,
    acceptance_of,
    draw,
    draw_acceptance,
    replica,
    simulate,
)
from pyllamabatch.sim.drafts import F64, Before, Luck, decide, steps_of
from tests.sim.test_simulate import linear, machine, one, outcomes
from tests.support.engines import check_idle, greedy
from tests.support.made_up_costs import Linear
from tests.support.speculating import always
from tools.validate_drafts import BOUND, Rows, compare

LAYOUTS = pytest.mark.parametrize("unified", [True, False], ids=["pool", "streams"])


@LAYOUTS
def test_what_is_always_right_comes_in_a_fraction_of_the_time(unified: bool) -> None:
    requests = [one(i, 0.0, 20, 200, acceptance=1.0) for i in range(2)]
    shape: dict[str, Any] = {"unified": unified, "n_seq_max": 2}
    plain = simulate([replace(r, acceptance=None) for r in requests], machine(**shape))
    fast = simulate(requests, machine(speculate=True, **shape))
    assert fast.summary()["duration"] < 0.5 * plain.summary()["duration"]
    counters = fast.loads[0].counters
    assert counters.tokens == plain.loads[0].counters.tokens == 400
    assert counters.accepted_tokens == counters.drafted_tokens == sum(counters.accepted_at) > 200
    assert sum(o.n_accepted for o in fast.outcomes) == counters.accepted_tokens
    assert counters.rows == counters.decode_rows + counters.prefill_rows
    assert fast.loads[0].itl.n == 2 * 199
    again = simulate(requests, machine(speculate=True, **shape))
    assert again.summary() == fast.summary()


def test_a_step_of_a_given_number_of_drafts_takes_its_rows() -> None:
    """4 drafted tokens in each step but the last ones: 10 ms and 1 ms a row."""
    (o,) = outcomes([one(1, 0.0, 10, 12, acceptance=1.0)], lambda: always(4, 1), speculate=True)
    assert o.first == pytest.approx(0.020)
    assert o.end - o.first == pytest.approx(0.015 + 0.015 + 0.011)  # 5, 5 and the last one
    assert (o.n_drafted, o.n_accepted) == (8, 8)
    (never,) = outcomes([one(1, 0.0, 10, 3, acceptance=0.0)], lambda: always(4, 1), speculate=True)
    assert (never.n_drafted, never.n_accepted) == (0, 0)
    assert never.end - never.first == pytest.approx(2 * 0.011)


@pytest.mark.parametrize("takes_time", [True, False])
@pytest.mark.parametrize("acceptance", [0.0, 0.3])
def test_short_answers_of_a_small_model_are_as_soon_as_without(
    takes_time: bool, acceptance: float
) -> None:
    """To decide takes as long as ten steps, and an answer has thirty."""
    requests = [one(i, 0.02 * i, 20, 30) for i in range(500)]
    shape: dict[str, Any] = {"n_seq_max": 4, "overhead": 3e-3, "cost": Linear(2e-4, 1e-4)}
    plain = simulate(requests, machine(**shape)).summary()
    spec = machine(speculate=True, **shape)
    spec = replace(spec, limits=replace(spec.limits, drafts_take_time=takes_time))
    drafted = simulate([replace(r, acceptance=acceptance) for r in requests], spec)
    assert drafted.summary()["duration"] < 1.02 * plain["duration"]
    assert drafted.loads[0].seconds < 1.02 * plain["duration"]


def test_a_policy_without_a_part_for_them_has_drafts_as_live() -> None:
    requests = [one(i, 0.0, 20, 300, acceptance=0.9) for i in range(2)]
    spec = machine(speculate=True, n_seq_max=2, cost=Linear(0.01))
    found = simulate(requests, spec, "fcfs")
    assert found.loads[0].counters.accepted_tokens > 300


@LAYOUTS
def test_rows_that_cost_as_much_as_the_first_have_no_drafts(unified: bool) -> None:
    requests = [one(i, 0.0, 20, 300, acceptance=0.6) for i in range(2)]
    shape: dict[str, Any] = {"unified": unified, "n_seq_max": 2, "cost": Linear(row_s=0.01)}
    found = simulate(requests, machine(speculate=True, **shape))
    plain = simulate(requests, machine(**shape))
    assert found.summary()["duration"] <= 1.02 * plain.summary()["duration"]
    assert found.loads[0].counters.drafted_tokens < 10


@pytest.mark.parametrize(
    ("profile", "least"),
    [
        ("m2-ultra-gemma-3-4b-it-qat", 1.5),
        ("nvidia-h200-gemma-3-1b-q4_k_m", 2.0),
        # Four rows take 2.7 times as long as one: less than a tenth could be gained.
        ("x86-2-core-avx512-qwen2-0.5b-q4_k_m", 0.99),
    ],
)
def test_the_decision_never_loses(profile: str, least: float) -> None:
    """By the prices of real devices, at any acceptance, for any number of sequences."""
    gains = []
    for unified in (True, False):
        cost = CostModel.fit(shipped_profile(profile), unified=unified, n_ubatch=512)
        for n in (1, 4, 16):
            shape: dict[str, Any] = {"n_seq_max": n, "n_cells": 1024 * n, "unified": unified}
            requests = draw(f"closed:clients={n},n={n},prompt=64,output=150", 3)
            plain = simulate(requests, EngineSpec.of(cost, **shape))
            for acceptance in (0.0, 0.4, 0.8):
                spec = EngineSpec.of(cost, speculate=True, **shape)
                drafted = simulate(draw_acceptance(requests, str(acceptance), 0), spec)
                ratio = plain.summary()["duration"] / drafted.summary()["duration"]
                assert ratio > 0.98, (unified, n, acceptance)
                if n == 1 and acceptance == 0.8:
                    gains.append(ratio)
    assert min(gains) > least


@pytest.mark.parametrize("n", [1, 4, 8, 16])
@pytest.mark.parametrize("acceptance", [0.4, 0.5, 0.8])
def test_nor_in_any_round(n: int, acceptance: float) -> None:
    """N answers at once, again and again. No round loses anything."""
    cost = CostModel.fit(
        shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m"), unified=False, n_ubatch=512
    )
    shape: dict[str, Any] = {"n_seq_max": n, "n_cells": 1024 * n, "unified": False}
    requests = [one(r * n + i, 60.0 * r, 64, 256) for r in range(12) for i in range(n)]
    plain = ends(simulate(requests, EngineSpec.of(cost, **shape)), n)
    spec = EngineSpec.of(cost, speculate=True, **shape)
    found = simulate([replace(r, acceptance=acceptance) for r in requests], spec)
    ratios = plain / ends(found, n)
    assert ratios.min() > 0.99
    if acceptance == 0.8:
        assert ratios[-1] > 1.5


@pytest.mark.parametrize("n", [1, 4])
def test_nor_where_a_pool_is_full(n: int) -> None:
    """Of cached prefixes. The room that drafts might need makes no call short for long."""
    cost = CostModel.fit(
        shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m"), unified=True, n_ubatch=512
    )
    shape: dict[str, Any] = {"n_seq_max": n, "n_cells": 1024 * n, "unified": True}
    requests = [one(r * n + i, 60.0 * r, 64, 512) for r in range(8) for i in range(n)]

    def rounds(speculate: bool) -> F64:
        spec = replace(EngineSpec.of(cost, speculate=speculate, **shape), overhead=1e-3)
        share = 0.0 if speculate else None
        return ends(simulate([replace(r, acceptance=share) for r in requests], spec), n)

    assert (rounds(False) / rounds(True)).min() > 0.995


@pytest.mark.parametrize("n", [4, 8, 16])
def test_the_first_steps_of_a_device_may_be_slow(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them wait for memory. Drafts go on: what that took is no price of theirs."""
    cost = CostModel.fit(
        shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m"), unified=False, n_ubatch=512
    )
    waits, drafted = [0.15, 0.15], steps_of

    def slow(step: Step, k: int, left: Any, luck: Any, limits: Any, seconds_of: Any,
                 before: Before) -> Any:  # fmt: skip
        def seconds(rows: int, at: int) -> tuple[float, float]:
            own, graph = seconds_of(rows, at)
            return own + (waits.pop() if waits and rows > n else 0.0), graph

        return drafted(step, k, left, luck, limits, seconds, before)

    monkeypatch.setattr(replica, "steps_of", slow)
    shape: dict[str, Any] = {"n_seq_max": n, "n_cells": 1024 * n, "unified": False}
    requests = [one(r * n + i, 60.0 * r, 64, 256) for r in range(8) for i in range(n)]
    plain = ends(simulate(requests, EngineSpec.of(cost, **shape)), n)
    spec = EngineSpec.of(cost, speculate=True, **shape)
    found = simulate([replace(r, acceptance=0.8) for r in requests], spec)
    assert not waits
    ratios = plain / ends(found, n)
    assert ratios[0] > 0.85
    assert ratios[1:].min() > 1.2


def test_one_without_any_drafts_keeps_no_others_from_theirs() -> None:
    cost = CostModel.fit(
        shipped_profile("nvidia-h200-gemma-3-1b-q4_k_m"), unified=False, n_ubatch=512
    )
    shape: dict[str, Any] = {"n_seq_max": 8, "n_cells": 16384, "unified": False}
    spec = EngineSpec.of(cost, speculate=True, **shape)
    found = []
    for share in (0.01, 0.0):
        requests = [one(i, 0.0, 64, 1500) for i in range(8)]
        requests = [replace(r, acceptance=0.9 if r.id else share) for r in requests]
        found.append(max(o.end for o in simulate(requests, spec).outcomes if o.id))
    assert found[1] < 1.1 * found[0]


def ends(found: Simulated, n: int) -> F64:
    """Seconds until the last of each round's n answers is there."""
    outcomes = sorted(found.outcomes, key=lambda o: o.id)
    rounds: F64 = np.array([o.end - o.arrival for o in outcomes]).reshape(-1, n)
    return np.asarray(rounds.max(axis=1))


@LAYOUTS
def test_a_step_leans_to_the_rows_of_the_last_one_with_drafts(unified: bool) -> None:
    """Where a new graph costs more than a step gives, some rows only fill up."""
    seconds = np.array([0.0, *(0.01 + 0.001 * rows for rows in range(1, 33))])
    prices = Prices(seconds, seconds, credit=1.0, new_graph=0.05)
    spec = machine(unified=unified, n_seq_max=2, speculate=True)
    slots = np.array([0, 1], np.int32)
    step = Step(slots, (), (), (), 2, {}, drafts={0: 6, 1: 6}, prices=prices)
    luck = [Luck(0, 0.8), Luck(1, 0.8)]

    def rows(n_most: int, last: int, graph: float = 0.05) -> int:
        own = prices._replace(new_graph=graph)
        decided = decide(step, [n_most] * 2, luck, spec.limits, own, Before(last))
        assert decided.rows >= 2 + sum(decided.n_drafted)
        return decided.rows

    assert rows(2, last=12) == rows(6, last=12) == 12
    assert rows(2, last=0, graph=0.0) == rows(2, last=12, graph=0.0) == 6


def test_simulated_steps_are_those_of_a_live_engine() -> None:
    """With the embedded model, its draft and the acceptance that each request had."""
    shape: dict[str, Any] = {
        "n_seq_max": 4,
        "n_ctx": 4 * 512,
        "kv_unified": False,
        "prefix_cache": False,
    }
    chats = [[{"role": "user", "content": one.prompt}] for one in default_prompts()[:8]]
    with (
        Model.default(n_gpu_layers=0) as model,
        Engine(model, speculate="draft", policy=always(4, 16), cost=None, **shape) as engine,
    ):
        prompts = [model.vocab.apply_chat_template(chat) for chat in chats]
        tokens = [model.vocab.tokenize(text, parse_special=True) for text in prompts]
        results = engine.generate(tokens, greedy(64))
        live, limits = check_idle(engine), engine.limits
    requests = [
        TraceRequest(
            r.id, 0.0, r.n_prompt, r.n_generated, ((2 * r.id, r.n_prompt),), 2 * r.id + 1,
            acceptance=acceptance_of(r.n_drafts, r.n_drafted, r.n_accepted),
        )
        for r in results
    ]  # fmt: skip
    spec = EngineSpec.of(
        linear(), n_seq_max=limits.n_seq_max, n_cells=limits.n_cells, unified=False, speculate=True
    )
    counters = simulate(requests, spec, lambda: always(4, 16)).loads[0].counters
    assert live.tokens == counters.tokens
    assert counters.tokens / counters.steps == pytest.approx(live.tokens / live.steps, rel=0.12)
    assert counters.accepted_tokens == pytest.approx(live.accepted_tokens, rel=0.12)
    without = simulate([replace(r, acceptance=None) for r in requests], spec)
    assert without.loads[0].counters.steps > 1.12 * live.steps  # the bound can fail


@pytest.mark.parametrize(("n", "row"), [(1, 0.3), (4, 0.1)])
def test_the_policy_of_drafts_decides_live_as_simulated(n: int, row: float) -> None:
    """`tools.validate_drafts`, by prices that no clock is in."""
    cost = Rows(row)
    with Model.default(n_gpu_layers=0) as model:
        live, simulated, plain = compare(model, cost, n, 64)
    assert live.tokens == simulated.tokens == plain.tokens
    assert simulated.worth(cost) == pytest.approx(live.worth(cost), rel=BOUND)
    assert live.worth(cost) > (1 + BOUND) * plain.worth(cost)  # the bound can fail
    assert 0 < live.accepted < live.drafted


def test_acceptance_from_counts() -> None:
    assert acceptance_of(0, 0, 0) is None
    assert acceptance_of(10, 40, 0) == pytest.approx(0, abs=1e-6)
    assert acceptance_of(10, 40, 40) == pytest.approx(1, abs=1e-6)
    right = 1000 * (0.7 + 0.7**2 + 0.7**3)
    assert acceptance_of(1000, 3000, round(right)) == pytest.approx(0.7, abs=1e-3)
    assert acceptance_of(2, 5, 2) == pytest.approx(0.54, abs=0.05)


def test_where_the_acceptance_comes_from() -> None:
    requests = [one(1, 0.0, 5, 5, acceptance=0.5), one(2, 0.0, 5, 5), one(3, 0.0, 5, 5)]
    assert [r.acceptance for r in draw_acceptance(requests, "0.25", 0)] == [0.5, 0.25, 0.25]
    drawn = [r.acceptance for r in draw_acceptance(requests, "0.2-0.4", 0)]
    assert drawn[0] == 0.5
    assert all(a is not None and 0.2 <= a <= 0.4 for a in drawn[1:])
    assert drawn == [r.acceptance for r in draw_acceptance(requests, "0.2-0.4", 0)]
    for wrong in ("2", "0.9-0.1", "often", ""):
        with pytest.raises(ArgumentError, match="acceptance"):
            draw_acceptance(requests, wrong, 0)
    with pytest.raises(ArgumentError, match="batch_invariant"):
        machine(unified=False, batch_invariant=True, speculate=True)
