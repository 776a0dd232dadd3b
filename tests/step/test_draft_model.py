"""A second model that drafts for a stepper, and what it has to refuse. What its memory holds is
native/tests/test_draft_model.cpp's; answers are tests/engine/test_draft_model.py's."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from pyllamabatch import Model, SamplingParams
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.draft_model import DraftModel
from pyllamabatch.step.stepper import Stepper
from tests.support.models_gguf import gguf_path

GREEDY = SamplingParams(temperature=0.0, max_tokens=60)
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
