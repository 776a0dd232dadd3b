"""Who sits in which slot: a request's way through the engine, between two steps.

Everything that a request takes with it when it comes, leaves for a while or ends is handled in one
place each: its sampler, its cells, its stream.
"""

from __future__ import annotations

import numpy as np

from .delivery import Delivery
from .machine import StepperLike
from .request import Request, Tokens
from .scheduler import Scheduler
from .stream import FinishReason
from .trace import StepTrace


class Seats:
    """The decoder thread's; every method is called with its `state` held, between two steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepperLike,
        delivery: Delivery,
        trace: StepTrace | None,
    ) -> None:
        self.at: list[Request | None] = [None] * scheduler.n_slots  # by slot
        self.open: dict[int, Request] = {}  # by id, from `add` to `end`
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
        )

    def tokens_of(self, id: int) -> Tokens:
        """All that a request knows: its prompt and what was sampled."""
        request = self.open[id]
        if request.slot < 0:
            return request.tokens
        sampler = self._stepper.take_slot(request.slot)
        tokens = np.concatenate((request.prompt, sampler.tokens()), dtype=np.int32)
        self._stepper.put_slot(request.slot, sampler)
        return tokens

    def admit(self, id: int, slot: int) -> None:
        """The scheduler has given it a slot."""
        request = self.open[id]
        request.slot = slot
        self._stepper.put_slot(slot, request.sampler)
        request.sampler = None
        self.at[slot] = request
        self._delivery.place(self._stepper.n_recorded, slot, request.stream)
        if self._trace is not None:
            self._trace.ids[slot] = id

    def leave(self, id: int, slot: int) -> None:
        """The scheduler has preempted it: the sampling state is kept, and what was generated comes
        behind the prompt."""
        request = self.open[id]
        request.sampler = sampler = self._stepper.take_slot(slot)
        request.tokens = np.concatenate((request.prompt, sampler.tokens()), dtype=np.int32)
        self._free(request)

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
            self._free(request)
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
        self._delivery.end(self._stepper.n_recorded, request.stream, reason, stop, error)

    def _free(self, request: Request) -> None:
        self.at[request.slot] = None
        self._delivery.leave(self._stepper.n_recorded, request.slot)
        request.slot = -1
