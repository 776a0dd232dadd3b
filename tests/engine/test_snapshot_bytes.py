"""Bytes that are no snapshot, or one with changed bytes: an error, or a sequence that goes on;
the process, the engine and its other sequences stay as they are."""

import copy
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ClosedError, PyllamabatchError, StateError
from pyllamabatch.llama import state
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.decoding import loaded

PROMPT = [*range(300, 340)]
DRAWN = SamplingParams(temperature=1.2, seed=5, repeat_penalty=1.3, max_tokens=40, ignore_eog=True)
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eog=True)


class Parts(NamedTuple):
    header: tuple[Any, ...]
    tokens: list[int]
    note: dict[str, Any]
    body: bytes


class Victim:
    """An engine, a snapshot of one of its sequences, and what a request gives beside it."""

    def __init__(self, model: Model, engine: Engine) -> None:
        self.engine = engine
        with engine.sequence(DRAWN) as sequence:
            sequence.prompt(PROMPT)
            for _ in range(3):
                sequence.sample()
            self.saved = sequence.snapshot()
            self.known = sequence.sample().token
        self.beside = engine.submit(PROMPT[:9], GREEDY).result(60).tokens
        tokens, note = state.read_note(model, self.saved)
        body = self.saved[-state._HEADER.unpack_from(self.saved)[5] :]
        self.parts = Parts(state._HEADER.unpack_from(self.saved), tokens.tolist(), note, body)

    def restore(self, data: bytes) -> None:
        """It is refused, or the sequence goes on; nothing else changes."""
        with self.engine.sequence(DRAWN) as sequence:
            sequence.prompt([7, 8])
            if taken(lambda: sequence.restore(data)):
                assert sequence.position == state._HEADER.unpack_from(data)[3]
            else:
                assert sequence.tokens == [7, 8]
            taken(sequence.sample)
        assert self.engine.submit(PROMPT[:9], GREEDY).result(60).tokens == self.beside

    def restore_forged(self, data: bytes) -> None:
        """Values of cells that no checksum finds may spoil answers; the engine goes on."""
        with self.engine.sequence(DRAWN) as sequence:
            if taken(lambda: sequence.restore(data)):
                taken(sequence.sample)
        taken(lambda: self.engine.submit(PROMPT[:9], GREEDY).result(60))


def taken(call: Callable[[], object]) -> bool:
    """False where it was refused, by an engine that goes on."""
    try:
        call()
    except ClosedError:
        raise
    except PyllamabatchError:
        return False
    return True


def packed(tokens: list[int], note: bytes, body: bytes, header: tuple[Any, ...]) -> bytes:
    ids = np.array(tokens, "<i4").tobytes()
    content = ids + note + body
    crc = zlib.crc32(content)
    return state._HEADER.pack(*header[:3], len(tokens), len(note), len(body), crc) + content


def victim_of(request: pytest.FixtureRequest) -> Iterator[Victim]:
    model, own = loaded("llama"), {"batch_invariant": request.param, "cost": None}
    with Engine(model, n_seq_max=2, n_ctx=512, **own) as engine:
        yield Victim(model, engine)


kinds: dict[str, Any] = {"scope": "module", "params": [True, False], "ids": ["invariant", "pool"]}
victim = pytest.fixture(**kinds)(victim_of)
of_forged = pytest.fixture(**kinds)(victim_of)


def changed(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Cut, grown and overwritten; each place is a share of a thousand."""
    for kind, permille, other in changes:
        at = len(data) * permille // 1000
        match kind:
            case "cut":
                data = data[:at]
            case "grow":
                data = data[:at] + other + data[at:]
            case "overwrite":
                data = data[:at] + other + data[at + len(other) :]
    return data


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["cut", "grow", "overwrite", "overwrite"]),
        st.integers(0, 1000),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=3,
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from([-1, 0, 1, 2, 41, 43, 44, 2**31 - 1, 2**32, 2**63])
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=15)
@given(CHANGES)
def test_changed_bytes_are_refused(victim: Victim, changes: list[tuple[str, int, bytes]]) -> None:
    data = changed(victim.saved, changes)
    if data != victim.saved:
        with victim.engine.sequence(DRAWN) as sequence, pytest.raises(StateError):
            sequence.restore(data)


@settings(max_examples=15)
@given(CHANGES)
@example([("cut", 0, b"")])
def test_a_state_that_was_changed_with_its_checksum(
    of_forged: Victim, changes: list[tuple[str, int, bytes]]
) -> None:
    header, tokens, note, body = of_forged.parts
    data = packed(tokens, json.dumps(note).encode(), changed(body, changes), header)
    of_forged.restore_forged(data)


@pytest.mark.parametrize("position", [-1, -(2**31)])
def test_a_negative_position_is_refused(victim: Victim, position: int) -> None:
    """No removal would reach its cell (`vendor/patches/state-positions.patch`)."""
    header, tokens, note, body = victim.parts
    cell = re.compile(re.escape(struct.pack("<ii", 5, 1)) + b"....", re.DOTALL)
    (at,) = (found.start() for found in cell.finditer(body) if body[found.end()] == 6)
    forged = body[:at] + struct.pack("<i", position) + body[at + 4 :]
    data = packed(tokens, json.dumps(note).encode(), forged, header)
    with Context(victim.engine.model, n_ctx=512) as context, pytest.raises(StateError):
        context.state_seq_set(data, 0)
    victim.restore(data)


@settings(max_examples=15)
@given(
    tokens=st.none() | st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50),
    changes=st.lists(st.tuples(st.integers(0, 60), VALUES), max_size=3),
    text=st.none() | CHANGES,
)
@example(tokens=[300] * 43, changes=[], text=None)
@example(tokens=[2**31 - 1], changes=[], text=None)
def test_a_note_that_was_changed_with_its_checksum(
    victim: Victim,
    tokens: list[int] | None,
    changes: list[tuple[int, Any]],
    text: list[tuple[str, int, bytes]] | None,
) -> None:
    """Fields of all depths have other values, or the note is no JSON."""
    header, own, note, body = victim.parts
    note = copy.deepcopy(note)
    for i, value in changes:
        places = [*fields(note)]
        holder, key = places[i % len(places)]
        holder[key] = value
    encoded = json.dumps(note).encode()
    encoded = encoded if text is None else changed(encoded, text)
    victim.restore(packed(own if tokens is None else tokens, encoded, body, header))


@pytest.mark.parametrize("field", [{"sampling": 5}, {"context": {"loras": [["a", 10**400]]}}])
def test_a_note_with_what_is_none_of_its_values(victim: Victim, field: dict[str, Any]) -> None:
    header, own, note, body = victim.parts
    encoded = json.dumps(note | field).encode()
    with victim.engine.sequence(DRAWN) as sequence, pytest.raises(StateError):
        sequence.restore(packed(own, encoded, body, header))


def test_a_plain_state_is_no_snapshot(victim: Victim) -> None:
    with victim.engine.sequence(DRAWN) as sequence:
        sequence.prompt(PROMPT)
        plain = victim.engine._context.state_seq_get(sequence._request.slot)
        with pytest.raises(StateError, match="a plain state"):
            sequence.restore(plain)


def fields(note: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in note.items():
        yield note, key
        if isinstance(value, dict):
            yield from fields(value)


def test_an_unchanged_one_goes_on(victim: Victim) -> None:
    with victim.engine.sequence(DRAWN) as sequence:
        sequence.restore(victim.saved)
        assert sequence.sample().token == victim.known
