"""A context to measure on: sequences of a wanted depth, steps of a wanted shape, their times.

Contents do not matter for time: tokens are random, and a depth is computed once and copied to the
other sequences as state.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from pyllamabatch.cost import where
from pyllamabatch.cost.profile import Shape
from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.handle import Owner
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import SAMPLE, Stepper

N_BATCH = 2048
_STATES_MAX = 2**30  # bytes
_UNDISTURBED = 0.95
_DRIFT = 64  # positions that a sequence may grow where steps can't be taken back
_SAMPLING = SamplingParams(max_tokens=2**30, ignore_eog=True, seed=1)


class Took(NamedTuple):
    """One step. disturbed: the CPU's threads, which never sleep within a step, did not have the
    cores all the time. new: graphs that libllama had to make for it."""

    seconds: float
    disturbed: bool
    new: int = 0


class Rig(Owner):
    """One context and stepper. Times are those of the native step: build, decode, wait, sample
    (with the default sampling parameters), in seconds."""

    def __init__(self, model: Model, *, n_seq_max: int, n_ctx: int, **context_params: Any) -> None:
        self.context = Context(
            model,
            n_ctx=n_ctx,
            n_seq_max=n_seq_max,
            n_outputs_max=n_seq_max,
            **{"n_batch": N_BATCH, **context_params},
        )
        can = self.context.capabilities
        try:
            if not can.has_memory or not can.causal or can.encoder:
                raise UnsupportedOperation(f"{model.architecture} does not generate token by token")
            self.stepper = Stepper(self.context, n_logprobs_max=0, n_steps_max=1, sync=True)
        except BaseException:
            self.context.close()
            raise
        self._stays = can.partial_removal  # a step can be taken back
        self._random = np.random.default_rng(1)
        self._n_held: dict[int, int] = {}  # positions by sequence
        self._states: dict[int, bytes] = {}  # of one sequence, by depth
        self._seconds_per_token = 0.0
        self._n_reused = 0  # graphs, so far
        device, _, share = where.device_of(self.context)
        self.on_cpu = device.kind == "cpu" or share < where.WHOLE
        self._n_threads = self.context.n_threads if self.on_cpu else 0
        for seq in range(n_seq_max):
            self.stepper.set_slot(seq, _SAMPLING)

    @property
    def ptr(self) -> Any:
        return self.context.ptr

    def close(self) -> None:
        self.stepper.close()
        self.context.close()

    # -- depths --

    def ready(self, shape: Shape) -> bool:
        """The depth needs no computing."""
        return (
            shape.depth in self._states or self._n_held.get(0, -1) == shape.depth or not shape.depth
        )

    def seconds_to_hold(self, depth: int) -> float:
        """About how long it takes to compute this depth."""
        return self._seconds_per_token * (depth - self._n_held.get(0, 0))

    def clear(self) -> None:
        """Nothing is held any more."""
        self.context.memory.clear()
        self._n_held.clear()

    def hold(self, n_seqs: int, depth: int) -> None:
        """Sequences 0 to n_seqs - 1 hold `depth` tokens each, the others nothing."""
        memory = self.context.memory
        for seq, held in list(self._n_held.items()):
            near = held == depth or (not self._stays and 0 < depth < held <= depth + _DRIFT)
            if seq < n_seqs and near:
                continue
            if seq == 0 and held < depth and depth not in self._states:
                continue  # goes on from what it has
            memory.seq_rm(seq)
            del self._n_held[seq]
        if depth == 0:
            return
        if depth not in self._states:
            self._compute(depth)
            self._keep(depth)
            if depth in self._states and self.context.model.n_swa:
                memory.seq_rm(0)  # a state has the window's cells alone, where there is one
                del self._n_held[0]
        missing = [seq for seq in range(n_seqs) if seq not in self._n_held]
        if missing:
            state = self._states.get(depth)
            at = depth if state else self._n_held[0]
            state = state or self.context.state_seq_get(0)
            for seq in missing:
                self.context.state_seq_set(state, seq)
                self._n_held[seq] = at

    def _compute(self, depth: int) -> None:
        have = self._n_held.get(0, 0)
        began, first = time.monotonic(), have
        while have < depth:
            n = min(self.context.n_batch, depth - have)
            self._write(0, n, 0, have)
            self._call(n)
            have = self._n_held[0] = have + n
        if have > first:
            self._seconds_per_token = (time.monotonic() - began) / (have - first)

    def _keep(self, depth: int) -> None:
        state = self.context.state_seq_get(0)
        if len(state) + sum(map(len, self._states.values())) <= _STATES_MAX:
            self._states[depth] = state

    # -- steps --

    def time(self, shape: Shape, n_steps: int) -> list[Took]:
        """`n_steps` steps of this shape, at the depth that is held.

        The first `decode` sequences decode; the prompt rows belong to the next ones, which hold
        `depth` tokens too, and are the prompts' last ones: each gives a token. What a step adds is
        taken away again, where the memory can.
        """
        taken = []
        for _ in range(n_steps):
            self.hold(shape.n_seqs, shape.depth)
            taken.append(self._step(shape))
        return taken

    def _step(self, shape: Shape) -> Took:
        n = 0
        decode = shape.rows - shape.prefill
        grown: dict[int, int] = {}
        taken: list[Took] = []
        for seq in range(decode):
            n = self._write(n, 1, seq, self._n_held.get(seq, 0), sample=True)
            grown[seq] = 1
        if decode and shape.prefill and not self.context.capabilities.unified:
            taken.append(self._call(n))  # as `Step.parts` has it
            n = 0
        for i, size in enumerate(shape.chunks()):
            seq = decode + i
            n = self._write(n, size, seq, self._n_held.get(seq, 0))
            self.stepper.rows.flags[n - 1] = SAMPLE
            grown[seq] = size
        taken.append(self._call(n))
        self._undo(grown, shape.depth)
        return Took(
            sum(t.seconds for t in taken),
            any(t.disturbed for t in taken),
            sum(t.new for t in taken),
        )

    def _call(self, n_rows: int) -> Took:
        cpu, wall = time.process_time(), time.perf_counter()
        result = self.stepper.step(n_rows)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        result.raise_for_code()
        took = result.steps[0]
        seconds = float(sum(took[name] for name in _PARTS)) * 1e-9
        n_reused = int(took["n_reused"]) - self._n_reused
        self._n_reused += n_reused
        new = max(0, -(-n_rows // self.context.n_ubatch) - n_reused)
        return Took(seconds, cpu < _UNDISTURBED * wall * self._n_threads, new)

    def _undo(self, grown: dict[int, int], depth: int) -> None:
        """Take the rows of a step away; where the memory can't (recurrent states, a window that has
        moved on), the sequence goes."""
        memory = self.context.memory
        for seq, size in grown.items():
            held = self._n_held.get(seq, 0) + size
            if self._stays:
                try:
                    memory.seq_rm(seq, depth)
                    continue
                except UnsupportedOperation:
                    pass
            elif held <= depth + _DRIFT and depth:
                self._n_held[seq] = held
                continue
            memory.seq_rm(seq)
            self._n_held.pop(seq, None)

    def _write(self, first: int, n: int, seq: int, start: int, *, sample: bool = False) -> int:
        rows, end = self.stepper.rows, first + n
        rows.token[first:end] = self._random.integers(0, self.stepper.n_vocab, n)
        rows.pos[first:end] = np.arange(start, start + n)
        rows.seq[first:end] = seq
        rows.flags[first:end] = SAMPLE if sample else 0
        return end


_PARTS = ("build_ns", "decode_ns", "sync_ns", "sample_ns")
