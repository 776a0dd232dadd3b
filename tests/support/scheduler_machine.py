"""A plain-Python executor that drives a scheduler by the book, and random limits for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pyllamabatch.kv import KvOperation, Sharing, SwapChoice
from pyllamabatch.kv.radix_tree import Tokens
from pyllamabatch.scheduler import KvOptions, Limits, Policy, Scheduler, Step

Cell = tuple[int, object]


@dataclass
class Known:
    """What the scheduler reads a sequence's tokens from."""

    tokens: dict[int, list[int]]
    id: int

    def known(self) -> Tokens:
        return np.array(self.tokens[self.id], dtype=np.int32)


@dataclass
class Machine:
    """Computes steps by the book and checks each against its own record of the cache: of every
    slot the cells, each a token and an identity."""

    limits: Limits
    policy: Policy | None = None
    sharing: Sharing = field(default_factory=Sharing)
    retain: bool = True
    swap: SwapChoice | None = None
    ends: dict[int, int] = field(default_factory=dict)  # id -> tokens after which it stops
    prompts: dict[int, int] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)  # what each one knows
    cells: dict[int, list[Cell]] = field(default_factory=dict)  # by slot
    saved: dict[int, list[int]] = field(default_factory=dict)  # tokens of saved states, by id
    moved: Counter[str] = field(default_factory=Counter)  # kinds of moves
    owner: dict[int, int] = field(default_factory=dict)  # slot -> id
    first_rows: list[int] = field(default_factory=list)  # ids in the order they first ran
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(
            self.limits,
            self.policy,
            kv=KvOptions(self.sharing, self.retain, self.swap or SwapChoice("recompute")),
        )
        self.now = 0.0

    def add(
        self,
        id: int,
        n_prompt: int,
        max_tokens: int,
        end: int,
        *,
        alike: int = 0,
        **facts: Any,
    ) -> None:
        """`alike`: so many of its first tokens are those of all."""
        alike = min(alike, n_prompt)
        self.tokens[id] = [*range(alike), *(1000 * id + i for i in range(1000, 1000 + n_prompt))]
        del self.tokens[id][n_prompt:]
        self.prompts[id], self.generated[id] = n_prompt, 0
        self.ends[id] = min(end, max_tokens)
        given: dict[str, Any] = {"arrival": float(id), "tokens": Known(self.tokens, id)}
        self.scheduler.add(id, n_prompt, max_tokens, **(given | facts))

    def leave(self, slot: int) -> None:
        """The scheduler says that none runs in `slot` any more."""
        del self.owner[slot]
        self.carry_out()

    def remove(self, id: int) -> None:
        slot = self.scheduler.remove(id)
        assert slot is None or self.owner[slot] == id
        if slot is not None:
            self.leave(slot)
        self.carry_out()

    def carry_out(self, operations: Iterable[KvOperation] | None = None) -> None:
        """The operations, each checked against what the memory can do; default: those that were
        decided since the last step."""
        can, cells = self.sharing, self.cells
        for move in self.scheduler.take_kv_operations() if operations is None else operations:
            held = cells.get(move.slot, [])
            self.moved[move.kind] += 1
            if move.kind == "remove":
                cells.pop(move.slot, None)
            elif move.kind == "trim":
                assert can.trim
                assert 0 < move.n < len(held)
                assert not can.window or len(held) <= can.window
                cells[move.slot] = held[: move.n]
            elif move.kind == "cut":
                cells[move.slot] = held[: move.n]
            elif move.kind == "copy":
                source = cells[move.source]
                assert not held
                assert can.copy_whole if move.whole else can.copy_part
                assert move.n == len(source) or (not move.whole and move.n < len(source))
                shared = source[: move.n]
                fresh = [(token, object()) for token, _ in shared]
                cells[move.slot] = shared if self.limits.unified else fresh
            elif move.kind == "save":
                assert move.n == len(held)
                self.saved[move.id] = [token for token, _ in held]
            elif move.kind == "load":
                assert not held
                cells[move.slot] = [(token, object()) for token in self.saved.pop(move.id)]
                assert len(cells[move.slot]) == move.n
            elif move.kind == "store":
                self.saved[move.id] = self.tokens[move.id][: move.n]
            else:
                del self.saved[move.id]

    def place(self, step: Step) -> None:
        for id, slot in step.preempted:
            assert self.owner.pop(slot) == id
        self.carry_out(step.kv_operations)
        for id, slot in step.admitted:
            assert slot not in self.owner
            self.owner[slot] = id
            self.cells.setdefault(slot, [])
            if id not in self.first_rows:
                self.first_rows.append(id)
        assert len(self.owner) <= self.limits.n_seq_max

    def grow(self, slot: int, n: int) -> int:
        """`n` more cells for the sequence in `slot`; how many it has then."""
        cells, tokens = self.cells[slot], self.tokens[self.owner[slot]]
        cells += [(token, object()) for token in tokens[len(cells) : len(cells) + n]]
        assert [token for token, _ in cells] == tokens[: len(cells)]
        return len(cells)

    @property
    def held(self) -> dict[int, list[int]]:
        """The tokens in each slot."""
        return {slot: [token for token, _ in cells] for slot, cells in self.cells.items()}

    @property
    def used(self) -> int:
        return len({cell for held in self.cells.values() for _, cell in held})

    def compute(self, step: Step, *, advance: bool = True) -> None:
        rows = len(step.decode) + sum(chunk.n for chunk in step.chunks)
        assert rows == step.n_rows <= self.limits.n_batch
        slots = [*step.decode.tolist(), *(chunk.slot for chunk in step.chunks)]
        assert len(slots) == len(set(slots))
        sampled = []
        for slot in step.decode.tolist():
            id = self.owner[slot]
            assert self.grow(slot, 1) == self.prompts[id] + self.generated[id]
            assert self.generated[id] >= 1
            sampled.append(id)
        for chunk in step.chunks:
            assert self.owner[chunk.slot] == chunk.id
            assert len(self.cells[chunk.slot]) == chunk.start
            known = self.prompts[chunk.id] + self.generated[chunk.id]
            assert self.grow(chunk.slot, chunk.n) == chunk.start + chunk.n <= known
            assert chunk.last == (chunk.start + chunk.n == known)
            if chunk.last:
                sampled.append(chunk.id)
        if self.limits.unified:
            assert self.used <= self.limits.n_cells
        assert all(len(cells) <= self.limits.n_cells_seq for cells in self.cells.values())
        if advance:
            self.scheduler.advance(step)
        for id in sampled:
            self.generated[id] += 1
            self.tokens[id].append(1000 * id + self.generated[id])
            if advance and self.generated[id] == self.ends[id]:
                self.remove(id)
                self.done.append(id)
        if advance:
            self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        assert scheduler.accounting.used == self.used
        view = scheduler.view(0.0)
        assert [s.id for s in view.running] == list(scheduler.running_ids())
        assert {s.id for s in view.running if s.decoding} == set(view.decoding)
        assert {s.id for s in view.running if not s.decoding} == {s.id for s in view.prefilling}
        for seq in view.running:
            assert seq.computed == len(self.cells[scheduler.slot(seq.id) or 0])
            assert seq.generated == self.generated[seq.id]
            assert seq.remaining >= 1
        assert view.kv.promised == sum(s.remaining for s in view.running)
        held = {cell for slot in self.owner for _, cell in self.cells[slot]}
        assert view.kv.free == scheduler.accounting.n_cells - len(held)
        for seq in view.running:
            slot = scheduler.slot(seq.id)
            others = {c for s in self.owner if s != slot for _, c in self.cells[s]}
            mine = {c for s in self.owner if s == slot for _, c in self.cells[s]}
            assert view.kv.freed_by(seq.id) == len(mine - others)
        assert set(self.saved) == set(scheduler.admission._saved)

    def _plan(self) -> Step | None:
        """The next step that has something to compute, when it is time for it."""
        while (step := self.scheduler.plan(self.now)) is None and not self.scheduler.idle:
            seconds = self.scheduler.hold(self.now)
            assert seconds > 0
            self.now += seconds
        return step

    def step(self) -> Step | None:
        step = self._plan()
        if step is not None:
            self.place(step)
            self.compute_parts(step)
        return step

    def compute_parts(self, step: Step) -> None:
        for part in (step,) if self.limits.unified else step.parts():
            self.compute(part)

    def step_many(self, most: int) -> tuple[Step, int] | None:
        """As `step`, as often as the plan stands for (at most `most` times), until one ends:
        the scheduler hears of it once."""
        step = self._plan()
        if step is None:
            return None
        self.place(step)
        if step.repeat == 1:
            self.compute_parts(step)
            return step, 1
        ids = [self.owner[slot] for slot in step.decode.tolist()]
        n = 0
        while n < min(most, step.repeat) and all(self.generated[i] < self.ends[i] for i in ids):
            self.compute(step, advance=False)
            n += 1
        self.scheduler.advance(step, n)
        for id in ids:
            if self.generated[id] == self.ends[id]:
                self.remove(id)
                self.done.append(id)
        self.check()
        return step, n

    def run(self, most: int = 100_000) -> None:
        for _ in range(most):
            if self.step() is None:
                return
        raise AssertionError("it never ends")


limits = st.builds(
    lambda n_batch, n_ubatch, n_seq_max, n_cells, unified: Limits(
        n_batch=n_batch,
        n_ubatch=min(n_batch, n_ubatch),
        n_seq_max=n_seq_max,
        n_cells=n_cells if unified else n_cells * n_seq_max,
        n_cells_seq=n_cells,
        unified=unified,
    ),
    st.integers(1, 40),
    st.integers(1, 16),
    st.integers(1, 6),
    st.integers(12, 80),
    st.booleans(),
)
