"""A context and a stepper of four sequences, exact enough to compare tokens."""

from collections.abc import Iterator

import pytest

from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.step.stepper import Stepper
from tests.support.engines import EXACT


@pytest.fixture
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_ctx=512, n_batch=64, n_seq_max=4, **EXACT) as context:
        yield context


@pytest.fixture(params=["auto", "chain"])
def stepper(context: Context, request: pytest.FixtureRequest) -> Iterator[Stepper]:
    """Both ways to sample: the fused sampler where it can, and libllama's chain."""
    with Stepper(context, sampler=request.param) as stepper:
        yield stepper
