"""What tests of batch invariance share: any policy, and what a request has alone."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from pyllamabatch.engine.engine import Engine
from pyllamabatch.scheduler import Plan, StepView
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.bits import Bits, recorded

Alone = list[tuple[list[int], Bits]]
"""Of each prompt: its tokens, and the digests of all logits that they were sampled from."""


class AnyPolicy:
    """Random chunks, pauses and preemptions, all within the rules; the first sequence that has
    generated two tokens is preempted in any case."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._preempted = False

    def plan(self, view: StepView) -> Plan:
        draw, limits = self._random, view.limits
        running = list(view.running)
        generating = [seq.id for seq in running if seq.generated > 1]
        if generating and not self._preempted:
            self._preempted = True
            return Plan(preempt=(generating[0],))
        if running and draw.random() < 0.08:
            return Plan(preempt=(draw.choice(running).id,))
        open_ = [seq for seq in running if seq.remaining]
        newcomers = list(view.waiting)[: limits.n_seq_max - len(running)]
        chosen = [seq for seq in [*open_, *newcomers] if draw.random() < 0.7]
        chosen = chosen or [*open_, *newcomers][:1]
        return Plan({seq.id: draw.randint(1, min(seq.remaining, 40)) for seq in chosen})


def each_alone(
    engine: Engine, prompts: Sequence[list[int]], wanted: Callable[[int], SamplingParams]
) -> Alone:
    """One prompt after another, in an engine without a prefix cache. wanted: of prompt i."""
    found: Alone = []
    with recorded(engine) as bits:
        for i, prompt in enumerate(prompts):
            tokens = engine.generate([prompt], wanted(i))[0].tokens
            ((_, own),) = bits.items()
            bits.clear()
            found.append((tokens, own))
    return found


def assert_alone(results: Sequence[tuple[int, Any]], bits: dict[int, Bits], known: Alone) -> None:
    """results: (prompt, result)."""
    for i, result in results:
        tokens, own = known[i]
        assert result.tokens == tokens, f"prompt {i}"
        assert bits[result.id] == own, f"prompt {i}"
