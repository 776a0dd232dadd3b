"""Who sits in which slot: a request's way through the engine, between two steps.

Everything that a request takes with it when it comes, leaves for a while or ends is handled in one
place each: its sampler, its cells, its stream.
"""

from __future__ import annotations

from collections.abc import Callable

from ..llama.lora import LoraSet
from ..scheduler import Scheduler
from ..step.trace import StepTrace
from .hand import Hand
from .output_processor import OutputProcessor
from .protocols import StepperLike
from .request import Request
from .stream import FinishReason


class SlotTable:
    """The core thread's; every method is called with its `state` held, between two steps.
    `left_line()`: a request waits for its first slot no more."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepperLike,
        delivery: OutputProcessor,
        trace: StepTrace | None,
        left_line: Callable[[], None] = lambda: None,
    ) -> None:
        self.at: list[Request | Hand | None] = [None] * scheduler.n_slots  # by slot
        self.open: dict[int, Request] = {}  # by id, from `add` to `end`
        self.hands: dict[int, Hand] = {}  # interactive ones that know tokens
        self._left_line = left_line
        self._scheduler = scheduler
        self._stepper = stepper
        self._output_processor = delivery
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
            tokens=request,
        )

    def admit(self, id: int, slot: int) -> None:
        """The scheduler has given it a slot."""
        occupant = self._occupant(id)
        occupant.slot = slot
        self._stepper.put_slot(slot, occupant.sampler)
        self.at[slot] = occupant
        if isinstance(occupant, Request):
            self._output_processor.place(self._stepper.n_recorded, slot, occupant.stream)
            if not occupant.seated:
                occupant.seated = True
                self._left_line()
        if self._trace is not None:
            self._trace.ids[slot] = id

    def leave(self, id: int, slot: int) -> None:
        """The scheduler has preempted it: the sampling state is kept, and what was generated comes
        behind the prompt."""
        occupant = self._occupant(id)
        occupant.sampler = self._stepper.take_slot(slot)
        occupant.unseated()
        self.free(occupant)

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
        self._output_processor.end(self._stepper.n_recorded, request.stream, reason, stop, error)

    def free(self, occupant: Request | Hand) -> None:
        """It sits nowhere any more."""
        self.at[occupant.slot] = None
        if isinstance(occupant, Request):
            self._output_processor.leave(self._stepper.n_recorded, occupant.slot)
        occupant.slot = -1

    def lora(self, id: int) -> LoraSet:
        """The adapters that a sequence is computed with."""
        return self._occupant(id).lora

    def lora_at(self, slot: int) -> LoraSet:
        occupant = self.at[slot]
        assert occupant is not None
        return occupant.lora

    def _occupant(self, id: int) -> Request | Hand:
        return self.open.get(id) or self.hands[id]
