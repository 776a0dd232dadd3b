"""Fork, roll back, shift, save, restore: the continuation is that of recomputing from the tokens.
Any operations in any order, to the same end, are tests/llama/test_memory_stateful.py's.

Bit for bit equal: a fork with a stream of cells per sequence, and a recurrent state that was
copied or restored.  Within the tolerance of `oracle`: everything in shared cells, where the order
of the cells, and so of the sums, depends on who wrote first; and what recomputes tokens in other
groups of rows, or rotates keys.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from tests.support.decoding import loaded
from tests.support.engines import EXACT
from tests.support.models_gguf import (
    ARCHITECTURES,
    SLIDING_WINDOW,
    Architecture,
    gguf_path,
    write_gguf,
)
from tests.support.oracle import (
    Agreement,
    Logits,
    RawModel,
    Reference,
    greedy,
    random_prompts,
    raw_model,
    solo,
    tolerance,
)

N_TOKENS = 12
PROMPT, OTHER = random_prompts(2, seed=100, shortest=60, longest=60)


class Sequences:
    """A typed context, fed by sequence and position."""

    def __init__(self, model: Model, n_seq_max: int = 3, **params: Any) -> None:
        settings = EXACT | {"n_ctx": 512 * n_seq_max, "n_ubatch": 64} | params
        self.context = Context(model, n_seq_max=n_seq_max, **settings)
        self.memory = self.context.memory
        self.batch = self.context.batch()

    def feed(self, tokens: Sequence[int], *, seq: int = 0, pos: int = 0) -> Logits:
        """The logits after the last token, a copy."""
        self.batch.clear()
        self.batch.extend(tokens, pos, seq)
        self.context.decode(self.batch)
        logits: Logits = self.context.logits().copy()
        return logits

    def greedy(self, logits: Logits, *, seq: int = 0, pos: int) -> Reference:
        return greedy(self.feed, logits.copy(), N_TOKENS, seq=seq, pos=pos)


@pytest.fixture(scope="module")
def oracle(architecture: Architecture) -> Iterator[RawModel]:
    with raw_model(gguf_path(architecture.name)) as model:
        yield model


@pytest.fixture
def sequences(model: Model) -> Iterator[Sequences]:
    made = Sequences(model)
    with made.context:
        yield made


Check = Callable[[Reference, Sequence[int]], None]


@pytest.fixture
def check(oracle: RawModel, architecture: Architecture) -> Check:
    """That a continuation is that of the tokens alone."""

    def same(got: Reference, tokens: Sequence[int]) -> None:
        assert_same(got, solo(oracle, tokens, N_TOKENS), tolerance(architecture.name))

    return same


def assert_same(got: Reference, expected: Reference, limit: float) -> None:
    agreement = Agreement()
    agreement.check(expected, got.tokens, limit)
    assert agreement.compared == len(expected.tokens)
    assert np.abs(got.logits - expected.logits).max() <= limit


@pytest.mark.parametrize("unified", [True, False])
def test_a_fork_continues_as_its_source(
    model: Model, check: Check, architecture: Architecture, unified: bool
) -> None:
    sequences = Sequences(model, kv_unified=unified)
    with sequences.context:
        logits = sequences.feed(PROMPT)
        sequences.memory.seq_cp(0, 1)
        fork = sequences.greedy(logits, seq=1, pos=len(PROMPT))
        source = sequences.greedy(logits, seq=0, pos=len(PROMPT))
    if architecture.recurrent or not unified:
        np.testing.assert_array_equal(fork.logits, source.logits)
    assert_same(fork, source, tolerance(architecture.name))
    check(fork, PROMPT)


def test_which_architectures_refuse_what() -> None:
    """The capabilities of the six, so that the branches above are the ones that are meant."""
    partial, prefix, window, shift = {}, {}, {}, {}
    for name in ARCHITECTURES:
        with Context(loaded(name), n_ctx=512, n_seq_max=2) as context:
            can = context.capabilities
            partial[name], prefix[name] = can.partial_removal, can.prefix_copy
            window[name], shift[name] = can.swa_window, can.can_shift
    attention = {"llama", "qwen2", "gemma3", "qwen3moe"}
    assert shift == {name: name in attention for name in ARCHITECTURES}
    assert {name for name, can in partial.items() if can} == attention
    assert {name for name, can in prefix.items() if can} == attention
    assert {name: n for name, n in window.items() if n} == {"gemma3": SLIDING_WINDOW}


@pytest.mark.parametrize("n_last", [1, 3, 20])
@pytest.mark.parametrize("n_back", [1, 2, 4])
def test_a_state_rolls_back_within_its_last_decode(n_last: int, n_back: int) -> None:
    """`n_rs_seq=4` lets the last tokens of an lfm2 go, but the first row of the last decode has no
    snapshot before it: without `vendor/patches/state-rolled-back.patch` libllama takes an old one
    without a word (logits off by 10).  Refused, and the sequence goes on."""
    with raw_model(gguf_path("lfm2")) as oracle:
        sequences = Sequences(loaded("lfm2"), n_seq_max=2, n_rs_seq=4)
        with sequences.context:
            before = len(PROMPT) - n_last
            sequences.feed(PROMPT[:before])
            sequences.feed(PROMPT[before:], pos=before)
            sequences.feed(OTHER, seq=1)  # a neighbour's rows do not spoil the snapshots
            whole = [*PROMPT[: len(PROMPT) - n_back], *OTHER[1:4]]
            if n_back < n_last:
                sequences.memory.seq_rm(0, len(PROMPT) - n_back)
            else:
                with pytest.raises(UnsupportedOperation, match="fewer than its rows"):
                    sequences.memory.seq_rm(0, len(PROMPT) - n_back)
                whole = [*PROMPT, *OTHER[1:4]]
            after = sequences.feed(OTHER[1:4], pos=len(whole) - 3)
            got = sequences.greedy(after, pos=len(whole))
        assert_same(got, solo(oracle, whole, N_TOKENS), tolerance("lfm2"))


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_state_that_was_rolled_back_is_copied(first: int) -> None:
    """It, and copies of it, go on from there, whichever comes first, and with a neighbour between:
    unpatched, libllama copies the state from before (logits off by 15)."""
    with raw_model(gguf_path("lfm2")) as oracle:
        sequences = Sequences(loaded("lfm2"), n_seq_max=4, n_rs_seq=4)
        memory = sequences.memory
        with sequences.context:
            sequences.feed(OTHER, seq=3)
            sequences.feed(PROMPT)
            memory.seq_rm(0, len(PROMPT) - 2)
            memory.seq_cp(0, 1)
            memory.seq_cp(1, 2)
            with pytest.raises(UnsupportedOperation, match="twice"):
                memory.seq_rm(0, len(PROMPT) - 3)
            whole = [*PROMPT[:-2], *OTHER[1:3]]
            for n, seq in enumerate([first, (first + 1) % 3, (first + 2) % 3]):
                sequences.feed(OTHER[1:3], pos=len(OTHER) + 2 * n, seq=3)
                logits = sequences.feed(OTHER[1:3], pos=len(whole) - 2, seq=seq)
                got = sequences.greedy(logits, pos=len(whole), seq=seq)
                assert_same(got, solo(oracle, whole, N_TOKENS), tolerance("lfm2"))


@pytest.mark.parametrize("copied", [True, False])
def test_what_was_rolled_back_and_removed_is_no_more_in_the_way(copied: bool) -> None:
    """A copy takes its place, or other tokens, before any decode has made it whole."""
    with raw_model(gguf_path("lfm2")) as oracle:
        sequences = Sequences(loaded("lfm2"), n_seq_max=2, n_rs_seq=4)
        memory = sequences.memory
        with sequences.context:
            logits = sequences.feed(OTHER, seq=1)
            sequences.feed(PROMPT)
            memory.seq_rm(0, len(PROMPT) - 2)
            if copied:
                with pytest.raises(ArgumentError, match="remove that first"):
                    memory.seq_cp(1, 0)
            memory.seq_rm(0)
            if copied:
                memory.seq_cp(1, 0)
            else:
                logits = sequences.feed(OTHER)
            got = sequences.greedy(logits, pos=len(OTHER))
        assert_same(got, solo(oracle, OTHER, N_TOKENS), tolerance("lfm2"))


def test_a_state_that_was_moved_has_no_snapshots() -> None:
    """A decode of others puts their states side by side; those of one that lies between stay
    behind. Unpatched, libllama goes on from another sequence's (logits off by 17)."""
    with raw_model(gguf_path("lfm2")) as oracle:
        sequences = Sequences(loaded("lfm2"), n_seq_max=4, n_rs_seq=4, kv_unified=True)
        with sequences.context:
            for seq in (0, 1, 2):
                logits = sequences.feed(PROMPT, seq=seq)
            sequences.batch.clear()
            for seq in (0, 2):
                sequences.batch.extend(OTHER[:1], len(PROMPT), seq)
            sequences.context.decode(sequences.batch)
            with pytest.raises(UnsupportedOperation, match="has moved it"):
                sequences.memory.seq_rm(1, len(PROMPT) - 2)
            got = sequences.greedy(logits, pos=len(PROMPT), seq=1)
        assert_same(got, solo(oracle, PROMPT, N_TOKENS), tolerance("lfm2"))


