"""A plain-Python executor that drives a scheduler by the book, and random limits for it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pyllamabatch.cost.step_cost import StepCost
from pyllamabatch.kv import KvOperation, Sharing, SwapChoice
from pyllamabatch.kv.radix_tree import Tokens
from pyllamabatch.scheduler import Invariance, KvOptions, Limits, Policy, Scheduler, Step
from pyllamabatch.scheduler.kv_options import Pool
from tests.support.cells import Cells
from tests.support.same_bits import SameBits

NEVER = 10**9
STEP_SECONDS = 0.1


@dataclass
class Known:
    """What the scheduler reads a sequence's tokens from."""

    tokens: dict[int, list[int]]
    id: int

    def known(self) -> Tokens:
        return np.array(self.tokens[self.id], dtype=np.int32)


class Machine:
    """Computes steps by the book, each in STEP_SECONDS, and checks each against its own record of
    the memory. `options`: of the scheduler.

    - tokens: what each sequence knows. generated: how many it has sampled. ends: after how many of
      these it ends.
    - owner: slot -> id. first_rows: ids in the order they first ran. done: in the order they ended.
    - alike: what they sample is the same behind the same tokens.
    - moved: operations, by kind. refuses: so many of the next ones that can fail do.
    - costs: what steps take from then on that the cells become "pool" or "streams". renewal_s: what
      it takes that they become so.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy | None = None,
        *,
        sharing: Sharing | None = None,
        retain: bool = True,
        swap: Any = "recompute",
        pool: Pool | None = None,
        invariance: Invariance | None = None,
        costs: Mapping[str, StepCost] | None = None,
        **options: Any,
    ) -> None:
        choice = swap if isinstance(swap, SwapChoice) else SwapChoice(swap)
        kv = KvOptions(sharing or Sharing(), retain, choice, pool, invariance)
        self.bits = None if invariance is None else SameBits(invariance)
        self.costs = costs or {}
        self.renewal_s = 0.0
        self.scheduler = Scheduler(limits, policy, kv=kv, **options)
        self.now = 0.0
        self.memory = Cells(kv.sharing, limits.unified)
        self.tokens: dict[int, list[int]] = {}
        self.generated: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.owner: dict[int, int] = {}
        self.filled: dict[int, int] = {}  # by slot: where rows begin that no sequence reads
        self.first_rows: list[int] = []
        self.done: list[int] = []
        self.moved: Counter[str] = Counter()
        self.alike = False
        self.refuses = 0
        self._fresh = count(1000)

    # -- sequences come and go

    def add(
        self,
        id: int,
        n_prompt: int,
        max_tokens: int = 1,
        end: int = NEVER,
        *,
        alike: int = 0,
        tokens: Iterable[int] = (),
        **facts: Any,
    ) -> None:
        """`end`: after so many tokens it ends, if `max_tokens` are not there sooner. `alike`: so
        many of its first tokens are those of all. `tokens`: its first ones."""
        tokens = [*(tokens or range(alike)), *islice(self._fresh, n_prompt)][:n_prompt]
        given: dict[str, Any] = {"arrival": float(id), "tokens": Known(self.tokens, id)} | facts
        self.tokens[id], self.generated[id] = tokens, 0
        self.ends[id] = NEVER if given.get("interactive") else min(end, max_tokens)
        self.scheduler.add(id, n_prompt, max_tokens, **given)

    def add_interactive(self, id: int, n_prompt: int, **facts: Any) -> None:
        self.add(id, n_prompt, arrival=self.now, interactive=True, **facts)

    def extend(self, id: int, n: int, *, alike: bool = False) -> None:
        """`alike`: as another one goes on that knows as many tokens."""
        known = len(self.tokens[id])
        self.scheduler.check_fits(known + n, 1)
        self.tokens[id] += range(known, known + n) if alike else islice(self._fresh, n)
        self.scheduler.interactive.extend(id, n)

    def restore(self, id: int) -> None:
        """The interactive sequence is what it was when it was saved, and computed as far as now."""
        tokens, slot = self.tokens[id], self.scheduler.slot(id)
        self.scheduler.check_fits(len(tokens), 1)
        how = self.scheduler.interactive.how_computed(id)
        n = self.memory.held(slot) if slot is not None and self.scheduler.loads(how) else 0
        self.remove(id)
        self.add_interactive(id, len(tokens), tokens=tokens, saved=n, restored=how)
        self.carry_out()

    def trim(self, id: int, known: int) -> None:
        cached, slot = self.scheduler.interactive.trim(id, known), self.scheduler.slot(id)
        before = 0 if slot is None else self.memory.held(slot)
        del self.tokens[id][known:]
        stays = known - 1 if self.bits is None else self.bits.trim(id, known)
        assert cached == min(before, stays)
        if self.carry_out() and slot is not None:
            assert self.memory.held(slot) == cached

    def remove(self, id: int, *, worth: bool = True, wanted: bool = False) -> None:
        slot = self.scheduler.remove(id, worth=worth, wanted=wanted)
        assert slot is None or self.owner[slot] == id
        self.leave(slot)

    def preempt(self, id: int, *, worth: bool = True) -> None:
        self.leave(self.scheduler.preempt(id, worth=worth))

    def leave(self, slot: int | None) -> None:
        """The scheduler says that none runs in `slot` any more."""
        if slot is not None:
            del self.owner[slot]
        self.carry_out()

    def drop_cached(self) -> None:
        self.scheduler.drop_cached()
        self.carry_out()

    def fresh_context(self) -> None:
        """All that runs is computed again."""
        for id in reversed(self.scheduler.running_ids()):
            self.preempt(id, worth=False)
        self.drop_cached()

    # -- steps

    def plan(self) -> Step:
        """The next step, which there is; nothing of it is computed."""
        step = self.scheduler.plan(self.now)
        assert step is not None
        return step

    def step(self) -> Step | None:
        """The next step that has something to compute, when it is time for it, computed."""
        step = self._plan()
        if step is not None and self.place(step):
            self.compute_parts(step)
        return step

    def next_step(self) -> Step:
        step = self.step()
        assert step is not None
        return step

    def steps(self) -> Iterator[Step]:
        for _ in range(100_000):
            step = self.step()
            if step is None:
                return
            yield step
        raise AssertionError("it never ends")

    def run(self) -> None:
        for _ in self.steps():
            pass

    def _plan(self) -> Step | None:
        seconds = 1.0
        while (step := self.scheduler.plan(self.now)) is None and not self.scheduler.idle:
            before, seconds = seconds, self.scheduler.hold(self.now)
            assert seconds > 0 or before > 0  # at once, but not for ever
            self.now += seconds
        return step

    def step_many(self, most: int) -> tuple[Step, int] | None:
        """As `step`, as often as the plan stands for (at most `most` times), until one ends:
        the scheduler hears of it once."""
        step = self._plan()
        if step is None:
            return None
        if not self.place(step):
            return step, 0
        if step.repeat == 1:
            self.compute_parts(step)
            return step, 1
        ids = [self.owner[slot] for slot in step.decode.tolist()]
        n = 0
        while n < min(most, step.repeat) and all(self.generated[i] < self.ends[i] for i in ids):
            self.compute(step, advance=False)
            n += 1
        self.scheduler.advance(step, n)
        self.carry_out()
        self._end(ids)
        self.check()
        return step, n

    def alone(self, step: Step, n: int) -> None:
        """`step`, which was computed, `n` times more, of an interactive sequence whose owner asks
        for as many tokens without a word."""
        (slot,) = step.decode.tolist()
        id = self.owner[slot]
        for _ in range(n):
            self._grow(slot, 1)
            if self.bits is not None:
                self.bits.computed(step, self.owner, {id: len(self.tokens[id])})
            self._sample(id)
        assert self.memory.used <= self.limits.n_cells
        assert self.memory.held(slot) <= self.limits.n_cells_seq
        self.now += n * STEP_SECONDS
        self.scheduler.advance_alone(step, n, self.now, STEP_SECONDS)
        self.check()

    def carry_out(self, operations: Iterable[KvOperation] | None = None) -> bool:
        """The operations; default: those that were decided since the last step. False when a
        sequence could not go on from there: a step that has rows of it is void."""
        failed: set[int] = set()
        for operation in self.scheduler.take_kv_operations() if operations is None else operations:
            if operation.id in failed and operation.kind in ("copy", "trim", "load"):
                continue
            if self._refused(operation):
                self.moved["refused"] += 1
                failed |= self._fail(operation)
                continue
            if self.moved["refused"] and self._is_gone(operation):
                continue
            self.moved[operation.kind] += 1
            if operation.kind == "trim" and operation.slot in self.filled:
                assert operation.n == self.filled.pop(operation.slot)
                continue
            assert not self.filled.keys() & {operation.slot, operation.source}
            if operation.kind in ("pool", "streams"):
                assert not self.owner
                saved, sharing = self.memory.saved, self.scheduler.admission.cache.sharing
                self.memory = Cells(sharing, unified=operation.kind == "pool")
                self.memory.saved = saved
                if operation.kind in self.costs:
                    self.scheduler.renewed(self.costs[operation.kind], self.renewal_s)
                continue
            self.memory.carry_out(operation, self.tokens.get(operation.id, ()))
            if self.bits is not None:
                self.bits.carry_out(operation)
        if failed and operations is None:
            self.carry_out()  # they have left their slots
        return not failed

    def _refused(self, operation: KvOperation) -> bool:
        """Whether the memory does, be it because of what was refused before."""
        kind, id, memory = operation.kind, operation.id, self.memory
        if self.refuses and kind in ("copy", "save", "load", "store", "cut"):
            self.refuses -= 1
            return True
        if not self.moved["refused"]:
            return False
        if kind == "copy":
            held = memory.held(operation.source)
            return held != operation.n if operation.whole else held < operation.n
        return kind == "load" and len(memory.saved.get(id, ())) != operation.n

    def _is_gone(self, operation: KvOperation) -> bool:
        """Whether what was refused before has left nothing to do."""
        if operation.kind == "discard":
            return operation.id not in self.memory.saved
        if operation.kind == "trim":
            return operation.slot not in self.memory.slots
        if operation.kind != "save" or self.memory.held(operation.slot) == operation.n:
            return False
        self.memory.saved[operation.id] = []  # with what was to be cut off: it can't be loaded
        return True

    def _fail(self, operation: KvOperation) -> set[int]:
        """The id of the sequence that has to be computed again for that, if there is one."""
        if operation.kind == "load":
            self.memory.saved.pop(operation.id, None)
        preempted = self.scheduler.kv_failed(operation)
        if preempted is None:
            return set()
        id, slot = preempted
        assert self.owner.pop(slot) == id
        return {id}

    def place(self, step: Step) -> bool:
        """Whether it can be computed: see `carry_out`."""
        assert step.n_slots == len(step.slots)
        for id, slot in step.preempted:
            assert self.owner.pop(slot) == id
        moved = {id: self.memory.tokens(source) for id, source, _ in step.moved}
        for id, source, slot in step.moved:
            assert self.owner.pop(source) == id
            assert slot not in self.owner
            self.owner[slot] = id
            self.memory.write(slot, ())
        for id, slot in step.admitted:
            assert slot not in self.owner
            self.owner[slot] = id
        whole = self.carry_out(step.kv_operations)
        assert not self.filled
        self.filled = {chunk.slot: chunk.start + chunk.n for chunk in step.chunks if chunk.fill}
        for id, _, slot in step.moved:
            assert not whole or self.memory.tokens(slot) == moved[id]
        for id, slot in step.admitted:
            if self.owner.get(slot) != id:  # what it was to start from was refused
                continue
            self.memory.write(slot, ())
            held = self.memory.tokens(slot)
            assert held == self.tokens[id][: len(held)]
            if self.bits is not None:
                self.bits.placed(id, slot)
            if id not in self.first_rows:
                self.first_rows.append(id)
        assert len(self.owner) <= self.limits.n_seq_max
        if not whole:
            self.carry_out()
        return whole

    def compute_parts(self, step: Step) -> None:
        for part in (step,) if self.limits.unified else step.parts():
            self.compute(part)

    def compute(self, step: Step, *, advance: bool = True) -> None:
        rows = len(step.decode) + sum(chunk.n for chunk in step.chunks)
        assert rows == step.n_rows <= self.limits.n_batch - step.n_fill
        assert step.n_slots == len(step.slots)
        if self.bits is not None:
            n_known = {id: len(tokens) for id, tokens in self.tokens.items()}
            self.bits.computed(step, self.owner, n_known)
        prompts = [chunk.slot for chunk in step.chunks]
        assert len(prompts) == len(set(prompts))
        for chunk in step.chunks:
            assert self.owner[chunk.slot] == chunk.id
            assert self.memory.held(chunk.slot) == chunk.start
            known = len(self.tokens[chunk.id])
            assert self._grow(chunk.slot, chunk.n) == chunk.start + chunk.n < known
            assert chunk.start + chunk.n + chunk.fill <= self.limits.n_cells_seq
        sampled = [self.owner[slot] for slot in step.decode.tolist()]
        assert len(sampled) == len(set(sampled))
        for id, slot in zip(sampled, step.decode.tolist(), strict=True):
            assert self._grow(slot, 1) == len(self.tokens[id])
        if self.limits.unified:
            assert self.memory.used <= self.limits.n_cells
        assert all(len(cells) <= self.limits.n_cells_seq for cells in self.memory.slots.values())
        self.now += STEP_SECONDS
        self.memory.copying.clear()
        if advance and step.n_rows:
            self.scheduler.advance(step)
            self.carry_out()
        for id in sampled:
            self._sample(id)
        if advance:
            self._end(sampled)
            self.check()

    def _sample(self, id: int) -> None:
        self.generated[id] += 1
        self.tokens[id].append(len(self.tokens[id]) if self.alike else next(self._fresh))

    def _grow(self, slot: int, n: int) -> int:
        """`n` more cells for the sequence in `slot`; how many it has then."""
        tokens, held = self.tokens[self.owner[slot]], self.memory.held(slot)
        self.memory.write(slot, tokens[held : held + n])
        return self.memory.held(slot)

    def _end(self, ids: Iterable[int]) -> None:
        for id in ids:
            if self.generated[id] == self.ends[id]:
                self.remove(id)
                self.done.append(id)

    # -- what there is

    @property
    def limits(self) -> Limits:
        return self.scheduler.limits

    @property
    def held(self) -> dict[int, list[int]]:
        return {slot: self.memory.tokens(slot) for slot in self.memory.slots}

    def check(self) -> None:
        scheduler, memory = self.scheduler, self.memory
        view = scheduler.view(self.now)
        assert scheduler.accounting.used == memory.used
        assert [s.id for s in view.running] == list(scheduler.running_ids())
        assert set(scheduler.running_ids()) == set(self.owner.values())
        busy = {s.id for s in view.running if s.remaining}
        assert {s.id for s in view.running if s.decoding} == set(view.decoding)
        assert {s.id for s in view.prefilling} == busy - set(view.decoding)
        assert len(scheduler.idle_sequences) == len(view.running) - len(busy)
        assert all(seq.remaining for seq in view.waiting)
        assert view.kv.promised == sum(s.remaining for s in view.running)
        uses = memory.uses(self.owner)
        assert view.kv.free == scheduler.limits.n_cells - len(uses)
        for slot, id in self.owner.items():
            seq = scheduler.sequence(id)
            assert (seq.computed, seq.known) == (memory.held(slot), len(self.tokens[id]))
            if seq.goal is None:
                assert seq.generated == self.generated[id]
                assert seq.remaining
            alone = sum(uses[cell] == 1 for _, cell in memory.slots[slot])
            assert view.kv.freed_by(id) == alone
        assert set(memory.saved) == set(scheduler.admission._saved)


limits = st.builds(
    lambda n_batch, n_ubatch, n_seq_max, n_cells, unified: Limits(
        n_batch=n_batch, n_ubatch=min(n_batch, n_ubatch), n_seq_max=n_seq_max,
        n_cells=n_cells if unified else n_cells * n_seq_max, n_cells_seq=n_cells, unified=unified,
    ),
    st.integers(1, 40),
    st.integers(1, 16),
    st.integers(1, 6),
    st.integers(12, 80),
    st.booleans(),
)  # fmt: skip
