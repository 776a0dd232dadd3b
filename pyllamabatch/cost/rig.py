"""A context to measure on: sequences of a wanted depth, steps of a wanted shape, their times.

Contents do not matter for time: tokens are random, and a depth is computed once and copied to the
other sequences as state."""

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
    """One step. disturbed: the CPU's threads, which never sleep within a step that no device has a
    part in, did not have the cores all the time. new: graphs that libllama had to make for it."""

    seconds: float
    disturbed: bool
    new: int = 0


class Rig(Owner):
    """One context and stepper. Times are those of the native step: build, decode, wait, sample
    (with the default sampling parameters), in seconds. n_threads: of the CPU that compute; 0 where
    devices hold all layers."""

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
        self._states: dict[int, bytes] = {}  # of a sequence, by depth
        self._seconds_per_token = 0.0
        self._n_reused = 0  # graphs, so far
        shares = where.shares_of(self.context)
        self.n_threads = self.context.n_threads if shares.with_cpu else 0
        # Beside a device they wait for it.
        self._n_awake = self.n_threads if shares.on_cpu >= where.WHOLE else 0
        for seq in range(n_seq_max):
            self.stepper.set_slot(seq, _SAMPLING)

    @property
    def ptr(self) -> Any:
        return self.context.ptr

    def close(self) -> None:
        self.stepper.close()
        self.context.close()

    # -- depths --

    def seconds_to_hold(self, depth: int) -> float:
        """About how long it takes to compute this depth; 0 for one that is known."""
        return self._seconds_per_token * (depth - self._known(depth))

    def clear(self) -> None:
        """Nothing is held any more."""
        self.context.memory.clear()
        self._n_held.clear()

    def hold(self, n_seqs: int, depth: int) -> None:
        """Sequences 0 to n_seqs - 1 hold `depth` tokens each, the others nothing."""
        for seq, held in list(self._n_held.items()):
            drifted = not self._stays and 0 < depth < held <= depth + _DRIFT
            if seq >= n_seqs or not (held == depth or drifted):
                self._drop(seq)
        if depth and depth not in self._states:
            self._compute(depth)
        for seq in range(n_seqs if depth else 0):
            if seq not in self._n_held:
                self.context.state_seq_set(self._states[depth], seq)
                self._n_held[seq] = depth

    def _compute(self, depth: int) -> None:
        """The state of a sequence of this depth, from the nearest one that is known."""
        if sum(map(len, self._states.values())) > _STATES_MAX:
            self._states.clear()
        known = self._known(depth)
        self._drop(0)
        if known:
            self.context.state_seq_set(self._states[known], 0)
        began = time.monotonic()
        for first in range(known, depth, self.context.n_batch):
            n = min(self.context.n_batch, depth - first)
            self._write(0, n, 0, first)
            self._call(n)
        self._seconds_per_token = (time.monotonic() - began) / (depth - known)
        self._states[depth] = self.context.state_seq_get(0)
        self._drop(0)

    def _known(self, depth: int) -> int:
        return max((known for known in self._states if known <= depth), default=0)

    def _drop(self, seq: int) -> None:
        self.context.memory.seq_rm(seq)
        self._n_held.pop(seq, None)

    # -- steps --

    def time(self, shape: Shape, n_steps: int) -> list[Took]:
        """`n_steps` steps of this shape, at the depth that is held.

        The first `decode` sequences decode; the prompt rows belong to the next ones, which hold
        `depth` tokens too, and are the prompts' last ones: each gives a token. What a step adds is
        taken away again, where the memory can."""
        taken = []
        for _ in range(n_steps):
            self.hold(shape.n_seqs, shape.depth)
            taken.append(self._step(shape))
        return taken

    def _step(self, shape: Shape) -> Took:
        decode = shape.rows - shape.prefill
        sizes = [1] * decode + shape.chunks()
        apart = not self.context.capabilities.unified and shape.prefill  # as `Step.parts` has it
        parts: list[Took] = []
        n = 0
        for seq, size in enumerate(sizes):
            if apart and n and seq == decode:
                parts.append(self._call(n))
                n = 0
            n = self._write(n, size, seq, self._n_held.get(seq, 0))
        parts.append(self._call(n))
        self._undo(sizes, shape.depth)
        seconds, disturbed, new = zip(*parts, strict=True)
        return Took(sum(seconds), any(disturbed), sum(new))

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
        return Took(seconds, cpu < _UNDISTURBED * wall * self._n_awake, new)

    def _undo(self, sizes: list[int], depth: int) -> None:
        """Take the rows of a step away; where the memory can't (recurrent states, a window that has
        moved on), the sequence goes."""
        for seq, size in enumerate(sizes):
            held = self._n_held.get(seq, 0) + size
            if self._stays:
                try:
                    self.context.memory.seq_rm(seq, depth)
                    continue
                except UnsupportedOperation:
                    pass
            elif depth and held <= depth + _DRIFT:
                self._n_held[seq] = held
                continue
            self._drop(seq)

    def _write(self, first: int, n: int, seq: int, start: int) -> int:
        """n rows of a sequence, the last one sampled."""
        rows, end = self.stepper.rows, first + n
        rows.token[first:end] = self._random.integers(0, self.stepper.n_vocab, n)
        rows.pos[first:end] = np.arange(start, start + n)
        rows.seq[first:end] = seq
        rows.flags[first:end] = 0
        rows.flags[end - 1] = SAMPLE
        return end


_PARTS = ("build_ns", "decode_ns", "sync_ns", "sample_ns")
