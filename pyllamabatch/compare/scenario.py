"""The Cotabby inference bench's three scenarios, as its one line of JSON; and the gate."""

import json
from collections.abc import Sequence
from typing import Any

from pyllamabatch.compare.comparison import by_bench
from pyllamabatch.report.disturbed import undisturbed
from pyllamabatch.report.records import Record

SCENARIOS = {
    "a_two_contexts": "contexts",
    "b_shared_context": "shared",
    "c_engine_threaded": "engine",
}
"""Its names, and the arms that they are here."""


def line(scenario: str, records: Sequence[Record]) -> str:
    """The bench's own keys, of the scenario's repeat with the median speed (the lower of two)."""
    records = [record for record in records if record.arm == SCENARIOS[scenario]]
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


def gate(records: Sequence[Record], arm: str, at_least: float) -> list[dict[str, Any]]:
    """For each bench and number of sequences from 2 on, the speed of `arm` over that of contexts:
    the median of the repeats that have both, and that others did not disturb; None without one,
    which is not met."""
    quiet = by_bench(undisturbed(records))
    return [
        {
            "bench": bench,
            "num_sequences": n,
            "ratio": (ratio := quiet[bench].ratio(arm, n, "contexts") if bench in quiet else None),
            "at_least": at_least,
            "met": ratio is not None and ratio >= at_least,
        }
        for bench, them in by_bench(records).items()
        for n in them.counts
        if n > 1
    ]
