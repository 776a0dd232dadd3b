"""PrefixCache on a memory of plain lists that refuses what the real ones would refuse."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.kv import Hit, KvAccounting, KvOperation, PrefixCache, Sharing
from pyllamabatch.kv.radix_tree import Tokens
from pyllamabatch.kv.sharing import MIN_PREFIX, NO_HIT
from tests.support.cells import Cells

UNIFIED = Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=4)
STATES = Sharing(copy_whole=True, n_cached=4)  # recurrent, hybrid
STREAMS = Sharing(copy_whole=True, trim=True)
BESIDE = Sharing(copy_whole=True, trim=True, n_cached=2)  # streams, and some more for copies
WINDOW = Sharing(trim=True, window=24)
NOTHING = Sharing()
LIMITS = [
    (UNIFIED, True), (STATES, True), (STREAMS, False), (BESIDE, False), (WINDOW, True),
    (NOTHING, True),
]  # fmt: skip
N_RUN, N_CELLS = 3, 300


def text(seed: int, n: int) -> Tokens:
    return np.random.default_rng(seed).integers(0, 1000, n).astype(np.int32)


def branch(tokens: Tokens, n: int, more: int, seed: int = 1) -> Tokens:
    """The first `n` of them, and others behind."""
    return np.concatenate((tokens[:n], text(seed, more)))


@dataclass
class Rig:
    """A cache, its accounting, and a memory that its operations are carried out on."""

    sharing: Sharing
    unified: bool = True
    retain: bool = True
    live: dict[int, Tokens] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_slots = N_RUN + self.sharing.n_cached
        self.accounting = KvAccounting(N_CELLS, self.n_slots, unified=self.unified)
        self.memory = Cells(self.sharing, self.unified)
        self.cache = PrefixCache(self.accounting, self.sharing, retain=self.retain)

    def start(self, tokens: Tokens, space: object = "") -> tuple[int, Hit]:
        hit = self.cache.find(tokens, space)
        if hit.cells > self.accounting.free:
            hit = NO_HIT
        slot = self.cache.start(1, hit)
        self.cache.lives(slot, tokens, space, hit.n)
        assert slot not in self.live
        self.live[slot] = tokens
        self.check()
        assert self.accounting.held(slot) == hit.n
        return slot, hit

    def advance(self, slot: int, n: int) -> None:
        tokens, at = self.live[slot], self.accounting.held(slot)
        n = self.cache.cut(slot, at, min(n, len(tokens) - at, self.accounting.free))
        if not self.unified:
            n = min(n, self.accounting.n_cells_seq - at)
        self.cache.make_cells(n)
        self.carry_out()
        self.accounting.take(slot, n)
        self.memory.write(slot, tokens[at : at + n].tolist())
        self.cache.make_checkpoints()
        self.check()

    def run(self, tokens: Tokens) -> int:
        """All of it, to the end; its slot."""
        slot, _ = self.start(tokens)
        self.advance(slot, len(tokens))
        self.end(slot)
        return slot

    def end(self, slot: int, known: bool = True) -> None:
        tokens = self.live.pop(slot)
        self.cache.leaves(slot, tokens if known else None)
        self.check()

    def carry_out(self) -> None:
        for operation in self.cache.kv_operations:
            self.memory.carry_out(operation)
        self.cache.kv_operations.clear()

    def check(self) -> None:
        self.carry_out()
        for slot in range(self.n_slots):
            held = self.memory.tokens(slot)
            assert len(held) == self.accounting.held(slot)
            if slot in self.live:
                assert held == self.live[slot][: len(held)].tolist()
        assert self.accounting.used == self.memory.used
        cached = [slot for slot in range(self.n_slots) if self.accounting.is_cached(slot)]
        assert len(cached) == self.cache.n_cached
        empty = [*self.cache._free, *self.cache._behind]
        assert sorted([*cached, *self.live, *empty]) == list(range(self.n_slots))


def test_what_ended_is_found_again() -> None:
    rig, tokens = Rig(UNIFIED), text(0, 60)
    assert rig.cache.find(tokens, "") == NO_HIT
    slot = rig.run(tokens)
    other = branch(tokens, 40, 10)
    again, hit = rig.start(other)
    assert (hit.slot, hit.n, hit.cells, again != slot) == (slot, 40, 40, True)
    assert rig.accounting.used == 60
    assert rig.start(other, space="another")[1] == NO_HIT
    assert rig.start(text(2, 50))[1] == NO_HIT
    rig = Rig(UNIFIED)
    source = rig.run(tokens)
    slot = rig.cache.start(7, Hit(source, 20))
    assert rig.cache.kv_operations == [KvOperation("copy", slot, source, 20, id=7)]


def test_the_last_token_is_always_computed() -> None:
    rig, tokens = Rig(UNIFIED), text(0, 30)
    slot, _ = rig.start(tokens)
    rig.advance(slot, 30)
    assert rig.start(tokens)[1].n == 29
    assert rig.start(tokens[: MIN_PREFIX + 1])[1].n == MIN_PREFIX
    rig.end(slot)
    assert rig.cache.find(tokens[:MIN_PREFIX], "") == NO_HIT


def test_one_who_is_still_computing_is_worth_waiting_for() -> None:
    rig, tokens = Rig(UNIFIED), text(0, 100)
    slot, _ = rig.start(tokens)
    rig.advance(slot, 10)
    other = branch(tokens, 80, 10)
    assert rig.cache.pending(other, "", 0) == Hit(slot, 80)
    assert rig.cache.pending(other, "b", 0) == NO_HIT
    rig.advance(slot, 70)
    hit = rig.cache.find(other, "")
    assert (hit, rig.cache.pending(other, "", hit.n)) == (Hit(slot, 80, 0), NO_HIT)


def test_a_state_is_cached_where_one_waits_for_it() -> None:
    rig, tokens = Rig(STATES), text(0, 100)
    slot, _ = rig.start(tokens)
    other = branch(tokens, 50, 10)
    assert rig.cache.pending(other, "", 0) == Hit(slot, 50)
    rig.advance(slot, 80)
    assert rig.accounting.held(slot) == 50
    hit = rig.cache.find(other, "")
    assert hit.n == 50
    rig.advance(slot, 80)
    assert rig.cache.find(other, "").n == 50
    assert rig.start(other)[1].n == 50
    assert rig.start(tokens)[1].n == 50


def test_a_state_is_cached_where_two_texts_have_parted() -> None:
    rig, tokens = Rig(STATES), text(0, 60)
    rig.run(tokens)
    second = branch(tokens, 40, 20)
    slot, hit = rig.start(second)
    assert hit == NO_HIT  # the state is of 60 tokens
    for _ in range(3):
        rig.advance(slot, 60)
    third = branch(tokens, 40, 20, 2)
    assert rig.start(third)[1].n == 40
    longer = branch(tokens, len(tokens), 5, 3)
    assert rig.start(longer)[1].n == 60


def test_a_stream_goes_on_where_it_is() -> None:
    rig, tokens = Rig(STREAMS, unified=False), text(0, 60)
    slot = rig.run(tokens)
    other = branch(tokens, 40, 20)
    assert rig.start(other)[0] == slot
    third, hit = rig.start(other)  # a copy, for that one is live now
    assert (third != slot, hit.n) == (True, 40)


def test_a_long_sequence_with_a_window_is_only_good_as_a_whole() -> None:
    rig, tokens = Rig(WINDOW), text(0, 60)
    slot = rig.run(tokens)
    assert rig.cache.find(branch(tokens, 40, 20), "") == NO_HIT
    longer, hit = rig.start(branch(tokens, len(tokens), 20))
    assert (longer, hit.n) == (slot, 60)


def test_what_is_cached_is_preempted_the_oldest_first() -> None:
    rig = Rig(UNIFIED)
    texts = [text(i, 60) for i in range(5)]
    for tokens in texts[:4]:
        rig.run(tokens)
    rig.cache.find(texts[0], "")
    slot, hit = rig.start(np.concatenate((texts[0], texts[4])))
    assert hit.n == 60
    rig.end(slot)  # holds no more than what is cached
    assert rig.cache.n_cached == 4
    slot, _ = rig.start(texts[4])
    rig.advance(slot, 60)
    rig.cache.make_cells(1)
    rig.check()
    found = [rig.cache.find(tokens, "").n for tokens in texts]
    assert found == [59, 44, 59, 59, 59]
    rig.cache.make_cells(170)
    rig.check()
    assert [rig.cache.find(tokens, "").n for tokens in texts] == [59, 0, 0, 0, 59]
    rig.cache.drop_all()
    rig.check()
    assert rig.accounting.used == 60
    assert rig.cache.n_cached == 0


@pytest.mark.parametrize("again", [True, False])
def test_a_prefix_goes_when_it_has_paid_what_it_is_likely_to_save(again: bool) -> None:
    """The share that a sequence has started from, half where nothing is known."""
    rig, tokens = Rig(UNIFIED), text(0, 60)
    rig.run(tokens)
    if again:
        slot, _ = rig.start(branch(tokens, 48, 10))
        rig.end(slot, known=False)
    for _ in range(3 if again else 1):
        rig.cache.charge(0.25)
        assert rig.cache.find(tokens, "").n == 59
    rig.cache.charge(0.25)
    rig.check()
    assert rig.cache.find(tokens, "") == NO_HIT


def test_what_is_used_again_has_paid_nothing() -> None:
    rig, tokens = Rig(UNIFIED), text(0, 60)
    rig.run(tokens)
    for _ in range(5):
        slot, hit = rig.start(branch(tokens, 40, 10))
        assert hit.n == 40
        rig.end(slot, known=False)
        rig.cache.charge(0.6)


def test_where_room_is_short_what_no_sequence_has_started_from_goes_first() -> None:
    """An older one, too, but not for ever: what others take the room of has paid for it."""
    rig, used = Rig(UNIFIED), text(0, 60)
    rig.run(used)
    slot, _ = rig.start(branch(used, 40, 10))
    rig.end(slot, known=False)
    found = []
    for i in range(1, 30):
        rig.run(text(i, 60))
        found.append(rig.cache.find(used, "").n == 59)
        assert rig.cache.find(text(i, 60), "").n == 59
    n_slots = rig.n_slots
    assert all(found[:n_slots])
    assert not any(found[-4:])


def test_what_room_was_taken_from_pays_on_with_the_rest() -> None:
    rig, used = Rig(UNIFIED), text(0, 200)
    rig.run(used)
    slot, _ = rig.start(branch(used, 150, 10))
    rig.end(slot, known=False)
    slot, _ = rig.start(text(1, 150))
    rig.advance(slot, 150)
    assert rig.cache.find(used, "").n == 150
    rig.cache.charge(0.5)
    rig.check()
    assert rig.cache.find(used, "").n == 150


def test_how_often_prefixes_are_asked_for_again_is_learnt() -> None:
    """So is what they may pay: until the next one comes, all pay a little."""

    def last(*, again: bool) -> bool:
        rig = Rig(UNIFIED)
        for i in range(40):
            for seed in (i, i) if again else (2 * i, 2 * i + 1):
                slot, _ = rig.start(text(seed, 60))
                rig.advance(slot, 60)
                rig.end(slot)
                rig.cache.charge(0.3)
        rig.run(text(500, 60))
        rig.cache.charge(0.3)
        return rig.cache.find(text(500, 60), "").n > 0

    assert last(again=True)
    assert not last(again=False)


def test_what_is_asked_for_when_it_is_gone_counts_as_asked_for_again() -> None:
    rig = Rig(UNIFIED)

    def paid(seed: int) -> float:
        """What a prefix pays before it goes."""
        rig.run(text(seed, 60))
        n = 0
        while rig.cache.find(text(seed, 60), "").n:
            rig.cache.charge(1 / 256)
            rig.check()
            n += 1
        return n / 256

    for seed in range(60):
        paid(seed)
    low = paid(100)
    assert low < 0.05
    for seed in range(200, 230):
        paid(seed)
        paid(seed)
    assert paid(300) > 0.5


@pytest.mark.parametrize("tail", [100, 0])
def test_what_all_begin_with_is_no_reason_to_cache_the_rest(tail: int) -> None:
    """As a chat template's header. Where all of a prompt comes again, it is."""
    rig, header = Rig(UNIFIED), text(0, 16)
    rest, n_cached = text(1, 100 - tail), 0
    for seed in range(100):
        rig.run(np.concatenate((header, rest, text(100 + seed, tail))))
        for _ in range(8):
            rig.cache.charge(1 / 32)
        rig.check()
        n_cached += rig.accounting.used if seed >= 50 else 0
    assert (n_cached == 0) == (tail > 0)


