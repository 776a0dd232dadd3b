"""What an engine has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..scheduler.router import expected_wait, row_seconds
from .core import EngineCore

AS_COUNTED = (
    *("prefill_rows", "recomputed_rows", "admissions", "preemptions", "known_tokens"),
    "layout_changes",
    *("prefix_tokens", "drafts", "drafted_tokens", "accepted_tokens"),
)
"""Fields that are those of the scheduler's `Counters`."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine has done, at one moment between two steps.

    `submitted` = `waiting` + `running` + the sum of `finished` (by finish reason). Interactive
    `sequences` that know tokens are not among these. `rows` = `decode_rows` + `prefill_rows`;
    `recomputed_rows`: prefill rows that had been computed before a preemption. `tokens`: sampled,
    those that end a text included. `fill`: how many steps have sampled so many sequences.
    `slot_steps`: slots that had rows, summed over the steps. `step_tokens`: how many steps had so
    many tokens, rows of prompts and sampled ones, as far as these were read.
    `kv_used` of `kv_total` cells are held by sequences that run, and `kv_cached` others by cached
    prefixes. `known_tokens`: of all sequences when they were admitted,
    again if they were preempted; of these `prefix_tokens` were in the cache (`prefix_hit_rate`) and
    `swapped_tokens` in a saved state.
    `graphs_reused`: compute graphs that did not have to be rebuilt, counted by libllama when a
    native call returns. Steps of one size reuse theirs. `restarts`: fresh contexts after a failure.
    `layout_changes`: how often streams of cells have become a pool, or a pool streams again.
    `drafts` with `drafted_tokens` were checked in rows of their own, which are among `decode_rows`,
    and `accepted_tokens` of these were right, `accepted_at[i]` of them the draft's token i
    (`Engine`'s speculate). Of a native call that goes on a step counts as one token of each
    sequence.
    `reasons`: as `Engine.reasons`; those of "layout" say what there is, and why.
    `wait_s`: seconds until one more request begins to be computed, `row_s`: of a prompt row, both
    by the cost model (`pyllamabatch.scheduler.router`); 0 without one."""

    submitted: int
    waiting: int
    running: int
    finished: dict[str, int]
    steps: int
    rows: int
    decode_rows: int
    prefill_rows: int
    recomputed_rows: int
    tokens: int
    admissions: int
    preemptions: int
    kv_used: int
    kv_total: int
    graphs_reused: int
    sequences: int
    fill: dict[int, int]
    kv_cached: int = 0
    known_tokens: int = 0
    prefix_tokens: int = 0
    swapped_tokens: int = 0
    restarts: int = 0
    layout_changes: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    slot_steps: int = 0
    step_tokens: Mapping[int, int] = field(default_factory=dict)
    accepted_at: tuple[int, ...] = ()
    wait_s: float = 0.0
    row_s: float = 0.0
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of `known_tokens` that did not have to be computed because they were in the cache;
        0 when no sequence was admitted."""
        return self.prefix_tokens / self.known_tokens if self.known_tokens else 0.0


class SlotState(NamedTuple):
    """What runs in a slot. `request`: its id, None while the slot is free. `n_prompt` + `generated`
    tokens are known, and `computed` of them in the cache; at most `left` are still to come."""

    slot: int
    request: int | None = None
    n_prompt: int = 0
    computed: int = 0
    generated: int = 0
    tenant: str = ""
    priority: int = 0
    left: int = 0


def slots_of(core: EngineCore) -> list[SlotState]:
    """Of every slot, between two calls."""
    with core.seen():
        core.settle()
        states = []
        for slot, request in enumerate(core.table.at[: core.scheduler.limits.n_seq_max]):
            if request is None:
                states.append(SlotState(slot))
                continue
            view = core.scheduler.sequence(request.id)
            known = view.n_prompt, view.computed, view.generated
            left = view.max_tokens - view.generated
            states.append(SlotState(slot, request.id, *known, view.tenant, view.priority, left))
        return states


def stats_of(core: EngineCore) -> EngineStats:
    """At this moment, steps of a call that still goes on included."""
    with core.seen():
        core.settle()
        scheduler, finished = core.scheduler, core.output_processor.finished.copy()
        counters, interactive = scheduler.counters, core.table.interactive
        submitted, waiting = core.commands.n_submitted, 0
        if core.commands.error is None:  # else those that it knows were given up
            waiting = scheduler.n_waiting - sum(map(scheduler.waits, interactive))
            waiting += submitted - core.n_taken
        n, n_rows = core.calls.progress()
        running = submitted - waiting - sum(finished.values())
        fill = counters.fill.copy()
        if n:
            fill[n_rows] = fill.get(n_rows, 0) + n
        return EngineStats(
            submitted=submitted,
            waiting=waiting,
            running=running,
            finished=finished,
            steps=counters.steps + n,
            rows=counters.rows + n * n_rows,
            decode_rows=counters.decode_rows + n * n_rows,
            tokens=counters.tokens + n * n_rows - core.output_processor.n_dropped,
            kv_used=scheduler.accounting.used - scheduler.accounting.cached + n * n_rows,
            kv_total=scheduler.limits.n_cells,
            graphs_reused=core.n_reused,
            sequences=len(interactive),
            fill=fill,
            kv_cached=scheduler.accounting.cached,
            swapped_tokens=counters.loaded_tokens,
            restarts=core.recovery.n_restarts,
            slot_steps=counters.slot_steps + n * n_rows,
            step_tokens=core.output_processor.step_tokens(),
            accepted_at=tuple(counters.accepted_at),
            wait_s=expected_wait(scheduler, waiting + running),
            row_s=row_seconds(scheduler),
            **{name: getattr(counters, name) for name in AS_COUNTED},
        )
