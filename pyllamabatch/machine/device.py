"""FakeDevice: what an engine runs on, in plain Python and without a model.

Stepper, ring and memory at once, as `pyllamabatch.engine.protocols` has them. It holds the tokens
of each sequence's cells, gives each sampled row a token, and counts budgets. What a step takes, and
which token comes next, is a subclass's: `ProfileDevice`, and the fakes of the tests."""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import NoCandidate, SamplingError
from pyllamabatch.kv import Slots
from pyllamabatch.scheduler import Limits
from pyllamabatch.step.ring_reader import CLOCK_OFFSET, Page
from pyllamabatch.step.types import SAMPLE, Finish, Rows, Run

_ROOM_SECONDS = 0.01  # a step waits so long for a reader that is behind
_YIELD_SECONDS = 0.002


class Sampler(Protocol):
    """A sequence's sampling state. generated: tokens so far. logprobs: see `SamplingParams`."""

    generated: list[int]

    @property
    def logprobs(self) -> int | None: ...


C = TypeVar("C")  # a cell
S = TypeVar("S", bound=Sampler)


class SampledRow(NamedTuple):
    """A row's token, -1 with `Finish.ERROR`."""

    slot: int
    token: int
    finish: Finish


class Times(NamedTuple):
    """When a step began, in ns, how long the device has it, and graphs that it reuses."""

    start_ns: int = 0
    device_ns: int = 0
    n_reused: int = 0


@dataclass(frozen=True, slots=True)
class Recorded:
    """A step on its way to the reader."""

    code: int
    n_rows: int
    sampled: Sequence[SampledRow]
    logprobs: frozenset[int]  # slots whose tokens have some
    times: Times
    end_ns: int
    n_reused: int  # graphs, by all steps until then


