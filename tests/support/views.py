"""Views made up, to try policies with no engine, no scheduler and no model."""

from typing import Any

from pyllamabatch.scheduler import Limits, Policy, SequenceView, StepView

LIMITS = Limits(n_batch=64, n_ubatch=16, n_seq_max=4, n_cells=400, n_cells_seq=400)


def waiting(id: int, n_prompt: int = 10, **facts: Any) -> SequenceView:
    return SequenceView(id, float(id), n_prompt, **({"max_tokens": 8} | facts))


def prefilling(id: int, n_prompt: int, computed: int, **facts: Any) -> SequenceView:
    return waiting(id, n_prompt, computed=computed, running=True, **facts)


def decoding(id: int, n_prompt: int = 5, generated: int = 1, **facts: Any) -> SequenceView:
    computed = n_prompt + generated - 1
    facts = {"max_tokens": 100, "turn": generated} | facts
    return prefilling(id, n_prompt, computed, generated=generated, **facts)


def view_of(*sequences: SequenceView, limits: Limits = LIMITS, **facts: Any) -> StepView:
    running = [seq for seq in sequences if seq.running]
    return StepView.of(limits, running, [seq for seq in sequences if not seq.running], **facts)


def tokens(policy: Policy, *sequences: SequenceView, **facts: Any) -> dict[int, int]:
    view = view_of(*sequences, **facts)
    return policy.plan(view).advances(view)
