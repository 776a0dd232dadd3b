"""Real engines under test: settings, and checks of their accounting against libllama's memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stats import EngineStats
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams

EXACT: dict[str, Any] = {
    "flash_attn_type": "disabled",
    "type_k": "f32",
    "type_v": "f32",
    "n_threads": 1,
}
"""Of an engine or a context: what `oracle.EXACT` is in raw calls."""


def greedy(max_tokens: int = 8, *, ignore_eog: bool = True, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eog=ignore_eog, **options)


def engine_on(model: Model, **options: Any) -> Engine:
    """A small one, with the settings EXACT; without drafts, so that rows can be counted."""
    sizes: dict[str, Any] = {"n_seq_max": 4, "n_ctx": 2048, "n_batch": 64, "speculate": None}
    return Engine(model, **{**sizes, **EXACT, **options})


@contextmanager
def slow(engine: Engine, seconds: float) -> Iterator[None]:
    """Every native call computes one step, and takes so long at least: what happens meanwhile does
    not depend on who is faster."""
    stepper: Any = engine._core._stepper
    compute = stepper.compute

    def computed(slots: Any, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Any:
        time.sleep(seconds)
        return compute(slots, 1, n_before, n_pad)

    stepper.compute = computed
    try:
        yield
    finally:
        stepper.compute = compute


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
        """Before a native call. What ended in a call of the same step is taken out with the next
        step."""
        scheduler, n_slots = self._scheduler, self._scheduler.n_slots
        held = [self._memory.pos_max(slot) + 1 for slot in range(n_slots)]
        if not scheduler.has_kv_operations:
            assert held == [scheduler.accounting.held(slot) for slot in range(n_slots)]
        for id in scheduler.running_ids():
            slot = scheduler.slot(id)
            assert slot is not None
            assert held[slot] == scheduler.computed(slot)
        assert n_cells <= scheduler.accounting.empty
        self.n_checks += 1
