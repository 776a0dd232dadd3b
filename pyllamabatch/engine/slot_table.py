"""SlotTable: which request is in which slot, and its way in and out."""

from ..llama.lora import LoraSet
from ..scheduler import Scheduler
from ..scheduler.invariance import Computed
from ..step.trace import StepTrace
from .draft_feeds import Feed
from .protocols import StepRunner
from .request import Request


class SlotTable:
    """The core thread's. Every method is called with the core's `state` held, between two steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        stepper: StepRunner,
        trace: StepTrace | None = None,
        feed: Feed | None = None,
    ) -> None:
        self.at: list[Request | None] = [None] * scheduler.n_slots  # by slot
        self.requests: dict[int, Request] = {}  # by id, from `add` to `end`
        self.interactive: set[int] = set()  # ids of those that have no budget
        self.scheduler = scheduler
        self.stepper = stepper
        self._trace = trace
        self._feed = feed or Feed()

    def add(self, request: Request, *, saved: int = 0, restored: Computed | None = None) -> None:
        """It waits for a slot. `saved`: tokens that its `state` holds. `restored`: see
        `Scheduler.add`."""
        self.requests[request.id] = request
        if request.budget is None:
            self.interactive.add(request.id)
        options = request.options
        self.scheduler.add(
            request.id,
            len(request.tokens),
            request.budget or 1,
            arrival=request.arrival,
            priority=options.priority,
            tenant=options.tenant,
            deadline=options.deadline,
            ttft_target=options.ttft_target,
            itl_target=options.itl_target,
            space=options.space,
            interactive=request.budget is None,
            saved=saved,
            restored=restored,
            tokens=request,
        )

    def admit(self, id: int, slot: int) -> None:
        """The scheduler has given it a slot."""
        request = self.at[slot] = self.requests[id]
        request.slot = slot
        report = request.budget is None
        self.stepper.put_slot(slot, request.sampler, request.next_row, report=report)
        self._feed.begin(slot, request)
        request.sink.placed()
        if self._trace is not None:
            self._trace.ids[slot] = id

    def leave(self, id: int, slot: int) -> None:
        """The scheduler has taken it out of its slot. Its sampling state goes with it."""
        request = self.requests[id]
        request.known()
        request.sampler = self.stepper.take_slot(slot)
        self._free(request)
        if self._trace is not None:
            self._trace.preempted[id] = slot

    def move(self, id: int, source: int, slot: int) -> None:
        """The scheduler has given it another slot."""
        self.leave(id, source)
        self.admit(id, slot)
        if self._trace is not None:
            del self._trace.preempted[id]

    def end(self, request: Request, *, worth: bool = True) -> None:
        """It is over, wherever it was. `worth`: its cells are right, and may stay cached."""
        wanted = request.params.max_tokens == 0  # it was computed for them
        self.scheduler.remove(request.id, worth=worth, wanted=wanted)
        del self.requests[request.id]
        self.interactive.discard(request.id)
        if request.slot >= 0:
            self.stepper.clear_slot(request.slot)
            self._free(request)
        self._feed.ended(request.id)

    def in_slot(self, slot: int) -> Request:
        request = self.at[slot]
        assert request is not None
        return request

    def lora_at(self, slot: int) -> LoraSet:
        """The adapters that the request in `slot` is computed with."""
        return self.in_slot(slot).options.lora

    def _free(self, request: Request) -> None:
        slot, request.slot = request.slot, -1
        self.at[slot] = None
        self._feed.leave(slot)
        request.sink.left(slot)
