"""The pages on policies: their code obeys the rules, and their tables are complete."""

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

from pyllamabatch import scheduler
from pyllamabatch.scheduler import RULES, Limits, make_policy, policy, policy_names
from tests.support.scheduler_machine import Machine

DOCS = Path(__file__).parents[2] / "docs"
TUTORIAL = (DOCS / "tutorial" / "write-a-policy.md").read_text(encoding="utf-8")
REFERENCE = (DOCS / "reference" / "policies.md").read_text(encoding="utf-8")
SMALLEST, OWN, *_ = re.findall(r"^```python\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)


def test_the_smallest_policy_obeys_every_rule() -> None:
    names: dict[str, Any] = {}
    exec(compile(SMALLEST, "write-a-policy.md", "exec"), names)
    machine = Machine(Limits(8, 8, 2, 64, 64), names["OneAtATime"]())
    machine.add(1, 10, 5)
    machine.add(2, 3, 2)
    assert [step.n_rows for step in machine.steps()] == [8, 2, 1, 1, 1, 1, 3, 1]


def test_the_first_part_of_the_reference_serves_all() -> None:
    _, example = (policy.__doc__ or "").split("callable object:\n")
    names: dict[str, Any] = dict(vars(scheduler))
    exec(compile(dedent(example), "policy.py", "exec"), names)
    machine = Machine(Limits(64, 64, 2, 512, 512), names["policy"])
    for id, n_prompt in enumerate((10, 150, 20, 30), 1):
        machine.add(id, n_prompt, 5)
    assert [*machine.steps()]
    assert sorted(machine.done) == [1, 2, 3, 4]


def test_a_policy_of_ones_own_takes_twenty_lines() -> None:
    assert len([line for line in OWN.splitlines() if line]) <= 20


def test_the_tables_are_complete() -> None:
    first = re.findall(r"^\| `([a-z-]+)` \|", REFERENCE, re.MULTILINE)
    assert first == [*RULES, *(name for name in first if name in policy_names())]
    assert set(first) >= set(policy_names())


def test_what_parts_are_given_and_answer_is_there() -> None:
    parts = REFERENCE[REFERENCE.index("| part |") : REFERENCE.index(":::")]
    names = set(re.findall(r"`(?:\w+=)?([A-Z][a-z]\w+)", parts)) - {"None"}
    defaults = {"WhenItFits", "TokenBudget", "ByGain"}
    assert names - defaults <= set(scheduler.__all__)
    assert names >= defaults | {"Verdict", "Mix", "Round", "Speculation", "StepView"}


def test_the_commands_name_real_policies() -> None:
    specs = re.findall(r"--policy (\S+)", REFERENCE)
    assert len(specs) == 2
    for spec in specs:
        assert callable(make_policy(spec).plan)
