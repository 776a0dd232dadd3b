"""A stepper and a memory in plain Python, to drive the core with no model and with any fault.

The next token of a sequence is a checksum of all tokens that its cells hold: one wrong token,
position or neighbour and everything after it differs from `solo`.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyllamabatch.engine.core import CoreOptions, EngineCore
from pyllamabatch.engine.detokenizer import Pieces
from pyllamabatch.engine.options import RequestOptions
from pyllamabatch.engine.output_processor import PAGE_STEPS
from pyllamabatch.engine.protocols import Device
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.errors import ContextCreateError, StateError, UnsupportedOperation
from pyllamabatch.kv import Sharing, SwapChoice, SwapSpace
from pyllamabatch.llama.lora import LoraNames, LoraSet
from pyllamabatch.scheduler import KvOptions, Limits, Policy, Scheduler
from pyllamabatch.step.ring_reader import Page
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import SAMPLE, Finish
from pyllamabatch.step.types import Run

EOG = 0
N_VOCAB = 997


def next_token(tokens: Sequence[int], lora: LoraSet = ()) -> int:
    text = np.asarray(tokens, dtype=np.int32).tobytes() + (repr(lora).encode() if lora else b"")
    return zlib.crc32(text) % N_VOCAB


def solo(
    prompt: Sequence[int], params: SamplingParams, lora: LoraSet = ()
) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that is alone in the world."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens:
        token = next_token(tokens, lora)
        if token == EOG or token in params.stop_token_ids:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


@dataclass
class Slot:
    """Sampling state: it must survive a preemption."""

    params: SamplingParams
    lora: LoraSet = ()
    generated: list[int] = field(default_factory=list)

    def tokens(self) -> Any:
        return np.array(self.generated, dtype=np.int32)


class Identity:
    """Of a cell. `lora`: the adapters that it was computed with."""

    def __init__(self, lora: LoraSet) -> None:
        self.lora = lora


Cell = tuple[int, Identity]  # a token and its cell
Fault = Callable[[int], object]  # step number -> None, a code, or an exception
Sampled = tuple[int, int, int]  # slot, token, finish


@dataclass
class FakeMachine:
    """Stepper, ring and memory at once. `fault`: what goes wrong at which step; a code of 2 or
    below -1 leaves the rows before the middle of the batch in the cache, as libllama may.
    `meanwhile`: what other threads do while a step is computed. `n_steps_max`: of a run."""

    limits: Limits
    fault: Fault = lambda step: None
    n_steps_max: int = 1
    meanwhile: Callable[[int], object] = lambda step: None
    barren: bool = False  # no fresh context can be made
    n_renewed: int = 0
    names: tuple[str, ...] = ()  # of adapters
    applied: LoraSet = ()
    n_applied: int = 0  # changes of these
    n_now: int = 0  # rows of the step that is being computed
    n_room: int = 10**9  # steps that the ring holds
    runs: list[int] = field(default_factory=list)  # steps of each run of decoding alone
    rung: bool = False
    sharing: Sharing = field(default_factory=Sharing)  # what its memory can do
    stubborn: bool = False  # it refuses every copy
    lossy: bool = False  # its copies are empty
    cells: dict[int, list[Cell]] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    n_steps: int = 0
    closed: bool = False
    failing: set[int] = field(default_factory=set)  # slots whose next sample is an error
    n_logprobs_max: int = 0
    recorded: list[tuple[int, list[Sampled]]] = field(default_factory=list)  # by step: code, result
    n_published: int = 0
    n_taken: int = 0
    news: threading.Condition = field(default_factory=threading.Condition)
    woken: bool = False

    def __post_init__(self) -> None:
        n = self.limits.n_batch
        self.rows = SimpleNamespace(
            token=np.zeros(n, np.int32),
            pos=np.zeros(n, np.int32),
            seq=np.zeros(n, np.int32),
            flags=np.zeros(n, np.uint8),
        )

    # -- Stepper

    def put_slot(self, seq_id: int, slot: Slot) -> None:
        assert seq_id not in self.slots
        self.slots[seq_id] = slot

    def take_slot(self, seq_id: int) -> Slot:
        return self.slots.pop(seq_id)

    def clear_slot(self, seq_id: int) -> None:
        del self.slots[seq_id]

    def slot_error(self, seq_id: int) -> str:
        return f"nothing to choose for {seq_id}"

    @property
    def n_recorded(self) -> int:
        return len(self.recorded)

    def compute(self, slots: Any, n_steps: int, n_more: int = 0) -> Run:
        n, n_done, code, finished = len(slots), 0, 0, []
        assert 1 <= n + n_more <= self.limits.n_batch
        assert n_steps == 1 or not n_more
        while n_done < min(n_steps, self.n_steps_max) and not code:
            self._publish()
            if len(self.recorded) - self.n_taken >= self.n_room:
                break
            self._write(slots)
            self.n_steps, self.n_now = self.n_steps + 1, n + n_more
            fault = self.fault(self.n_steps)
            self.meanwhile(self.n_steps)
            if isinstance(fault, BaseException):
                if n_done == 0:
                    raise fault
                fault = -1019
            sampled = self._decode(n + n_more, fault)
            code = int(fault or 0)  # type: ignore[call-overload]
            self.recorded.append((code, sampled))
            if code == 0:
                n_done += 1
                finished = [record for record in sampled if record[2]]
                if finished or self.rung:
                    break
        self.rung = False
        if not n_more:
            self.runs.append(n_done)
        return Run(code, n_done, 0, 1e-3 * n_done, [(*record, np.nan) for record in finished])

    def interrupt(self) -> None:
        self.rung = True

    def flush(self) -> None:
        self._publish()
        self.wake()

    def _publish(self) -> None:
        with self.news:
            self.n_published = len(self.recorded)
            self.news.notify_all()

    def _write(self, slots: Any) -> None:
        rows, n = self.rows, len(slots)
        rows.token[:n] = [self.slots[slot].generated[-1] for slot in slots.tolist()]
        rows.pos[:n] = [len(self.cells[slot]) for slot in slots.tolist()]
        rows.seq[:n], rows.flags[:n] = slots, SAMPLE

    def _decode(self, n_rows: int, fault: object) -> list[Sampled]:
        rows = self.rows
        if fault in (1, -1):
            return []
        results = []
        for i in range(n_rows // 2 if fault else n_rows):
            seq, token, pos = int(rows.seq[i]), int(rows.token[i]), int(rows.pos[i])
            held = self.cells.setdefault(seq, [])
            assert pos == len(held), (seq, pos, held)
            assert self.slots[seq].lora == self.applied
            held.append((token, Identity(self.applied)))
            assert len(held) <= self.limits.n_cells_seq
            if rows.flags[i] & SAMPLE and not fault:
                results.append(self._sample(seq))
        if self.limits.unified:
            assert self.n_held <= self.limits.n_cells
        return results

    def _sample(self, seq: int) -> Sampled:
        slot = self.slots[seq]
        if seq in self.failing:
            self.failing.discard(seq)
            return seq, -1, Finish.ERROR
        assert {cell.lora for _, cell in self.cells[seq]} == {slot.lora}
        token = next_token([token for token, _ in self.cells[seq]], slot.lora)
        slot.generated.append(token)
        finish = Finish.NONE
        if token == EOG:
            finish = Finish.EOG
        elif token in slot.params.stop_token_ids:
            finish = Finish.STOP
        elif len(slot.generated) == slot.params.max_tokens:
            finish = Finish.LENGTH
        return seq, token, finish

    # -- the ring's reader

    def wait(self, n_wanted: int, timeout: float) -> int:
        with self.news:
            self.news.wait_for(lambda: self.n_published >= n_wanted or self.woken, timeout)
            self.woken = False
            return self.n_published

    def wake(self) -> None:
        with self.news:
            self.woken = True
            self.news.notify_all()

    def yield_to_compute(self) -> None:
        pass

    def read(self, until: int, page: Page) -> int:
        n = 0
        while self.n_taken < min(until, self.n_published) and page.struct.n_steps < PAGE_STEPS:
            code, sampled = self.recorded[self.n_taken]
            page.steps.table[page.struct.n_steps]["code"] = code
            for seq, token, finish in sampled:
                if finish in (Finish.NONE, Finish.LENGTH):
                    at = page.n_tokens[seq]
                    page.token[seq, at], page.step[seq, at] = token, page.struct.n_steps
                    page.n_tokens[seq] += 1
            page.struct.n_steps += 1
            self.n_taken += 1
            n += 1
        return n

    # -- Memory

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        assert p1 == -1
        held = self.cells.get(seq_id, [])
        if p0 > 0 and not self.sharing.trim:
            raise UnsupportedOperation("only all of it")
        self.cells[seq_id] = held[: max(p0, 0)]
        if not self.cells[seq_id]:
            del self.cells[seq_id]

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        assert not self.cells.get(dst)
        if self.stubborn:
            raise UnsupportedOperation("no copies today")
        n = len(self.cells[src]) if p1 < 0 else p1
        assert self.sharing.copy_whole if p1 < 0 else self.sharing.copy_part
        copied = [] if self.lossy else self.cells[src][:n]
        unified = self.limits.unified
        self.cells[dst] = copied
        if not unified:
            self.cells[dst] = [(token, Identity(cell.lora)) for token, cell in copied]

    def state_seq_get(self, seq_id: int, loras: LoraNames | None = None) -> bytes:
        assert {(cell.lora) for _, cell in self.cells[seq_id]} == {tuple(loras or ())}
        if self.stubborn:
            raise StateError("no states today")
        return np.array([token for token, _ in self.cells[seq_id]], np.int32).tobytes()

    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> None:
        assert not self.cells.get(seq_id)
        tokens = np.frombuffer(data, np.int32).tolist()
        self.cells[seq_id] = [(token, Identity(tuple(loras or ()))) for token in tokens]

    # -- Loras

    def apply(self, lora: LoraSet) -> None:
        self.n_applied += lora != self.applied
        self.applied = lora

    def files(self, lora: LoraSet) -> LoraNames:
        return list(lora)

    def renew(self, pool: int = 0) -> None:
        self.cells.clear()
        if self.barren:
            raise ContextCreateError("no memory left")
        self.n_renewed += 1

    @property
    def n_held(self) -> int:
        """Cells in use, shared ones once."""
        return len({cell for held in self.cells.values() for _, cell in held})

    def pos_max(self, seq_id: int) -> int:
        return len(self.cells.get(seq_id, ())) - 1


@dataclass(frozen=True)
class Submitted:
    """What a rig was given, and the stream that it gave."""

    id: int
    prompt: list[int]
    params: SamplingParams
    lora: LoraSet
    stream: Stream

    @property
    def alone(self) -> tuple[list[int], str]:
        return solo(self.prompt, self.params, self.lora)


class Rig:
    """A core on a fake machine, turned by its test instead of by its thread."""

    def __init__(
        self,
        limits: Limits,
        fault: Fault = lambda step: None,
        policy: Policy | None = None,
        n_steps_max: int = 1,
        sharing: Sharing | None = None,
        swap: Any = "recompute",
        max_restarts: int = 0,
        loras: tuple[str, ...] = (),
    ) -> None:
        sharing = sharing or Sharing(trim=True)
        self.machine = FakeMachine(limits, fault, n_steps_max, sharing=sharing)
        self.machine.names = loras
        self.scheduler = Scheduler(limits, policy, kv=KvOptions(sharing, swap=SwapChoice(swap)))
        self.space = SwapSpace(10**6)
        machine = self.machine
        self.core = EngineCore(
            self.scheduler,
            Device(machine, machine, machine, machine, self._close),
            CoreOptions(space=self.space, max_restarts=max_restarts),
        )
        self.requests: list[Submitted] = []
        self._pieces = Pieces(lambda tokens: [b"%d " % token for token in tokens])

    def _close(self) -> None:
        self.machine.closed = True

    def submit(self, prompt: Sequence[int], params: SamplingParams, lora: LoraSet = ()) -> Stream:
        id = len(self.requests) + 1
        options = RequestOptions(lora=lora, space=lora or None)
        request = Request(
            id,
            np.array(prompt, np.int32),
            params,
            Slot(params, lora),
            options,
            budget=params.max_tokens,
        )
        host = Host(self.core.cancel, self.core.output_processor.watch)
        stream = Stream(id, len(prompt), params, self._pieces, host)
        self.requests.append(Submitted(id, list(prompt), params, lora, stream))
        self.core.submit([self.core.stream_to(request, stream)])
        return stream

    def submit_all(self, prompts: Iterable[Sequence[int]], params: SamplingParams) -> list[Stream]:
        return [self.submit(prompt, params) for prompt in prompts]

    @property
    def reasons(self) -> list[str]:
        """How each request ended."""
        return [request.stream.wait(0).finish_reason for request in self.requests]

    @property
    def finished(self) -> dict[str, int]:
        """As counted, without zeros."""
        return {reason: n for reason, n in self.core.output_processor.finished.items() if n}

    def check_solo(self) -> None:
        """Every request has the tokens that it gets alone; one that was cancelled or failed, the
        first of them."""
        for request in self.requests:
            result, (tokens, reason) = request.stream.wait(0), request.alone
            assert result.tokens == tokens[: len(result.tokens)]
            if result.finish_reason in ("stop", "length"):
                assert (result.tokens, result.finish_reason) == (tokens, reason)

    def turn(self) -> None:
        """One turn of the core, and one of the output processor for what came before it."""
        if self.has_work:
            self.core.step()
            self.check()
            self.deliver()

    @property
    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self.core.commands or not scheduler.idle or scheduler.has_kv_operations)

    def deliver(self) -> None:
        """As if the output thread had its turn now."""
        self.machine.wake()
        self.core.output_processor.turn()

    def settle(self) -> None:
        """All that was computed is delivered."""
        self.machine.flush()
        self.deliver()

    def run(self) -> None:
        for _ in range(100_000):
            if not self.has_work:
                self.settle()
                if not self.core.commands:  # a stop string in the last tokens
                    return
            self.turn()
        raise AssertionError("it never ends")

    @property
    def n_tokens(self) -> int:
        """Tokens that count: `EngineStats.tokens`."""
        return self.scheduler.counters.tokens - self.core.output_processor.n_dropped

    def check(self) -> None:
        """Cache, accounting, slots and streams say the same."""
        scheduler, machine = self.scheduler, self.machine
        running = {scheduler.slot(id) for id in scheduler.running_ids()}
        assert set(machine.slots) == running
        if scheduler.has_kv_operations:
            return  # they come with the next step
        accounting = scheduler.accounting
        assert accounting.used == machine.n_held
        for slot in range(scheduler.n_slots):
            held = len(machine.cells.get(slot, ()))
            assert held == accounting.held(slot)
            assert slot not in running or held == scheduler.computed(slot)
            assert slot in running or accounting.is_cached(slot) == (held > 0)
        assert set(scheduler.admission._saved) == set(self.space._states)
        n_open = len(self.core.table.requests)
        with self.core.state:
            assert n_open == scheduler.n_running + scheduler.n_waiting
        n_done = sum(request.stream.done for request in self.requests)
        assert n_done == sum(self.core.output_processor.finished.values())
