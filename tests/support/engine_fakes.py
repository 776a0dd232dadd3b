"""A stepper and a memory in plain Python, to drive the core with no model and with any fault.

The next token of a sequence is a checksum of all tokens that its cells hold: one wrong token,
position or neighbour and everything after it differs from `solo`.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from pyllamabatch.engine.core import CoreOptions, EngineCore
from pyllamabatch.engine.detokenizer import Pieces
from pyllamabatch.engine.options import RequestOptions
from pyllamabatch.engine.protocols import Device
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.stream import Host, Stream
from pyllamabatch.errors import ContextCreateError, StateError, UnsupportedOperation
from pyllamabatch.kv import Sharing, SwapChoice, SwapSpace
from pyllamabatch.llama.lora import LoraNames, LoraSet
from pyllamabatch.machine.device import FakeDevice, SampledRow, Times
from pyllamabatch.scheduler import KvOptions, Limits, Policy, Scheduler
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.types import Finish, Run

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

    @property
    def logprobs(self) -> int | None:
        return self.params.logprobs

    def tokens(self) -> Any:
        return np.array(self.generated, dtype=np.int32)


class Identity:
    """Of a cell. `lora`: the adapters that it was computed with."""

    def __init__(self, lora: LoraSet) -> None:
        self.lora = lora


Cell = tuple[int, Identity]  # a token and its cell
Fault = Callable[[int], object]  # step number -> None, a code, or an exception


class FakeMachine(FakeDevice[Cell, Slot]):
    """`fault`: what goes wrong at which step; a code of 2 or below -1 leaves the rows before the
    middle of the batch in the cache, as libllama may. `n_steps_max`: of a run. `sharing`: what its
    memory can do."""

    def __init__(
        self,
        limits: Limits,
        fault: Fault = lambda step: None,
        n_steps_max: int = 1,
        *,
        sharing: Sharing | None = None,
        n_logprobs_max: int = 0,
    ) -> None:
        super().__init__(
            limits, n_steps_max=n_steps_max, n_room=10**9, n_logprobs_max=n_logprobs_max
        )
        self.fault = fault
        self.sharing = sharing or Sharing()
        self.meanwhile: Callable[[int], object] = lambda step: None  # other threads, in a step
        self.barren = False  # no fresh context can be made
        self.stubborn = False  # it refuses every copy
        self.lossy = False  # its copies are empty
        self.failing: set[int] = set()  # slots whose next sample is an error
        self.names: tuple[str, ...] = ()  # of adapters
        self.applied: LoraSet = ()
        self.n_applied = 0  # changes of these
        self.n_renewed = 0
        self.n_steps = 0
        self.runs: list[int] = []  # steps of each run of decoding alone
        self.closed = False

    # -- Stepper

    def put_slot(
        self,
        seq_id: int,
        slot: Slot,
        next_row: tuple[int, int] | None = None,
        *,
        report: bool = False,
    ) -> None:
        assert seq_id not in self.slots
        super().put_slot(seq_id, slot, next_row, report=report)

    def clear_slot(self, seq_id: int) -> None:
        del self.slots[seq_id]

    def compute(self, slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Run:
        assert 1 <= len(slots) + n_before <= self.limits.n_batch
        assert n_steps == 1 or not n_before
        run = super().compute(slots, n_steps, n_before, n_pad)
        if not n_before:
            self.runs.append(run.n_steps)
        return run

    def _compute(self, slots: Any, n_before: int, n_pad: int) -> tuple[int, int, Times]:
        self.n_steps += 1
        fault = self.fault(self.n_steps)
        self.meanwhile(self.n_steps)
        if isinstance(fault, BaseException):
            if self.n_in_run == 0:
                raise fault
            fault = -1019
        code = int(fault or 0)  # type: ignore[call-overload]
        n_held = self.n_now if not code else 0 if code in (1, -1) else self.n_now // 2
        return code, n_held, Times()

    def _cell(self, token: int) -> Cell:
        return token, Identity(self.applied)

    def _token(self, cell: Cell) -> int:
        return cell[0]

    def _hold(self, n_rows: int, *, sample: bool) -> list[SampledRow]:
        seqs = set(self.rows.seq[:n_rows].tolist())
        assert all(self.slots[seq].lora == self.applied for seq in seqs)
        sampled = super()._hold(n_rows, sample=sample)
        assert all(len(self.cells[seq]) <= self.limits.n_cells_seq for seq in seqs)
        assert not self.limits.unified or self.n_held <= self.limits.n_cells
        return sampled

    def _sample(self, slot: int) -> SampledRow:
        state = self.slots[slot]
        if slot in self.failing:
            self.failing.discard(slot)
            return SampledRow(slot, -1, Finish.ERROR)
        assert {cell.lora for _, cell in self.cells[slot]} == {state.lora}
        token = next_token([token for token, _ in self.cells[slot]], state.lora)
        state.generated.append(token)
        finish = Finish.NONE
        if token == EOG:
            finish = Finish.EOG
        elif token in state.params.stop_token_ids:
            finish = Finish.STOP
        elif len(state.generated) == state.params.max_tokens:
            finish = Finish.LENGTH
        return SampledRow(slot, token, finish)

    def _has_room(self) -> bool:
        return len(self.recorded) < self.n_room

    def yield_to_compute(self) -> None:
        pass

    # -- Memory

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        if p0 > 0 and not self.sharing.trim:
            raise UnsupportedOperation("only all of it")
        super().seq_rm(seq_id, p0, p1)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        if self.stubborn:
            raise UnsupportedOperation("no copies today")
        assert self.sharing.copy_whole if p1 < 0 else self.sharing.copy_part
        super().seq_cp(src, dst, p0, p1)
        copied = [] if self.lossy else self.cells[dst]
        self.cells[dst] = copied
        if not self.limits.unified:
            self.cells[dst] = [(token, Identity(cell.lora)) for token, cell in copied]

    def state_seq_get(self, seq_id: int, loras: LoraNames | None = None) -> bytes:
        assert {(cell.lora) for _, cell in self.cells[seq_id]} == {tuple(loras or ())}
        if self.stubborn:
            raise StateError("no states today")
        return super().state_seq_get(seq_id)

    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> None:
        super().state_seq_set(data, seq_id)
        self.cells[seq_id] = [
            (token, Identity(tuple(loras or ()))) for token, _ in self.cells[seq_id]
        ]

    # -- Loras

    def apply(self, lora: LoraSet) -> None:
        self.n_applied += lora != self.applied
        self.applied = lora

    def files(self, lora: LoraSet) -> LoraNames:
        return list(lora)

    def renew(self, pool: int | None = None) -> None:
        self.cells.clear()
        if self.barren:
            raise ContextCreateError("no memory left")
        self.n_renewed += 1

    def shrink(self) -> bool:
        return False

    def grow(self) -> None:
        pass

    @property
    def n_held(self) -> int:
        """Cells in use, shared ones once."""
        return len({cell for held in self.cells.values() for _, cell in held})


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
            id, np.array(prompt, np.int32), params, Slot(params, lora), options,
            budget=params.max_tokens,
        )  # fmt: skip
        host = Host(self.core.cancel, self.core.output_processor.watch)
        stream = Stream(id, len(prompt), params, self._pieces, host, perf_counter())
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

    def check_end(self) -> None:
        """All that ran is over: nothing stays but what is cached, and that can be dropped."""
        self.check_solo()
        self.check()
        self.scheduler.drop_cached()
        self.core.kv.flush()
        self.check()
        assert self.machine.cells == {}
        assert len(self.space) == 0

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