def test_parts_of_several_states_are_not_removed_at_once() -> None:
    """Of which one might stay, and another not."""
    sequences = Sequences(loaded("lfm2"), n_seq_max=2, n_rs_seq=4)
    with sequences.context:
        for seq in (0, 1):
            sequences.feed(PROMPT, seq=seq)
        with pytest.raises(UnsupportedOperation):
            sequences.memory.seq_rm(-1, len(PROMPT) - 2)
        assert [sequences.memory.pos_max(seq) for seq in (0, 1)] == 2 * [len(PROMPT) - 1]


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_mamba_has_no_snapshots_in_this_llama_cpp(name: str) -> None:
    with raw_model(gguf_path(name)) as oracle:
        sequences = Sequences(loaded(name), n_seq_max=2, n_rs_seq=4)
        with sequences.context:
            assert sequences.context.n_rs_seq == 0
            logits = sequences.feed(PROMPT)
            with pytest.raises(UnsupportedOperation, match="at most 0 tokens"):
                sequences.memory.seq_rm(0, len(PROMPT) - 1)
            got = sequences.greedy(logits, pos=len(PROMPT))
        assert_same(got, solo(oracle, PROMPT, N_TOKENS), tolerance(name))


def test_a_window_that_forgot_cannot_be_trimmed_into() -> None:
    """gemma3 with cells for the window only: what is gone is refused, the rest still goes on."""
    with raw_model(gguf_path("gemma3")) as oracle:
        sequences = Sequences(
            loaded("gemma3"), swa_full=False, n_ubatch=16, n_batch=16, n_seq_max=1
        )
        with sequences.context:
            long = (4 * (PROMPT + OTHER))[:480]
            for pos in range(0, 480, 8):
                logits = sequences.feed(long[pos : pos + 8], pos=pos)
            oldest = sequences.memory.pos_min(0)
            assert oldest > SLIDING_WINDOW
            with pytest.raises(UnsupportedOperation, match="are forgotten"):
                sequences.memory.seq_rm(0, oldest + 2)
            assert sequences.memory.pos_max(0) == 479
            got = sequences.greedy(logits, pos=480)
        assert_same(got, solo(oracle, long, N_TOKENS), tolerance("gemma3"))


