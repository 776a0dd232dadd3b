"""A machine that computes nothing, for the time that the engine itself takes."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.engine.core import CoreOptions, EngineCore
from pyllamabatch.engine.detokenizer import Pieces
from pyllamabatch.engine.protocols import Device
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.scheduler import Limits, Policy, Scheduler
from pyllamabatch.step.ring_reader import Page
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Finish
from pyllamabatch.step.trace import StepTrace
from pyllamabatch.step.types import Run

N_PROMPT = 8
TOKEN = 7


class NullSlot:
    """Sampling state of a request for so many tokens."""

    def __init__(self, budget: int) -> None:
        self.budget = self.left = budget

    def tokens(self) -> npt.NDArray[np.int32]:
        return np.full(self.budget - self.left, TOKEN, np.int32)


class NullMachine:
    """Stepper, ring and memory: each step gives every sequence the same token at once. A request
    ends when its budget is used up. `own_ns`: CPU time that the machine itself has taken."""

    n_steps_max = 256
    n_logprobs_max = 20
    names = applied = ()  # of adapters

    def __init__(self, n_slots: int, n_rows: int, most: int) -> None:
        self.own_ns = 0
        self.n_recorded = self.n_published = 0
        self.rows = SimpleNamespace(
            token=np.zeros(n_rows, np.int32),
            pos=np.zeros(n_rows, np.int32),
            seq=np.zeros(n_rows, np.int32),
            flags=np.zeros(n_rows, np.uint8),
        )
        self._most = most  # steps of a run
        self._left = np.zeros(n_slots, np.int64)  # budgets
        self._slots: dict[int, NullSlot] = {}
        self._unread: list[tuple[Any, int]] = []  # slots that sampled, and how often
        self._n_read = 0

    def compute(self, slots: Any, n_steps: int, n_more: int = 0) -> Run:
        began = time.thread_time_ns()
        self.n_published = self.n_recorded
        if n_more:
            rows = slice(len(slots), len(slots) + n_more)
            sampled = self.rows.seq[rows][self.rows.flags[rows] != 0]
            slots, n_steps = np.concatenate((slots, sampled)), 1
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
        while self._unread and self._n_read < until:
            slots, n_steps = self._unread[0]
            if n_steps > page.struct.n_steps_max - page.struct.n_steps:
                break
            for i in range(n_steps):
                at = page.n_tokens[slots]
                page.token[slots, at], page.step[slots, at] = TOKEN, page.struct.n_steps + i
                page.n_tokens[slots] += 1
            page.struct.n_steps += n_steps
            self._n_read += n_steps
            n += n_steps
            del self._unread[0]
        self.own_ns += time.thread_time_ns() - began
        return n

    def flush(self) -> None:
        self.n_published = self.n_recorded

    def wait(self, n_wanted: int, timeout: float) -> int:
        return self.n_published

    def interrupt(self) -> None: ...
    def wake(self) -> None: ...
    def yield_to_compute(self) -> None: ...

    def renew(self) -> None:
        raise AssertionError("it never fails")

    def put_slot(self, seq_id: int, slot: NullSlot) -> None:
        self._slots[seq_id], self._left[seq_id] = slot, slot.left

    def take_slot(self, seq_id: int) -> NullSlot:
        slot = self._slots.pop(seq_id)
        slot.left = int(self._left[seq_id])
        return slot

    def clear_slot(self, seq_id: int) -> None: ...

    def slot_error(self, seq_id: int) -> str:
        return ""

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None: ...

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None: ...

    def pos_max(self, seq_id: int) -> int:
        return -1

    def state_seq_get(self, seq_id: int, loras: Any = None) -> bytes:
        raise NotImplementedError("nobody is preempted")

    def state_seq_set(self, data: bytes, seq_id: int, loras: Any = None) -> None:
        raise NotImplementedError("nobody is preempted")


class NullEngine:
    """The decoder and the delivery thread's work on a machine that computes nothing, in one thread
    and in turns. `stops`: every request has these stop strings; `read`: somebody waits for each
    token of each stream."""

    def __init__(
        self,
        n_slots: int,
        most: int,
        *,
        policy: Policy | None = None,
        stops: tuple[str, ...] = (),
        read: bool = False,
    ) -> None:
        limits = Limits(2048, 512, n_slots, n_cells=2**40, n_cells_seq=2**40)
        self.machine = NullMachine(n_slots, limits.n_batch, most)
        scheduler = Scheduler(limits, policy)
        trace = StepTrace(4096, n_slots)
        machine = self.machine
        device = Device(machine, machine, machine, machine, lambda: None)
        self._core = EngineCore(scheduler, device, CoreOptions(trace))
        self._pieces = Pieces(lambda tokens: [b" word"] * len(tokens))
        self._stops = stops
        self._read = read
        self._n_requests = 0

    def submit(self, n_tokens: int) -> None:
        self._n_requests += 1
        params = SamplingParams(max_tokens=n_tokens, stop=self._stops)
        core, prompt = self._core, np.full(N_PROMPT, TOKEN, np.int32)
        host = Host(core.cancel, core.output_processor.watch)
        stream = Stream(self._n_requests, N_PROMPT, params, self._pieces, host)
        slot = NullSlot(n_tokens)
        request = Request(self._n_requests, prompt, params, slot, budget=n_tokens)
        core.submit([core.stream_to(request, stream)])

    @property
    def n_finished(self) -> int:
        return sum(self._core.output_processor.finished.values())

    def turn(self) -> tuple[int, int]:
        """CPU time in ns that the two threads would have taken for one turn each, without the
        machine's: the decoder's, the delivery thread's."""
        decoder, machine = self._core, self.machine
        if self._read:
            running = (one for one in decoder.table.requests.values() if one.slot >= 0)
            decoder.output_processor._watched.update(one.sink.stream for one in running)
        machine.own_ns, began = 0, time.thread_time_ns()
        if decoder.commands or not decoder.scheduler.idle:
            if decoder.wait_for_work():
                decoder.step()
        else:
            machine.flush()
        decoder_ns = time.thread_time_ns() - began - machine.own_ns
        machine.own_ns, began = 0, time.thread_time_ns()
        decoder.output_processor.turn()
        return decoder_ns, time.thread_time_ns() - began - machine.own_ns
