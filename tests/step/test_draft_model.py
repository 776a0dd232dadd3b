"""A second model that drafts: the same tokens as without, and its memory stays in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest

from pyllamabatch import Model, SamplingParams
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.vocab import TokenArray
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.draft_model import DraftModel
from pyllamabatch.step.stepper import SAMPLE, Stepper
from tests.support.models_gguf import gguf_path

GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
PROMPTS = ("Copy: one two three four five", "Sort the numbers: 42 7 19", "Reverse: hello")
MOST = 4
"""Drafted tokens of a sequence in a step."""


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default(n_gpu_layers=0) as default:
        yield default


class Both(NamedTuple):
    target: Stepper
    draft: DraftModel


@pytest.fixture(params=[True, False], ids=["pool", "streams"])
def both(model: Model, request: pytest.FixtureRequest) -> Iterator[Both]:
    context = Context(
        model, n_ctx=2048, n_seq_max=4, kv_unified=request.param, n_threads=1, n_threads_batch=1
    )
    with context, Stepper(context, n_draft_max=MOST) as target:
        draft = DraftModel(model, target, n_ctx=2048, n_threads=1, n_threads_batch=1)
        yield Both(target, draft)
        draft.close()


def tokens_of(model: Model, prompt: str) -> TokenArray:
    text = model.vocab.apply_chat_template([{"role": "user", "content": prompt}])
    return model.vocab.tokenize(text, parse_special=True)


class Done(NamedTuple):
    tokens: list[list[int]]
    n_steps: int
    n_drafted: int
    n_accepted: int


def start(target: Stepper, prompts: Sequence[TokenArray], params: SamplingParams) -> list[int]:
    """Each prompt in a sequence; the first token of each."""
    n = 0
    for seq, prompt in enumerate(prompts):
        target.set_slot(seq, params, prompt)
        end, rows = n + len(prompt), target.rows
        rows.token[n:end], rows.pos[n:end] = prompt, np.arange(len(prompt))
        rows.seq[n:end], rows.flags[n:end] = seq, 0
        rows.flags[end - 1] = SAMPLE
        n = end
    result = target.step(n)
    result.raise_for_code()
    return [int(token) for token in result.token]


def finish(target: Stepper, first: Sequence[int], draft: DraftModel | None) -> Done:
    """All sequences to their ends, a run of one step after the other."""
    assert target.drafts is not None
    tokens, live = [[token] for token in first], list(range(len(first)))
    n_steps = n_drafted = n_accepted = 0
    while live:
        if draft is not None:
            target.drafts.n_most[:] = MOST
            draft.draft(live)
        result = target.run(live, 1)
        result.raise_for_code()
        n_steps += 1
        n_drafted += int(result.steps["n_drafted"].sum())
        n_accepted += int(result.steps["n_accepted"].sum())
        for seq, token, end in zip(
            result.seq.tolist(), result.token.tolist(), result.finish.tolist(), strict=True
        ):
            tokens[seq].append(token)
            if end:
                live.remove(seq)
    return Done(tokens, n_steps, n_drafted, n_accepted)


def without_and_with(
    target: Stepper, draft: DraftModel, model: Model, params: SamplingParams
) -> tuple[Done, Done]:
    """The same prompts, without drafts and with them."""
    prompts = [tokens_of(model, prompt) for prompt in PROMPTS]
    alone = finish(target, start(target, prompts, params), None)
    target._context.memory.clear()  # type: ignore[union-attr]
    first = start(target, prompts, params)
    for seq, prompt in enumerate(prompts):
        draft.begin(seq, np.append(prompt, first[seq]))
    return alone, finish(target, first, draft)


def test_a_model_that_drafts_for_itself_is_nearly_always_right(model: Model, both: Both) -> None:
    target, draft = both
    alone, drafted = without_and_with(target, draft, model, GREEDY)
    assert drafted.tokens == alone.tokens
    assert (
        drafted.n_accepted > 0.85 * drafted.n_drafted > 0
    )  # but for what is drafted behind an end
    assert drafted.n_steps < alone.n_steps / 2


def test_what_it_holds_of_an_ended_sequence_serves_the_next_one(model: Model, both: Both) -> None:
    target, draft = both
    prompt = tokens_of(model, PROMPTS[0])
    first = start(target, [prompt], GREEDY)
    draft.begin(0, np.append(prompt, first[0]))
    before = finish(target, first, draft)
    draft.end(0)
    target._context.memory.clear()  # type: ignore[union-attr]
    first = start(target, [prompt], GREEDY)
    draft.begin(0, np.append(prompt, first[0]))
    rows = draft._stepper._info
    target.drafts.n_most[:] = 1  # type: ignore[union-attr]
    draft.draft([0])
    assert rows.n_rows == 1  # the prompt is there already
    assert finish(target, first, draft).tokens == before.tokens


def test_drawn_tokens_are_the_same_too(model: Model, both: Both) -> None:
    """Most drafts are wrong then, and taken back in both memories."""
    target, draft = both
    params = SamplingParams(temperature=3.0, seed=7, max_tokens=40, ignore_eog=True)
    alone, drafted = without_and_with(target, draft, model, params)
    assert drafted.tokens == alone.tokens
    assert 0 < drafted.n_accepted < drafted.n_drafted


def test_without_room_there_are_no_drafts_and_later_there_are(model: Model) -> None:
    context = Context(model, n_ctx=1024, n_seq_max=2, n_threads=1, n_threads_batch=1)
    with context, Stepper(context, n_draft_max=MOST) as target:
        assert target.drafts is not None
        draft = DraftModel(model, target, n_ctx=256, n_threads=1, n_threads_batch=1)
        long, short = np.full(300, 65, np.int32), tokens_of(model, PROMPTS[2])
        start(target, [long, short], GREEDY)
        target.drafts.n_most[:] = MOST
        draft.begin(0, long)
        draft.draft([0])
        assert target.drafts.n_given[0] == 0  # more tokens than its model has cells
        draft.begin(1, np.append(short, 111))
        draft.draft([1])
        assert target.drafts.n_given[1] > 0
        draft.close()


def test_a_sequence_that_was_not_begun_gets_none(both: Both) -> None:
    target, draft = both
    assert target.drafts is not None
    target.set_slot(0, GREEDY)
    target.drafts.n_most[0] = MOST
    draft.draft([0])
    assert target.drafts.n_given[0] == 0
    with pytest.raises(ArgumentError, match=r"slots"):
        draft.draft([99])
    with pytest.raises(ArgumentError, match=r"slot=1"):
        draft.begin(1, np.array([1], np.int32))


def test_another_vocabulary_is_refused(model: Model) -> None:
    context = Context(model, n_ctx=256, n_seq_max=1, n_threads=1, n_threads_batch=1)
    with context, Stepper(context) as without, Stepper(context, n_draft_max=1) as target:
        with pytest.raises(ArgumentError, match=r"n_draft_max of 1 or more"):
            DraftModel(model, without, n_ctx=256)
        limit = r"draft model='\d+ tokens': the model has 259"
        with Model(gguf_path("llama")) as other, pytest.raises(ArgumentError, match=limit):
            DraftModel(other, target, n_ctx=256)


def test_the_native_calls_check_what_they_are_given(both: Both) -> None:
    native = both.draft._native
    ids = ffi.new("llama_token[]", [1, -1])
    assert lib.plb_draft_model_begin(native, 99, ids, 1) == lib.PLB_E_SEQ
    assert lib.plb_draft_model_begin(native, 0, ids, 1) == lib.PLB_E_NO_SLOT
    both.target.set_slot(0, GREEDY)
    assert lib.plb_draft_model_begin(native, 0, ids, 0) == lib.PLB_E_ARGUMENT
    assert lib.plb_draft_model_begin(native, 0, ids, 2) == lib.PLB_E_TOKEN
    assert lib.plb_draft_model_begin(native, 0, ids, 1) == lib.PLB_OK
    assert lib.plb_draft_model_end(native, 99) == lib.PLB_E_SEQ
    assert lib.plb_draft_model_draft(native, ids, -1) == lib.PLB_E_ARGUMENT
    out = ffi.new("plb_draft_model **")
    engine = both.target._engine
    assert lib.plb_draft_model_new(engine, engine, out) == lib.PLB_E_ARGUMENT
