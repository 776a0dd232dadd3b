"""A stepper and a memory in plain Python, to drive the decoder with no model and with any fault.

The next token of a sequence is a checksum of all tokens that its cells hold: one wrong token,
position or neighbour and everything after it differs from `solo`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from pyllamabatch.decoder import Decoder
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.machine import Pace
from pyllamabatch.request import Request
from pyllamabatch.sampling import SamplingParams
from pyllamabatch.scheduler import Limits, Policy, Scheduler
from pyllamabatch.stepper import SAMPLE, Finish
from pyllamabatch.stream import Stream
from pyllamabatch.text import Pieces

EOG = 0
N_VOCAB = 997


def next_token(tokens: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(tokens, dtype=np.int32).tobytes()) % N_VOCAB


def solo(prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], str]:
    """Tokens and finish reason of a request that is alone in the world."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < params.max_tokens:
        token = next_token(tokens)
        if token == EOG or token in params.stop_token_ids:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


@dataclass
class Slot:
    """Sampling state: it must survive a preemption."""

    params: SamplingParams
    n_generated: int = 0
    token: int = -1  # the one that was sampled last


Fault = Callable[[int], object]  # step number -> None, a code, or an exception


@dataclass
class FakeMachine:
    """Stepper and memory at once. `fault`: what goes wrong at which step; a code of 2 or below -1
    leaves the rows before the middle of the batch in the cache, as libllama may. `meanwhile`: what
    another thread does while a step is computed."""

    limits: Limits
    fault: Fault = lambda step: None
    n_steps_max: int = 1
    meanwhile: Callable[[int], object] = lambda step: None
    runs: list[int] = field(default_factory=list)  # steps of each run
    rung: bool = False
    cells: dict[int, list[int]] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)
    n_steps: int = 0
    closed: bool = False
    failing: set[int] = field(default_factory=set)  # slots whose next sample is an error

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
        assert not self.cells.get(seq_id)
        self.slots[seq_id] = slot

    def take_slot(self, seq_id: int) -> Slot:
        return self.slots.pop(seq_id)

    def clear_slot(self, seq_id: int) -> None:
        del self.slots[seq_id]

    def slot_error(self, seq_id: int) -> str:
        return f"nothing to choose for {seq_id}"

    def step(self, n_rows: int) -> Any:
        rows = self.rows
        assert 1 <= n_rows <= self.limits.n_batch
        self.n_steps += 1
        fault = self.fault(self.n_steps)
        self.meanwhile(self.n_steps)
        if isinstance(fault, BaseException):
            raise fault
        if fault == 1 or fault == -1:
            return SimpleNamespace(code=fault, n_steps=0)
        n_done = n_rows // 2 if fault else n_rows
        results = []
        for i in range(n_done):
            seq, token, pos = int(rows.seq[i]), int(rows.token[i]), int(rows.pos[i])
            held = self.cells.setdefault(seq, [])
            assert pos == len(held), (seq, pos, held)
            held.append(token)
            assert len(held) <= self.limits.n_cells_seq
            if rows.flags[i] & SAMPLE and not fault:
                results.append(self._sample(seq))
        if self.limits.unified:
            assert sum(map(len, self.cells.values())) <= self.limits.n_cells
        if fault:
            return SimpleNamespace(code=fault, n_steps=0)
        return self._results(0, 1, results)

    def run(self, slots: Any, n_steps: int) -> Any:
        assert 1 <= n_steps <= self.n_steps_max
        rows, n = self.rows, len(slots)
        results: list[tuple[int, int, int]] = []
        n_done = code = 0
        while n_done < n_steps and not code:
            rows.token[:n] = [self.slots[slot].token for slot in slots.tolist()]
            rows.pos[:n] = [len(self.cells[slot]) for slot in slots.tolist()]
            rows.seq[:n], rows.flags[:n] = slots, SAMPLE
            try:
                step = self.step(n)
            except PyllamabatchError:
                if n_done == 0:
                    raise
                code = -1019
                break
            code = step.code
            if code == 0:
                n_done += 1
                results += zip(step.seq.tolist(), step.token, step.finish, strict=True)
                if step.finish.any() or self.rung:
                    break
        self.rung = False
        self.runs.append(n_done)
        return self._results(code, n_done, results)

    def ring(self) -> None:
        self.rung = True

    def _results(self, code: int, n_steps: int, results: list[tuple[int, int, int]]) -> Any:
        seqs, tokens, finishes = np.array(results, dtype=np.int32).reshape(-1, 3).T
        return SimpleNamespace(code=code, n_steps=n_steps, seq=seqs, token=tokens, finish=finishes)

    def _sample(self, seq: int) -> tuple[int, int, int]:
        slot = self.slots[seq]
        if seq in self.failing:
            self.failing.discard(seq)
            return seq, -1, Finish.ERROR
        token = slot.token = next_token(self.cells[seq])
        slot.n_generated += 1
        finish = Finish.NONE
        if token == EOG:
            finish = Finish.EOG
        elif token in slot.params.stop_token_ids:
            finish = Finish.STOP
        elif slot.n_generated == slot.params.max_tokens:
            finish = Finish.LENGTH
        return seq, token, finish

    # -- Memory

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        assert (p0, p1) == (-1, -1)  # all that every kind of memory can do
        self.cells.pop(seq_id, None)

    def pos_max(self, seq_id: int) -> int:
        return len(self.cells.get(seq_id, ())) - 1


class Rig:
    """A decoder on a fake machine, turned by hand instead of by its thread."""

    def __init__(
        self,
        limits: Limits,
        fault: Fault = lambda step: None,
        policy: Policy | None = None,
        n_steps_max: int = 1,
    ) -> None:
        self.machine = FakeMachine(limits, fault, n_steps_max)
        self.scheduler = Scheduler(limits, policy)
        self.decoder = Decoder(
            self.scheduler,
            self.machine,
            self.machine,
            Pieces(lambda token: b"%d " % token),
            self._close,
        )
        self.decoder._pace = Pace(1e9)  # as many steps as the machine does
        self.requests: list[Request] = []

    def _close(self) -> None:
        self.machine.closed = True

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> Stream:
        stream = Stream(
            len(self.requests) + 1, len(prompt), stops=params.stop, cancel=self.decoder.cancel
        )
        request = Request(np.array(prompt, np.int32), params, stream, Slot(params))
        self.requests.append(request)
        self.decoder.submit([request])
        return stream

    def turn(self) -> None:
        if self.decoder._mail or not self.scheduler.idle:
            self.decoder._take_mail()
            self.decoder._turn()
            self.check()

    def run(self) -> None:
        for _ in range(100_000):
            if self.scheduler.idle and not self.decoder._mail:
                return
            self.turn()
        raise AssertionError("it never ends")

    def check(self) -> None:
        """Cache, ledger, slots and streams say the same."""
        scheduler, machine = self.scheduler, self.machine
        held = {slot: len(cells) for slot, cells in machine.cells.items() if cells}
        assert scheduler.ledger.used == sum(held.values())
        running = {scheduler.slot(id) for id in scheduler.running_ids()}
        assert set(machine.slots) == running
        assert set(held) <= running
        assert all(scheduler.computed(slot) == n for slot, n in held.items())
        n_open = sum(not request.stream.done for request in self.requests)
        with self.decoder.state:
            assert n_open == scheduler.n_running + scheduler.n_waiting + self.decoder.n_mail
            assert self.decoder.n_submitted == n_open + sum(self.decoder.finished.values())
