"""A small run of each bench: it measures what it says, and its figures follow from its records."""

from dataclasses import replace

import numpy as np
import pytest

from bench import (
    acceptance,
    beside,
    coalesce,
    prefix,
    sampler,
    scheduler,
    simulator,
    soak,
    speculate,
    stall,
    step,
)
from bench.__main__ import main
from bench.case import Measured
from bench.speculates import OFTEN
from pyllamabatch.report.records import Record
from pyllamabatch.scheduler import policy_names
from tests.bench.conftest import Run
from tests.support.null_engine import TOKEN, NullEngine

EMBEDDED = ("--model", "default", "--threads", "1", "--quick", "--repeats", "1")


def test_coalesce_counts_rows_for_each_decode(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    status, records = run("coalesce", *EMBEDDED, "-N", "1,2", "--tokens", "6")
    assert status == 0
    arms = (coalesce.BASE, coalesce.THREADS, coalesce.WINDOW)
    assert [(r.pl, r.arm) for r in records] == [(pl, arm) for pl in (1, 2) for arm in arms]
    for record in records:
        if record.arm != coalesce.BASE:
            rows = record.detail["rows_per_decode"]
            assert rows == pytest.approx(6 * record.pl / record.detail["steps"])
            assert 1 <= rows <= record.pl
    assert coalesce.fill(2)(records) == records[4].detail["rows_per_decode"] / 2
    assert "| 2 | threads-window |" in capsys.readouterr().out


def test_beside_measures_with_and_without_in_turns(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "UNRELATED", 3)
    given = ("--model", "default", "--tokens", "12", "--rounds", "3")
    status, records = run("beside", *given)
    assert status == 0
    assert [(r.arm, r.pl, r.tg) for r in records] == [("readers", 8, 12), ("cached", 8, 12)]
    assert all(min(r.t_tg, r.t_pp) > 0 for r in records)
    for target, record in zip(beside.TARGETS, records, strict=True):
        assert target.measured(records) == record.detail["over_without"] > 0
        assert record.detail["rounds"] == 3


def test_beside_takes_the_ratio_of_each_pair() -> None:
    times = iter([9.0, 9.0, 2.0, 1.0, 3.0, 1.0, 4.0, 1.0])  # with and without: 2, 1; 1, 3; 4, 1

    def one() -> Measured:
        return Measured(0.0, next(times))

    found = beside.in_turns(one, one, 3)
    assert found.detail["over_without"] == 0.5
    assert found.t_tg == 2.0


def test_prefix_counts_what_was_computed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--requests", "3", "--common", "40", "--own", "4", "--tokens", "2")
    status, records = run("prefix", *EMBEDDED, *sizes)
    assert status == 0
    arms = (prefix.ALONE, prefix.SHARED, prefix.WARM)
    by_arm = {record.arm: record.detail for record in records}
    assert [by_arm[arm]["prefill_rows"] for arm in arms] == [3 * 43, 40 + 3 * 3, 3 * 3]
    assert [by_arm[arm]["computed"] for arm in arms] == [3, 1, 0]
    rates = [by_arm[arm]["hit_rate"] for arm in arms]
    assert rates == pytest.approx([0, 2 * 40 / (3 * 44), 3 * 40 / (3 * 44)])
    assert all(r.kv_unified and r.pl == 3 and r.t_pp > 0 for r in records)
    computed, ratio = (target.measured(records) for target in prefix.TARGETS)
    assert computed == 1
    alone, shared = (by_arm[arm]["ttft_mean_s"] for arm in arms[:2])
    assert ratio == alone / shared
    assert [target.measured([]) for target in prefix.TARGETS] == [None, None]
    assert f"| {prefix.WARM} | 9 | 0.00 | 0.91 |" in capsys.readouterr().out


def test_stall_says_by_its_status_whether_chunks_bound_the_stall(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    status, records = run("stall", *EMBEDDED, "--prompt-tokens", "300")
    assert [record.arm for record in records] == [stall.CHUNKED, stall.PREFILL_FIRST, stall.ENGINE]
    assert [record.kv_unified for record in records] == [True, True, False]  # it has chosen
    for record in records:
        detail = record.detail
        assert (record.pl, record.tg, record.pp) == (stall.STREAMS, stall.TOKENS, 300)
        assert 0 < detail["itl_p99_s"] <= detail["itl_max_s"] < record.t_tg
        assert detail["p99_over_median"] == detail["itl_p99_s"] / detail["itl_median_s"]
        assert detail["arrives_after"] == stall.ARRIVES
        assert detail["began_unified"] == 1 or record.arm == stall.ENGINE
    figures = [target.measured(records) for target in stall.TARGETS]
    over = [record.detail["p99_over_median"] for record in records[:2]]
    assert figures == [*over, records[2].detail["itl_p99_s"]]
    missed = [target.missed_by(records) for target in stall.TARGETS]
    assert status == int(any(missed))
    assert capsys.readouterr().out.count("MISSED") == missed.count(True)


def test_speculate_asks_both_arms_the_same_texts(run: Run) -> None:
    words = ("--sequences", "2", "--tokens", "12")
    status, records = run("speculate", *EMBEDDED, *words)
    assert status == 0
    assert [(r.arm, r.sampling, r.pl) for r in records] == [
        (arm, sampling, 2)
        for sampling in ("greedy", "default")
        for arm in (speculate.OFF, speculate.NGRAM)
    ]
    for off, ngram in zip(records[::2], records[1::2], strict=True):
        n = 32 * OFTEN  # all prompts
        assert n < off.detail["tokens"] == ngram.detail["tokens"] <= n * 12
        assert off.detail["drafted"] == off.detail["accepted"] == 0
        assert ngram.detail["accepted"] <= ngram.detail["drafted"]
        assert 0 < off.detail["rows_a_token"] <= 2  # a stream between two prompts may have one
        assert ngram.detail["rows_a_token"] > 0


def test_speculate_knows_answers_as_often_as_it_is_told(run: Run) -> None:
    words = ("--sequences", "2", "--tokens", "8", "--acceptance", "1,0.5", "--arms", "")
    status, records = run("speculate", *EMBEDDED, *words, "--learn", "0.1")
    assert status == 0
    arms = [acceptance.OFF, acceptance.WATCHES, acceptance.KNOWS]
    kinds = ["acceptance 1.00", "acceptance 0.50"]
    assert [(r.arm, r.sampling) for r in records] == [(arm, kind) for kind in kinds for arm in arms]
    assert [r.detail["tokens"] for r in records] == [16.0] * 6
    with pytest.raises(SystemExit, match="0 to 1"):
        run("speculate", *EMBEDDED, "--acceptance", "80")

    prompt, answer = np.arange(3, 13, dtype=np.int32), np.arange(1000, 1900, dtype=np.int32)
    made = acceptance.texts(prompt, answer, 0.5, np.random.default_rng(3))
    assert len(made) == len(answer)
    every, before = np.concatenate([prompt, answer]), acceptance.KNOWN
    right = []
    for at, text in enumerate(made, len(prompt)):
        expected = every[at - before : at + acceptance.DRAFTED]
        assert len(text) == len(expected)
        assert text[:before].tolist() == expected[:before].tolist()
        right += (text == expected)[before:].tolist()
    assert 0.45 < np.mean(right) < 0.55


def test_step_has_the_figures_of_every_arm(run: Run) -> None:
    status, records = run("step", "--quick", "--tokens", "16")
    assert status == 0
    for record in records:
        detail = record.detail
        if record.arm.startswith("python"):
            assert detail["step_us"] == pytest.approx(detail["decoder_us"] + detail["delivery_us"])
            assert detail["n_steps"] >= 40 * 16
            assert record.t_tg == pytest.approx(1e-6 * detail["step_us"] * 16)
        elif record.arm.startswith("stepper"):
            assert detail["over_c_us"] == pytest.approx(detail["python_us"] - detail["c_us"])
            assert detail["c_us"] > 0
        else:
            assert 0 < detail["gap_p50_us"] <= detail["gap_p99_us"] <= detail["gap_max_us"]
            assert 0 < detail["gap_share"] < 1
            assert record.t_tg > 0
    by_arm = {record.arm: record.detail for record in records}
    calls = [by_arm[f"gap: {name}"]["native_calls"] for name in ("turnover", "steady")]
    assert calls[0] > calls[1]
    figures = [target.measured(records) for target in step.TARGETS]
    assert figures == [by_arm["python: steady"]["step_us"], by_arm["stepper: 1"]["over_c_us"]]


@pytest.mark.parametrize("most", [1, 7])
def test_the_engine_does_all_of_its_work_on_a_device_that_computes_nothing(most: int) -> None:
    engine = NullEngine(4, most, stops=("never",), read=True)
    lengths = [5, 40, 300, 17, 33, 2]
    for n in lengths:
        engine.submit(n)
    for _ in range(1000):
        engine.turn()
        if engine.n_finished == len(lengths):
            break
    results = [stream.result(0).tokens for stream in engine.streams.values()]
    assert results == [[TOKEN] * n for n in lengths]
    assert engine._core.scheduler.counters.tokens == sum(lengths)


def test_sampler_times_one_row_beside_a_scan(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--quick", "--chain", "--vocab", "6400", "--arms", "greedy,default")
    status, records = run("sampler", *words)
    assert status == 0
    assert [record.arm for record in records] == [
        "greedy, 1 thread",
        "greedy, chain, 1 thread",
        "default, 1 thread",
        "default, chain, 1 thread",
    ]
    for record in records:
        assert record.detail["over_scan"] == pytest.approx(record.t_tg / record.detail["scan_s"])
        assert (record.pl, record.tg, record.n_threads) == (1, 1, 1)
    assert f"| {records[0].detail['over_scan']:.2f} |" in capsys.readouterr().out
    whole = [replace(record, model_filename=sampler.subject(sampler.VOCAB)) for record in records]
    assert sampler.over_scan("default")(whole) == records[2].detail["over_scan"]
    assert sampler.over_scan("default")(records) is None


def test_sampler_times_many_rows_on_threads(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--quick", "--rows", "5", "--vocab", "6400", "--threads", "1,3")
    _, (one, three) = run("sampler", *words, "--arms", "temperature")
    assert (one.n_threads, three.n_threads) == (1, 3)
    assert f"| {one.t_tg / three.t_tg:.2f} |" in capsys.readouterr().out
    speed_up = sampler.speed_up("temperature", 5, 3)([one, three])
    assert speed_up == pytest.approx(one.t_tg / three.t_tg)


@pytest.mark.parametrize("words", [("--vocab", "100"), ("--arms", "quick"), ("--rows", "0")])
def test_what_sampler_refuses(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="--arms"):
        main(["sampler", *words])


@pytest.fixture(scope="module")
def scheduled(run: Run) -> list[Record]:
    sizes = ("--running", "3,5", "--waiting", "7", "--policies", "sarathi,mlfq")
    status, records = run("scheduler", "--quick", "--repeats", "1", *sizes)
    assert status == 0
    return records


def test_scheduler_measures_each_policy_scenario_and_size(scheduled: list[Record]) -> None:
    assert [(record.pl, record.arm) for record in scheduled] == [
        (n, f"{policy}: {scenario}")
        for n in (3, 5)
        for policy in ("sarathi", "mlfq")
        for scenario in scheduler.SCENARIOS
    ]
    for record in scheduled:
        assert record.detail["waiting"] == 7
        assert record.detail["n_steps"] >= 50
        assert record.t_tg > 0


def test_schedulers_figure_is_that_of_the_slowest_policy(scheduled: list[Record]) -> None:
    join = [record for record in scheduled if record.arm.endswith("join") and record.pl == 5]
    seconds = scheduler.per_step(scheduled, "join", 5, 7)
    assert seconds == max(record.t_tg / record.tg for record in join)
    assert scheduler.per_step(scheduled, "join", 6, 7) == 0
    assert all(target.measured(scheduled) is None for target in scheduler.TARGETS)
    moved = [
        replace(record, pl=256 if record.pl == 5 else 32, detail={"waiting": 1000.0})
        for record in scheduled
    ]
    figures = {target.text: target.measured(moved) for target in scheduler.TARGETS}
    assert figures["join: us a step, 256 running, 1000 waiting, slowest policy"] == seconds * 1e6
    growth = figures["join: time of a step with 256 running over that with 32"]
    assert growth == seconds / scheduler.per_step(scheduled, "join", 3, 7)
    each = scheduler.per_step(scheduled, "run", 3, 7)
    assert figures["run: decode steps a second, 32 running"] == 1 / each


@pytest.mark.parametrize("policy", policy_names())
@pytest.mark.parametrize("scenario", scheduler.SCENARIOS)
def test_every_step_does_what_its_scenario_says(policy: str, scenario: str) -> None:
    scheduled, step = scheduler.prepare(policy, scenario, 4, 9)
    for _ in range(3):
        step()
    before = replace(scheduled.counters)
    n_steps = sum(step() for _ in range(5))
    counters = scheduled.counters
    assert n_steps == (5 * scheduler.AT_ONCE if scenario == "run" else 5)
    assert counters.steps - before.steps == n_steps
    assert counters.preemptions == 0
    assert counters.admissions - before.admissions == (5 if scenario == "join" else 0)
    assert (counters.prefill_rows > before.prefill_rows) == (scenario in ("join", "chunk"))
    assert scheduled.n_waiting == 9
    assert scheduled.n_running == 4


def test_soak_finds_every_token_and_request(run: Run) -> None:
    """No request gets a wrong token; no request and no token is lost or counted twice."""
    words = ("--requests", "150", "--clients", "24", "--cancelled", "0.1", "--seed", "5")
    status, (record,) = run("soak", *words)
    detail = record.detail
    assert status == 0
    assert detail["requests"] == 150
    assert detail["cancelled"] > 0
    assert (detail["wrong"], detail["unbalanced"], detail["kv_used"]) == (0, 0, 0)


def test_soaks_slope_of_memory() -> None:
    growing = soak.slope([(n, 10_000_000 + 1024 * n) for n in range(0, 1000, 100)])
    assert growing == pytest.approx(1000.0)
    assert abs(soak.slope([(n, 5_000_000) for n in range(0, 1000, 100)])) < 1e-6
    assert soak.slope([(1, 5)]) == 0.0


def test_simulator_counts_the_steps_of_each_load(run: Run) -> None:
    status, records = run("simulator", "--quick", "--repeats", "1", "--requests", "40")
    assert status == 0
    assert [record.arm for record in records] == list(simulator.LOADS)
    decode = records[0]
    # The first token of each comes with its prompt, and at least one and at most 32 with each step.
    assert 2 * 999 <= decode.detail["n_steps"] <= 40 * 2000
    assert decode.detail["requests"] == 40
    (target,) = simulator.TARGETS
    assert target.measured(records) == decode.tg / decode.t_tg
    assert target.measured([]) is None
    seconds = simulator.seconds(decode)
    assert seconds == pytest.approx(decode.t_tg * decode.detail["n_steps"])
    earlier = replace(decode, tg=500, t_tg=2.0, detail={})  # which counts its steps as tokens
    assert simulator.seconds(earlier) == 2.0
