"""Fixtures that every test folder shares."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pyllamabatch.llama.model import Model
from tests.support.decoding import loaded
from tests.support.models_gguf import ARCHITECTURES, Architecture, gguf_path

# A shell ignores it for what runs in the background, and commands under test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A Mac's GPU is left out, before llama.cpp starts and for processes that tests start: they compare
# bits, fork, and ask for what only a CPU has. With GGML_METAL_DEVICES=1 it is there.
os.environ.setdefault("GGML_METAL_DEVICES", "0")

with suppress(ImportError):  # an installed wheel is tested with nothing but pytest
    from hypothesis import HealthCheck, settings

    # How long an example takes says more of the machine than of what is tested.
    settings.register_profile("calm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("calm")


@pytest.fixture(scope="session")
def tiny_llama_path() -> Path:
    """A tiny random-weight llama (see `models_gguf`)."""
    return gguf_path("llama")


@pytest.fixture(scope="session")
def model() -> Model:
    """The tiny llama, loaded. Not to be closed: all tests share it."""
    return loaded("llama")


@pytest.fixture(scope="session")
def embedded_model() -> Iterator[Model]:
    """The model that comes with the package. Not to be closed: all tests share it."""
    with Model.default() as model:
        yield model


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def arch_path(architecture: Architecture) -> Path:
    """The tiny model of each architecture in turn; the fixture `architecture` describes it."""
    return gguf_path(architecture.name)
