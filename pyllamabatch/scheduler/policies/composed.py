"""ComposedPolicy: a policy of parts, each of which can be replaced alone."""

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import cast

from ...errors import ArgumentError
from ..policy import (
    Admit,
    Budget,
    ChunkSize,
    Mix,
    Mixing,
    Order,
    PlanBuilder,
    Repeat,
    Speculate,
    Verdict,
    Victim,
    Width,
)
from ..rules import whole
from ..view import Plan, SequenceView, StepView
from .parts import all_that_is_left, first_come, newest_first, token_budget, when_it_fits


@dataclass(frozen=True, kw_only=True)
class ComposedPolicy:
    """The parts (`scheduler/policy.py` says what each is asked), by default those of `sarathi`
    without a cost model.

    - repeat: a number, when it is always the same one. The other parts may not look at the time
      then, nor admit a sequence for having waited longer.
    - width: without it all that decode do so at every step.
    - speculate: drafted tokens. It is asked only where drafts are possible, and all that decode
      have a row. Without it a scheduler takes `ByGain()` there.
    - mix: what is computed in a step: always the same, or asked when decodes and prompts
      are planned.
    - ended: see `Policy`."""

    order: Order = first_come
    admit: Admit = when_it_fits
    budget: Budget = token_budget
    chunk: ChunkSize = all_that_is_left
    victim: Victim = newest_first
    repeat: Repeat | int = 1
    width: Width | None = None
    speculate: Speculate | None = None
    mix: Mix | Mixing = Mix.BOTH
    ended: Callable[[SequenceView], None] | None = None

    def plan(self, view: StepView) -> Plan:
        rows = whole(min(self.budget(view), view.limits.n_batch))
        builder = PlanBuilder(view, rows, view.kv.free, view.kv.promised)
        prompts_first = self.mix is Mix.PROMPTS
        if prompts_first:
            self._end_prompts(builder)
        else:
            self._decode(builder)
        if len(view.prefilling) or len(view.waiting):
            builder = self._advance_others(builder)
        if prompts_first:
            if builder.tokens:  # of prompts: the next step has other rows
                return builder.plan()
            self._decode(builder)
        elif self.mix is not Mix.BOTH:
            mix = self.mix(builder) if callable(self.mix) else self.mix
            if not isinstance(mix, Mix):
                raise ArgumentError("mix", mix, "must be a Mix")
            if mix is Mix.DECODES and len(view.decoding):
                builder = PlanBuilder(view, rows, view.kv.free, view.kv.promised)
                self._decode(builder)
                return builder.plan()
            if mix is Mix.PROMPTS and builder.prompts():
                builder.drop_decodes()
                return builder.plan()
        if not builder.steady:
            return builder.plan()
        repeat = self.repeat(builder) if callable(self.repeat) else self.repeat
        sit_out: Set[int] = frozenset()
        if self.width is not None and builder.decode_all and len(view.decoding) > 1:
            sit_out, steps = self.width(builder)
            repeat = min(repeat, steps)
        if self.speculate is None or builder.view.drafts is None or sit_out:
            return builder.plan(repeat, sit_out)
        return builder.plan(repeat, sit_out, self.speculate(builder))

    def _decode(self, builder: PlanBuilder) -> None:
        n = len(builder.view.decoding)
        if n == 0:
            return
        if n <= builder.rows and n <= builder.cells and not builder.preempt:
            builder.give_all_decodes()
            return
        self._decode_each(builder, builder.view.running)

    def _end_prompts(self, builder: PlanBuilder) -> None:
        """Of those that decode, the ones whose prompt has one token left."""
        running, decoding = builder.view.running, builder.view.decoding
        new = running.column("id")[running.column("generated") == 0].tolist()
        if any(id in decoding for id in new):
            self._decode_each(builder, (seq for seq in running if not seq.generated))

    def _decode_each(self, builder: PlanBuilder, running: Iterable[SequenceView]) -> None:
        for seq in running:
            if builder.rows < 1:
                break
            if seq.decoding and seq.id not in builder.preempt:
                self._advance(builder, seq)

    def _advance_others(self, builder: PlanBuilder) -> PlanBuilder:
        """In the order, until the rows are given away or a newcomer has to wait; then the other
        ones that run."""
        for seq in self.order(builder.view):
            if builder.rows < 1:
                return builder
            if builder.has(seq):
                continue
            if seq.running:
                self._advance(builder, seq)
                continue
            if builder.short:
                break  # the preempted come before any newcomer
            if seq.prefix.pending:
                continue  # its prefix is being computed
            verdict = self._verdict(builder, seq)
            if verdict is Verdict.STOP:
                builder, verdict = self._make_room(builder, seq)
            if verdict is Verdict.ADMIT:
                self._start(builder, seq)
            elif verdict is Verdict.STOP:
                break
            elif verdict is not Verdict.SKIP:
                raise ArgumentError("admit", verdict, "must answer with a Verdict")
        for seq in builder.view.prefilling:
            if builder.rows < 1:
                break
            if not builder.has(seq):
                self._advance(builder, seq)
        return builder

    def _make_room(self, builder: PlanBuilder, seq: SequenceView) -> tuple[PlanBuilder, Verdict]:
        """`builder` with victims enough that `seq` is admitted, or as it was."""
        trial, verdict = builder, Verdict.STOP
        while verdict is Verdict.STOP:
            victim = self._victim(trial, seq)
            if victim is None:
                return builder, Verdict.STOP
            trial = builder.copy() if trial is builder else trial
            trial.take_back(victim, f"preempted: sequence {seq.id} takes its place")
            verdict = self._verdict(trial, seq)
        return (trial if verdict is Verdict.ADMIT else builder), verdict

    def _verdict(self, builder: PlanBuilder, seq: SequenceView) -> Verdict:
        return self.admit(builder, seq) if builder.slots > 0 else Verdict.STOP

    def _victim(self, builder: PlanBuilder, seq: SequenceView) -> SequenceView | None:
        victim = self.victim(builder, seq)
        if victim is None:
            return None
        if not (isinstance(victim, SequenceView) and victim.running):
            raise ArgumentError("victim", victim, "must answer with a running sequence or None")
        if victim.id in builder.preempt:
            limit = "must answer with one that is not in builder.preempt yet, or None"
            raise ArgumentError("victim", victim.id, limit)
        return victim

    def _advance(self, builder: PlanBuilder, seq: SequenceView) -> None:
        while builder.cells < 1:
            victim = self._victim(builder, seq)
            if victim is None:
                return
            builder.take_back(victim, f"preempted: sequence {seq.id} found no free cell")
            builder.short = True
            if victim.id == seq.id:
                return
        n = 1 if seq.decoding else self._cut(builder, seq)
        if n > 0:
            builder.give(seq, n)
            if n < seq.remaining:
                builder.reasons[seq.id] = f"chunk of {n} rows, {seq.remaining - n} tokens to go"

    def _start(self, builder: PlanBuilder, seq: SequenceView) -> None:
        if builder.cells <= seq.prefix.cells:
            return
        n = min(self._cut(builder, seq), builder.cells - seq.prefix.cells)
        if n > 0:
            builder.admit(seq)
            builder.give(seq, n)
            builder.reasons[seq.id] = f"admitted with {n} of {seq.remaining} tokens"

    def _cut(self, builder: PlanBuilder, seq: SequenceView) -> int:
        n = min(self.chunk(builder, seq), seq.remaining, builder.rows, builder.cells)
        return cast("int", whole(n))