def test_nothing_is_cached_when_it_is_not_wanted() -> None:
    rig, tokens = Rig(UNIFIED, retain=False), text(0, 60)
    slot, _ = rig.start(tokens)
    rig.advance(slot, 60)
    assert rig.start(tokens)[1].n == 59
    rig.end(slot)
    assert rig.cache.n_cached == 0


def test_no_slot_is_left_when_all_run() -> None:
    rig = Rig(NOTHING)
    for i in range(N_RUN):
        rig.start(text(i, 20))
    with pytest.raises(ValueError, match="every slot is running"):
        rig.cache.start(1)


@settings(max_examples=250)
@given(
    st.sampled_from(LIMITS),
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from(["start", "advance", "advance", "end", "fail", "cells"]),
            st.integers(0, 9),
            st.integers(0, 60),
            st.integers(1, 60),
        ),
        max_size=60,
    ),
)
def test_any_mix_keeps_memory_and_ledger_together(
    limits: tuple[Sharing, bool], retain: bool, operations: list[tuple[str, int, int, int]]
) -> None:
    rig = Rig(*limits, retain=retain)
    for name, seed, a, b in operations:
        live = sorted(rig.live)
        if name == "start" and len(live) < N_RUN:
            tokens = np.concatenate((text(seed % 2, a), text(seed + 5, b)))
            if rig.unified or len(tokens) <= rig.accounting.n_cells_seq:
                pending = rig.cache.pending(tokens, "", rig.cache.find(tokens, "").n)
                assert pending.n < len(tokens)
                rig.start(tokens)
        elif name == "advance" and live:
            rig.advance(live[seed % len(live)], b)
        elif name in ("end", "fail") and live:
            rig.end(live[seed % len(live)], name == "end")
        elif name == "cells" and b <= rig.accounting.free:
            rig.cache.make_cells(b)
            rig.check()
            assert rig.accounting.empty >= b or not rig.unified