def test_a_shifted_sequence_continues_the_same(
    sequences: Sequences, oracle: RawModel, architecture: Architecture
) -> None:
    """Only distances count: all positions moved by 100 give the same continuation."""
    logits, moved = sequences.feed(PROMPT), 100
    if not sequences.memory.can_shift:
        moved = 0
        with pytest.raises(UnsupportedOperation, match="can't shift positions"):
            sequences.memory.seq_add(0, 0, -1, 100)
    else:
        sequences.memory.seq_add(0, 0, -1, moved)
    assert sequences.memory.pos_max(0) == len(PROMPT) - 1 + moved
    got = sequences.greedy(logits, pos=len(PROMPT) + moved)
    # keys rotated twice: the sines of two angles instead of one
    limit = max(tolerance(architecture.name), 1e-3)
    assert_same(got, solo(oracle, PROMPT, N_TOKENS), limit)


def test_cutting_the_middle_out_and_closing_the_gap(tmp_path: Path) -> None:
    """In one layer a cell depends on its own token alone, so cut and shift equal a recompute.

    (In deeper models the cells after the cut still carry what they saw: that is what context
    shifting is, and no recompute gives it.)
    """
    path = tmp_path / "one-layer.gguf"
    write_gguf(path, replace(ARCHITECTURES["llama"], layers=("attention",)))
    with Model(path) as model:
        sequences = Sequences(model)
        with sequences.context:
            sequences.feed(OTHER, seq=1)
            sequences.feed(PROMPT[:-1])
            sequences.memory.seq_rm(0, 10, 30)
            sequences.memory.seq_add(0, 30, -1, -20)
            whole = PROMPT[:10] + PROMPT[30:]
            logits = sequences.feed(PROMPT[-1:], pos=len(whole) - 1)
            got = sequences.greedy(logits, pos=len(whole))
    with raw_model(path) as oracle:
        assert_same(got, solo(oracle, whole, N_TOKENS), 1e-3)


def test_a_saved_sequence_continues_elsewhere(
    model: Model, check: Check, architecture: Architecture, tmp_path: Path
) -> None:
    """Under another id beside a neighbour, and in a new context, from bytes and from a file."""
    first, second = Sequences(model), Sequences(model)
    with first.context, second.context:
        logits = first.feed(PROMPT)
        data = first.context.state_seq_get(0)
        first.context.state_seq_save(tmp_path / "state", 0, PROMPT)
        went_on = first.greedy(logits, pos=len(PROMPT))

        first.context.state_seq_set(data, 2)
        same_context = first.greedy(logits, seq=2, pos=len(PROMPT))

        second.feed(OTHER, seq=0)
        loaded = second.context.state_seq_load(tmp_path / "state", 1)
        assert loaded.dtype == np.int32
        assert loaded.tolist() == PROMPT
        new_context = second.greedy(logits, seq=1, pos=len(PROMPT))
    limit = tolerance(architecture.name)
    for restored in (same_context, new_context):
        if architecture.recurrent:
            np.testing.assert_array_equal(restored.logits, went_on.logits)
        assert_same(restored, went_on, limit)
        check(restored, PROMPT)
