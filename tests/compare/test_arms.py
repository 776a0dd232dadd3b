"""`pyllamabatch compare` with the embedded model: every arm does what it was asked, and what fails
or is interrupted harms no other."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import psutil
import pytest

from pyllamabatch.cli import main
from pyllamabatch.compare.case import Case
from pyllamabatch.compare.hosted import probe
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.report.records import Record, read
from tests.support.machines import fast_profile

SHORT = ["--prompt-tokens", "12", "--sample-tokens", "6", "--repeats", "1", "--quiet", "-t", "1"]
ARMS = ["single", "processes", "contexts", "shared", "engine"]
KEYS = [
    *("scenario", "num_sequences", "prompt_tokens", "sample_tokens", "elapsed_seconds"),
    *("total_tokens_sampled", "aggregate_tokens_per_second", "per_sequence_tokens_per_second"),
]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")


def compare(*words: str | Path) -> int:
    return main(["compare", *SHORT, *map(str, words)])


def rows_of(out: Path, *words: str) -> list[Record]:
    compare("--out", out, *words)
    return list(read(out))


@pytest.fixture(scope="module", autouse=True)
def undisturbed() -> Iterator[None]:
    """What other programs do meanwhile is no matter here."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pyllamabatch.report.disturbed", "pyllamabatch.compare.run"):
            patch.setattr(f"{module}.BUSY", inf)
        yield


