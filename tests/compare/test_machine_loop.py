"""The raw arms on a profile machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyllamabatch.compare import hosted
from pyllamabatch.compare.case import Case, ModelFile
from pyllamabatch.compare.workload import BURST, Workload, failure, figures
from pyllamabatch.engine.on_machine import vocabulary
from pyllamabatch.llama.model import Model
from pyllamabatch.machine.profile_machine import ProfileMachine
from tests.support.machines import fast_profile

TOKENS = 30


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with vocabulary() as one:
        yield one


@pytest.mark.parametrize("arm", [hosted.contexts, hosted.shared, hosted.engine])
def test_an_arm_takes_what_the_profile_says(
    arm: Callable[[Model, Case], hosted.Run], model: Model, tmp_path: Path
) -> None:
    profile = fast_profile(tmp_path)
    case = Case(ModelFile(Path()), 20, TOKENS - 1, 2, 1, "default", 1, machine=str(profile))
    workload = Workload(BURST, 1, TOKENS, (0.0, 0.0))
    timings = arm(model, case)(workload)
    assert not failure(workload, timings)
    machine = ProfileMachine.named(profile)
    cost = machine.cost(unified=False, n_ubatch=512)
    machine.queue.close()
    if arm is hosted.contexts:  # a row at a time, one after the other
        least = 2 * sum(cost.predict(1, 0, 20 + i, 1) for i in range(1, TOKENS))
    else:
        least = sum(cost.predict(2, 0, 2 * (20 + i), 2) for i in range(1, TOKENS))
    # The last token of one may come a step before that of the other, and the time began while the
    # first step was under way.
    assert figures(workload, timings)["elapsed_seconds"] >= least * (1 - 2 / TOKENS)
