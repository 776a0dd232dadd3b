"""Progress: what changes when a step has been computed."""

import numpy as np
import numpy.typing as npt

from ..kv import Slots
from .attention import Attention
from .drafting import Drafted, Drafting
from .idle import IdleSequences
from .sequences import Sequences
from .step import Counters, PromptChunk, Step
from .step_builder import StepBuilder

_COPIES = ("copy", "load")


class Progress:
    """Cells, tokens and places of the sequences that a step has computed. `builder`: what made the
    step."""

    def __init__(
        self,
        sequences: Sequences,
        idle: IdleSequences,
        counters: Counters,
        attention: Attention,
        drafting: Drafting | None,
        builder: StepBuilder,
    ) -> None:
        self._sequences = sequences
        self._idle = idle
        self._counters = counters
        self._attention = attention
        self._drafting = drafting
        self._builder = builder
        self._accounting = builder.accounting
        self._unwaited = False  # the last step had only prompts, or had some behind it

    def advance(self, step: Step, n: int, now: float | None, drafted: Drafted | None) -> None:
        """See `Scheduler.advance`."""
        if not 1 <= n <= step.repeat:
            raise ValueError(f"a step for 1 to {step.repeat} times was computed {n} times")
        sequences, running = self._sequences, self._sequences.running
        if self._drafting is not None and n < self._drafting.cuts:  # something else has ended it
            self._drafting.cuts = 0
        if now is not None:
            self._idle.within = (now - sequences.now) / n
            sequences.now = now
        self._charge(step, n)
        n_recomputed = sum([self._advance(chunk) for chunk in step.chunks]) if step.chunks else 0
        if len(step.decode):
            taken = n if drafted is None else self._drafted(step, n, drafted)
            self._accounting.take_each(step.decode, taken)
            self._builder.computed(step, n)
            if running.asked:
                self._answered(step.decode)
        self._counters.count(step, n, n_recomputed)
        self._unwaited = bool(step.chunks) and (step.behind or not len(step.decode))

    def advance_alone(self, step: Step, n: int, now: float, seconds: float) -> None:
        """See `Scheduler.advance_alone`."""
        sequences, running = self._sequences, self._sequences.running
        (slot,) = step.decode.tolist()
        (entry,) = running.ids.values()
        self._charge(step, n)
        self._accounting.take(slot, n)
        entry.true = False
        view = running.seen(entry)
        entry.view = view._replace(goal=view.computed)
        entry.high = max(entry.high, view.computed)
        sequences.now = now
        self._idle.computed_alone(view.id, n, now, seconds)
        self._counters.count(step, n, 0)

    def _charge(self, step: Step, n: int) -> None:
        """What is cached pays for `n` times this step."""
        if price := self._attention.price(step, n):
            self._builder.charge(price)

    def _drafted(self, step: Step, n: int, drafted: Drafted) -> npt.NDArray[np.int64]:
        """Tokens that each slot of `step.decode` has sampled in `n` steps."""
        drafting, decode, cost = self._drafting, step.decode, self._builder.cost
        assert drafting is not None
        n_more = drafted.n_rows - n * step.n_rows
        self._counters.count_drafts(n_more, drafted)
        owner, kv = self._sequences.running.owner[decode], self._attention.cells(step, (n - 1) / 2)
        if step.chunks or self._unwaited or any(op.kind in _COPIES for op in step.kv_operations):
            cost = None  # something else was computed or copied in this time
        drafting.observe(decode, owner, drafted, n, kv, cost, asked=bool(step.drafts))
        taken: npt.NDArray[np.int64] = drafted.taken[decode].astype(np.int64)
        return taken

    def _answered(self, decode: Slots) -> None:
        """Those of interactive sequences have the token that they were asked for."""
        sequences, running = self._sequences, self._sequences.running
        for slot in [slot for slot in decode.tolist() if slot in running.asked]:
            entry = running.ids[running.asked[slot]]
            entry.true = False
            entry.high = max(entry.high, int(running.computed[slot]))
            sequences.promised -= 1
            sequences.update(entry, running.seen(entry))

    def _advance(self, chunk: PromptChunk) -> int:
        """The rows of a chunk are in the cache; how many had been computed before."""
        sequences, running = self._sequences, self._sequences.running
        slot, end = chunk.slot, chunk.start + chunk.n
        entry = running.ids[chunk.id]
        entry.true = False
        self._accounting.take(slot, chunk.n)
        running.ahead[slot] -= chunk.n
        sequences.promised -= chunk.n
        n_recomputed = max(0, min(end, entry.high) - chunk.start)
        entry.high = max(end, entry.high)
        if entry.computed is not None and not chunk.decodes:
            entry.computed.add(chunk.start, chunk.n)
        if entry.view.goal is not None:
            sequences.update(entry, running.seen(entry))
        elif running.ahead[slot] == 1:
            sequences.prefilling.leave(chunk.id)
            running.start_decoding(entry)
        return n_recomputed
