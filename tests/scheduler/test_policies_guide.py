"""The Python in docs/policies.md runs as it is printed, and its table of rules is the real one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.scheduler import RULES, Limits, Scheduler, make_policy, policy_names

GUIDE = Path(__file__).parents[2].joinpath("docs", "policies.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the blocks define, one after the other."""
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "docs/policies.md", "exec"), names)
    return names


def test_every_block_runs(names: dict[str, Any]) -> None:
    assert len(BLOCKS) == 6
    assert names["done"] == [2, 3, 1]
    own = next(block for block in BLOCKS if "def short_prompts" in block)
    assert len([line for line in own.splitlines() if line]) <= 20


def test_the_smallest_policy_keeps_every_rule(names: dict[str, Any]) -> None:
    scheduler = Scheduler(Limits(8, 8, 2, 64, 64), names["OneAtATime"]())
    scheduler.add(1, 10, 5, arrival=0.0)
    scheduler.add(2, 3, 2, arrival=0.0)
    n_rows = []
    while not scheduler.idle:
        step = scheduler.plan(0.0)
        assert step is not None
        scheduler.advance(step, step.repeat)
        n_rows += [step.n_rows] * step.repeat
        for id, most in ((1, 5), (2, 2)):
            if id in scheduler.running_ids() and scheduler.sequence(id).generated == most:
                scheduler.remove(id)
    assert n_rows == [8, 2, 1, 1, 1, 1, 3, 1]


def test_its_tables_are_complete() -> None:
    first = re.findall(r"^\| `([a-z-]+)` \|", GUIDE, re.MULTILINE)
    assert first == [*RULES, *(name for name in first if name in policy_names())]
    assert set(first) >= set(policy_names())


def test_its_commands_name_real_policies() -> None:
    specs = re.findall(r"--policy (\S+)", GUIDE)
    assert len(specs) == 2
    for spec in specs:
        assert callable(make_policy(spec).plan)
