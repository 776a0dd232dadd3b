"""Every error, in another process: as `concurrent.futures` and `multiprocessing` bring it back."""

import copy
import inspect
import pickle
from typing import Any

import pytest

from pyllamabatch import errors

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.PyllamabatchError)
]


def made(kind: type[errors.PyllamabatchError]) -> errors.PyllamabatchError:
    """With all its arguments."""
    if kind.__init__ is Exception.__init__:
        return kind("what has happened")
    parameters = list(inspect.signature(kind).parameters.values())
    values: dict[str, Any] = {"int": 7, "str": "text", "object": [1]}
    return kind(*(values[getattr(one.annotation, "__name__", "object")] for one in parameters))


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_is_the_same_when_it_was_pickled(kind: type[errors.PyllamabatchError]) -> None:
    error = made(kind)
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)
