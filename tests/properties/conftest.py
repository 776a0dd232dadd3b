"""Models of the properties: of each architecture in turn, and the embedded one."""

import pytest

from pyllamabatch.llama.model import Model
from tests.properties.test_batch_invariance import alone
from tests.support.decoding import loaded
from tests.support.embedded import solos
from tests.support.invariance import Alone
from tests.support.models_gguf import Architecture
from tests.support.oracle import Reference


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> Model:
    return loaded(architecture.name)


@pytest.fixture(scope="session")
def embedded_alone(embedded_model: Model) -> list[Reference]:
    return solos(embedded_model)


@pytest.fixture(scope="session")
def embedded_bits(embedded_model: Model) -> Alone:
    """What each prompt of `test_batch_invariance.prompts` gets alone, bit by bit."""
    return alone(embedded_model)
