"""An engine on a device that computes nothing, for the time that the engine itself takes."""

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.engine.core import CoreOptions, EngineCore
from pyllamabatch.engine.detokenizer import Pieces
from pyllamabatch.engine.protocols import Device
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.scheduler import Limits, Scheduler
from pyllamabatch.step.ring_reader import Page
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Finish
from pyllamabatch.step.trace import StepTrace
from pyllamabatch.step.types import Run
from tests.support.engine_fakes import FakeMachine

N_PROMPT = 8
TOKEN = 7


class Budget:
    """Sampling state of a request for so many tokens."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = self.left = n_tokens

    def tokens(self) -> npt.NDArray[np.int32]:
        return np.full(self.n_tokens - self.left, TOKEN, np.int32)


class NullMachine(FakeMachine):
    """A fake machine without cells: each step gives every sequence the same token at once, and a
    request ends when its budget is used up. `own_ns`: CPU time that the machine itself has taken.
    """

    def __init__(self, limits: Limits, most: int) -> None:
        """`most`: steps of a run that is asked for more."""
        super().__init__(limits, n_steps_max=256, n_logprobs_max=20)
        self.own_ns = 0
        self._most = most
        self.n_taken = 0
        self._left = np.zeros(limits.n_seq_max, np.int64)  # budgets
        self._budgets: dict[int, Budget] = {}
        self._unread: list[tuple[Any, int]] = []  # slots that sampled, and how often

    def compute(self, slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Run:
        began = time.thread_time_ns()
        self.n_published = self.n_recorded
        n = min(n_steps, self._most)
        if len(slots):
            n = min(n, int(self._left[slots].min()))
        self._left[slots] -= n
        over = slots[self._left[slots] == 0].tolist()
        self.n_recorded += n
        self._unread.append((slots, n))
        run = Run(0, n, 0, 1e-3 * n, [(slot, TOKEN, int(Finish.LENGTH), np.nan) for slot in over])
        self.own_ns += time.thread_time_ns() - began
        return run

    def read(self, until: int, page: Page) -> int:
        began, n = time.thread_time_ns(), 0
        while self._unread and self.n_taken < until:
            slots, n_steps = self._unread[0]
            if n_steps > page.struct.n_steps_max - page.struct.n_steps:
                break
            for i in range(n_steps):
                at = page.n_tokens[slots]
                page.token[slots, at], page.step[slots, at] = TOKEN, page.struct.n_steps + i
                page.n_tokens[slots] += 1
            page.struct.n_steps += n_steps
            self.n_taken += n_steps
            n += n_steps
            del self._unread[0]
        self.own_ns += time.thread_time_ns() - began
        return n

    def flush(self) -> None:
        self.n_published = self.n_recorded

    def wait(self, n_wanted: int, timeout: float) -> int:
        return self.n_published

    def put_slot(
        self,
        seq_id: int,
        slot: Any,
        next_row: tuple[int, int] | None = None,
        *,
        report: bool = False,
    ) -> None:
        self._budgets[seq_id], self._left[seq_id] = slot, slot.left

    def take_slot(self, seq_id: int) -> Any:
        budget = self._budgets.pop(seq_id)
        budget.left = int(self._left[seq_id])
        return budget

    def clear_slot(self, seq_id: int) -> None: ...

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None: ...


class NullEngine:
    """The work of the core's and the output thread on such a machine, in one thread and in turns.
    `stops`: every request has these stop strings; `read`: each token of each stream has a reader.
    """

    def __init__(
        self, n_slots: int, most: int, *, stops: tuple[str, ...] = (), read: bool = False
    ) -> None:
        limits = Limits(2048, 512, n_slots, n_cells=2**40, n_cells_seq=2**40)
        self.machine = machine = NullMachine(limits, most)
        self.streams: dict[int, Stream] = {}  # by request id
        device = Device(machine, machine, machine, machine, lambda: None)
        self._core = EngineCore(Scheduler(limits), device, CoreOptions(StepTrace(4096, n_slots)))
        self._pieces = Pieces(lambda tokens: [b" word"] * len(tokens))
        self._stops = stops
        self._read = read

    def submit(self, n_tokens: int) -> None:
        id, core = len(self.streams) + 1, self._core
        params = SamplingParams(max_tokens=n_tokens, stop=self._stops)
        host = Host(core.cancel, core.output_processor.watch)
        stream = Stream(id, N_PROMPT, params, self._pieces, host, time.perf_counter())
        self.streams[id] = stream
        prompt = np.full(N_PROMPT, TOKEN, np.int32)
        request = Request(id, prompt, params, Budget(n_tokens), budget=n_tokens)
        core.submit([core.stream_to(request, stream)])

    @property
    def n_finished(self) -> int:
        return sum(self._core.output_processor.finished.values())

    def turn(self) -> tuple[int, int]:
        """CPU time in ns that the two threads would have taken for one turn each, without the
        machine's: the core's, the output thread's."""
        core, machine = self._core, self.machine
        if self._read:
            for id, request in core.table.requests.items():
                if request.slot >= 0:
                    self.streams[id]._watch()  # as a reader that has all there is
        machine.own_ns, began = 0, time.thread_time_ns()
        if core.commands or not core.scheduler.idle:
            if core.wait_for_work():
                core.step()
        else:
            machine.flush()
        core_ns = time.thread_time_ns() - began - machine.own_ns
        machine.own_ns, began = 0, time.thread_time_ns()
        core.output_processor.turn()
        return core_ns, time.thread_time_ns() - began - machine.own_ns
