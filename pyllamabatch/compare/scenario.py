"""The Cotabby inference bench's three scenarios, as its one line of JSON; and the gate."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pyllamabatch.compare.comparison import by_bench
from pyllamabatch.report.records import Record

SCENARIOS = {
    "a_two_contexts": "contexts",
    "b_shared_context": "shared",
    "c_engine_threaded": "engine",
}
"""Its names, and the arms that they are here."""


def line(scenario: str, rows: Sequence[Record]) -> str:
    """The bench's own keys, of the repeat with the median speed (the lower one of two)."""
    if failed := [row for row in rows if row.error]:
        return json.dumps({"scenario": scenario, "error": failed[0].error})
    if not rows:
        return json.dumps({"scenario": scenario, "error": "interrupted before the first result"})
    row = sorted(rows, key=lambda row: row.speed_tg)[(len(rows) - 1) // 2]
    return json.dumps(
        {
            "scenario": scenario,
            "num_sequences": row.pl,
            "prompt_tokens": row.pp,
            "sample_tokens": row.tg + 1,
            "elapsed_seconds": row.t_tg,
            "total_tokens_sampled": row.tg * row.pl,
            "aggregate_tokens_per_second": row.speed_tg,
            "per_sequence_tokens_per_second": row.speed_tg / row.pl,
        }
    )


def ratios(rows: Sequence[Record], arm: str, base: str) -> dict[tuple[str, int], float | None]:
    """Of each bench and number of sequences from 2 on that the arm was to run: its speed over the
    base's, the median of the repeats that have both; None without one."""
    return {
        (bench, n): them.ratio(arm, n, base)
        for bench, them in by_bench(rows).items()
        for n in them.counts
        if n > 1
    }


def met(found: dict[tuple[str, int], float | None], least: float) -> bool:
    """Every ratio is there and at least `least`, and there is one."""
    return bool(found) and all(ratio is not None and ratio >= least for ratio in found.values())
