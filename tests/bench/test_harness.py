"""What all benches share: arms in turns, records, targets, the command line."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import decode, harness, quiet
from bench.__main__ import main, parser_of
from bench.arms import InProcess, StepClock
from bench.benches import BENCHES, about, load
from bench.cache import REPOSITORY, RESULTS
from bench.case import Arm, Case, Measured
from bench.options import numbers
from bench.shapes import SHAPES
from bench.targets import Target, speed_ratio
from pyllamabatch.report import meters
from pyllamabatch.report.disturbed import UNWATCHED
from pyllamabatch.report.facts import machine
from pyllamabatch.report.meters import OtherCores
from pyllamabatch.report.records import SCHEMA, read, speeds
from pyllamabatch.scheduler import StepView, sarathi
from pyllamabatch.scheduler.view import Limits, SequenceView
from tests.bench.conftest import options
from tests.support.made_up_rows import row


@pytest.mark.parametrize("sampling", ["greedy", "default"])
def test_every_arm_of_ours_does_the_work(case: Case, sampling: str) -> None:
    inside = InProcess(case.model, 0)
    names = ["raw", "stepper", "C loop", "engine"]
    arms = [arm for arm in decode.all_arms(inside) if arm.name in names]
    cases = [replace(case, sampling=sampling, pl=pl, n_batch=16) for pl in (1, 3)]
    records = list(harness.measure("decode", arms, cases, inside.facts(), options()))
    assert [(record.repeat, record.pl, record.arm) for record in records] == [
        (repeat, pl, name)
        for repeat in (0, 1)
        for pl in (1, 3)
        for name in (names if repeat == 0 else names[::-1])
    ]
    for record in records:
        assert record.t_pp > 0
        assert record.t_tg > 0
        assert (record.sampling, record.tg, record.n_kv) == (sampling, 5, record.pl * 14)
        assert record.build_commit == "b11549" or record.build_number == 0


def test_an_arm_that_fails_leaves_a_record_and_the_others_go_on(case: Case) -> None:
    def broken(case: Case) -> Measured:
        raise RuntimeError("no memory")

    arms = [Arm("broken", "", broken), Arm("good", "", lambda case: Measured(0.0, 1.0))]
    about = harness.facts_of()
    lost, good = harness.measure("b", arms, [case], about, options(repeats=1))
    assert (lost.arm, lost.error, lost.t_tg) == ("broken", "RuntimeError: no memory", 0.0)
    assert (good.arm, good.t_tg) == ("good", 1.0)
    assert list(harness.measure("b", arms, [case], about, options(budget=0.0))) == []


def test_rows_and_output_say_that_no_one_looked_what_others_use(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [Arm("engine", "", lambda case: Measured(0.0, 1.0))]
    asked = options(command="decode", repeats=1, out=tmp_path / "rows.jsonl")
    told = []
    for library in (psutil, None):
        monkeypatch.setattr(meters, "psutil", library)
        harness.run(asked, arms, [case], harness.facts_of(), "title", "model")
        told.append(UNWATCHED in capsys.readouterr().out)
    assert told == [False, True]
    known, unknown = (record.detail["other_cpu"] for record in read(asked.out))
    assert known >= 0 > unknown


def test_the_step_clock_counts_steady_steps_only() -> None:
    limits = Limits(n_batch=8, n_ubatch=8, n_seq_max=2, n_cells=64, n_cells_seq=64)
    done: dict[str, Any] = {
        "n_prompt": 3, "computed": 3, "generated": 1, "max_tokens": 9, "running": True,
    }  # fmt: skip
    both = [SequenceView(id=i, arrival=0.0, **done) for i in (1, 2)]
    begun = SequenceView(id=2, arrival=0.0, n_prompt=9, computed=3, max_tokens=9, running=True)
    clock = StepClock(sarathi(), 2, 6)
    for running, waiting in (([both[0], begun], []), (both[:1], []), (both, [begun])):
        clock.plan(StepView.of(limits, running, waiting))
    assert clock.starts == []
    for steps in (0, 1, 4, 6):  # a plan may stand for several steps, but ends with the last one
        assert not clock.done.is_set()
        now = [s._replace(computed=3 + steps, generated=1 + steps) for s in both]
        plan = clock.plan(StepView.of(limits, now))
        assert plan.decode_all
        assert plan.repeat == 6 - steps or steps == 6
    assert clock.done.is_set()
    assert clock.steps == [0, 1, 4, 6]
    assert len(clock.starts) == 4


def test_a_target_looks_at_its_own_records_only() -> None:
    about = {"n_cores": 2, "gpu_info": "", "build_commit": "b115"}
    target = Target("t", speed_ratio("ours", "base", 4), at_least=2.0, where=about)
    records = [row("base", 4, 10), row("ours", 4, 20), row("ours", 8, 9)]
    assert target.measured([*records, row("ours", 4, 0, error="lost")]) == pytest.approx(2.0)
    assert target.limit == "≥ 2"
    assert target.met_by(2.0)
    assert not target.met_by(1.99)
    assert target.missed_by([records[0], row("ours", 4, 19)])
    others = [replace(record, gpu_info="a GPU") for record in records]
    assert target.measured(others) is None
    assert not target.missed_by(others)
    assert not Target("t", target.figure, at_most=1.0).met_by(2.0)


def test_the_commit_of_a_record_can_be_given_for_copied_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYLLAMABATCH_BENCH_COMMIT", "abc")
    harness.commit.cache_clear()
    assert harness.commit() == "abc"
    monkeypatch.delenv("PYLLAMABATCH_BENCH_COMMIT")
    harness.commit.cache_clear()
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", harness.commit())


def test_the_machine_is_named_without_its_host_name() -> None:
    import platform

    facts = machine()
    assert facts["n_cores"] >= 1
    assert facts["cpu_info"]
    assert facts["memory_bytes"] > 0
    node = platform.node()
    assert not node or node not in str(facts)


def test_committed_results_are_records() -> None:
    records = [record for path in sorted(RESULTS.glob("*.jsonl")) for record in read(path)]
    for record in records:  # a speed without its time (no prompt, say) is 0
        times = {"t_pp": record.t_pp, "t_tg": record.t_tg}
        expected = speeds(pp=record.pp, tg=record.tg, pl=record.pl, **times)
        assert {name: getattr(record, name) for name in expected} == pytest.approx(expected)
        if record.bench not in ("plan", "validate", "answers", "same"):  # no speeds
            assert (record.t_tg == 0) == bool(record.error)
    assert {record.schema for record in records} <= {SCHEMA}


def test_the_runner_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BENCHES, *SHAPES))
    for name in BENCHES:
        assert all(target.text in printed for target in load(name).TARGETS)
        assert about(load(name)).endswith(".")  # a line that says it whole
    page = (REPOSITORY / "bench" / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in BENCHES)


@pytest.mark.parametrize("name", BENCHES)
def test_quick_gives_other_defaults_to_options_that_exist(name: str) -> None:
    whole, quick = (
        vars(parser_of(words).parse_args(words)) for words in ([name], [name, "--quick"])
    )
    assert whole.keys() == quick.keys()
    changed = {key: value for key, value in quick.items() if value != whole[key]}
    assert changed == {"quick": True, **load(name).QUICK}


def test_an_argument_stands_also_with_quick() -> None:
    words = ["decode", "--quick", "--tokens", "9"]
    found = parser_of(words).parse_args(words)
    assert (found.tokens, found.repeats) == (9, decode.QUICK["repeats"])


def test_numbers() -> None:
    assert numbers("1,16,4") == [1, 16, 4]
    for words in ("", "1,x", "0", "2,-1"):
        with pytest.raises(SystemExit, match="1 or more"):
            numbers(words)
    with pytest.raises(SystemExit, match="1 or more"):
        main(["decode", "--tokens", "0"])


def test_a_policy_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scheduler", "--quick", "--policies", "nope"]) == 1
    assert "policy='nope': one of" in capsys.readouterr().err


def test_a_run_that_others_disturb_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([0.9, 0.1, 0.5, 0.1, 0.1])  # busy, quiet, run disturbed, quiet, run undisturbed
    monkeypatch.setattr(OtherCores, "used", lambda self: next(seen))
    monkeypatch.setattr(quiet, "SETTLE_S", 0.0)
    runs = iter([Measured(0.0, 1.0), Measured(0.0, 2.0)])
    assert quiet.undisturbed(lambda: next(runs), 0.2) == Measured(0.0, 2.0, {}, {"other_cpu": 0.1})


def test_what_a_run_knows_of_others_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that it starts are others, as seen from without."""
    monkeypatch.setattr(OtherCores, "used", lambda self: 7.0)
    monkeypatch.setattr(quiet, "wait_for_quiet", lambda limit: None)
    runs = iter([0.9, 0.1])
    found = quiet.undisturbed(lambda: Measured(0.0, 1.0, {}, {"other_cpu": next(runs)}), 0.2)
    assert found.detail == {"other_cpu": 0.1}


def test_without_psutil_no_bench_promises_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["serve", "--undisturbed", "0.1"]
    assert parser_of(words).parse_args(words).undisturbed == 0.1
    monkeypatch.setattr(meters, "psutil", None)
    found = quiet.undisturbed(lambda: Measured(0.0, 1.0), None)
    assert found.detail == {"other_cpu": meters.UNKNOWN}
    assert meters.descendants() == []
    with pytest.raises(SystemExit):
        main(words)
    assert "psutil" in capsys.readouterr().err


def test_without_docstrings_the_runner_lists_what_there_is() -> None:
    words = [sys.executable, "-OO", "-m", "bench", "list"]
    assert all(name in subprocess.check_output(words, text=True) for name in BENCHES)


def test_without_psutil_every_bench_is_there() -> None:
    names = [f"bench.{name}" for name in BENCHES]
    code = "import sys, importlib; sys.modules['psutil'] = None\n"
    code += f"for name in {[*names, 'pyllamabatch.cli.compare']}: importlib.import_module(name)"
    subprocess.run([sys.executable, "-c", code], check=True)
