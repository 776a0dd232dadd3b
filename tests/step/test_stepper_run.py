"""Stepper.run: the same tokens as step by step, its ends, the interrupt, and what it refuses."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError, ClosedError, ContextBusy
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import lib
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.stepper import RESULT_DTYPE, STEP_DTYPE, Finish, Results, Stepper, Stop
from tests.support.decoding import write, write_next
from tests.support.models_special import N_POSITIONS, write_gpt2

PROMPTS = ([1, 270, 280, 290], [1, 320, 330], [1, 340])


def params(max_tokens: int = 500, **options: Any) -> SamplingParams:
    settings: dict[str, Any] = {"seed": 3, "ignore_eog": True, "logprobs": 2, **options}
    return SamplingParams(max_tokens=max_tokens, **settings)


def start(stepper: Stepper, each: Sequence[SamplingParams]) -> None:
    """A prompt for every one, its first token sampled."""
    assert stepper._context is not None
    stepper._context.memory.clear()
    n = 0
    for seq, param in enumerate(each):
        stepper.set_slot(seq, param, PROMPTS[seq])
        n = write(stepper, PROMPTS[seq], seq=seq, at=n)
    assert stepper.step(n).code == 0


def step_by_step(stepper: Stepper, slots: Sequence[int], n_steps: int) -> list[Any]:
    records = []
    for _ in range(n_steps):
        for row, seq in enumerate(slots):
            write_next(stepper, seq, at=row)
        result = stepper.step(len(slots))
        assert (result.code, result.n_steps) == (0, 1)
        records += [
            (*record, *top)
            for record, top in zip(
                result.records.tolist(), result.top_logprob[:, :2].tolist(), strict=True
            )
        ]
    return records


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_run_gives_what_its_steps_would(stepper: Stepper, temperature: float) -> None:
    each = [params(temperature=temperature, repeat_penalty=1.2)] * 3
    slots = [2, 0, 1]
    start(stepper, each)
    expected = step_by_step(stepper, slots, 10)
    start(stepper, each)
    result = stepper.run(slots, 10)
    assert isinstance(result, Results)
    assert (result.code, result.stop, result.n_steps) == (0, Stop.STEPS, 10)
    got = zip(result.records.tolist(), result.top_logprob[:, :2].tolist(), strict=True)
    assert [(*record, *top) for record, top in got] == expected
    assert result.seq.tolist() == slots * 10
    assert result.row.tolist() == [0, 1, 2] * 10
    assert result.index.tolist() == [i // 3 + 1 for i in range(30)]
    assert result.n_top.tolist() == [2] * 30
    steps = result.steps
    assert steps["first_result"].tolist() == list(range(0, 30, 3))
    assert (steps["n_rows"] == 3).all()
    assert (steps["decode_ns"] > 0).all()
    assert (np.diff(steps["t_start_ns"]) > 0).all()
    # and on from there, by step or by run
    again = step_by_step(stepper, [1], 1)
    assert again[0][3] == 11
    assert stepper.run(np.array([0, 1], np.int32), 3) is result
    result.raise_for_code()
    assert result.index.tolist() == [11, 12, 12, 13, 13, 14]


def test_the_step_in_which_one_finishes_is_the_last_and_whole(stepper: Stepper) -> None:
    start(stepper, [params(), params(5), params()])
    result = stepper.run([0, 1, 2], 20)
    assert (result.stop, result.n_steps, result.n_results) == (Stop.FINISH, 4, 12)
    assert result.finish[-3:].tolist() == [0, Finish.LENGTH, 0]
    assert not result.finish[:-3].any()
    with pytest.raises(ArgumentError, match="has not finished") as error:
        stepper.run([0, 1], 1)
    assert error.value.argument == "slots[1]"
    assert stepper.run([0, 2], 2).stop == Stop.STEPS


def test_positions_end_a_run_before_they_end(tmp_path: Path) -> None:
    """A model that looks its positions up in a table runs to the last one, and no further."""
    write_gpt2(tmp_path / "gpt2.gguf")
    with (
        Model(tmp_path / "gpt2.gguf") as model,
        Context(model, n_ctx=256, n_batch=64, n_threads=1) as context,
        Stepper(context, n_steps_max=100) as stepper,
    ):
        start(stepper, [params()])
        n_pos = stepper.n_pos_max
        assert n_pos == N_POSITIONS
        result = stepper.run([0], 100)
        assert (result.code, result.stop) == (0, Stop.STEPS)
        assert result.n_steps == n_pos - len(PROMPTS[0])
        assert context.memory.pos_max(0) == n_pos - 1
        with pytest.raises(ArgumentError, match=f"below {n_pos}"):
            stepper.run([0], 1)


def test_another_thread_rings_while_the_run_goes_on(model: Model) -> None:
    """It gets in during the run, which does not hold the interpreter, and stops it."""
    with (
        Context(model, n_ctx=8192, n_batch=64, n_threads=1) as context,
        Stepper(context, n_steps_max=8000) as stepper,
    ):
        start(stepper, [params(8100)])
        busy: list[Exception] = []

        def interrupt() -> None:
            while not stepper._run.n_steps:  # until the run is on its way
                pass
            try:
                stepper.run([0], 1)
            except ContextBusy as error:
                busy.append(error)
            stepper.interrupt()

        thread = threading.Thread(target=interrupt)
        thread.start()
        result = stepper.run([0], 8000)
        thread.join()
        assert result.stop == Stop.INTERRUPT
        assert 1 <= result.n_steps < 8000
        assert len(busy) == 1
        assert stepper.slot(0).n_generated == result.n_steps + 1


@pytest.mark.parametrize(
    ("slots", "n_steps", "words"),
    [
        ([], 1, r"1\.\.4"),
        ([0, 1, 2, 3, 0], 1, r"1\.\.4"),
        ([0], 0, r"1\.\.32"),
        ([0], 33, r"1\.\.32"),
        ([0, -1], 1, r"slots\[1\]=-1: must be in 0\.\.3"),
        ([0, 4], 1, r"slots\[1\]=4: must be in 0\.\.3"),
        ([0, 3], 1, r"slots\[1\]=3: must be a sequence with a slot"),
        ([0, 2], 1, r"slots\[1\]=2: must be a sequence that has a next"),
        ([0, 1, 0], 1, r"slots\[2\]=0: must be named once"),
    ],
)
def test_bad_runs_are_refused(
    stepper: Stepper, context: Context, slots: list[int], n_steps: int, words: str
) -> None:
    start(stepper, [params(), params()])
    stepper.set_slot(2, params())
    before = [stepper.slot(seq) for seq in range(2)]
    with pytest.raises(ArgumentError, match=words):
        stepper.run(slots, n_steps)
    assert [stepper.slot(seq) for seq in range(2)] == before
    assert context.memory.pos_max(0) == len(PROMPTS[0]) - 1
    assert stepper.run([0, 1], 2).n_steps == 2


def test_the_layout_of_the_records_is_the_shims(stepper: Stepper) -> None:
    from pyllamabatch.raw import ffi

    for dtype, name in ((RESULT_DTYPE, "plb_result"), (STEP_DTYPE, "plb_step_info")):
        assert dtype.itemsize == ffi.sizeof(name)
        for field, (_, offset, *_rest) in (dtype.fields or {}).items():
            assert offset == ffi.offsetof(name, field)
    names = {stop: getattr(lib, f"PLB_STOP_{stop.name}") for stop in Stop}
    assert all(stop == value for stop, value in names.items())


def test_closed(context: Context) -> None:
    stepper = Stepper(context, n_steps_max=1)
    assert stepper.n_steps_max == 1
    stepper.close()
    stepper.interrupt()
    with pytest.raises(ClosedError, match="stepper"):
        stepper.run([0], 1)
    for n in (0, 65537):
        with pytest.raises(ArgumentError, match="n_steps_max"):
            Stepper(context, n_steps_max=n)


@pytest.mark.parametrize("slots", [np.array([2**32]), [2**32], [0.7], [[0]]], ids=str)
def test_slots_are_sequences_as_they_are_given(stepper: Stepper, slots: Any) -> None:
    start(stepper, [params()])
    with pytest.raises(ArgumentError, match="slots"):
        stepper.run(slots, 1)
    assert stepper.slot(0).n_generated == 1
