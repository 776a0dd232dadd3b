"""Random sequences of memory operations against a plain-Python model of cells.

The model knows a cell by its position and the sequences that it belongs to; it also says which
operations are refused. After every operation both sides must hold the same positions, and in the
end the continuation of a sequence must be the one of a context that saw nothing else.
"""

from __future__ import annotations

import atexit
import functools
from collections import Counter
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyllamabatch import Context, Model
from pyllamabatch.errors import ArgumentError, KvCacheFull, UnsupportedOperation
from tests.support.decoding import decode
from tests.support.models_gguf import gguf_path

N_SEQ = 3
N_CELLS = 256
SEQS = st.integers(0, N_SEQ - 1)
POSITIONS = st.integers(-1, 60)
TOLERANCE = 0.06  # see test_memory


@dataclass(eq=False)
class Cell:
    pos: int
    seqs: set[int]
    token: int
    home: int = 0  # the position it was computed at


@dataclass
class Cells:
    """Attention memory with one stream (`unified`) or one per sequence."""

    unified: bool
    cells: list[Cell] = field(default_factory=list)

    def of(self, seq: int) -> list[Cell]:
        return sorted((c for c in self.cells if seq in c.seqs), key=lambda c: (c.pos, c.home))

    def span(self, seq: int) -> tuple[int, int]:
        held = self.of(seq)
        return (held[0].pos, held[-1].pos) if held else (-1, -1)

    def within(self, seq: int, p0: int, p1: int) -> list[Cell]:
        p0, end = max(p0, 0), p1 if p1 >= 0 else 2**31
        return [c for c in self.of(seq) if p0 <= c.pos < end]

    def used(self, seq: int) -> int:
        return len([c for c in self.cells if self.unified or seq in c.seqs])

    def decode(self, seq: int, tokens: list[int]) -> None:
        start = self.span(seq)[1] + 1
        for pos, token in enumerate(tokens, start):
            self.cells.append(Cell(pos, {seq}, token, pos))

    def remove(self, seq: int, p0: int, p1: int) -> None:
        for cell in self.within(seq, p0, p1):
            cell.seqs.discard(seq)
        self.sweep()

    def copy(self, src: int, dst: int, p0: int, p1: int) -> None:
        for cell in self.within(src, p0, p1):
            if self.unified:
                cell.seqs.add(dst)
            else:
                self.cells.append(Cell(cell.pos, {dst}, cell.token, cell.home))

    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        for cell in self.within(seq, p0, p1):
            cell.pos += delta
            if cell.pos < 0:
                cell.seqs.clear()
        self.sweep()

    def divide(self, seq: int, p0: int, p1: int, divisor: int) -> None:
        for cell in self.within(seq, p0, p1):
            cell.pos //= divisor

    def sweep(self) -> None:
        self.cells = [cell for cell in self.cells if cell.seqs]


@dataclass
class States:
    """Recurrent memory: one position per sequence, and the tokens that led there."""

    tokens: dict[int, list[int]] = field(default_factory=dict)

    def span(self, seq: int) -> tuple[int, int]:
        last = len(self.tokens.get(seq, ())) - 1
        return (last, last)


@functools.cache
def loaded(name: str) -> Model:
    model = Model(gguf_path(name))
    atexit.register(model.close)
    return model


def continuation(name: str, tokens: list[int]) -> np.ndarray:
    with Context(loaded(name), n_threads=1, n_ctx=512) as alone:
        return decode(alone, tokens)


