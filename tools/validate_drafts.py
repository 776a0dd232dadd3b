"""How far the simulator's drafts are from a live engine's, with the same decision.

    python -m tools.validate_drafts --sequences 1,4 --rows 0.02,0.1,0.3

Runs the embedded model with its draft, and simulates the same requests with the acceptance that
each had. On both sides `ByGain` decides by made-up prices: a step takes 1, and each row a share
more. So no clock is in it: what is compared is tokens for what the steps would have cost. Exit
status 1: they are off by more than a bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_prompts
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler.policies.composed import ComposedPolicy
from pyllamabatch.scheduler.policies.speculate import ByGain
from pyllamabatch.scheduler.policy import PlanBuilder, Speculation
from pyllamabatch.scheduler.view import Drafts, Prices
from pyllamabatch.sim import EngineSpec, Simulated, TraceRequest, acceptance_of, simulate
from pyllamabatch.step.sampling_params import SamplingParams

BOUND = 0.1
"""Relative error that tokens for the same cost are to stay within."""


@dataclass
class Rows(StepCost):
    """A step takes 1, and each row `row` more."""

    row: float

    def predict(self, rows: int, prefill: int = 0, kv: float = 0.0, n_seqs: int = 1) -> float:
        return 1.0 + self.row * rows


class Found(NamedTuple):
    """Tokens that were sampled, steps, and rows; drafted tokens, and those that were right."""

    tokens: int
    steps: int
    rows: int
    drafted: int
    accepted: int

    def worth(self, cost: Rows) -> float:
        """Tokens for a cost of 1."""
        return self.tokens / (self.steps + cost.row * self.rows)


class Compared(NamedTuple):
    """plain: simulated without drafts."""

    live: Found
    simulated: Found
    plain: Found


def by_prices(cost: Rows) -> Callable[[], ComposedPolicy]:
    """`ByGain`, with these prices, and without a limit to what drafts may lose."""

    def speculate(builder: PlanBuilder) -> Speculation:
        seen = builder.view.drafts
        assert seen is not None
        drafts = seen()
        rows = range(drafts.room + 1)
        seconds = np.array([cost.predict(n) if n else 0.0 for n in rows])
        prices = Prices(seconds, seconds, credit=1e9)
        priced: Drafts = drafts._replace(prices=lambda: prices, untimed=0)
        builder.view = builder.view._replace(drafts=lambda: priced, drafts_in=0)
        return ByGain()(builder)

    return lambda: ComposedPolicy(repeat=2**31, speculate=speculate)


def compare(model: Model, cost: Rows, n: int, n_tokens: int) -> Compared:
    """All prompts of the embedded model, `n` at a time, with up to `n_tokens` tokens each."""
    made = by_prices(cost)
    texts = [
        model.vocab.apply_chat_template([{"role": "user", "content": one.prompt}])
        for one in default_prompts()
    ]
    prompts = [model.vocab.tokenize(text, parse_special=True) for text in texts]
    shape: dict[str, Any] = {
        "n_seq_max": n,
        "n_ctx": 1024 * n,
        "kv_unified": True,
        "prefix_cache": False,
    }
    with Engine(model, speculate="draft", policy=made(), cost=None, **shape) as engine:
        results = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=n_tokens))
        live, limits = engine.stats(), engine.limits
    requests = [
        TraceRequest(
            r.id, 0.0, r.n_prompt, r.n_generated + (r.finish_reason == "stop"),
            ((2 * r.id, r.n_prompt),), 2 * r.id + 1,
            acceptance=acceptance_of(r.n_drafts, r.n_drafted, r.n_accepted) or 0.0,
        )
        for r in results
    ]  # fmt: skip
    spec = EngineSpec.of(
        cost, n_seq_max=n, n_cells=limits.n_cells, speculate=True, prefix_cache=False
    )
    spec = replace(spec, limits=replace(spec.limits, drafts_take_time=True))

    without = replace(spec, limits=replace(spec.limits, n_draft_max=0))
    return Compared(
        Found(live.tokens, live.steps, live.rows, live.drafted_tokens, live.accepted_tokens),
        _found(simulate(requests, spec, made)),
        _found(simulate(requests, without, lambda: ComposedPolicy(repeat=2**31))),
    )


def _found(run: Simulated) -> Found:
    counters = run.loads[0].counters
    return Found(
        counters.tokens,
        counters.steps,
        counters.rows,
        counters.drafted_tokens,
        counters.accepted_tokens,
    )


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.validate_drafts", description=__doc__)
    parser.add_argument("--sequences", default="1,4", help="at once; comma separated")
    parser.add_argument("--rows", default="0.02,0.1,0.3", help="prices of a row, likewise")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    options = parser.parse_args(words)
    lines, worst = [], 0.0
    with Model.default(n_gpu_layers=0) as model:
        for n in map(int, options.sequences.split(",")):
            for row in map(float, options.rows.split(",")):
                cost = Rows(row)
                live, simulated, plain = compare(model, cost, n, options.tokens)
                error = simulated.worth(cost) / live.worth(cost) - 1
                worst = max(worst, abs(error))
                lines.append(
                    [f"{n}", f"{row:g}"]
                    + [f"{one.tokens / one.steps:.2f}" for one in (live, simulated)]
                    + [f"{one.drafted / one.tokens:.2f}" for one in (live, simulated)]
                    + [f"{one.worth(cost) / plain.worth(cost):.3f}" for one in (live, simulated)]
                    + [f"{error:+.1%}"]
                )
    kinds = ("tokens a step", "drafted a token", "gain")
    each = [f"{kind}, {arm}" for kind in kinds for arm in ("live", "simulated")]
    heads = ["sequences", "a row's price", *each, "error"]
    print(Table(heads, lines).markdown())
    return 1 if worst > BOUND else 0


if __name__ == "__main__":
    raise SystemExit(main())
