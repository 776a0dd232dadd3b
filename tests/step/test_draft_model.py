"""A second model that drafts for a stepper, and what it has to refuse. What its memory holds is
native/tests/test_draft_model.cpp's; answers are tests/engine/test_draft_model.py's."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from pyllamabatch import Model, SamplingParams
from pyllamabatch.errors import ArgumentError, ClosedError, FatalDecodeError, KvCacheFull
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.draft_model import DraftModel
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import begin
from tests.support.faults import set_fault
from tests.support.models_gguf import gguf_path

GREEDY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eog=True)
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


def test_a_sequence_that_was_not_begun_gets_none(both: Both) -> None:
    target, draft = both
    assert target.drafts is not None
    target.set_slot(0, GREEDY)
    target.drafts.n_most[0] = MOST
    draft.draft([0])
    assert target.drafts.n_given[0] == 0
    with pytest.raises(ArgumentError, match=r"slots"):
        draft.draft([99])
    for slot, tokens, limit in (
        (1, [1], "slot=1: the sequence has no slot"),
        (4, [1], r"slot=4: must be in 0\.\.3"),
        (0, [], "tokens=.*: must be at least one"),
        (0, [1, 2**40], r"tokens\[1\]=1099511627776: must be in"),
    ):
        with pytest.raises(ArgumentError, match=limit):
            draft.begin(slot, np.array(tokens, np.int64))
    with pytest.raises(ArgumentError, match="slot=4"):
        draft.end(4)


def test_a_sequence_is_named_once(both: Both) -> None:
    target, draft = both
    assert target.drafts is not None
    first = begin(target, GREEDY, [1, 5, 6], seq=1)
    draft.begin(1, np.array([1, 5, 6, first], np.int32))
    target.drafts.n_most[1] = MOST
    with pytest.raises(ArgumentError, match=r"slots=.*named twice"):
        draft.draft([1, 1])
    assert not target.drafts.n_given.any()
    draft.draft([1])
    assert target.drafts.n_given[1] == MOST


@pytest.mark.parametrize(
    ("code", "error"),
    [(lib.PLB_E_MEMORY, MemoryError), (lib.PLB_E_DECODE, FatalDecodeError), (1, KvCacheFull)],
)
def test_what_a_decode_raises(both: Both, code: int, error: type[Exception]) -> None:
    target, draft = both
    assert target.drafts is not None
    first = begin(target, GREEDY, [1, 5, 6])
    draft.begin(0, np.array([1, 5, 6, first], np.int32))
    target.drafts.n_most[0] = MOST
    set_fault(draft._stepper, 1, code)
    with pytest.raises(error):
        draft.draft([0])


def test_a_closed_one_says_so(both: Both) -> None:
    draft = both.draft
    draft.close()
    calls: list[Callable[[], None]] = [
        lambda: draft.begin(0, np.array([1], np.int32)),
        lambda: draft.end(0),
        lambda: draft.draft([0]),
        draft.attach,
    ]
    for call in calls:
        with pytest.raises(ClosedError, match="draft model"):
            call()


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
