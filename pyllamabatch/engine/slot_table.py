"""Who sits in which slot: a request's way through the engine, between two steps.

Everything that a request takes with it when it comes, leaves for a while or ends is handled in one
place each: its sampler, its cells, its stream.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..llama.lora_set import LoraSet
from ..scheduler import Scheduler
from ..step.trace import StepTrace
from .hand import Hand
from .output_processor import Delivery
from .protocols import StepperLike
from .request import Request, Tokens
from .stream import FinishReason


class Seats:
    """The decoder thread's; every method is called with its `state` held, between two steps.
    `left_line()`: a request waits for its first slot no more."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepperLike,
        delivery: Delivery,
        trace: StepTrace | None,
        left_line: Callable[[], None] = lambda: None,
    ) -> None:
        self.at: list[Request | Hand | None] = [None] * scheduler.n_slots  # by slot
        self.open: dict[int, Request] = {}  # by id, from `add` to `end`
        self.hands: dict[int, Hand] = {}  # hand-driven ones that know tokens
        self._left_line = left_line
        self._scheduler = scheduler
        self._stepper = stepper
        self._delivery = delivery
        self._trace = trace

    def add(self, request: Request) -> None:
        """It waits in line."""
        self.open[request.id] = request
        self._scheduler.add(
            request.id,
            len(request.prompt),
            request.params.max_tokens,
            arrival=request.stream.submitted_at,
            space=request.space,
            priority=request.terms.priority,
            tenant=request.terms.tenant,
            deadline=request.terms.deadline,
            itl_target=request.terms.itl_target,
        )

    def tokens_of(self, id: int) -> Tokens:
        """All that a sequence knows: what it was given and what was sampled."""
        guest = self._guest(id)
        if isinstance(guest, Hand) or guest.slot < 0:
            return np.array(guest.tokens, dtype=np.int32)
        sampler = self._stepper.take_slot(guest.slot)
        tokens = np.concatenate((guest.prompt, sampler.tokens()), dtype=np.int32)
        self._stepper.put_slot(guest.slot, sampler)
        return tokens

    def admit(self, id: int, slot: int) -> None:
        """The scheduler has given it a slot."""
        guest = self._guest(id)
        guest.slot = slot
        self._stepper.put_slot(slot, guest.sampler)
        guest.sampler = None
        self.at[slot] = guest
        if isinstance(guest, Request):
            self._delivery.place(self._stepper.n_recorded, slot, guest.stream)
            if not guest.seated:
                guest.seated = True
                self._left_line()
        if self._trace is not None:
            self._trace.ids[slot] = id

    def leave(self, id: int, slot: int) -> None:
        """The scheduler has preempted it: the sampling state is kept, and what was generated comes
        behind the prompt."""
        guest = self._guest(id)
        guest.sampler = self._stepper.take_slot(slot)
        guest.unseated()
        self.free(guest)

    def end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        """It is over, wherever it was; the stream ends behind all that was sampled for it."""
        self._scheduler.remove(request.id, worth=reason != "error")
        if request.slot >= 0:
            self._stepper.clear_slot(request.slot)
            self.free(request)
        self.retire(request, reason, stop=stop, error=error)

    def retire(
        self,
        request: Request,
        reason: FinishReason,
        *,
        stop: int | None = None,
        error: Exception | None = None,
    ) -> None:
        """`end` of a request that holds nothing, or of an engine that is broken."""
        del self.open[request.id]
        if not request.seated:
            self._left_line()
        self._delivery.end(self._stepper.n_recorded, request.stream, reason, stop, error)

    def free(self, guest: Request | Hand) -> None:
        """It sits nowhere any more."""
        self.at[guest.slot] = None
        if isinstance(guest, Request):
            self._delivery.leave(self._stepper.n_recorded, guest.slot)
        guest.slot = -1

    def lora(self, id: int) -> LoraSet:
        """The adapters that a sequence is computed with."""
        return self._guest(id).lora

    def lora_at(self, slot: int) -> LoraSet:
        guest = self.at[slot]
        assert guest is not None
        return guest.lora

    def _guest(self, id: int) -> Request | Hand:
        return self.open.get(id) or self.hands[id]
