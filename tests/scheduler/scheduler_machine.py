"""A plain-Python executor that drives a scheduler by the book, and random limits for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from pyllamabatch.scheduler import Limits, Policy, Scheduler, Step


@dataclass
class Machine:
    """Computes steps by the book and checks each against its own record of the cache."""

    limits: Limits
    policy: Policy | None = None
    ends: dict[int, int] = field(default_factory=dict)  # id -> tokens after which it stops
    prompts: dict[int, int] = field(default_factory=dict)
    generated: dict[int, int] = field(default_factory=dict)
    cells: dict[int, int] = field(default_factory=dict)  # slot -> computed
    owner: dict[int, int] = field(default_factory=dict)  # slot -> id
    first_rows: list[int] = field(default_factory=list)  # ids in the order they first ran
    done: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.limits, self.policy)
        self.now = 0.0

    def add(self, id: int, n_prompt: int, max_tokens: int, end: int, **facts: Any) -> None:
        self.scheduler.add(id, n_prompt, max_tokens, **{"arrival": float(id)} | facts)
        self.prompts[id], self.generated[id] = n_prompt, 0
        self.ends[id] = min(end, max_tokens)

    def leave(self, slot: int) -> None:
        del self.cells[slot]
        del self.owner[slot]

    def remove(self, id: int) -> None:
        slot = self.scheduler.remove(id)
        if slot is not None:
            assert self.owner[slot] == id
            self.leave(slot)

    def place(self, step: Step) -> None:
        for id, slot in step.preempted:
            assert self.owner[slot] == id
            self.leave(slot)
        for id, slot in step.admitted:
            assert slot not in self.owner
            self.owner[slot], self.cells[slot] = id, 0
            if id not in self.first_rows:
                self.first_rows.append(id)
        assert len(self.owner) <= self.limits.n_seq_max

    def compute(self, step: Step, *, advance: bool = True) -> None:
        rows = len(step.decode) + sum(chunk.n for chunk in step.chunks)
        assert rows == step.n_rows <= self.limits.n_batch
        slots = [*step.decode.tolist(), *(chunk.slot for chunk in step.chunks)]
        assert len(slots) == len(set(slots))
        sampled = []
        for slot in step.decode.tolist():
            id = self.owner[slot]
            assert self.cells[slot] == self.prompts[id] + self.generated[id] - 1
            assert self.generated[id] >= 1
            self.cells[slot] += 1
            sampled.append(id)
        for chunk in step.chunks:
            assert self.owner[chunk.slot] == chunk.id
            assert self.cells[chunk.slot] == chunk.start
            self.cells[chunk.slot] += chunk.n
            known = self.prompts[chunk.id] + self.generated[chunk.id]
            assert self.cells[chunk.slot] <= known
            assert chunk.last == (self.cells[chunk.slot] == known)
            if chunk.last:
                sampled.append(chunk.id)
        if self.limits.unified:
            assert sum(self.cells.values()) <= self.limits.n_cells
        assert all(n <= self.limits.n_cells_seq for n in self.cells.values())
        if advance:
            self.scheduler.advance(step)
        for id in sampled:
            self.generated[id] += 1
            if advance and self.generated[id] == self.ends[id]:
                self.remove(id)
                self.done.append(id)
        if advance:
            self.check()

    def check(self) -> None:
        scheduler = self.scheduler
        assert scheduler.ledger.used == sum(self.cells.values())
        view = scheduler.view(0.0)
        assert [s.id for s in view.running] == list(scheduler.running_ids())
        assert {s.id for s in view.running if s.decoding} == set(view.decoding)
        assert {s.id for s in view.running if not s.decoding} == {s.id for s in view.prefilling}
        for seq in view.running:
            assert seq.computed == self.cells[scheduler.slot(seq.id) or 0]
            assert seq.generated == self.generated[seq.id]
            assert seq.remaining >= 1
        assert view.kv_promised == sum(s.remaining for s in view.running)
        assert view.kv_free == self.limits.n_cells - sum(s.computed for s in view.running)

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
        """As `step`, as often as the plan stands for (at most `most` times), until somebody ends:
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
