"""StreamSink: a request whose tokens go to a stream, and which ends by itself."""

from collections.abc import Callable
from types import TracebackType

from ..errors import SamplingError
from ..step.types import Finish
from .output_processor import OutputProcessor
from .request import NO_SINK, Request, Sink
from .results import FinishReason
from .slot_table import SlotTable
from .stream import Stream


class StreamSink(Sink):
    """`left_queue()` is called once: the request has had a slot, or has ended without one."""

    __slots__ = ("_left_queue", "_output", "_table", "_waits", "request", "stream")

    def __init__(
        self,
        request: Request,
        stream: Stream,
        table: SlotTable,
        output: OutputProcessor,
        left_queue: Callable[[], None],
    ) -> None:
        self.stream = stream
        self.request = request
        self._table = table
        self._output = output
        self._left_queue = left_queue
        self._waits = True  # for its first slot

    def placed(self) -> None:
        if self._waits:
            self.stream._admitted(self._table.scheduler.computed(self.request.slot))
        self._output.place(self.request.slot, self.stream)
        self._leave_queue()

    def computed(self) -> None:
        self.stream._prompt_computed(self._table.scheduler.computed(self.request.slot))

    def left(self, slot: int) -> None:
        self._output.leave(slot)

    def sampled(
        self, token: int, finish: Finish, logprob: float, error: SamplingError | None
    ) -> None:
        if error is not None:
            self.failed(error)
        elif finish == Finish.LENGTH:
            self.cancel("length")
        else:  # an end-of-generation or stop token
            self._end("stop", stop=token)

    def drafted(self, n_drafts: int, n_drafted: int, n_accepted: int) -> None:
        self.stream._drafted(n_drafts, n_drafted, n_accepted)

    def failed(self, error: Exception) -> None:
        self._end("error", error=error)

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        self._end(reason)

    def abandon(self, error: Exception, lines: TracebackType | None) -> None:
        self.stream._traceback = lines
        del self._table.requests[self.request.id]
        self._tell_end("error", error=error)

    def _end(
        self, reason: FinishReason, *, stop: int | None = None, error: Exception | None = None
    ) -> None:
        self._table.end(self.request, worth=reason != "error")
        self._tell_end(reason, stop=stop, error=error)

    def _tell_end(
        self, reason: FinishReason, *, stop: int | None = None, error: Exception | None = None
    ) -> None:
        """The stream ends behind all that was sampled for it."""
        self._leave_queue()
        self._output.end(self.stream, reason, stop, error)
        self.request.sink = NO_SINK  # which has the request: a cycle would outlive both

    def _leave_queue(self) -> None:
        if self._waits:
            self._waits = False
            self._left_queue()
