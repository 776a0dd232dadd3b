"""The policy of `examples/own_policy.py`: on a view made up, simulated, and live."""

import runpy
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.scheduler import Limits, Policy, make_policy
from pyllamabatch.sim.replica import EngineSpec
from pyllamabatch.sim.simulate import simulate
from pyllamabatch.sim.workload import draw
from tests.support.views import decoding, view_of, waiting

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_policy.py"
LIMITS = Limits(n_batch=64, n_ubatch=64, n_seq_max=3, n_cells=100, n_cells_seq=100)


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture
def memory_aware() -> Policy:
    return make_policy(f"{EXAMPLE}:memory_aware")


def test_on_a_view_made_up(memory_aware: Policy) -> None:
    """Of 20 tokens each, which need 40 cells at their ends."""
    one, two, three = (waiting(id, 20, max_tokens=21) for id in (1, 2, 3))
    plan = memory_aware.plan(view_of(one, two, three, limits=LIMITS))
    assert plan.tokens == {1: 20, 2: 20}  # 80 of 100 cells at their ends
    running = [decoding(id, 20, max_tokens=21) for id in (1, 2)]
    plan = memory_aware.plan(view_of(*running, three, limits=LIMITS))
    assert (plan.decode_all, plan.tokens) == (True, {})
    assert plan.repeat > 1
    plan = memory_aware.plan(view_of(running[0], three, limits=LIMITS))
    assert (plan.decode_all, plan.tokens) == (True, {3: 20})


def test_simulated(example: dict[str, Any]) -> None:
    spec = EngineSpec.of(example["Device"](), n_seq_max=16, n_cells=1024)
    trace = draw("poisson:rate=50,n=40,prompt=32,output=128", seed=1)
    by_policy = {
        name: simulate(trace, spec, policy).summary()["preemptions"]
        for name, policy in (("sarathi", "sarathi"), ("own", example["memory_aware"]))
    }
    assert by_policy["own"] == 0 < by_policy["sarathi"]


def test_live(model: Model, memory_aware: Policy) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eog=True)
    with Engine(model, policy=memory_aware, n_ctx=256, n_seq_max=8) as engine:
        results = engine.generate(["Copy: hello"] * 12, params)
        assert engine.stats().preemptions == 0
    assert all(result.n_generated == 60 for result in results)


def test_it_is_short() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    policy = text[text.index("def cells_at_the_end") : text.index("class Device")]
    assert len([line for line in policy.splitlines() if line]) <= 20
