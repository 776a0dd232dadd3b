"""Policies by name, with options as a command line gives them."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler import (
    ComposedPolicy,
    SequenceView,
    fcfs,
    make_policy,
    policies,
    policy_names,
    registry,
    sarathi,
    shortest,
    slo,
    static,
)


def half(seq: SequenceView) -> float:
    return seq.max_tokens / 2


def test_eleven_ship() -> None:
    shipped = "fair fcfs mlfq prefill-first prefix sarathi shortest slo static"
    ours = "device-aware width"
    assert {*shipped.split(), *ours.split()} == set(policies.SHIPPED) <= set(policy_names())


def test_options_are_those_of_the_function() -> None:
    assert make_policy("sarathi") == sarathi()
    assert make_policy("sarathi:budget=512") == sarathi(budget=512) != sarathi()
    assert make_policy("sarathi:budget=None") == sarathi()
    assert make_policy("static: size = 4, wait=2") == static(size=4, wait=2.0)
    assert make_policy("slo:itl=0.05,ttft=1") == slo(itl=0.05, ttft=1.0)
    assert make_policy("shortest", predict=half, patience=7) == shortest(predict=half, patience=7)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none", r"one of device-aware, fair, fcfs, mlfq, .*static"),
        ("sarathi:512", r"NAME:option=value"),
        ("sarathi:rows=512", r"no option 'rows'; options of sarathi: budget, .*watermark"),
        ("sarathi:budget=many", r"budget='many': must be int or None"),
        ("sarathi:budget=1.5", r"budget=1.5: must be int or None"),
        ("sarathi:budget=True", r"budget=True: must be int or None"),
        ("sarathi:budget=0", r"budget=0: at least 1 row"),
        ("sarathi:itl=0.0", "itl=0.0"),
        ("sarathi:stretch=0.5", "stretch=0.5"),
        ("width:itl=0.0", "itl=0.0"),
        ("width:gain=-0.1", "gain=-0.1"),
        ("fcfs:watermark=1", r"watermark=1.0: a share"),
        ("static:size=0", r"size=0: at least 1"),
        ("static:wait=-1", r"wait=-1.0: seconds"),
        ("slo:itl=0", r"itl=0.0: more than 0"),
        ("slo:least=0", r"least=0: at least 1 row"),
        ("slo:margin=0", r"margin=0.0: above 0"),
        ("mlfq:growth=0", r"growth=0: at least 1"),
        ("mlfq:patience=0", r"patience=0: at least 1 step"),
        ("device-aware:group_wait=-1", r"group_wait=-1.0: must be at least 0"),
        ("prefix:patience=0", r"patience=0: at least 1 step"),
        ("fair:generated=0", r"generated=0.0: more than 0"),
        ("shortest:predict=4", r"predict=4: must be"),
    ],
)
def test_what_is_wrong_is_said(spec: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_policy(spec)


def nothing() -> int:
    return 3


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "mine": "pyllamabatch.scheduler.policies.fcfs:fcfs",
        "away": "pyllamabatch.scheduler.nowhere:fcfs",
        "gone": "pyllamabatch.scheduler.policies.fcfs:away",
        "number": "pyllamabatch.scheduler.policies.parts:ALWAYS",
        "nothing": f"{__name__}:nothing",
    }

    def entry_points(*, group: str) -> list[Any]:
        assert group == policies.GROUP
        return [EntryPoint(name, value, group) for name, value in values.items()]

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.usefixtures("packages")
def test_entry_points() -> None:
    assert "mine" in policy_names()
    assert isinstance(make_policy("mine:watermark=0.5"), ComposedPolicy)
    with pytest.raises(ArgumentError, match=r"one of away, device-aware, fair, .*mine"):
        make_policy("yours")


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("away", r"policy='away': it can't be loaded: No module"),
        ("gone", r"policy='gone': it can't be loaded: .*no attribute"),
        ("number", r"policy='number': it must be callable, and is 2147"),
        ("nothing", r"policy='nothing': must have plan\(view\)"),
    ],
)
def test_an_entry_point_that_is_none_is_said(name: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_policy(name)


def test_one_of_your_own_is_named_by_its_module_or_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    name = f"neighbour_{tmp_path.name}"
    tmp_path.joinpath(f"{name}.py").write_text("from pyllamabatch.scheduler import fcfs\n")
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        f"from {name} import fcfs as own\nnumber = 3\n@dataclass\nclass Data:\n    n: int\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert make_policy(f"{file}:own") == fcfs()
    assert make_policy(f"{file}:own:watermark=0.5") == fcfs(watermark=0.5)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert make_policy(f"{name}:fcfs") == fcfs()
    module = "pyllamabatch.scheduler.policies.slo"
    assert make_policy(f"{module}:slo: itl=2, least=3") == slo(itl=2.0, least=3)
    for spec, message in (
        (f"{file}:away", r"mine.py:away'.*: it can't be loaded: .*no attribute 'away'"),
        (f"{file}:number", r"it must be callable, and is 3"),
        (f"{file}:own:rows=1", r"no option 'rows'; options of .*mine.py:own: watermark"),
        (f"{tmp_path}/none.py:own", r"can't be loaded: .*No such file"),
        ("no_such_module:own", r"can't be loaded: No module named 'no_such_module'"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make_policy(spec)
