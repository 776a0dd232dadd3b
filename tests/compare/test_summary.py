"""The table and the plain sentences, over rows that were made up."""

from argparse import Namespace
from typing import Any

import pytest

from pyllamabatch.cli.compare import show
from pyllamabatch.compare.advice import advice, as_fast
from pyllamabatch.compare.case import Measured
from pyllamabatch.compare.comparison import short
from pyllamabatch.compare.run import steadiest
from pyllamabatch.compare.scenario import gate
from pyllamabatch.compare.summary import plain, table
from pyllamabatch.report.records import Record
from tests.support.made_up_rows import GIB, row


def cells(text: str, arm: str, n: int) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {n} | {arm} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[2:]]


def heads(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")[2:]]


def overall(rows: list[Record]) -> str:
    line = advice(rows).splitlines()[-1]
    assert line.startswith("Overall, with m-Q4_K_M on ")
    return line


def test_ratios_are_medians_of_pairs_in_one_repeat() -> None:
    rows = []
    for repeat, drift in enumerate((1.0, 0.5, 0.8)):
        rows += [
            row("single", 1, 50 * drift, repeat=repeat),
            row("contexts", 4, 60 * drift, repeat=repeat),
            row("engine", 4, 120 * drift, repeat=repeat, per_sequence_tokens_per_second=30.0),
        ]
    text = table(rows)
    assert heads(text) == ["tok/s", "over contexts", "over single", "each, tok/s"]
    assert cells(text, "engine", 4) == ["96.0", "2.00", "2.40", "30.0"]
    assert cells(text, "contexts", 4) == ["48.0", "1.00", "1.20", ""]
    assert cells(text, "single", 1) == ["40.0", "", "1.00", ""]


def test_columns_that_no_row_has_are_left_out_and_failures_say_why() -> None:
    rows = [
        row("engine", 2, 40, bench="compare-ds4", ttft_p50_s=0.25, ttft_p99_s=1.5, fairness=0.987),
        row("contexts", 2, 0, bench="compare-ds4", error="Traceback\nDecodeError: no | room"),
        row("processes", 2, 9, bench="compare-ds4", completed=1.0, rss_bytes=1.0 * GIB),
        row("engine", 2, 50, rss_bytes=0.5 * GIB, energy_joules=40.0),
    ]
    first, second = table(rows).split("\n\nIdentical completions")
    assert heads(first) == ["tok/s", "RSS, GiB", "J/token"]
    assert cells(first, "engine", 2) == ["50.0", "0.50", "0.20"]
    assert "| N | arm | tok/s | TTFT p50, ms | p99 | fairness |" in second
    assert cells(second, "engine", 2) == ["40.0", "250", "1500", "0.99"]
    assert cells(second, "contexts", 2)[0] == cells(second, "processes", 2)[0] == "—"
    assert "- contexts, N = 2, has no result: DecodeError: no | room\n" in second
    assert "- processes, N = 2, has no result: 1 of 2 completed\n" in second


def test_a_terminal_gets_columns_and_what_each_time_contains() -> None:
    lines = plain([row("engine", 2, 90), row("processes", 2, 0, error="broken")]).splitlines()
    assert lines[2:5] == ["N  arm        tok/s", "2  engine      90.0", "2  processes      —"]
    assert lines[-2:] == ["- engine: ", "- processes: "]


def test_arms_with_other_threads_are_told() -> None:
    def arms(**n_threads: float) -> list[Record]:
        return [row(arm, 4, 90, n_threads_each=n) for arm, n in n_threads.items()]

    assert "CPU threads" not in table(arms(contexts=2, processes=2, engine=8))
    assert "- CPU threads at N = 4: contexts 4 × 1, shared 1, engine 1\n" in table(
        arms(contexts=1, shared=1, engine=1)
    )


def test_a_busy_machine_is_told_first() -> None:
    rows = [row("engine", 2, 90, other_cpu=0.1), row("contexts", 2, 50, other_cpu=1.25)]
    told = "The machine was busy: in 1 of 2 runs other programs used CPU, up to 1.2 of 2 cores."
    assert advice(rows).splitlines() == [
        f"{told} These count for nothing below.",
        "2 users: no advice, every run of contexts was disturbed.",
        "Overall: no advice. Measure again when the machine is quiet.",
    ]
    assert "busy" not in advice(rows[:1])


def test_that_no_one_looked_what_others_use_is_told_first() -> None:
    rows = [row("engine", 2, 90, other_cpu=0.1), row("contexts", 2, 50, other_cpu=-1.0)]
    told, users, _ = advice(rows).splitlines()
    assert told.startswith("Whether other programs used the CPU is not known")
    assert users.startswith("2 users: engine")
    assert "not known: " not in advice(rows[:1])


def test_disturbed_runs_count_for_nothing() -> None:
    rows = [row(arm, 2, 50, other_cpu=0.1) for arm in ("contexts", "engine")]
    slow = row("contexts", 2, 5, repeat=1, other_cpu=0.0)
    wild = row("engine", 2, 5000, repeat=1, other_cpu=1.9)
    told, users, last = advice([*rows, slow, wild]).splitlines()
    assert told.startswith("The machine was busy: in 1 of 4 runs")
    assert "5000" not in users
    assert last.startswith("Overall, with")
    assert [one["ratio"] for one in gate([*rows, slow, wild], "engine", 1.0)] == [1.0]
    assert [one["met"] for one in gate([rows[0], wild], "engine", 1.0)] == [False]


def test_a_gate_that_is_not_met_for_others_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Once: also where a scenario prints its line alone, and beside advice."""
    rows = [row(arm, 2, 50, other_cpu=1.9) for arm in ("contexts", "engine")]
    for scenario in ("c_engine_threaded", None):
        args = Namespace(plot=None, scenario=scenario, json=False)
        show(args, rows, gate(rows, "engine", 1.0))
        out, err = capsys.readouterr()
        assert err.startswith("gate, compare, 2 sequences: no ratio")
        assert (out + err).count("The machine was busy: in 2 of 2 runs") == 1


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ((0.1,), {"other_cpu": 0.1}),
        ((0.9, 0.1), {"other_cpu": 0.1, "disturbed_runs": 1.0}),
        ((0.9, 0.5, 0.7), {"other_cpu": 0.5, "disturbed_runs": 2.0}),
    ],
)
def test_a_run_that_is_disturbed_is_made_again(
    others: tuple[float, ...], best: dict[str, float]
) -> None:
    runs = iter([Measured(0.0, 1.0, detail={"other_cpu": one}) for one in others])
    assert steadiest(lambda: next(runs), 0.2, 3).detail == best
    assert next(runs, None) is None


def test_a_table_of_failures_and_of_nothing() -> None:
    assert "- engine, N = 2, has no result: gone" in table([row("engine", 2, 0, error="gone")])
    assert table([]) == "No records.\n"
    assert advice([]) == ""


def test_requests_at_random_have_no_ratios_of_speeds() -> None:
    rows = [row(arm, 2, 10, bench="compare-poisson") for arm in ("contexts", "engine")]
    assert heads(table(rows)) == ["tok/s"]


def test_reasons_are_short() -> None:
    assert short("a\n\nlast  line\n") == "last line"
    assert short("x" * 200) == "x" * 89 + "…"
    assert short("") == ""


@pytest.mark.parametrize(
    ("same", "ratios"),
    [(1, [1.02]), (0, [1.06]), (1, [0.95, 1.06, 1.12]), (0, [1.10, 1.12, 1.14]), (0, [])],
)
def test_as_fast_by_the_floor_or_by_what_repeats_differ(same: bool, ratios: list[float]) -> None:
    assert as_fast(ratios) == same


EACH = "per_sequence_tokens_per_second"


def rows_of(speeds: dict[str, float], name: str = "", *values: float, **more: Any) -> list[Record]:
    """A run of each arm with 2 users; `values`: of a detail, for the first arms."""
    details: list[dict[str, Any]] = [{name: value} for value in values] + [{}] * len(speeds)
    return [
        row(arm, 2, speed, **detail, **more)
        for (arm, speed), detail in zip(speeds.items(), details, strict=False)
    ]


def says(rows: list[Record], *words: str, never: str = "?") -> None:
    """Of 2 users."""
    (line,) = [line for line in advice(rows).splitlines() if line.startswith("2 users:")]
    assert [part for part in words if part not in line] == []
    assert never not in line


def test_the_fastest_arm_is_taken() -> None:
    rows = [row("single", 1, 50), *rows_of({"contexts": 60, "engine": 120})]
    says(rows, "2 users: engine, 120 tok/s together and 60 each: 2.00 × contexts and 2.40 × one us")
    says(rows_of({"contexts": 90, "engine": 60}), "2 users: contexts, 90 tok/s")


def test_among_equals_memory_decides() -> None:
    speeds: dict[str, float] = {"engine": 100, "contexts": 101, "processes": 50}
    says(
        rows_of(speeds, "pss_bytes", GIB, 0.8 * GIB, 2.0 * GIB),
        "2 users: contexts,",
        "engine is as fast within the noise; contexts takes the least memory (PSS).",
        "contexts takes 0.80 GiB (PSS), engine 1.00, processes 2.00.",
    )
    equal = rows_of(dict.fromkeys(("processes", "contexts", "engine"), 100), rss_bytes=GIB)
    words = "processes and contexts are as fast within the noise."
    says(equal, "2 users: engine,", words, never="GiB")


def test_the_raw_loop_gives_way_to_the_engine_unless_it_is_slower() -> None:
    rows = rows_of({"shared": 102, "engine": 100}, "pss_bytes", 0.5 * GIB, GIB)
    words = "shared is as fast within the noise; the engine also lets requests"
    says(rows, "2 users: engine,", words)
    slower = rows_of({"shared": 120, "engine": 100})
    says(slower, "2 users: shared,", "start together: the engine has 0.83 of that")
    says(rows_of({"shared": 100, "contexts": 99}), "2 users: contexts,")


def test_what_users_share_is_said() -> None:
    alone = row("single", 1, 100)
    says([alone, row("engine", 2, 101)], "2 users share what one alone gets.")
    says([alone, row("engine", 2, 80)], "Together they get less than one alone")
    says(rows_of({"engine": 9}, "fairness", 0.5), "Its streams are uneven (fairness 0.50).")
    says(rows_of({"engine": 9}, "fairness", 0.99), never="uneven")


def test_failures_stand_beside_the_advice() -> None:
    rows = [row("engine", 2, 100), row("processes", 2, 0, error="OutOfMemory: 3 of 8 GiB")]
    says(
        [*rows, row("contexts", 2, 200, completed=1.0)],
        "2 users: engine,",
        "processes has no result: OutOfMemory: 3 of 8 GiB.",
        "contexts has no result: 1 of 2 completed.",
    )
    broken = row("engine", 2, 0, repeat=1, error="broken")
    says([broken], "2 users: nothing to take. engine has no result: broken.")
    says([rows[0], broken], "2 users: engine, 100 tok/s", never="broken")


def test_energy_is_of_a_token() -> None:
    speeds: dict[str, float] = {"engine": 100, "contexts": 50}
    told = "engine takes 0.2 J a token, contexts 0.4."
    says(rows_of(speeds, "energy_joules", 40, 80), told)
    says(rows_of(speeds, "energy_joules", 40, 40), never=" J ")
    says(rows_of(speeds, "energy_joules", 40), never=" J ")


def test_without_the_burst_another_protocol_decides() -> None:
    completions = rows_of({"engine": 90, "contexts": 50}, bench="compare-ds4")
    says(completions, "2 users: engine, 90 tok/s")
    poisson = rows_of(
        {"engine": 9, "contexts": 9, "shared": 9}, EACH, 40, 30, 39.5, bench="compare-poisson"
    )
    words = "2 users: engine, 40 tok/s for a request that comes at random, waiting included. "
    says(poisson, words + "shared is as fast within the noise", never="contexts")


def test_the_last_line_is_of_all_numbers_of_users() -> None:
    rows = [row("single", 1, 50), row("contexts", 2, 90), row("engine", 2, 60)]
    rows += [row("contexts", 4, 90), row("engine", 4, 120), row("engine", 8, 130)]
    assert advice(rows).splitlines()[0] == "1 user: single, 50 tok/s."
    assert "2 cores of A Processor: contexts for 2 users, then engine for 4 and 8 users." in (
        overall(rows)
    )
    assert "Not measured: processes and shared." in overall(rows)
    once = [row("engine", 2, 9, gpu="an H")]
    assert "on an H: engine for 2 users." in overall(once)
    assert "Each ran once" in overall(once)
    assert "Each ran once" not in overall([*once, row("engine", 2, 10, repeat=1)])
    assert "no arm to take" in overall([row("engine", 3, 0, error="broken")])
