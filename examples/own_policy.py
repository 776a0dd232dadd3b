"""A policy of your own: a request starts only where it can grow to its end, so none is preempted.

Here it is tried on a view made up, simulated and live. From the command line it is
`pyllamabatch simulate --policy examples/own_policy.py:memory_aware …`.
"""

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.scheduler import (
    ComposedPolicy,
    Limits,
    PlanBuilder,
    SequenceView,
    StepView,
    Verdict,
)
from pyllamabatch.scheduler.policies.parts import ALWAYS
from pyllamabatch.sim.replica import EngineSpec
from pyllamabatch.sim.simulate import simulate
from pyllamabatch.sim.workload import draw


def cells_at_the_end(seq: SequenceView) -> int:
    return seq.n_prompt + seq.max_tokens - 1  # the last token is never computed


def fits_to_its_end(builder: PlanBuilder, seq: SequenceView) -> Verdict:
    """Admit it if all that run then can have all the tokens that they asked for."""
    together = [*builder.view.running, *builder.admitted, seq]
    cells = sum(cells_at_the_end(each) for each in together)
    return Verdict.ADMIT if cells <= builder.view.limits.n_cells else Verdict.STOP


def memory_aware() -> ComposedPolicy:
    # Nothing changes while all decode: a plan stands until a sequence comes or goes.
    return ComposedPolicy(admit=fits_to_its_end, repeat=ALWAYS)


class Device(StepCost):
    def predict(self, rows: int, prefill: int, kv: float, n_seqs: int) -> float:
        return 5e-3 + 1e-4 * rows


if __name__ == "__main__":
    limits = Limits(n_batch=64, n_ubatch=64, n_seq_max=8, n_cells=100, n_cells_seq=100)
    waiting = [SequenceView(id, 0.0, n_prompt=20, max_tokens=21) for id in (1, 2, 3)]
    print("made up:", memory_aware().plan(StepView.of(limits, waiting=waiting)).tokens)

    spec = EngineSpec.of(Device(), n_seq_max=16, n_cells=1024)
    trace = draw("poisson:rate=50,n=60,prompt=32,output=128", seed=1)
    for policy in ("sarathi", memory_aware):
        run = simulate(trace, spec, policy)
        print(f"simulated: {run.policy} preempts {run.summary()['preemptions']:.0f} times")

    model = Model.default()
    with model, Engine(model, policy=memory_aware(), n_ctx=256, n_seq_max=8) as engine:
        engine.generate(["Copy: hello"] * 12, SamplingParams(max_tokens=60))
        print("live:", engine.stats().preemptions, "preemptions")