class AttentionMachine(RuleBasedStateMachine):
    """A llama: everything is allowed that its streams allow."""

    @initialize(unified=st.booleans())
    def start(self, unified: bool) -> None:
        self.unified = unified
        n_ctx = N_CELLS if unified else N_CELLS * N_SEQ
        self.context = Context(
            loaded("llama"), n_threads=1, n_ctx=n_ctx, n_seq_max=N_SEQ, kv_unified=unified
        )
        self.memory = self.context.memory
        self.model = Cells(unified)

    def teardown(self) -> None:
        if not hasattr(self, "context"):
            return
        for seq in range(N_SEQ):  # sequences that were never moved continue as if alone
            held = self.model.of(seq)
            if (
                held
                and [c.pos for c in held] == list(range(len(held)))
                and all(c.pos == c.home for c in held)
                and self.model.used(seq) < N_CELLS
            ):
                logits = decode(self.context, [7], len(held), seq)
                expected = continuation("llama", [*(c.token for c in held), 7])
                np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
                break
        self.context.close()

    @rule(seq=SEQS, tokens=st.lists(st.integers(5, 400), min_size=1, max_size=24))
    def decode(self, seq: int, tokens: list[int]) -> None:
        start = self.model.span(seq)[1] + 1
        if self.model.used(seq) + len(tokens) > N_CELLS:
            with pytest.raises(KvCacheFull):
                decode(self.context, tokens, start, seq)
            return
        decode(self.context, tokens, start, seq)
        self.model.decode(seq, tokens)

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS)
    def remove(self, seq: int, p0: int, p1: int) -> None:
        self.memory.seq_rm(seq, p0, p1)
        self.model.remove(seq, p0, p1)

    @rule(p0=POSITIONS, p1=POSITIONS)
    def remove_from_all(self, p0: int, p1: int) -> None:
        self.memory.seq_rm(-1, p0, p1)
        for seq in range(N_SEQ):
            self.model.remove(seq, p0, p1)

    @rule(src=SEQS, dst=SEQS, p0=POSITIONS, p1=POSITIONS)
    def copy(self, src: int, dst: int, p0: int, p1: int) -> None:
        refusal = self.refusal(src, dst, p0, p1)
        if refusal is not None:
            with pytest.raises(refusal):
                self.memory.seq_cp(src, dst, p0, p1)
            return
        self.memory.seq_cp(src, dst, p0, p1)
        self.model.copy(src, dst, p0, p1)

    @rule(src=SEQS, dst=SEQS)
    def fork(self, src: int, dst: int) -> None:
        assume(src != dst)
        self.memory.seq_rm(dst)
        self.memory.seq_cp(src, dst)
        self.model.remove(dst, -1, -1)
        self.model.copy(src, dst, -1, -1)

    def refusal(self, src: int, dst: int, p0: int, p1: int) -> type[Exception] | None:
        if src == dst:
            return ArgumentError
        (first, last), (low, high) = self.model.span(src), self.model.span(dst)
        p0, end = max(p0, 0), p1 if p1 >= 0 else 2**31
        if last < 0 or p0 > last or end <= max(first, p0):
            return None  # nothing to copy
        if self.unified:
            return ArgumentError if high >= 0 and p0 <= high and end > max(low, p0) else None
        if p0 > first or end <= last:
            return UnsupportedOperation
        return ArgumentError if high >= 0 else None

    @rule(seq=SEQS)
    def keep(self, seq: int) -> None:
        self.memory.seq_keep(seq)
        for other in set(range(N_SEQ)) - {seq}:
            self.model.remove(other, -1, -1)

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS, delta=st.integers(-40, 40))
    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        self.memory.seq_add(seq, p0, p1, delta)
        self.model.shift(seq, p0, p1, delta)

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS, divisor=st.integers(1, 4))
    def divide(self, seq: int, p0: int, p1: int, divisor: int) -> None:
        self.memory.seq_div(seq, p0, p1, divisor)
        self.model.divide(seq, p0, p1, divisor)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.model.cells.clear()

    @rule(src=SEQS, dst=SEQS)
    def restore(self, src: int, dst: int) -> None:
        if self.memory.is_stale(src):
            with pytest.raises(UnsupportedOperation, match="next decode"):
                self.context.state_seq_get(src)
            return
        data = self.context.state_seq_get(src)
        cells = [Cell(c.pos, {dst}, c.token, c.home) for c in self.model.of(src)]
        self.model.remove(dst, -1, -1)
        assume(self.model.used(dst) + len(cells) <= N_CELLS)
        self.context.state_seq_set(data, dst)
        self.model.cells += cells

    @invariant()
    def same_positions(self) -> None:
        if hasattr(self, "context"):
            for seq in range(N_SEQ):
                span = self.memory.pos_min(seq), self.memory.pos_max(seq)
                assert span == self.model.span(seq)