def test_streams_that_run_stay_neighbours_and_what_is_cached_lies_behind_them() -> None:
    rig = Rig(BESIDE, unified=False)
    common, n = text(1, 40), 20
    tokens = [np.concatenate((common, text(2 + i, n))) for i in range(4)]
    slots = []
    for each in tokens[:3]:
        slot, _ = rig.start(each)
        slots.append(slot)
        while rig.accounting.held(slot) < len(each):
            rig.advance(slot, len(each))
    assert slots == [0, 1, 2]
    rig.end(1)
    rig.carry_out()
    assert rig.accounting.held(1) == 0
    assert rig.accounting.held(3) == 60  # the copy
    slot, hit = rig.start(tokens[3])
    assert (slot, hit.n) == (1, 40)
    rig.carry_out()
    assert rig.accounting.held(3) == 60  # others can start from it, too


def test_a_copy_that_does_not_pay_is_not_made() -> None:
    rig = Rig(BESIDE, unified=False)
    rig.cache = PrefixCache(rig.accounting, BESIDE, copy_share=lambda n: 2.5 / n)
    for n, cached in ((30, 0), (60, 1)):
        rig.run(text(n, n))
        assert rig.cache.n_cached == cached


def test_copies_are_made_as_long_as_sequences_start_from_them() -> None:
    rig = Rig(BESIDE, unified=False)
    rig.cache = PrefixCache(rig.accounting, BESIDE, copy_share=lambda n: 1 / 20)

    def copies(tokens: Tokens) -> bool:
        """When a sequence of these ends."""
        rig.run(tokens)
        return rig.cache.find(branch(tokens, len(tokens), 1), "").n == len(tokens)

    made = [copies(text(seed, 40)) for seed in range(20)]
    assert all(made[:4])
    assert not any(made[10:])
    assert copies(branch(text(19, 40), 39, 10))  # there is no copy that it could start from
    assert copies(text(300, 40))


def test_what_comes_back_is_copied_where_that_is_cheaper_than_computing_it() -> None:
    for share, cached in ((0.9, 1), (1.1, 0)):
        rig = Rig(BESIDE, unified=False)
        rig.cache = PrefixCache(rig.accounting, BESIDE, copy_share={40: share}.__getitem__)
        tokens = text(0, 40)
        slot, _ = rig.start(tokens)
        rig.advance(slot, 40)
        rig.cache.leaves(slot, tokens, comes_back=True)
        assert rig.cache.n_cached == cached
