"""What a step is made of, in terms of slots, and the counts of what was done."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..cost.terms import Shape as Shape
from ..kv import KvOperation, Slots
from .drafting import Drafted
from .invariance import Invariance
from .view import Prices

# Steps of one group before another one's turn. A change of adapters makes libllama plan its graphs
# anew, which takes about as long as a step.
AT_A_TIME = 8


NO_SLOTS: Slots = np.zeros(0, dtype=np.int32)
NO_SLOTS.flags.writeable = False


class PromptChunk(NamedTuple):
    """Rows `start` to `start + n - 1` of one sequence's known tokens. Nothing is sampled from them:
    the last known token is a row of those that decode. decodes: one row that is computed as those
    (`Invariance`). fill: rows behind them that no sequence reads. apart: it shares no call with
    the chunk before it, though that may have as many rows (`Neighbours`)."""

    id: int
    slot: int
    start: int
    n: int
    decodes: bool = False
    fill: int = 0
    apart: bool = False


@dataclass(slots=True)
class Step:
    """A checked plan in terms of slots; nothing changes it once it is built.

    - chunks: rows of prompts, computed first. decode: slots that compute the last known token and
      sample (int32, ascending, read-only), those whose prompt ends with this step's chunk included.
      behind: but none of those, and the chunks are computed behind it (`StepBuilder`).
    - preempted, admitted: (id, slot). moved: (id, slot before, slot), before any is admitted; see
      `Compaction`, `Neighbours`.
    - repeat: how many times it may be computed before the policy is asked again, as long as no
      sequence comes or goes; more than 1 only for pure decoding. stands: the same of an interactive
      sequence that is alone, once each time that its owner asks; see `Scheduler.advance_alone`.
    - kv_operations: to be carried out in the memory, in this order, before the rows are computed.
    - n_rows, n_slots: how many rows there are, without those that fill up, and how many slots have
      some.
    - n_out: sequences that decode and have no row in this step, but whose cells are attended.
    - n_pad: slots that have a row, used or not (`Padding`); 0: only those that decode.
    - drafts: drafted tokens that each slot may add each time. prices: see `Plan`.
    - invariance: how it is cut into calls, where that may not depend on neighbours."""

    decode: Slots
    chunks: tuple[PromptChunk, ...]
    preempted: tuple[tuple[int, int], ...]
    admitted: tuple[tuple[int, int], ...]
    n_rows: int
    reasons: Mapping[int, str]
    repeat: int = 1
    n_slots: int = 0
    n_out: int = 0
    kv_operations: tuple[KvOperation, ...] = ()
    n_pad: int = 0
    behind: bool = False
    moved: tuple[tuple[int, int, int], ...] = ()
    stands: int = 1
    drafts: Mapping[int, int] = field(default_factory=dict)
    invariance: Invariance | None = None
    prices: Prices | None = None

    @property
    def n_fill(self) -> int:
        """Rows that fill up chunks."""
        return sum([chunk.fill for chunk in self.chunks])

    @property
    def slots(self) -> list[int]:
        """All that have rows in it, each once."""
        return list(dict.fromkeys([*self.decode.tolist(), *(chunk.slot for chunk in self.chunks)]))

    def shape(self, kv: float) -> Shape:
        """What `CostModel.predict` is told, when `kv` cells are attended before it: rows, those of
        prompts, kv, sequences. One that decodes, has no row now and is attended counts as a
        sequence; one whose prompt ends with this step twice."""
        if not self.chunks:
            n_rows = max(self.n_rows, self.n_pad)
            return n_rows, 0, kv, n_rows + self.n_out
        n_decode = len(self.decode)
        return self.n_rows, self.n_rows - n_decode, kv, n_decode + len(self.chunks)

    def by_group(self, group_of: Callable[[int], Hashable], first: Hashable) -> tuple[Step, ...]:
        """This step as one for each group of slots, `first` first if it is among them. Where there
        are several, none is computed more than `AT_A_TIME` times before the others' turn."""
        groups: dict[Hashable, tuple[list[int], list[PromptChunk]]] = {first: ([], [])}
        for slot in self.decode.tolist():
            groups.setdefault(group_of(slot), ([], []))[0].append(slot)
        for chunk in self.chunks:
            groups.setdefault(group_of(chunk.slot), ([], []))[1].append(chunk)
        pieces = [piece for piece in groups.values() if piece != ([], [])]
        if len(pieces) == 1:
            return (self,)
        at_a_time = replace(self, repeat=min(self.repeat, AT_A_TIME))
        # No call is saved by rows that make a prompt as long as another group's.
        return at_a_time._cut(
            [
                (
                    np.array(slots, np.int32),
                    [chunk._replace(fill=0, apart=False) for chunk in chunks],
                )
                for slots, chunks in pieces
            ]
        )

    def parts(self) -> tuple[Step, ...]:
        """The native calls that this step is best computed in where every sequence has a stream of
        cells of its own, one after another; each is a step that can be advanced by itself.

        libllama makes ubatches there of sequences with ascending ids and the same number of rows.
        So rows of a prompt share none with those that decode, but for its own last one, and of two
        prompts only pieces of the same length from neighbouring slots go together. In one call a
        mixture is cut into more and smaller ubatches, and outputs that come out of order are sorted
        by moving whole rows of logits."""
        if self.invariance is not None:
            return self._invariant_parts(self.invariance)
        if not self.chunks or (self.behind and len(self.chunks) == 1):
            return (self,)
        groups: list[list[PromptChunk]] = []
        for chunk in sorted(self.chunks, key=by_slot):
            last = groups[-1][-1] if groups and not chunk.apart else None
            rows = chunk.n + chunk.fill
            if last is not None and (last.n + last.fill, last.slot + 1) == (rows, chunk.slot):
                groups[-1].append(chunk)
            else:
                groups.append([chunk])
        if self.behind:
            behind = [(NO_SLOTS, group) for group in groups]
            return self._cut([(self.decode, groups[0]), *behind[1:]])
        left = dict.fromkeys(self.decode.tolist())
        ends = {chunk.slot for chunk in self.chunks}
        others = [slot for slot in left if slot not in ends]
        pieces: list[tuple[Slots, Sequence[PromptChunk]]] = []
        for group in groups:
            slots = [chunk.slot for chunk in group]
            # As many rows of each: their last ones go along, but where that costs a graph, or parts
            # others that decode into two ubatches: cells are held between them now.
            costs_graph = self.n_pad and len(self.decode) > len(slots)
            parts_others = others and others[0] < slots[0] <= slots[-1] < others[-1]
            if not left.keys() >= set(slots) or costs_graph or parts_others:
                slots = []
            for slot in slots:
                del left[slot]
            pieces.append((np.array(slots, np.int32), group))
        if len(left) == len(self.decode) > 0:
            pieces.append((self.decode, ()))
        elif left:
            pieces.append((np.array([*left], np.int32), ()))
        return self._cut(pieces)

    def _invariant_parts(self, invariance: Invariance) -> tuple[Step, ...]:
        """Each chunk alone; rows that decode, those that sample nothing before the others, with
        as many rows as `invariance` wants."""
        pieces: list[tuple[Slots, Sequence[PromptChunk]]] = []
        rounds: list[list[PromptChunk]] = []  # one row of a sequence in each
        for chunk in self.chunks:
            if not chunk.decodes:
                pieces.append((NO_SLOTS, [chunk]))
                continue
            for others in rounds:
                if all(other.slot != chunk.slot for other in others):
                    others.append(chunk)
                    break
            else:
                rounds.append([chunk])
        pieces += [(NO_SLOTS, sorted(one, key=by_slot)) for one in rounds]
        if len(self.decode):
            pieces.append((self.decode, ()))
        parts = self._cut(pieces)
        return tuple(replace(part, n_pad=invariance.width(part._decoding())) for part in parts)

    def _decoding(self) -> list[int]:
        """Slots with a row that decodes, whether it samples or not."""
        return [*self.decode.tolist(), *(chunk.slot for chunk in self.chunks if chunk.decodes)]

    def _cut(self, pieces: Sequence[tuple[Slots, Sequence[PromptChunk]]]) -> tuple[Step, ...]:
        parts: list[Step] = []
        for decode, chunks in pieces:
            drafts = {}
            if self.drafts:
                drafts = {k: self.drafts[k] for k in decode.tolist() if k in self.drafts}
            part = replace(
                self,
                decode=decode,
                chunks=tuple(chunks),
                preempted=() if parts else self.preempted,
                admitted=() if parts else self.admitted,
                n_rows=len(decode) + sum(chunk.n for chunk in chunks),
                n_slots=len({*decode.tolist(), *(chunk.slot for chunk in chunks)}),
                n_pad=self.n_pad if decode is self.decode else 0,
                behind=self.behind and len(decode) > 0 and len(chunks) > 0,
                drafts=drafts,
                prices=self.prices if drafts else None,
            )
            parts.append(part)
        return tuple(parts)


