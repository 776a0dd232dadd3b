"""Static batching, the baseline that continuous batching is measured against: a batch is admitted
when the last one is all done, and no sequence joins it on the way.

A sequence that has finished is not computed any longer, so this is a kinder baseline than engines
that pad their batch to its longest sequence. A plan repeats while a batch decodes."""

from dataclasses import dataclass

from ...errors import ArgumentError
from ..policy import Admit, Mix, PlanBuilder, Verdict
from ..view import SequenceView
from .composed import ComposedPolicy
from .parts import ALWAYS, WhenItFits, whole_batch


@dataclass(frozen=True, slots=True)
class Together:
    """Admit those that `fits` admits until the batch begins to decode: `size` sequences at most
    (default all slots), from `wait` seconds after the first one came at the latest."""

    fits: Admit
    size: int | None = None
    wait: float = 0.0

    def __call__(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        view = builder.view
        size = min(self.size or view.limits.n_seq_max, view.limits.n_seq_max)
        if builder.n_running >= size:
            return Verdict.STOP
        if len(view.running):
            if view.running.column("turn").max() > 1:
                return Verdict.STOP
        elif self.wait and not builder.admitted and len(view.waiting) < size:
            latest = seq.arrival + self.wait
            if view.now < latest:
                builder.ask_again(latest)
                return Verdict.STOP
        return self.fits(builder, seq)


def static(
    *, size: int | None = None, wait: float = 0.0, watermark: float = 0.01
) -> ComposedPolicy:
    """`size`: sequences of a batch (default: all that the context can run). `wait`: how many
    seconds a batch waits for its last sequences. `watermark`: see `WhenItFits`."""
    if size is not None and size < 1:
        raise ArgumentError("size", size, "at least 1")
    if not 0 <= wait < float("inf"):
        raise ArgumentError("wait", wait, "seconds, 0 or more")
    return ComposedPolicy(
        admit=Together(WhenItFits(watermark), size, wait),
        budget=whole_batch,
        mix=Mix.PROMPTS,
        repeat=ALWAYS,
    )
