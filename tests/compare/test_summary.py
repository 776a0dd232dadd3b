"""The table and the plain sentences, over rows that were made up."""

from __future__ import annotations

from typing import Any

from pyllamabatch.compare.advice import advice, as_fast
from pyllamabatch.compare.comparison import short
from pyllamabatch.compare.summary import plain, table
from pyllamabatch.report.records import Record
from tests.support.made_up_rows import GIB, row


def cells(text: str, arm: str, n: int) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {n} | {arm} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[2:]]


def heads(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")[2:]]


def line_for(rows: list[Record], n: int) -> str:
    start = "1 user:" if n == 1 else f"{n} users:"
    (line,) = [line for line in advice(rows).splitlines() if line.startswith(start)]
    return line


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
    assert (
        advice(rows)
        .splitlines()[0]
        .startswith(
            "The machine was busy: in 1 of 2 runs other programs used CPU, up to 1.2 of 2 cores."
        )
    )
    assert "2 cores of A Processor, as far as a busy machine tells: engine" in overall(rows)
    assert "busy" not in advice(rows[:1])


def test_a_table_of_failures_and_of_nothing() -> None:
    assert "- engine, N = 2, has no result: gone" in table([row("engine", 2, 0, error="gone")])
    assert table([]) == "No records.\n"
    assert advice([]) == ""


def test_requests_at_random_have_no_ratios_of_speeds() -> None:
    rows = [row(arm, 2, 10, bench="compare-poisson") for arm in ("contexts", "engine")]
    assert heads(table(rows)) == ["tok/s"]


def test_one_run_of_each_says_nothing_of_noise() -> None:
    once = [row("engine", 2, 10)]
    assert "Each ran once" in overall(once)
    assert "Each ran once" not in overall([*once, row("engine", 2, 10, repeat=1)])


def test_reasons_are_short() -> None:
    assert short("a\n\nlast  line\n") == "last line"
    assert short("x" * 200) == "x" * 89 + "…"
    assert short("") == ""


def test_as_fast_by_the_floor_or_by_what_repeats_differ() -> None:
    assert as_fast([1.02])
    assert not as_fast([1.06])
    assert as_fast([0.95, 1.06, 1.12])
    assert not as_fast([1.10, 1.12, 1.14])
    assert not as_fast([])


def test_the_fastest_arm_with_its_ratios() -> None:
    rows = [row("single", 1, 50), row("contexts", 4, 60), row("engine", 4, 120)]
    assert line_for(rows, 4) == (
        "4 users: engine, 120 tok/s together and 30 each: 2.00 × contexts and "
        "2.40 × one user alone."
    )
    assert line_for(rows, 1) == "1 user: single, 50 tok/s."
    assert "engine for 4 users" in overall(rows)
    assert "2 cores of A Processor:" in overall(rows)
    assert "Not measured: processes and shared." in overall(rows)
    assert "on an H:" in overall([row("engine", 2, 9, gpu="an H")])


def test_another_arm_may_be_the_fastest() -> None:
    rows = [row("single", 1, 50), row("contexts", 2, 90), row("engine", 2, 60)]
    rows += [row("contexts", 4, 90), row("engine", 4, 120), row("engine", 8, 130)]
    assert line_for(rows, 2).startswith("2 users: contexts, 90 tok/s together and 45 each: 1.80 ×")
    assert "contexts for 2 users, then engine for 4 and 8 users." in overall(rows)


def test_among_equals_memory_decides() -> None:
    rows = [
        row("engine", 2, 100, pss_bytes=1.0 * GIB),
        row("contexts", 2, 101, pss_bytes=0.8 * GIB),
        row("processes", 2, 50, pss_bytes=2.0 * GIB),
    ]
    line = line_for(rows, 2)
    assert line.startswith("2 users: contexts,")
    assert "engine is as fast within the noise; contexts takes the least memory (PSS)." in line
    assert "contexts takes 0.80 GiB (PSS), engine 1.00, processes 2.00." in line


def test_equals_in_all_are_said_to_be_equal() -> None:
    same: dict[str, Any] = {"rss_bytes": 1.0 * GIB}
    rows = [row(arm, 2, 100, **same) for arm in ("processes", "contexts", "engine")]
    line = line_for(rows, 2)
    assert line.startswith("2 users: engine,")
    assert line.endswith("processes and contexts are as fast within the noise.")
    assert "GiB" not in line


def test_the_raw_loop_gives_way_to_the_engine_unless_it_is_slower() -> None:
    rows = [row("shared", 2, 102, pss_bytes=0.5 * GIB), row("engine", 2, 100, pss_bytes=GIB)]
    assert line_for(rows, 2).startswith("2 users: engine,")
    assert "shared is as fast within the noise; the engine also lets requests" in line_for(rows, 2)
    slower = [row("shared", 2, 120), row("engine", 2, 100)]
    assert line_for(slower, 2).startswith("2 users: shared,")
    assert "start together: the engine has 0.83 of that" in line_for(slower, 2)
    alone = [row("shared", 2, 100), row("contexts", 2, 99)]
    assert line_for(alone, 2).startswith("2 users: contexts,")


def test_what_users_share_is_said() -> None:
    rows = [row("single", 1, 100), row("engine", 2, 101), row("engine", 4, 80)]
    assert "2 users share what one alone gets." in line_for(rows, 2)
    assert "Together they get less than one alone" in line_for(rows, 4)
    uneven = [row("engine", 2, 100, fairness=0.5), row("engine", 4, 100, fairness=0.99)]
    assert "Its streams are uneven (fairness 0.50)." in line_for(uneven, 2)
    assert "uneven" not in line_for(uneven, 4)


def test_failures_stand_beside_the_advice() -> None:
    rows = [row("engine", 2, 100), row("processes", 2, 0, error="OutOfMemory: 3 of 8 GiB")]
    rows += [row("contexts", 2, 200, completed=1.0), row("engine", 3, 0, error="broken")]
    line = line_for(rows, 2)
    assert line.startswith("2 users: engine,")
    assert "processes has no result: OutOfMemory: 3 of 8 GiB." in line
    assert "contexts has no result: 1 of 2 completed." in line
    assert line_for(rows, 3) == "3 users: nothing to take. engine has no result: broken."
    assert "engine for 2 users." in overall(rows)
    assert "no arm to take" in overall([row("engine", 3, 0, error="broken")])


def test_one_failed_repeat_of_three_leaves_the_others() -> None:
    rows = [row("engine", 2, 100), row("engine", 2, 0, repeat=1, error="broken")]
    assert line_for(rows, 2).startswith("2 users: engine, 100 tok/s")
    assert "broken" not in line_for(rows, 2)


def test_energy_is_of_a_token() -> None:
    rows = [row("engine", 2, 100, energy_joules=40.0), row("contexts", 2, 50, energy_joules=80.0)]
    assert "engine takes 0.2 J a token, contexts 0.4." in line_for(rows, 2)
    rows[1] = row("contexts", 2, 50, energy_joules=40.0)
    assert " J " not in line_for(rows, 2)
    rows[0] = row("engine", 2, 100)
    assert " J " not in line_for(rows, 2)


def test_without_the_burst_the_completions_decide() -> None:
    rows = [row("engine", 2, 90, bench="compare-ds4"), row("contexts", 2, 50, bench="compare-ds4")]
    assert line_for(rows, 2).startswith("2 users: engine, 90 tok/s")


def test_with_requests_at_random_alone_each_ones_speed_decides() -> None:
    def at_random(arm: str, each: float) -> Record:
        return row(arm, 2, 9, bench="compare-poisson", per_sequence_tokens_per_second=each)

    rows = [at_random("engine", 40), at_random("contexts", 30), at_random("shared", 39.5)]
    assert line_for(rows, 2).startswith(
        "2 users: engine, 40 tok/s for a request that comes at random, waiting included. "
        "shared is as fast within the noise"
    )
    assert "contexts" not in line_for(rows, 2)
