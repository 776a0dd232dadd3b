"""The Cotabby inference bench's three scenarios, as its one line of JSON; and the gate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyllamabatch.compare.comparison import by_bench
from pyllamabatch.compare.run import Experiment
from pyllamabatch.errors import ArgumentError
from pyllamabatch.report.records import Record

SCENARIOS = {
    "a_two_contexts": "contexts",
    "b_shared_context": "shared",
    "c_engine_threaded": "engine",
}
"""Its names, and the arms that they are here."""


def line(scenario: str, records: Sequence[Record]) -> str:
    """The bench's own keys, of the scenario's repeat with the median speed (the lower of two)."""
    records = [r for r in records if r.arm.split()[0] == SCENARIOS[scenario]]
    errors = [record.error for record in records if record.error]
    if errors or not records:
        why = errors[0] if errors else "interrupted before the first result"
        return json.dumps({"scenario": scenario, "error": why})
    record = sorted(records, key=lambda r: r.speed_tg)[(len(records) - 1) // 2]
    return json.dumps(
        {
            "scenario": scenario,
            "num_sequences": record.pl,
            "prompt_tokens": record.pp,
            "sample_tokens": record.tg + 1,
            "elapsed_seconds": record.t_tg,
            "total_tokens_sampled": record.tg * record.pl,
            "aggregate_tokens_per_second": record.speed_tg,
            "per_sequence_tokens_per_second": record.speed_tg / record.pl,
        }
    )


@dataclass(frozen=True)
class Gate:
    """`arm` must be `at_least` times as fast as `base` at each number of sequences from 2 on."""

    arm: str
    base: str
    at_least: float

    @classmethod
    def of(cls, experiments: Sequence[Experiment], at_least: float) -> Gate:
        """Of the engine, or of `shared` where it does not run. ArgumentError where an arm or the
        second sequence is missing."""
        first = {arm.kind: arm.name for arm in reversed(experiments[0].arms)}
        arm = first.get("engine") or first.get("shared")
        if arm is None or "contexts" not in first:
            raise ArgumentError("--gate", at_least, "needs contexts, and engine or shared")
        if all(case.pl < 2 for experiment in experiments for case in experiment.cases):
            raise ArgumentError("--gate", at_least, "needs 2 sequences or more")
        return cls(arm, first["contexts"], at_least)

    def judged(self, records: Sequence[Record]) -> list[dict[str, Any]]:
        """For each bench and number of sequences the median ratio of the repeats that have both;
        None without one."""
        return [
            {
                "bench": bench,
                "num_sequences": n,
                "ratio": them.ratio(self.arm, n, self.base),
                "at_least": self.at_least,
            }
            for bench, them in by_bench(records).items()
            for n in them.counts
            if n > 1
        ]

    def met(self, records: Sequence[Record]) -> bool:
        """Every ratio is there and large enough, and there is one."""
        ratios = [one["ratio"] for one in self.judged(records)]
        return bool(ratios) and all(ratio and ratio >= self.at_least for ratio in ratios)