class Span(NamedTuple):
    """Slots that are computed together: how many rows that are, and how many of them decode."""

    rows: int
    decode: int


def spans(slots: Slots, held: npt.NDArray[np.int64], gap_max: int) -> list[Span]:
    """What libllama makes of rows that decode in ascending `slots`, where each sequence has a
    stream of cells of its own: neighbours are computed together (src/llama-batch.cpp:
    `split_equal`), and with them up to `gap_max` slots in between that hold nothing
    (native/step/gaps.hpp). held: positions by slot."""
    first, n = int(slots[0]), len(slots)
    if int(slots[-1]) - first + 1 == n:
        return [Span(n, n)]
    found: list[Span] = []
    start, n_before = first, 0
    for i in (slots[1:] - slots[:-1] > 1).nonzero()[0].tolist():
        before, slot = int(slots[i]), int(slots[i + 1])
        if slot - before - 1 > gap_max or any(held[before + 1 : slot].tolist()):
            found.append(Span(before + 1 - start, i + 1 - n_before))
            start, n_before = slot, i + 1
    return [*found, Span(int(slots[-1]) + 1 - start, n - n_before)]


def by_slot(chunk: PromptChunk) -> int:
    return chunk.slot


@dataclass(slots=True)
class Counters:
    """What has been computed so far. `rows` = `decode_rows` + `prefill_rows`; the last known token
    of a prompt is a row of the first. `recomputed_rows` are the prefill rows that a preempted
    sequence had computed before; `tokens` = sampled; `fill`: how many steps have sampled so many
    sequences; `slot_steps`: slots that had rows, summed over the steps. `known_tokens`: of
    sequences when they were admitted; of these `prefix_tokens` were in the cache and
    `loaded_tokens` in a saved state. `layout_changes`: how often streams have become a pool, or a
    pool streams again.
    `drafts` with `drafted_tokens` were checked in rows of their own, and `accepted_tokens` of these
    were right, `accepted_at[i]` of them the draft's token i; these rows, and those that only fill
    up beside them, are among `decode_rows`."""

    steps: int = 0
    rows: int = 0
    decode_rows: int = 0
    prefill_rows: int = 0
    recomputed_rows: int = 0
    tokens: int = 0
    admissions: int = 0
    preemptions: int = 0
    fill: dict[int, int] = field(default_factory=dict)
    slot_steps: int = 0
    known_tokens: int = 0
    prefix_tokens: int = 0
    loaded_tokens: int = 0
    layout_changes: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: list[int] = field(default_factory=list)

    def count_drafts(self, n_rows: int, drafted: Drafted) -> None:
        """Beside what `count` has: so many rows for drafts."""
        self.rows += n_rows
        self.decode_rows += n_rows
        if not drafted.n_drafted:
            return
        self.tokens += drafted.n_accepted
        self.drafts += drafted.n_drafts
        self.drafted_tokens += drafted.n_drafted
        self.accepted_tokens += drafted.n_accepted
        if drafted.n_right is not None:
            right: list[int] = drafted.n_right.tolist()
            before = self.accepted_at or [0] * len(right)
            self.accepted_at = [a + b for a, b in zip(before, right, strict=True)]

    def count(self, step: Step, n: int, n_recomputed: int) -> None:
        """`step` was computed `n` times. n_recomputed: see `recomputed_rows`."""
        n_sampled = len(step.decode)
        self.steps += n
        self.rows += n * step.n_rows
        self.decode_rows += n * n_sampled
        self.prefill_rows += n * (step.n_rows - n_sampled)
        self.recomputed_rows += n_recomputed
        self.tokens += n * n_sampled
        self.slot_steps += n * step.n_slots
        self.fill[n_sampled] = self.fill.get(n_sampled, 0) + n
