"""What the owners of interactive sequences ask for, one thing at a time each, and what a step gives
them."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from time import perf_counter
from typing import Any

from ..errors import Cancelled, EngineClosed, PyllamabatchError, SamplingError
from ..kv import SwapSpace
from ..llama.lora import LoraNames
from ..scheduler import Scheduler, Step
from ..step.types import Finish
from . import snapshot
from .hand import Call, Draw, Hand
from .protocols import MemoryLike
from .slot_table import SlotTable
from .snapshot import Saved


class InteractiveRunner:
    """The core thread's, as `SlotTable`: every method is called between two steps. Those that
    take a `Call` finish it, now or after a step."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: Any,
        memory: MemoryLike,
        slot_table: SlotTable,
        states: Any,
        space: SwapSpace,
        loras_of: Callable[[int], LoraNames],
    ) -> None:
        self._loras_of = loras_of
        self._open = slot_table.hands
        self._scheduler = scheduler
        self._stepper = stepper
        self._memory = memory
        self._slot_table = slot_table
        self._states = states  # the context
        self._space = space

    # -- what owners ask for

    def extend(self, hand: Hand, tokens: list[int], sampler: Any, call: Call, now: float) -> None:
        """These tokens come next. `now`: when that was asked for."""
        scheduler, n = self._scheduler, len(hand.tokens)
        hand.tokens += tokens
        self._open[hand.id] = hand
        try:
            if n:
                scheduler.extend(hand.id, len(tokens), now)
            else:
                scheduler.add(
                    hand.id,
                    len(tokens),
                    1,
                    arrival=perf_counter(),
                    priority=hand.priority,
                    tenant=hand.tenant,
                    space=hand.space,
                    interactive=True,
                    tokens=hand,
                )
        except PyllamabatchError as error:
            del hand.tokens[n:]
            if not n:
                del self._open[hand.id]
            call.finish(error=error)
            return
        self._renew(hand, sampler)
        hand.wait_for(call, n)
        self._settle(hand)

    def compute(self, hand: Hand, call: Call) -> None:
        """All of its tokens but the last, as behind a prompt."""
        n = len(hand.tokens)
        try:
            self._scheduler.extend(hand.id, 0)
        except PyllamabatchError as error:
            call.finish(error=error)
            return
        hand.wait_for(call, n)
        self._settle(hand)

    def save(self, hand: Hand, call: Call) -> None:
        """It as bytes; None when it has given its cells up meanwhile."""
        if hand.slot < 0:
            call.finish(None)
            return
        params = None if hand.spent else hand.params
        try:
            data = snapshot.save(
                self._states,
                self._stepper,
                hand.slot,
                hand.tokens,
                params,
                hand.n_given,
                self._loras_of(hand.id),
            )
        except PyllamabatchError as error:
            call.finish(error=error)
        else:
            call.finish(data)

    def restore(self, hand: Hand, saved: Saved, data: bytes, sampler: Any, call: Call) -> None:
        """It is what was saved."""
        if hand.tokens:
            self._trim(hand, 0)
        hand.tokens += saved.tokens.tolist()
        self._open[hand.id] = hand
        hand.state = data
        self._scheduler.add(
            hand.id,
            len(hand.tokens),
            1,
            arrival=perf_counter(),
            priority=hand.priority,
            tenant=hand.tenant,
            space=hand.space,
            interactive=True,
            saved=saved.n_computed,
            tokens=hand,
        )
        self._renew(hand, sampler)
        hand.n_given = saved.n_prompt
        call.finish()

    def ask(self, hand: Hand, sampler: Any, call: Call, now: float) -> None:
        """Sample the next token; with another sampling state, if there is one. `now`: when that was
        asked for."""
        try:
            self._scheduler.ask(hand.id, now)
        except PyllamabatchError as error:
            call.finish(error=error)
            return
        if sampler is not None:
            self._renew(hand, sampler)
        hand.wait_for(call)

    def trim(self, hand: Hand, n: int, sampler: Any, call: Call) -> None:
        """Only the first `n` tokens stay."""
        self._trim(hand, n)
        if n:
            self._renew(hand, sampler)
        call.finish()

    def cancel(self, hand: Hand) -> None:
        """What its owner waits for is not wanted any more: it has not happened."""
        self._take_back(hand, Cancelled("the call was cancelled; the sequence is as it was before"))

    def close(self, hand: Hand, call: Call) -> None:
        self.drop(hand, EngineClosed("the sequence is closed"))
        call.finish()

    def drop(self, hand: Hand, error: Exception) -> None:
        """It is over; its owner, if he waits, gets `error`."""
        if hand.id in self._open:
            self._remove(hand)
        call, hand.call = hand.call, None
        if call is not None:
            call.finish(error=error)

    # -- what steps do

    def stepped(self, step: Step) -> None:
        """The step was computed: some prompts may be complete."""
        for chunk in step.chunks:
            hand = self._slot_table.at[chunk.slot]
            if isinstance(hand, Hand) and not chunk.last:
                self._settle(hand)

    def sampled(self, hand: Hand, token: int, finish: int, logprob: float) -> None:
        if finish == Finish.ERROR:
            error = SamplingError(self._stepper.slot_error(hand.slot))
            self._scheduler.counters.tokens -= 1
            self._scheduler.trim(hand.id, len(hand.tokens))  # the scheduler has counted a token
            hand.spent = True
            self._take_back(hand, error)
            return
        hand.tokens.append(token)
        hand.spent = finish != Finish.NONE
        call, hand.call = hand.call, None
        assert call is not None
        call.finish(Draw(token, None if isnan(logprob) else logprob, Finish(finish)))

    def failed(self, hand: Hand, error: Exception) -> None:
        """A step that it was in has failed."""
        self._take_back(hand, error)

    # -- inside

    def _settle(self, hand: Hand) -> None:
        """The end of a prompt, if all of it is computed."""
        call = hand.call
        if call is None or hand.back_to is None:
            return
        if self._scheduler.sequence(hand.id).remaining == 0:
            hand.call = None
            call.finish()

    def _take_back(self, hand: Hand, error: Exception) -> None:
        call, hand.call = hand.call, None
        if call is None:
            return
        if hand.back_to is None:
            self._scheduler.relax(hand.id)
        else:
            self._trim(hand, hand.back_to)
            hand.spent = True
        call.finish(error=error)

    def _renew(self, hand: Hand, sampler: Any) -> None:
        hand.sampler = sampler
        if hand.slot >= 0:
            self._stepper.put_slot(hand.slot, sampler)
        hand.spent, hand.n_given = False, len(hand.tokens)

    def _trim(self, hand: Hand, n: int) -> None:
        if n:
            self._scheduler.trim(hand.id, n)
        else:
            self._remove(hand)
        del hand.tokens[n:]

    def _remove(self, hand: Hand) -> None:
        self._scheduler.remove(hand.id)
        del self._open[hand.id]
        if hand.slot >= 0:
            self._stepper.clear_slot(hand.slot)
            self._slot_table.free(hand)
