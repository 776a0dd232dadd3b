"""The raw arms on a profile machine."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyllamabatch.compare import hosted
from pyllamabatch.compare.case import Case, ModelFile
from pyllamabatch.compare.machine_loop import MachineLoop
from pyllamabatch.compare.workload import BURST, Workload, failure, figures
from pyllamabatch.engine.on_machine import vocabulary
from pyllamabatch.llama.model import Model
from pyllamabatch.machine import device, gpu_queue, profile_machine
from pyllamabatch.machine.context import MachineContext
from pyllamabatch.machine.gpu_queue import GpuQueue
from pyllamabatch.machine.profile_machine import ProfileMachine
from tests.support.machines import fast_profile

TOKENS = 30


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with vocabulary() as one:
        yield one


@pytest.mark.parametrize("arm", [hosted.contexts, hosted.shared, hosted.engine])
def test_an_arm_takes_what_the_profile_says(
    arm: Callable[[Model, Case], hosted.Run],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[float] = []
    reserve = GpuQueue.reserve

    def noted(queue: GpuQueue, seconds: float, since_ns: int) -> tuple[int, int]:
        taken.append(seconds)
        return reserve(queue, seconds, since_ns)

    monkeypatch.setattr(GpuQueue, "reserve", noted)
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
    # The last token of one may come a step before that of the other.
    assert sum(taken) >= least * (1 - 1 / TOKENS)
    assert figures(workload, timings)["completed"] == 2


def test_what_the_machine_itself_takes_is_in_no_step(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes late, and then writes down what a native loop has in its ring. A raw loop, which
    calls it for each step, loses its own time alone."""
    now, late_ns, own_ns = 10**9, 7 * 10**6, 10**6

    def clock() -> int:
        nonlocal now
        now += 10
        return now

    def wake(end_ns: int) -> None:
        nonlocal now
        now = max(now, end_ns) + late_ns

    clocks = SimpleNamespace(perf_counter_ns=clock, time_ns=clock)
    monkeypatch.setattr(gpu_queue, "time", clocks)
    monkeypatch.setattr(device, "perf_counter_ns", clock)
    monkeypatch.setattr(profile_machine, "perf_counter_ns", clock)
    monkeypatch.setattr(profile_machine, "sleep_until", wake)
    machine = ProfileMachine.named(fast_profile(tmp_path))
    steps: list[tuple[int, int]] = []
    reserve = machine.queue.reserve

    def noted(seconds: float, since_ns: int) -> tuple[int, int]:
        steps.append(reserve(seconds, since_ns))
        return steps[-1]

    monkeypatch.setattr(machine.queue, "reserve", noted)
    loop = MachineLoop(MachineContext(machine, model, n_ctx=64, n_seq_max=1, kv_unified=False))
    loop.start(0, [1, 2, 3], 0)
    for _ in range(5):
        loop.step()
        now += own_ns
    gaps = [start - end for (_, end), (start, _) in pairwise(steps)]
    assert gaps == pytest.approx([own_ns] * 4, abs=1000)
    machine.queue.close()
