"""Unused sequences between those that decode: a row each keeps a step in one ubatch, unseen."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler.step import spans
from pyllamabatch.step.ring_reader import Page, StreamStepper
from pyllamabatch.step.stepper import OUTPUT, SAMPLE, Stepper
from tests.support.decoding import begin, write
from tests.support.engines import greedy
from tests.support.models_gguf import gguf_path
from tests.support.oracle import EXACT, Agreement, Reference, random_prompts, solos, tolerance

N_SEQ, N_PROMPT, N_TOKENS = 8, 4, 20
PROMPTS = random_prompts(N_SEQ, seed=11, shortest=N_PROMPT - 1, longest=N_PROMPT - 1)


@pytest.fixture(scope="module", params=["llama", "gemma3", "mamba", "jamba"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> Iterator[Model]:
    with Model(gguf_path(name)) as model:
        yield model


@pytest.fixture(scope="module")
def alone(name: str) -> list[Reference]:
    return solos(name, PROMPTS, N_TOKENS + 1)


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(
        model, n_ctx=2048, n_batch=64, n_seq_max=N_SEQ, kv_unified=False, n_threads=1, **EXACT
    ) as context:
        yield context


def start(stepper: Stepper, seqs: list[int], n: int, temperature: float = 0.0) -> list[int]:
    """Prompts, one a step; the first tokens."""
    first = []
    for seq in seqs:
        params = replace(greedy(n), temperature=temperature, seed=seq)
        first.append(begin(stepper, params, PROMPTS[seq], seq=seq))
        assert stepper._info.n_filled == 0
    return first


def run(
    context: Context, seqs: list[int], gap_max: int, n: int = N_TOKENS, temperature: float = 0.0
) -> Any:
    """Tokens by sequence, rows that were filled in and graphs that were used again per step."""
    context.memory.clear()
    with Stepper(context, gap_max=gap_max) as stepper:
        tokens = [[token] for token in start(stepper, seqs, n + 1, temperature)]
        result = stepper.run(np.array(seqs, np.int32), n)
        assert result.n_steps == n
        for i, column in enumerate(result.token.reshape(n, len(seqs)).T.tolist()):
            tokens[i] += column
        steps = result.steps
        filled = {*steps["n_filled"].tolist()}
        reused = np.diff(steps["n_reused"])[-n // 2 :]
        held = [context.memory.pos_max(seq) for seq in range(N_SEQ)]
    assert held == [N_PROMPT + n - 1 if seq in seqs else -1 for seq in range(N_SEQ)]
    return tokens, filled, reused


def test_the_tokens_are_those_of_every_sequence_alone(
    context: Context, name: str, alone: list[Reference]
) -> None:
    agreement = Agreement()
    for seqs in ([0, 2], [1, 4, 7], [0, 1, 3, 7], [2, 3, 4]):
        tokens, filled, _ = run(context, seqs, 16)
        for seq, got in zip(seqs, tokens, strict=True):
            agreement.check(alone[seq], got, tolerance(name))
        assert filled == {seqs[-1] - seqs[0] + 1 - len(seqs)}
    assert agreement.fraction >= 0.9


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_rows_that_are_filled_in_draw_nothing(context: Context) -> None:
    """Where rounding is small enough for the same seeds to draw the same tokens."""
    without, filled, _ = run(context, [0, 2, 5], 0, temperature=1.0)
    assert filled == {0}
    tokens, filled, _ = run(context, [0, 2, 5], 16, temperature=1.0)
    assert filled == {3}
    assert tokens == without


@pytest.mark.parametrize("name", ["llama", "gemma3"], indirect=True)
def test_it_is_one_ubatch(context: Context) -> None:
    """A graph is used again for the same sequences, so where there is more than one ubatch none
    is."""
    _, filled, reused = run(context, [0, 2, 4, 6], 16)
    assert filled == {3}
    assert {*reused.tolist()} == {1}
    _, filled, reused = run(context, [0, 2, 4, 6], 0)
    assert filled == {0}
    assert {*reused.tolist()} == {0}


def test_wide_gaps_and_used_sequences_are_left_alone(context: Context) -> None:
    _, filled, _ = run(context, [0, 4, 6], 2)
    assert filled == {1}  # 5; 1 to 3 are too many
    context.memory.clear()
    with Stepper(context, gap_max=16) as stepper:
        start(stepper, [0, 1, 2], 20)
        result = stepper.run(np.array([0, 2], np.int32), 5)  # 1 waits
        assert {*result.steps["n_filled"].tolist()} == {0}
        assert [context.memory.pos_max(seq) for seq in range(3)] == [8, 3, 8]


def test_the_default(model: Model) -> None:
    for kv_unified in (True, False):
        with Context(model, n_ctx=1024, n_seq_max=4, kv_unified=kv_unified, n_threads=1) as context:
            wanted = int(not kv_unified or context.capabilities.recurrent)
            context.memory.clear()
            with Stepper(context) as stepper:
                start(stepper, [0, 2], 10)
                result = stepper.run(np.array([0, 2], np.int32), 3)
                assert {*result.steps["n_filled"].tolist()} == {wanted}
                context.renew()
                start(stepper, [0, 2], 10)
                result = stepper.run(np.array([0, 2], np.int32), 3)
                assert {*result.steps["n_filled"].tolist()} == {wanted}
    with (
        Context(model, n_ctx=64, n_threads=1) as context,
        pytest.raises(ArgumentError, match="gap_max"),
    ):
        Stepper(context, gap_max=-1)


def test_a_state_that_holds_tokens_is_not_filled(context: Context) -> None:
    """A row more could not be removed again."""
    state = context.capabilities.recurrent or context.capabilities.hybrid
    context.memory.clear()
    with closing(StreamStepper(context, gap_max=16)) as stepper:
        for seq in (0, 1, 2):
            slot = stepper.make_slot(greedy(20), PROMPTS[seq])
            n = write(stepper, PROMPTS[seq], seq=seq)
            stepper.put_slot(seq, slot)
            assert stepper.compute(np.zeros(0, np.int32), 1, n).code == 0
        stepper.flush()
        stepper.read(3, Page(N_SEQ, 8))
        assert stepper.compute(np.array([0, 2], np.int32), 2, 0, 4).n_steps == 2
        stepper.flush()
        stepper.read(5, page := Page(N_SEQ, 8))
        assert page.steps.table[:2]["n_filled"].tolist() == [0 if state else 2] * 2
        assert [context.memory.pos_max(seq) for seq in range(4)] == [5, 3, 5, -1]


def test_spans_tell_what_is_filled_in(model: Model) -> None:
    with Engine(
        model, n_seq_max=8, n_ctx=64 * 8, kv_unified=False, n_threads=1, cost=None
    ) as engine:
        most = engine.limits.gap_max
        engine.generate(PROMPTS, [greedy(n) for n in (30, 5, 20, 10, 15, 25, 8, 35)])
        trace = engine.trace()
    assert most == 1
    alone = trace[trace["prefill_rows"] == 0]
    told = []
    for row in alone:
        slots = np.flatnonzero(row["ids"])
        held = np.where(row["ids"] > 0, 9, 0)
        found = spans(slots.astype(np.int32), held, most)
        assert sum(span.decode for span in found) == len(slots)
        told.append(sum(span.rows for span in found) - len(slots))
    assert alone["filled"].tolist() == told
    assert set(told) >= {0, 1, 2}


@pytest.mark.parametrize("name", ["llama"], indirect=True)
def test_logits_are_those_of_their_rows(context: Context) -> None:
    """A row that is asked for its output is where the caller has put it; without that no other
    row's logits are taken for its own."""
    plain = context.batch()
    for token, seq in ((5, 0), (9, 2)):
        plain.add(token, 0, seq, logits=True)
    context.decode(plain)
    expected = [context.logits(row) for row in (0, 1)]
    context.memory.clear()
    with closing(Stepper(context, gap_max=1, n_threads=1)) as stepper:
        rows = stepper.rows
        rows.token[:2], rows.pos[:2], rows.seq[:2], rows.flags[:2] = (5, 9), 0, (0, 2), OUTPUT
        assert stepper.step(2).code == 0
        assert [np.allclose(context.logits(row), expected[row]) for row in (0, 1)] == [True, True]

        for seq in (0, 2):
            stepper.set_slot(seq, greedy(9))
        rows.pos[:2], rows.flags[:2] = 1, SAMPLE
        assert stepper.step(2).steps["n_filled"] == 1
        with pytest.raises(ArgumentError, match="row"):
            context.logits(1)
        with pytest.raises(UnsupportedOperation):
            context.logits_all()
