"""Fixtures of the properties that hold for the embedded model."""

from __future__ import annotations

import pytest

from pyllamabatch.llama.model import Model
from tests.support.embedded import solos
from tests.support.oracle import Reference


@pytest.fixture(scope="session")
def embedded_alone(embedded_model: Model) -> list[Reference]:
    """What each prompt of `embedded.texts` gets alone."""
    return solos(embedded_model)