class FakeDevice(Generic[C, S]):
    """limits: what a step may not exceed. n_steps_max: of a run. n_room: steps between the thread
    that computes and the one that reads. A subclass defines `_cell`, `_token` and `_sample`."""

    def __init__(
        self, limits: Limits, *, n_steps_max: int = 256, n_room: int = 256, n_logprobs_max: int = 20
    ) -> None:
        self.limits = limits
        self.n_steps_max = n_steps_max
        self.n_room = n_room
        self.n_logprobs_max = n_logprobs_max
        n = limits.n_batch
        token, pos, seq = np.zeros((3, n), np.int32)
        self.rows = Rows(token, pos, seq, np.zeros(n, np.uint8))
        self.cells: dict[int, list[C]] = {}  # by sequence
        self.slots: dict[int, S] = {}
        self._next: dict[int, tuple[int, int]] = {}  # token and position, by slot
        self._reported: set[int] = set()  # slots whose results a run gives, finished or not
        self.n_now = 0  # rows of the step that is being computed
        self.n_in_run = 0  # steps before it in its run
        self.called_ns = 0  # when its run was called
        self.recorded: deque[Recorded] = deque()  # and not read
        self.n_recorded = self.n_published = 0
        self._n_reused = 0
        self._interrupted = False
        self._news = threading.Condition()
        self._woken = self._planning = False

    # -- a subclass's

    def _cell(self, token: int) -> C:
        """A new cell, which holds `token`."""
        raise NotImplementedError

    def _token(self, cell: C) -> int:
        raise NotImplementedError

    def _sample(self, slot: int) -> SampledRow:
        """What the sequence's last row gives, which is in its sampling state from now on."""
        raise NotImplementedError

    def _compute(self, slots: Slots, n_before: int, n_pad: int) -> tuple[int, int, Times]:
        """Begin a step: llama_decode's code, rows that are in the cells after it, times. Raises
        what the stepper would."""
        return 0, len(slots) + n_before, Times(perf_counter_ns())

    def _wait(self) -> None:
        """Until the step that was begun last is over."""

    # -- StepRunner

    def put_slot(
        self, seq_id: int, slot: S, next_row: tuple[int, int] | None = None, *, report: bool = False
    ) -> None:
        self.slots[seq_id] = slot
        if next_row is not None:
            self._next[seq_id] = next_row
        (self._reported.add if report else self._reported.discard)(seq_id)

    def take_slot(self, seq_id: int) -> S:
        return self.slots.pop(seq_id)

    def clear_slot(self, seq_id: int) -> None:
        self.slots.pop(seq_id, None)

    @property
    def last_error(self) -> str:
        return ""

    def slot_error(self, seq_id: int) -> SamplingError:
        return NoCandidate(f"nothing to choose for {seq_id}")

    def compute(self, slots: Slots, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Run:
        """As `StreamStepper.compute`."""
        n_done, n_reused, code, first_ns = 0, 0, 0, 0
        results: list[tuple[int, int, int, float]] = []
        began = self.called_ns = perf_counter_ns()
        self._plan(False)
        while n_done < min(n_steps, self.n_steps_max) and not code:
            self._publish()
            if not self._has_room():
                break
            self._write(slots, n_before)
            self.n_now, self.n_in_run = len(slots) + n_before, n_done
            code, n_held, times = self._compute(slots, n_before, n_pad)
            sampled = self._hold(n_held, sample=not code)
            self._wait()
            self._record(code, sampled, times)
            if code:
                break
            n_done += 1
            n_reused += times.n_reused
            if n_done == 1:
                first_ns = perf_counter_ns() - began
            results = self._results(sampled)
            if self._interrupted or any(Finish(finish) for _, _, finish, _ in results):
                break
        self._interrupted = False
        self._plan(True)
        seconds = (perf_counter_ns() - began) * 1e-9
        return Run(code, n_done, n_reused, seconds, results, first_ns * 1e-9)

    def interrupt(self) -> None:
        self._interrupted = True

    def flush(self) -> None:
        self._publish()
        self._plan(False)
        self.wake()

    def _write(self, slots: Slots, n_before: int) -> None:
        """The rows of sequences that decode, behind those of prompts."""
        rows, mine = self.rows, slice(n_before, n_before + len(slots))
        rows.token[mine] = [self._next[slot][0] for slot in slots.tolist()]
        rows.pos[mine] = [self._next[slot][1] for slot in slots.tolist()]
        rows.seq[mine], rows.flags[mine] = slots, SAMPLE

    def _hold(self, n_rows: int, *, sample: bool) -> list[SampledRow]:
        """The first rows are in the cells; what those of them give that are sampled."""
        table = (column[:n_rows].tolist() for column in self.rows)
        found: list[SampledRow] = []
        for token, pos, seq, flags in zip(*table, strict=True):
            held = self.cells.setdefault(seq, [])
            assert pos == len(held), f"row at {pos} of sequence {seq}, which holds {len(held)}"
            held.append(self._cell(token))
            if sample and flags & SAMPLE:
                one = self._sample(seq)
                if one.token >= 0:
                    self._next[seq] = one.token, pos + 1
                found.append(one)
        return found

    def _results(self, sampled: Sequence[SampledRow]) -> list[tuple[int, int, int, float]]:
        """Of the sequences that have finished, and of those that are reported."""
        return [
            (slot, token, int(finish), 0.0 if self._logprobs(slot) is not None else np.nan)
            for slot, token, finish in sampled
            if finish or slot in self._reported
        ]

    def _logprobs(self, slot: int) -> int | None:
        return self.slots[slot].logprobs

    def _record(self, code: int, sampled: Sequence[SampledRow], times: Times) -> None:
        given = [one for one in sampled if one.finish in (Finish.NONE, Finish.LENGTH)]
        logprobs = frozenset(one.slot for one in given if self._logprobs(one.slot) is not None)
        end = perf_counter_ns()
        with self._news:
            self._n_reused += times.n_reused
            self.recorded.append(
                Recorded(code, self.n_now, given, logprobs, times, end, self._n_reused)
            )
            self.n_recorded += 1

    def _publish(self) -> None:
        with self._news:
            self.n_published = self.n_recorded
            self._news.notify_all()

    def _plan(self, planning: bool) -> None:
        with self._news:
            self._planning = planning
            self._news.notify_all()

    def _has_room(self) -> bool:
        """For another step, in some time."""
        with self._news:
            return self._news.wait_for(lambda: len(self.recorded) < self.n_room, _ROOM_SECONDS)

    # -- RingReader

    def wait(self, n_wanted: int, timeout: float) -> int:
        with self._news:
            self._news.wait_for(lambda: self.n_published >= n_wanted or self._woken, timeout)
            self._woken = False
            return self.n_published

    def wake(self) -> None:
        with self._news:
            self._woken = True
            self._news.notify_all()

    def yield_to_compute(self) -> None:
        with self._news:
            self._news.wait_for(lambda: not self._planning, _YIELD_SECONDS)

    def read(self, until: int, page: Page) -> int:
        room = page.struct.n_steps_max - page.struct.n_steps
        with self._news:
            n_taken = self.n_recorded - len(self.recorded)
            most = min(room, min(until, self.n_published) - n_taken)
            steps = [self.recorded[i] for i in range(max(0, most))]
        for step in steps:
            _write_step(page, step)
        with self._news:
            for _ in steps:
                self.recorded.popleft()
            self._news.notify_all()
        return len(steps)

    # -- KvMemory

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        assert p1 == -1, "nothing is taken out of the middle"
        self.cells[seq_id] = self.cells.get(seq_id, [])[: max(p0, 0)]
        if not self.cells[seq_id]:
            del self.cells[seq_id]

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        assert not self.cells.get(dst), f"sequence {dst} has cells"
        self.cells[dst] = self.cells[src][: len(self.cells[src]) if p1 < 0 else p1]

    def pos_max(self, seq_id: int) -> int:
        return len(self.cells.get(seq_id, ())) - 1

    # -- the state of a sequence

    def state_seq_get(self, seq_id: int, loras: Any = None) -> bytes:
        tokens = [self._token(cell) for cell in self.cells.get(seq_id, ())]
        return np.array(tokens, np.int32).tobytes()

    def state_seq_set(self, data: bytes, seq_id: int, loras: Any = None) -> None:
        assert not self.cells.get(seq_id), f"sequence {seq_id} has cells"
        tokens = np.frombuffer(data, np.int32).tolist()
        self.cells[seq_id] = [self._cell(token) for token in tokens]

    @property
    def n_held(self) -> int:
        """Cells that all sequences hold."""
        return sum(map(len, self.cells.values()))


def _write_step(page: Page, step: Recorded) -> None:
    """At the page's end."""
    at = page.struct.n_steps
    info, times = page.steps.table[at], step.times
    info["t_start_ns"] = times.start_ns - int(CLOCK_OFFSET * 1e9)
    info["code"], info["n_rows"] = step.code, step.n_rows
    info["decode_ns"] = times.device_ns
    info["sync_ns"] = max(0, step.end_ns - times.start_ns - times.device_ns)
    info["n_outputs"] = info["n_results"] = len(step.sampled)
    info["n_reused"] = step.n_reused
    page.struct.n_steps += 1
    if not step.sampled:
        return
    slots = np.array([one.slot for one in step.sampled])
    column: npt.NDArray[np.int32] = page.n_tokens[slots]
    page.token[slots, column] = [one.token for one in step.sampled]
    page.step[slots, column] = at
    page.n_tokens[slots] += 1
    for one, i in zip(step.sampled, column.tolist(), strict=True):
        if one.slot in step.logprobs:
            _write_logprob(page, one, i)


def _write_logprob(page: Page, one: SampledRow, at: int) -> None:
    """The token is certain, and there is no other."""
    assert page.logprob is not None
    assert page.n_top is not None
    assert page.top_token is not None
    assert page.top_logprob is not None
    page.logprob[one.slot, at] = 0.0
    page.n_top[one.slot, at] = min(1, page.top_token.shape[-1])
    page.top_token[one.slot, at, :1] = one.token
    page.top_logprob[one.slot, at, :1] = 0.0
