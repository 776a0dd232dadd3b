"""States that are saved, brought and loaded again, when one of these fails, on the fake device."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pyllamabatch.engine.interactive import Call, InteractiveSink
from pyllamabatch.engine.request import Request
from pyllamabatch.engine.snapshot import Saved
from pyllamabatch.errors import StateError
from pyllamabatch.llama.lora import LoraNames
from pyllamabatch.scheduler import Limits
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.engine_fakes import Rig, Slot

TOKENS = np.arange(5, 15, dtype=np.int32)
OWNER = SamplingParams(max_tokens=2**31 - 1)
SAVED = Saved(TOKENS, len(TOKENS), len(TOKENS) - 1)
STATE = TOKENS[:-1].tobytes()


@pytest.mark.parametrize("problem", [StateError("none is given"), MemoryError()])
def test_a_state_that_could_not_be_saved_is_computed_again(
    problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was preempted is admitted by the very plan that brings the save."""

    def refuse(slot: int, loras: LoraNames | None = None) -> bytes:
        raise problem

    rig = Rig(Limits(16, 16, 3, 100, 100), fault=lambda step: 1 if step == 6 else None, swap="swap")
    monkeypatch.setattr(rig.machine, "state_seq_get", refuse)
    streams = [
        rig.submit(list(range(1 + k, 9 + k)), SamplingParams(max_tokens=20)) for k in range(3)
    ]
    while rig.machine.n_steps < 6:
        rig.core.step()
    streams[0].cancel()
    rig.run()
    rig.check_solo()
    assert rig.scheduler.counters.preemptions >= 1
    assert "error" not in rig.finished


def interactive(rig: Rig) -> InteractiveSink:
    return rig.core.interactive(Request(1, np.zeros(0, np.int32), OWNER, Slot(OWNER)))


def sample(rig: Rig, sink: InteractiveSink) -> None:
    """A token, which the fake machine does not report."""
    rig.core.call(partial(sink.sample, None, 0.0), Call(), more=True)
    for _ in range(6):
        if rig.has_work:
            rig.core.step()
    assert rig.scheduler.counters.tokens == 1


@pytest.mark.parametrize("at_once", [False, True])
def test_a_state_that_could_not_be_stored_is_computed(tmp_path: Path, at_once: bool) -> None:
    rig = Rig(Limits(16, 16, 2, 100, 100))
    rig.space.n_bytes, rig.space._folder = 0, str(tmp_path / "nowhere")
    sink = interactive(rig)
    rig.core.call(partial(sink.restore, SAVED, STATE, Slot(OWNER)), Call())
    if not at_once:
        rig.core.step()
    sample(rig, sink)
    assert rig.scheduler.counters.prefill_rows == len(TOKENS) - 1


@pytest.mark.parametrize("times", [1, 2])
def test_of_two_states_brought_the_second_is_loaded(times: int) -> None:
    rig = Rig(Limits(16, 16, 2, 100, 100))
    sink = interactive(rig)
    for _ in range(times):
        rig.core.call(partial(sink.restore, SAVED, STATE, Slot(OWNER)), Call())
    rig.core.step()
    sample(rig, sink)
    counters = rig.scheduler.counters
    assert (counters.loaded_tokens, counters.prefill_rows, counters.preemptions) == (9, 0, 0)
