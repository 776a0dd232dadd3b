"""Real engines under test: settings, and checks of their accounting against libllama's memory."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyllamabatch.engine import core as core_module
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stats import EngineStats
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams

clock: Any = core_module  # by which an engine's core goes
EXACT: dict[str, Any] = {
    "flash_attn_type": "disabled", "type_k": "f32", "type_v": "f32", "n_threads": 1,
}  # fmt: skip
"""Of an engine or a context: what `oracle.EXACT` is in raw calls."""


def greedy(max_tokens: int = 8, *, ignore_eog: bool = True, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eog=ignore_eog, **options)


def engine_on(model: Model, **options: Any) -> Engine:
    """A small one, with the settings EXACT; without drafts, so that rows can be counted."""
    sizes: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 2048, "n_batch": 64, "speculate": None}
    return Engine(model, **{**sizes, **EXACT, **options})


def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The core's clock stands still until this is set: no deadline comes before."""
    goes, now = threading.Event(), time.perf_counter()
    monkeypatch.setattr(
        clock, "perf_counter", lambda: time.perf_counter() if goes.is_set() else now
    )
    return goes


@contextmanager
def held(engine: Engine, n_steps: int = 8) -> Iterator[threading.Event]:
    """Each native call computes one step. After `n_steps` of them the next one waits until a thread
    tells the engine something, which lets it go on for as many, until a deadline has come, or until
    the event is set, at the end of the block at the latest. So what is long enough does not end
    meanwhile, however late the test's own thread is."""
    core: Any = engine._core
    stepper, commands, free = core._stepper, core.commands, threading.Event()
    compute, take, left = stepper.compute, commands.take, n_steps

    def told() -> bool:
        deadline = core.scheduler.deadlines.next
        return bool(commands) or (deadline is not None and deadline <= clock.perf_counter())

    def computed(slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
        nonlocal left
        if left == 0:
            stepper.flush()
            while not (told() or free.wait(0.001)):
                pass
        else:
            left -= 1
        return compute(slots, 1, n_before, n_pad)

    def taken() -> Any:
        nonlocal left
        left = n_steps
        return take()

    stepper.compute, commands.take = computed, taken
    try:
        yield free
    finally:
        free.set()
        stepper.compute, commands.take = compute, take


def check_idle(engine: Engine) -> EngineStats:
    """Nothing runs, and counters, accounting and libllama's own memory agree on what is left:
    cached prefixes."""
    core = engine._core
    with core.state:
        core.kv.flush()
        accounting, memory = core.scheduler.accounting, core._device.memory
        slots = range(accounting.n_seq_max)
        held = [memory.pos_max(slot) + 1 for slot in slots]
        assert held == [accounting.held(slot) for slot in slots]
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.sequences == stats.kv_used == 0
    assert stats.kv_cached == accounting.used
    assert stats.submitted == sum(stats.finished.values())
    return stats


class Checked:
    """Sits between an engine's core and its stepper. `may_fail`: decodes are made to fail on
    purpose; else each must succeed, for what the accounting allows fits."""

    def __init__(self, engine: Engine, *, may_fail: bool = False) -> None:
        self._stepper: Any = engine._stepper
        self._scheduler = engine._core.scheduler
        self._memory = engine._core._device.memory
        self._may_fail = may_fail
        self.n_steps = 0
        self.n_checks = 0
        engine._core.calls._stepper = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stepper, name)

    def compute(self, slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
        self._check(len(slots) * n_steps + n_before)
        result = self._stepper.compute(slots, n_steps, n_before, n_pad)
        assert result.code == 0 or self._may_fail
        self.n_steps += result.n_steps
        return result

    def _check(self, n_cells: int) -> None:
        """Before a native call. What ended in a call of the same step, and what filled up chunks of
        it, is taken out with the next step."""
        scheduler, n_slots = self._scheduler, self._scheduler.n_slots
        held = [self._memory.pos_max(slot) + 1 for slot in range(n_slots)]
        if not scheduler.has_kv_operations:
            assert held == [scheduler.accounting.held(slot) for slot in range(n_slots)]
        for id in scheduler.running_ids():
            slot = scheduler.slot(id)
            assert slot is not None
            n = scheduler.computed(slot)
            assert held[slot] == n or (scheduler.has_kv_operations and held[slot] > n)
        assert n_cells <= scheduler.accounting.empty
        self.n_checks += 1
