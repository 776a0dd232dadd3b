"""One server over the embedded model for all tests that don't change it."""

from collections.abc import Iterator

import pytest

from pyllamabatch.llama.model import Model
from tests.support.served import Served, serving


@pytest.fixture(scope="session")
def served(embedded_model: Model) -> Iterator[Served]:
    with serving(embedded_model) as served:
        yield served