class RecurrentMachine(RuleBasedStateMachine):
    """A mamba: whole sequences only."""

    name = "mamba"

    @initialize()
    def start(self) -> None:
        self.context = Context(loaded(self.name), n_threads=1, n_ctx=512, n_seq_max=N_SEQ)
        self.memory = self.context.memory
        self.model = States()

    def teardown(self) -> None:
        if not hasattr(self, "context"):
            return
        for seq, tokens in self.model.tokens.items():
            logits = decode(self.context, [7], len(tokens), seq)
            np.testing.assert_allclose(
                logits, continuation(self.name, [*tokens, 7]), atol=TOLERANCE
            )
            break
        self.context.close()

    @precondition(lambda self: sum(map(len, self.model.tokens.values())) < 400)
    @rule(seq=SEQS, tokens=st.lists(st.integers(5, 400), min_size=1, max_size=24))
    def decode(self, seq: int, tokens: list[int]) -> None:
        before = self.model.tokens.get(seq, [])
        decode(self.context, tokens, len(before), seq)
        self.model.tokens[seq] = before + tokens

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS)
    def remove(self, seq: int, p0: int, p1: int) -> None:
        last = self.model.span(seq)[1]
        p0, end = max(p0, 0), p1 if p1 >= 0 else 2**31
        if last < 0 or p0 > last or end <= p0:
            self.memory.seq_rm(seq, p0, p1)  # nothing there
        elif p0 == 0 and end > last:
            self.memory.seq_rm(seq, p0, p1)
            self.model.tokens.pop(seq, None)
        else:
            with pytest.raises(UnsupportedOperation):
                self.memory.seq_rm(seq, p0, p1)

    @rule(src=SEQS, dst=SEQS)
    def fork(self, src: int, dst: int) -> None:
        assume(src != dst)
        if src in self.model.tokens and dst in self.model.tokens:
            with pytest.raises(ArgumentError):
                self.memory.seq_cp(src, dst)
            self.memory.seq_rm(dst)
            del self.model.tokens[dst]
        self.memory.seq_cp(src, dst)
        if src in self.model.tokens:
            self.model.tokens[dst] = list(self.model.tokens[src])

    @rule(seq=SEQS, delta=st.integers(1, 9))
    def shift(self, seq: int, delta: int) -> None:
        if seq in self.model.tokens:
            with pytest.raises(UnsupportedOperation):
                self.memory.seq_add(seq, -1, -1, delta)

    @rule(seq=SEQS)
    def keep(self, seq: int) -> None:
        self.memory.seq_keep(seq)
        self.model.tokens = {s: t for s, t in self.model.tokens.items() if s == seq}

    @rule(src=SEQS, dst=SEQS)
    def restore(self, src: int, dst: int) -> None:
        assume(not self.memory.is_stale(src))
        self.context.state_seq_set(self.context.state_seq_get(src), dst)
        tokens = self.model.tokens.get(src)
        self.model.tokens.pop(dst, None)
        if tokens is not None:
            self.model.tokens[dst] = list(tokens)

    @rule()
    def clear(self) -> None:
        self.memory.clear()
        self.model.tokens.clear()

    @invariant()
    def same_positions(self) -> None:
        if hasattr(self, "context"):
            for seq in range(N_SEQ):
                assert self.memory.pos_max(seq) == self.model.span(seq)[1]


class HybridMachine(RecurrentMachine):
    name = "jamba"


LIMITS = settings(
    max_examples=20,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


class TestAttention(AttentionMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = LIMITS


class TestRecurrent(RecurrentMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = LIMITS


class TestHybrid(HybridMachine.TestCase):  # type: ignore[misc, valid-type]
    settings = LIMITS


def test_the_model_knows_shared_cells() -> None:
    cells = Cells(unified=True)
    cells.decode(0, [1, 2, 3])
    cells.copy(0, 1, -1, 2)
    cells.shift(1, 0, -1, 5)
    assert cells.span(0) == (2, 6)
    cells.remove(0, -1, -1)
    assert Counter(c.pos for c in cells.cells) == {5: 1, 6: 1}