@pytest.fixture(scope="module")
def burst(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    out = tmp_path_factory.mktemp("burst") / "rows.jsonl"
    words = ["-n", "2", "--repeats", "2", "--keep-loaded"]
    assert compare("--out", out, *words) == 0
    return list(read(out))


def test_every_arm_runs_and_its_neighbours_change_places(burst: list[Record]) -> None:
    assert [row.arm for row in burst] == ARMS + ARMS[::-1]
    assert [row.repeat for row in burst] == [0] * 5 + [1] * 5
    assert [row.pl for row in burst[:3]] == [1, 2, 2]
    assert not any(row.error for row in burst)


def test_a_burst_times_all_tokens_but_the_first(burst: list[Record]) -> None:
    for row in burst:
        detail = row.detail
        assert (row.bench, row.pp, row.tg, row.t_pp) == ("compare", 12, 5, 0.0)
        assert detail["completed"] == detail["requests"] == row.pl
        assert detail["total_tokens_sampled"] == 5 * row.pl
        assert detail["elapsed_seconds"] == row.t_tg > 0
        assert row.speed_tg == pytest.approx(5 * row.pl / row.t_tg)
        slow, mean, fast = (
            detail[f"{name}_tokens_per_second"] for name in ("slowest", "per_sequence", "fastest")
        )
        assert 0 < slow <= mean <= fast
        assert detail["fairness"] == pytest.approx(slow / fast)
        assert 0 < detail["ttft_p50_s"] <= detail["ttft_p99_s"]
        assert detail["itl_p50_s"] <= detail["itl_p99_s"]


def test_rows_say_where_and_how(burst: list[Record]) -> None:
    for row in burst:
        assert row.model_filename == "default.gguf"
        assert row.model_n_params > 3e6
        assert row.backends
        assert row.n_threads == row.detail["n_threads_each"] == 1
        assert ("no HTTP" in row.includes) == (row.arm != "processes")


def test_completions_fired_at_once_count_whole(tmp_path: Path) -> None:
    words = ["--protocol", "ds4", "-n", "2", "--kv", "unified", "--arms", ",".join(ARMS[1:])]
    rows = rows_of(tmp_path / "r.jsonl", *words, "--speculate", "ngram")
    assert [row.arm for row in rows] == ARMS[1:]
    for row in rows:
        assert row.kv_unified
        drafts = [
            row.detail[name] for name in ("draft_n", "draft_n_accepted") if name in row.detail
        ]
        assert len(drafts) == (2 if row.arm == "engine" else 0)
        assert drafts == sorted(drafts, reverse=True)
        assert not row.error
        assert (row.bench, row.tg, row.detail["total_tokens_sampled"]) == ("compare-ds4", 6, 12)
        assert row.t_tg >= row.detail["ttft_p99_s"]


def test_requests_that_come_at_random(tmp_path: Path) -> None:
    words = ["--protocol", "poisson", "--rate", "40", "-n", "2", "--requests", "3"]
    rows = rows_of(tmp_path / "r.jsonl", *words, "--arms", ",".join(ARMS[1:]))
    assert [row.arm for row in rows] == ARMS[1:]
    for row in rows:
        assert not row.error
        assert not row.kv_unified
        assert (row.bench, row.pp, row.tg) == ("compare-poisson", 3 * 12, 3 * 6)
        assert row.detail["completed"] == row.detail["requests"] == 6
        assert row.detail["total_tokens_sampled"] == 36
        assert row.detail["rate"] == 40


@pytest.mark.parametrize(("words", "each"), [([], 2), (["--oversubscribe"], 6)])
def test_threads_are_divided_or_not(tmp_path: Path, words: list[str], each: int) -> None:
    words = ["-n", "3", "-t", "6", "--arms", "contexts", *words]
    (row,) = rows_of(tmp_path / "r.jsonl", *words)
    assert row.n_threads == row.detail["n_threads_each"] == each


def test_threads_without_a_flag_are_those_of_a_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, where a device computes all layers."""

    def probed(case: Case, verbose: bool) -> tuple[dict[str, Any], int]:
        about, threads = probe(case, verbose)
        assert threads == usable_cores()
        return about, 3

    monkeypatch.setattr("pyllamabatch.cli.compare.probe", probed)
    out = tmp_path / "r.jsonl"
    assert main(["compare", *SHORT[:-2], "-n", "2", "--arms", "shared", "--out", str(out)]) == 0
    assert [row.n_threads for row in read(out)] == [3]


@pytest.mark.parametrize(("arm", "extra"), [("processes", "compare"), ("replicas", "ray")])
def test_an_extra_that_is_missing_is_named(arm: str, extra: str) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(('fastapi', 'uvicorn', 'psutil', 'ray'))\n"
        "from pyllamabatch.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    asked = [sys.executable, "-c", code, "compare", "--arms", arm]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"pyllamabatch: the arm {arm} needs the extra {extra}: pip install 'pyllamabatch[{extra}]'"
    ]


def test_one_object_and_a_page_of_a_profile_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, profile = tmp_path / "page.html", fast_profile(tmp_path)
    words: list[str | Path] = [
        "-n", "2", "--arms", "shared,engine", "--machine", profile, "--plot", page, "--json",
    ]  # fmt: skip
    assert compare(*words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in found["rows"]] == ["shared", "engine"]
    assert all("the profile of" in row["model_type"] for row in found["rows"])
    assert "rss_bytes" not in found["rows"][0]["detail"]  # of no model
    assert found["advice"].splitlines()[-1] in page.read_text(encoding="utf-8")


def test_a_scenario_prints_the_bench_s_line(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--scenario", "c_engine_threaded", "--num-sequences", "3", "--gpu-layers", "0"]
    assert compare(*words) == 0
    (line,) = capfd.readouterr().out.splitlines()
    values = json.loads(line)
    assert list(values) == KEYS
    assert values["scenario"] == "c_engine_threaded"
    assert [values[key] for key in KEYS[1:4]] == [3, 12, 6]
    assert values["total_tokens_sampled"] == (6 - 1) * 3
    speed = values["total_tokens_sampled"] / values["elapsed_seconds"]
    assert values["aggregate_tokens_per_second"] == pytest.approx(speed)
    assert values["per_sequence_tokens_per_second"] == pytest.approx(speed / 3)


def test_a_scenario_that_fails_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    """More sequences than the cells' memory would hold."""
    assert compare("--scenario", "b_shared_context", "--ctx-size", str(2**29)) == 1
    (line,) = capfd.readouterr().out.splitlines()
    values = json.loads(line)
    assert list(values) == ["scenario", "error"]
    assert "memory" in values["error"].lower()


@pytest.mark.parametrize(("least", "status"), [("1e-6", 0), ("1e6", 3)])
def test_the_gate_sets_the_status(
    least: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--scenario", "b_shared_context", "--gate", least]
    assert compare(*words) == status
    out, err = capfd.readouterr()
    assert list(json.loads(out)) == KEYS  # one line, of the scenario alone
    assert f"at least {float(least):g} wanted" in err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--gate", "1.4", "--arms", "engine"], "--gate"),
        (["--gate", "1.4", "-n", "1"], "--gate"),
        (["--arms", "engines"], "engines"),
        (["--scenario", "a_two_contexts", "--arms", "engine"], "--scenario"),
        (["--scenario", "a_two_contexts", "-n", "2,3"], "--num-sequences"),
        (["--sample-tokens", "1"], "--sample-tokens"),
        (["--ctx-size", "17"], "--ctx-size"),
        (["-n", "0"], "--num-sequences"),
        (["--limit", "0"], "--limit"),
        (["--rate", "1e9"], "below 1e9"),
        (["--protocol", "poisson"], "--rate"),
        (["--total-memory", "1G", "--arms", "engine"], "--total-memory"),
        (["--speculate", "ngram", "--arms", "shared"], "--speculate"),
        (["--speculate", "n-gram", "--arms", "engine"], "n-gram"),
        (["--plot", "x.gif"], "x.gif"),
        (["--out", "/dev/null/x"], "/dev/null"),
        (["--plot", "/dev/null/x.svg"], "/dev/null"),
        (["--plot", "x.pdf"], "plot='x.pdf'"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_runs(
    words: list[str],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pyllamabatch.cli.compare.probe", None)
    try:
        status: int | str | None = compare(*words)
    except SystemExit as parsing:
        status = parsing.code
    assert status == 2
    assert named in capfd.readouterr().err


def test_a_file_that_is_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And no file is left behind."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF but no more")
    files: list[str | Path] = ["--out", tmp_path / "rows.jsonl", "--plot", tmp_path / "page.html"]
    assert compare("-m", tmp_path / "m.gguf", *files) == 1
    assert "m.gguf" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@LINUX
def test_over_commit_ends_an_arm_and_not_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    words = ["-n", "1,2", "--total-memory", "64Mi", "--arms", "processes,contexts"]
    assert compare(*words, "--out", out, "--ctx-size", "65536", "--repeats", "2") == 1
    rows = list(read(out))
    assert [(row.arm, row.pl, bool(row.error)) for row in rows] == [
        (arm, n, arm == "processes")
        for n in (1, 2)
        for arm in ("processes", "contexts", "contexts")  # what failed is not tried again
    ]
    for row in rows[::3]:
        assert row.speed_tg == 0
        assert "worker 0" in row.error
    assert "worker 0" in capfd.readouterr().out  # the table says it


def test_ctrl_c_leaves_no_process_and_keeps_the_rows(tmp_path: Path) -> None:
    started = Started(tmp_path, "--arms", "single,processes", "-n", "2", "--sample-tokens", "1000")
    with started:
        started.wait_for(row=True, n_children=3)  # two workers and the router
        started.process.send_signal(signal.SIGINT)
        out, err = started.process.communicate(timeout=60)
        started.assert_all_gone(within_s=0)
    assert started.process.returncode == 130
    assert "interrupted" in err
    assert "single" in out  # a table of what there is
    assert [row.arm for row in read(started.rows)] == ["single"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_no_process_stays(tmp_path: Path, number: signal.Signals) -> None:
    with Started(tmp_path, "--arms", "processes", "-n", "2", "--sample-tokens", "3000") as started:
        started.wait_for(row=False, n_children=3)
        started.process.send_signal(number)
        started.process.communicate(timeout=60)
        started.assert_all_gone(within_s=0 if number == signal.SIGTERM else 20)
    assert started.process.returncode == (130 if number == signal.SIGTERM else -number)


class Started:
    """The command in a process of its own, which ends with the block."""

    def __init__(self, folder: Path, *words: str) -> None:
        self.rows = folder / "rows.jsonl"
        command = [sys.executable, "-m", "pyllamabatch", "compare", *SHORT]
        # A shell's background job ignores SIGINT, and so would what it starts.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = psutil.Popen(
                [*command, "--out", str(self.rows), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        self.children: list[psutil.Process] = []

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *error: Any) -> None:
        """Its children too, where the test has failed because they stayed."""
        for process in (self.process, *self.children):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def wait_for(self, row: bool, n_children: int) -> None:
        """Until it has written a row, and has so many children, which are at work: by then it
        knows of them."""
        end = time.monotonic() + 60
        while not (len(self.children) == n_children and self.at_work and (self.has_row or not row)):
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.05)
            self.children = self.process.children()

    @property
    def at_work(self) -> bool:
        with suppress(psutil.NoSuchProcess):
            return all(child.cpu_times().user > 0.1 for child in self.children)
        return False

    @property
    def has_row(self) -> bool:
        return self.rows.exists() and "\n" in self.rows.read_text()

    def assert_all_gone(self, within_s: float) -> None:
        _, alive = psutil.wait_procs(self.children, within_s)
        assert not alive
