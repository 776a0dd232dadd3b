"""Random sequences of memory operations against a plain-Python model of cells.

The model knows a cell by its position and the sequences that it belongs to; it also says which
operations are refused. After every operation both sides must hold the same positions, and in the
end the continuation of a sequence must be the one of a context that saw nothing else.
"""

from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pyllamabatch import Context
from pyllamabatch.errors import ArgumentError, KvCacheFull, UnsupportedOperation
from tests.support.decoding import decode, loaded
from tests.support.engines import EXACT
from tests.support.models_gguf import ARCHITECTURES
from tests.support.oracle import tolerance

N_SEQ = 3
N_CELLS = 256
SEQS = st.integers(0, N_SEQ - 1)
POSITIONS = st.integers(-1, 60)


@dataclass(eq=False)
class Cell:
    pos: int
    seqs: set[int]
    token: int
    home: int = 0  # the position it was computed at
    past: tuple[int, ...] = ()  # the tokens it was computed behind


@dataclass
class Cells:
    """Memory with one stream (`shared`) or one per sequence."""

    shared: bool
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
        return len([c for c in self.cells if self.shared or seq in c.seqs])

    def remove(self, seq: int, p0: int = -1, p1: int = -1) -> None:
        for cell in self.within(seq, p0, p1):
            cell.seqs.discard(seq)
        self.sweep()

    def copy(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        for cell in self.within(src, p0, p1):
            if self.shared:
                cell.seqs.add(dst)
            else:
                self.cells.append(replace(cell, seqs={dst}))

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


class Machine(RuleBasedStateMachine):
    """A llama: everything is allowed that its streams allow."""

    name = "llama"
    one_state = False  # for all positions of a sequence: whole sequences only, and no shift

    @initialize(unified=st.booleans())
    def start(self, unified: bool) -> None:
        n_ctx = N_CELLS if unified else N_CELLS * N_SEQ
        self.context = Context(
            loaded(self.name), n_ctx=n_ctx, n_seq_max=N_SEQ, kv_unified=unified, **EXACT
        )
        self.memory = self.context.memory
        self.unified = unified
        self.model = Cells(unified and not self.one_state)
        for seq in range(2):
            self.decode(seq, [5 + i % 40 for i in range(40 + seq)])

    def teardown(self) -> None:
        if not hasattr(self, "context"):
            return
        for seq in range(N_SEQ):  # sequences that were never moved continue as if alone
            held = self.model.of(seq)
            text = [cell.token for cell in held]
            unmoved = all(
                c.pos == c.home == i and c.past == tuple(text[:i]) for i, c in enumerate(held)
            )
            if held and unmoved and self.free(seq) > 0:
                logits = decode(self.context, [7], len(held), seq)
                with Context(loaded(self.name), n_ctx=512, **EXACT) as alone:
                    expected = decode(alone, [*text, 7])
                np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(self.name))
                self.model.cells.append(Cell(len(held), {seq}, 7))
        self.context.close()

    def free(self, seq: int) -> int:
        """Cells that a sequence may still take. Of cells beside states, what is sure."""
        return N_CELLS - (len(self.model.cells) if self.one_state else self.model.used(seq))

    def part(self, seq: int, p0: int, p1: int) -> bool:
        """The range has some of what a sequence holds, and not all."""
        return 0 < len(self.model.within(seq, p0, p1)) < len(self.model.of(seq))

    @rule(seq=SEQS, tokens=st.lists(st.integers(5, 400), min_size=1, max_size=24))
    def decode(self, seq: int, tokens: list[int]) -> None:
        start = self.model.span(seq)[1] + 1
        if self.free(seq) < len(tokens):
            assume(not self.one_state)
            with pytest.raises(KvCacheFull):
                decode(self.context, tokens, start, seq)
            return
        decode(self.context, tokens, start, seq)
        text = [*(cell.token for cell in self.model.of(seq)), *tokens]
        for pos, at in enumerate(range(len(text) - len(tokens), len(text)), start):
            self.model.cells.append(Cell(pos, {seq}, text[at], pos, tuple(text[:at])))

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS)
    def remove(self, seq: int, p0: int, p1: int) -> None:
        if self.one_state and self.part(seq, p0, p1):
            with pytest.raises(UnsupportedOperation):
                self.memory.seq_rm(seq, p0, p1)
            return
        self.memory.seq_rm(seq, p0, p1)
        self.model.remove(seq, p0, p1)

    @rule(p0=POSITIONS, p1=POSITIONS)
    def remove_from_all(self, p0: int, p1: int) -> None:
        if self.one_state and any(self.part(seq, p0, p1) for seq in range(N_SEQ)):
            with pytest.raises(UnsupportedOperation):
                self.memory.seq_rm(-1, p0, p1)
            return
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
        self.model.remove(dst)
        self.model.copy(src, dst)

    def refusal(self, src: int, dst: int, p0: int, p1: int) -> type[Exception] | None:
        if src == dst:
            return ArgumentError
        (first, last), (low, high) = self.model.span(src), self.model.span(dst)
        p0, end = max(p0, 0), p1 if p1 >= 0 else 2**31
        if last < 0 or p0 > last or end <= max(first, p0):
            return None  # nothing to copy
        if self.model.shared:
            return ArgumentError if high >= 0 and p0 <= high and end > max(low, p0) else None
        if p0 > first or end <= last:
            return UnsupportedOperation
        return ArgumentError if high >= 0 else None

    @rule(seq=SEQS)
    def keep(self, seq: int) -> None:
        self.memory.seq_keep(seq)
        for other in set(range(N_SEQ)) - {seq}:
            self.model.remove(other)

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS, delta=st.integers(-40, 40))
    def shift(self, seq: int, p0: int, p1: int, delta: int) -> None:
        if delta and self.one_state and self.model.within(seq, p0, p1):
            with pytest.raises(UnsupportedOperation, match="can't shift"):
                self.memory.seq_add(seq, p0, p1, delta)
            return
        self.memory.seq_add(seq, p0, p1, delta)
        self.model.shift(seq, p0, p1, delta)

    @rule(seq=SEQS, p0=POSITIONS, p1=POSITIONS, divisor=st.integers(1, 4))
    def divide(self, seq: int, p0: int, p1: int, divisor: int) -> None:
        if divisor > 1 and self.one_state and self.model.within(seq, p0, p1):
            with pytest.raises(UnsupportedOperation, match="can't shift"):
                self.memory.seq_div(seq, p0, p1, divisor)
            return
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
        if self.memory.is_copying(dst):
            with pytest.raises(UnsupportedOperation, match="next decode"):
                self.context.state_seq_set(data, dst)
            return
        cells = [replace(c, seqs={dst}) for c in self.model.of(src)]
        self.model.remove(dst)
        assume(self.free(dst) >= len(cells))
        self.context.state_seq_set(data, dst)
        self.model.cells += cells

    @invariant()
    def same_positions(self) -> None:
        if hasattr(self, "context"):
            for seq in range(N_SEQ):
                first, last = self.model.span(seq)
                assert self.memory.pos_max(seq) == last
                assert self.one_state or self.memory.pos_min(seq) == first


LIMITS = settings(
    max_examples=20,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("name", [a.name for a in ARCHITECTURES.values() if not a.window])
def test_any_operations(name: str) -> None:
    """Where no layer has a window: that forgets, and a saved state has not all of it."""
    arch = ARCHITECTURES[name]
    own = {"name": name, "one_state": arch.recurrent or arch.hybrid}
    run_state_machine_as_test(type(name, (Machine,), own), settings=LIMITS)
