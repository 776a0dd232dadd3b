"""Whether a pool of cells or streams are faster on a device, by its cost model.

In streams a row looks at few cells, and prompts are computed apart from rows that decode. In a pool
a row looks at the cells of all, and rows that decode ride along with prompts, which is nearly free
where they pay for a whole tile of rows otherwise."""

from collections.abc import Callable

from ..cost.step_cost import StepCost
from ..scheduler.policies.width import GAIN, all_once, times, widths

PROMPT, ANSWER = 256, 128  # tokens of the requests that the layouts are compared with
N_KV = 256  # cells after which a context's graph is another one
LEAST_GAIN = 0.1  # below it exact answers are worth more: streams. A fit errs by half of it

CostOf = Callable[[bool], StepCost]
"""The cost model of a pool (True) and of streams (False)."""


def pool_speed(cost_of: CostOf, n_seq_max: int) -> float | None:
    """Requests per second of a pool over those of streams, when `n_seq_max` run; when half as many
    do, where the pool is slower then. None where steps of one of them were not measured."""
    streams, pool = cost_of(False), cost_of(True)
    if not all(cost.calibrated and cost.layout_measured for cost in (streams, pool)):
        return None
    half, full = (
        seconds(streams, n, False) / seconds(pool, n, True)
        for n in (max(2, n_seq_max // 2), n_seq_max)
    )
    return min(half, full) if half < 1 else full


def pool_pays(speed: float | None) -> bool:
    """Whether a pool of this `pool_speed` is worth that answers depend on their neighbours."""
    return speed is not None and speed >= 1 + LEAST_GAIN


def seconds(cost: StepCost, n: int, unified: bool) -> float:
    """In which `n` requests that run at once get an answer each, while as many prompts come one by
    one."""
    kv = n * (PROMPT + ANSWER / 2)
    # In streams a prompt's last token is a row of the next step.
    n_decodes = ANSWER + (not unified)
    new, settle = cost.new_graph
    # A pool is as large as all that it holds; of streams the longest one counts.
    n_graphs = n * (1 + ANSWER / N_KV) if unified else (PROMPT + ANSWER) / N_KV
    return (
        n * (cost.predict(n - 1 + PROMPT, PROMPT, kv, n) + new)
        + max(0, n_decodes - n) * decode_seconds(cost, n, kv, unified)
        + n_graphs * (new + settle)
    )


def decode_seconds(cost: StepCost, n: int, kv: float, unified: bool) -> float:
    """For a token of each of `n` sequences: all at once, or in turns where that is faster."""
    wide = best = cost.predict(n, 0, kv, n)
    for width in widths(n, cost, unified):
        each = all_once(times(cost, n, width, kv, unified), n, width, unified)
        if each * (1 + GAIN) <= wide:
            best = min(best, each)
    return best
