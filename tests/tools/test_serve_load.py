"""What `tools.serve_load` finds wrong."""

from typing import Any

from tools.serve_load import GROWTH_MIB, problems

GOOD: dict[str, Any] = {
    "answers": {"answered 200": 9, "huge 413": 4}, "memory_mib": [150, 150 + GROWTH_MIB],
    "running": 0, "waiting": 0, "kv_in_use": 0.0, "busy_slots": 0,
}  # fmt: skip


def test_what_is_wrong_is_said() -> None:
    assert problems(GOOD) == []
    assert problems({**GOOD, "memory_mib": [150, 190]}) == ["memory: 150 MiB, then 190"]
    assert problems({**GOOD, "busy_slots": 1}) == ["busy_slots=1"]
    assert problems({**GOOD, "answers": {"huge 200": 1}}) == ["huge 200: 1"]
