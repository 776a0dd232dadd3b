"""Logits are read where the graph has left them, or copied where something may write there
(vendor/patches/logits-in-place.patch)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import loaded, write
from tests.support.models_gguf import gguf_path
from tests.support.oracle import Logits, RawContext, Row, raw_context, raw_model

NO_SLOT = 1  # llama_decode's code for too few cells
PROMPT = [1, *range(20, 31)]
SEQS = [0, 1]


@dataclass
class Graphs:
    """The logits of each graph that a context has computed: where they lay, and a copy."""

    addresses: list[int] = field(default_factory=list)
    rows: list[Logits] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.callback = ffi.callback("ggml_backend_sched_eval_callback", self._see)

    def _see(self, tensor: Any, ask: bool, data: Any) -> bool:
        found = ffi.string(tensor.name) == b"result_output" and tensor.ne[1] > 0
        if found and not ask:
            buffer = ffi.buffer(tensor.data, lib.ggml_nbytes(tensor))
            self.addresses.append(_address(tensor.data))
            self.rows.append(np.frombuffer(buffer, np.float32).reshape(tensor.ne[1], -1).copy())
        return bool(found) or not ask


def _address(pointer: Any) -> int:
    return int(ffi.cast("intptr_t", pointer))


def logits_at(context: RawContext) -> int:
    return _address(lib.llama_get_logits(context.ptr))


@contextmanager
def watched(**params: Any) -> Iterator[tuple[RawContext, Graphs]]:
    graphs = Graphs()
    params = {"n_ctx": 256, "n_batch": 64, "cb_eval": graphs.callback, **params}
    with raw_model(gguf_path("llama")) as model, raw_context(model, **params) as context:
        yield context, graphs


def prompt(wanted: Sequence[int], *, seq: int = 0) -> list[Row]:
    return [(token, pos, seq, pos in wanted) for pos, token in enumerate(PROMPT)]


EVERY, LAST = range(len(PROMPT)), [len(PROMPT) - 1]


@pytest.mark.parametrize(
    ("wanted", "n_ubatch"),
    [(EVERY, 64), (LAST, 64), ([0, 5], 64), (LAST, 4), ([8, 11], 4)],
    ids=["every row", "last", "some", "the last ubatch's only", "two of the last ubatch's"],
)
def test_they_are_read_in_place(wanted: Sequence[int], n_ubatch: int) -> None:
    with watched(n_ubatch=n_ubatch) as (context, graphs):
        logits = context.decode(prompt(wanted))
        assert logits_at(context) == graphs.addresses[-1]
        np.testing.assert_array_equal(logits, graphs.rows[-1])
        step = context.decode([(40, len(PROMPT), 0, True)])
        assert logits_at(context) == graphs.addresses[-1]
        np.testing.assert_array_equal(step, graphs.rows[-1])


def test_they_are_put_in_order_in_place() -> None:
    """Streams: libllama computes the rows of one sequence behind those of another."""
    one, other = prompt(EVERY), [(t + 50, p, 1, True) for t, p, _, _ in prompt(EVERY)]
    with watched(n_seq_max=2, kv_unified=False) as (context, graphs):
        logits = context.decode([row for pair in zip(one, other, strict=True) for row in pair])
        assert logits_at(context) == graphs.addresses[-1]
        assert len(graphs.rows) == 1
        computed = graphs.rows[0].reshape(2, len(PROMPT), -1)
        np.testing.assert_array_equal(logits, computed.swapaxes(0, 1).reshape(logits.shape))


@pytest.mark.parametrize("wanted", [EVERY, [3, 11], [0, 1]], ids=["all", "two", "of the first"])
def test_those_of_several_ubatches_are_copied(wanted: Sequence[int]) -> None:
    with watched(n_ubatch=4) as (context, graphs):
        logits = context.decode(prompt(wanted))
        assert logits_at(context) not in graphs.addresses
        np.testing.assert_array_equal(logits, np.concatenate(graphs.rows))
        context.decode([(40, len(PROMPT), 0, True)])
        assert logits_at(context) == graphs.addresses[-1]
        graphs.rows.clear()
        lib.llama_memory_clear(context.memory, True)
        logits = context.decode(prompt(wanted))
        assert logits_at(context) not in graphs.addresses
        np.testing.assert_array_equal(logits, np.concatenate(graphs.rows))


def test_a_decode_without_a_place_leaves_those_of_the_one_before() -> None:
    with watched() as (context, graphs):
        for begin in range(0, 240, 60):
            logits = context.decode([(20, begin + i, 0, i > 57) for i in range(60)])
        too_many = [(20, 240 + i, 0, True) for i in range(60)]
        assert context.try_decode(too_many)[0] == NO_SLOT
        assert logits_at(context) == graphs.addresses[-1]
        row = lib.llama_get_logits_ith(context.ptr, 59)
        assert ffi.buffer(row, logits[1].nbytes)[:] == logits[1].tobytes()
        lib.llama_memory_seq_add(context.memory, 0, 0, -1, 1)  # at the next decode, by a graph
        assert (
            context.try_decode([(20, pos + 1, 0, True) for _, pos, _, _ in too_many])[0] == NO_SLOT
        )
        assert logits_at(context) == 0
        context.decode([(20, 241, 0, True)])
        assert logits_at(context) == graphs.addresses[-1]


def test_those_that_stay_while_a_prompt_is_computed_behind_are_copied() -> None:
    graphs = Graphs()
    with (
        Context(
            loaded("llama"), n_ctx=1024, n_batch=64, n_seq_max=4, kv_unified=False, n_threads=1,
            cb_eval=graphs.callback,
        ) as context,
        Stepper(context) as stepper,
    ):  # fmt: skip
        for seq in SEQS:
            stepper.set_slot(seq, SamplingParams(temperature=0, max_tokens=99, ignore_eog=True))
            stepper.step(write(stepper, PROMPT, seq=seq)).raise_for_code()
        assert _address(lib.llama_get_logits(context.ptr)) == graphs.addresses[-1]
        stepper.rows.flags[: write(stepper, PROMPT, seq=2)] = 0
        assert stepper._run_native(len(PROMPT), np.array(SEQS, np.int32), 1) == 0
        assert context.memory.pos_max(2) == len(PROMPT) - 1
        logits = lib.llama_get_logits(context.ptr)
        assert _address(logits) not in graphs.addresses
        row = np.frombuffer(ffi.buffer(logits, graphs.rows[-1].nbytes), np.float32)
        np.testing.assert_array_equal(row, graphs.rows[-1].ravel())
        assert [stepper.slot(s).next_token for s in SEQS] == graphs.rows[-1].argmax(1).tolist()
