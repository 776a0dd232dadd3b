"""pyllamabatch simulate."""

import argparse
import inspect
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cli import main, serve
from pyllamabatch.cli import simulate as cli_simulate
from pyllamabatch.cli.batch_file import problem_fields
from pyllamabatch.cli.simulate import split_policies
from pyllamabatch.cost.profile import profile_folder, shipped_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.server import live
from pyllamabatch.sim import EngineSpec, Simulated, at_load, load_acceptance, simulate

PROFILE = ["simulate", "--profile", "m2-ultra-gemma-3-4b-it-qat"]
TRACE = ["--trace", "poisson:rate=2,n=30,prompt=10-200,output=5-40"]


def test_policies_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"out.{name}" for name in ("jsonl", "markdown", "html")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    options = ["--policy", "fcfs,sarathi:budget=64", "--slo", "ttft=1,itl=50ms", "-s", "4"]
    assert main([*PROFILE, *TRACE, *options, *words]) == 0
    out = capsys.readouterr().out
    assert "| fcfs | sarathi:budget=64 |" in out
    assert files["markdown"].read_text(encoding="utf-8") == out
    assert files["html"].read_text(encoding="utf-8").count("<svg") == 2
    lines = files["jsonl"].read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["n_seq_max"] == 4
    assert len(lines) == 1 + 2 * (1 + 30)


def test_without_matplotlib_nothing_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "page.html"
    assert main([*PROFILE, *TRACE, "--html", str(path)]) == 1
    printed = capsys.readouterr()
    assert (printed.out, path.exists()) == ("", False)
    assert "pyllamabatch[plots]" in printed.err


def test_json_is_the_same_for_the_same_seed(capsys: pytest.CaptureFixture[str]) -> None:
    def run(seed: str) -> dict[str, dict[str, float]]:
        assert main([*PROFILE, *TRACE, "--json", "--seed", seed, "--replicas", "2"]) == 0
        found: dict[str, dict[str, float]] = json.loads(capsys.readouterr().out)
        return found

    assert run("1") == run("1")
    assert run("1") != run("2")
    assert run("1")[DEFAULT]["requests"] == 30


def test_its_steps_look_like_live_ones(tmp_path: Path) -> None:
    steps, page = tmp_path / "steps.json", tmp_path / "page.html"
    assert main([*PROFILE, *TRACE, "-s", "4", "--steps", str(steps)]) == 0
    assert main(["view", str(steps), "--out", str(page)]) == 0
    found = live.recorded(steps)
    assert {lane[1] for step in found for lane in step["lanes"]} == {*range(1, 31)}
    assert json.dumps(found[-1]["lanes"]) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "unified"),
    [
        (["-s", "4", "--batch-invariant"], False),
        (["-s", "1", "--load", "0.5", "--acceptance", "0.6"], True),
        (["-s", "4", "-c", "800"], True),  # a share is of little use
        (["-s", "4", "-c", "2048"], False),
    ],
)
def test_the_layout_is_an_engines_own(tmp_path: Path, words: list[str], unified: bool) -> None:
    out = tmp_path / "out.jsonl"
    assert main([*PROFILE, *TRACE, *words, "--jsonl", str(out)]) == 0
    settings, *requests = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert settings["kv_unified"] == unified
    assert len(requests) == 1 + 30


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("nvidia-h200-gemma-3-1b-q4_k_m", {}),
        ("x86-2-core-avx512-qwen2-0.5b-q4_k_m", {"n_seq_max": 3, "n_ctx": 2048}),
        ("x86-2-core-avx512-qwen2-0.5b-q4_k_m", {"kv_unified": True}),
        ("m2-ultra-gemma-3-4b-it-qat", {"n_batch": 64, "prefix_cache": False}),
        ("m2-ultra-gemma-3-4b-it-qat", {"n_seq_max": 31, "n_ctx": 2048, "kv_unified": False}),
        ("m2-ultra-gemma-3-4b-it-qat", {"n_seq_max": 3, "n_ctx": 10000}),
        ("m2-ultra-gemma-3-4b-it-qat", {"n_seq_max": 4, "n_ctx": 300}),
        ("x86-2-core-avx512-qwen2-0.5b-q4_k_m", {"n_seq_max": 3, "batch_invariant": True}),
        ("x86-1-thread-qwen2-0.5b-q4_k_m", {}),  # which has no streams
    ],
)
def test_the_engine_is_the_live_one_of_these_options(
    monkeypatch: pytest.MonkeyPatch, profile: str, words: dict[str, Any]
) -> None:
    seen: list[EngineSpec] = []

    def simulated(requests: Any, spec: EngineSpec, *args: Any, **options: Any) -> Simulated:
        seen.append(spec)
        return simulate(requests, spec, *args, **options)

    monkeypatch.setattr("pyllamabatch.cli.simulate.simulate", simulated)
    flags = []
    for name, value in words.items():
        flag = name.replace("_", "-")
        flags += (
            [f"--{flag}", str(value)] if type(value) is int else [f"--{'no-' * (not value)}{flag}"]
        )
    assert main(["simulate", "--profile", profile, *TRACE, *flags]) == 0
    (spec,) = seen
    sizes = {"n_seq_max": 16, "n_ctx": 32768, **words}
    with Engine(machine=profile, speculate=None, **sizes) as engine:
        cache, limits = engine._core.scheduler.admission.cache, engine.limits
        assert replace(spec.limits, behind=limits.behind, fills=limits.fills) == limits
        pool = engine._core.scheduler._pool
        assert (spec.pool and spec.pool.limits) == (pool and pool.limits)
        assert replace(spec.sharing, tries=cache.sharing.tries) == cache.sharing
        assert spec.retain == cache.retain
        assert spec.swap.bytes_per_token == shipped_profile(profile).cell_bytes
        assert (spec.swap.mode == "swap") == ("batch_invariant" in words)
        assert engine.cost is not None
        if "nvidia" not in profile:  # which samples on the device, as no profile machine does
            assert bool(spec.cost.switch) == (engine.cost.switch is None and any(spec.new_graph))


def test_the_preempted_are_swapped_by_a_profile_that_knows_a_cell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    known = shipped_profile("x86-2-core-avx512-qwen2-0.5b-q4_k_m")
    assert known.cell_bytes == 24 * 2 * 2 * 64 * 2  # layers, K and V, heads of 64, f16
    trace = ["--trace", "closed:clients=4,n=12,prompt=300,output=300"]
    found = []
    for name, profile in (("knows", known), ("not", replace(known, cell_bytes=0.0))):
        path = tmp_path / f"{name}.json"
        profile.save(path)
        words = ["-s", "4", "-c", "1200", "--kv-unified", "--no-prefix-cache", "--json"]
        assert main(["simulate", "--profile", str(path), *trace, *words]) == 0
        ((_, figures),) = json.loads(capsys.readouterr().out).items()
        assert figures["preemptions"] > 0
        found.append(figures["recomputed_rows"])
    assert found[0] == 0 < found[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*PROFILE, "--trace", "none.csv"], "none.csv"),
        (["simulate", "--profile", "no-such-file.json", *TRACE], "no-such-file"),
        ([*PROFILE, *TRACE, "--policy", "fastest"], "fastest"),
        ([*PROFILE, *TRACE, "--policy", "fcfs,fcfs"], "every one once"),
        ([*PROFILE, *TRACE, "--slo", "speed=1"], "slo"),
        ([*PROFILE, *TRACE, "--overhead", "-1"], "overhead"),
        ([*PROFILE, *TRACE, "-b", "8"], "n_batch=8: must be in 16.."),
        ([*PROFILE, *TRACE, "--latency", "inf"], "latency"),
        ([*PROFILE, *TRACE, "--seed", "-1"], "seed=-1: at least 0"),
        ([*PROFILE, *TRACE, "--steps", "x", "--policy", "fcfs,sarathi"], "one policy"),
        ([*PROFILE, *TRACE, "--steps", "x", "--replicas", "2"], "one replica"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (1, 2)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("file", ["steps", "jsonl", "markdown", "html"])
def test_a_file_that_can_not_be_written_is_said_before_anything_runs(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PROFILE, *TRACE, f"--{file}", "/no/such/folder/x"]) in (1, 2)
    said = capsys.readouterr()
    assert "/no/such/folder" in said.err
    assert not said.out


def test_what_can_not_run_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "figures")
    files = [f"--{file}={tmp_path / file}" for file in ("steps", "markdown", "html")]
    words = [*files, f"--jsonl={tmp_path / 'link'}", "--acceptance=2"]
    assert main([*PROFILE, *TRACE, *words]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_routers_name_may_be_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    """And what a request takes on its way, until its last token is there."""
    fleet = [*PROFILE, *TRACE, "--json", "--replicas", "2", "--router"]
    found = []
    for words in (["prefix-affinity"], ["prefix"], ["prefix", "--latency", "0.5"]):
        assert main([*fleet, *words]) == 0
        ((_, figures),) = json.loads(capsys.readouterr().out).items()
        found.append(figures["e2el_p50"])
    assert found[1] == found[0]
    assert found[2] == pytest.approx(found[0] + 0.5)
    with pytest.raises(SystemExit):
        main([*fleet, "p r"])


def test_a_simulated_fleet_is_routed_as_a_live_one() -> None:
    found = [inspect.signature(one).parameters["router"].default for one in (simulate, at_load)]
    for command in (cli_simulate, serve):
        parser = argparse.ArgumentParser()
        command.add_arguments(parser)
        found.append(parser.get_default("router"))
    assert found == ["prefix-affinity"] * 4


def test_the_profile_that_was_saved_last_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path))
    assert main(["simulate", *TRACE]) == 1
    assert "run `pyllamabatch calibrate`" in capsys.readouterr().err
    for i, name in enumerate(("m2-ultra-gemma-3-4b-it-qat", "nvidia-h200-gemma-3-1b-q4_k_m")):
        path = profile_folder() / f"mine-{i}.json"
        shipped_profile(name).save(path)
        os.utime(path, (i, i))
    assert main(["simulate", *TRACE]) == 0
    assert "on NVIDIA H200" in capsys.readouterr().out
    assert main(["simulate", *TRACE, "--profile", "mine-0"]) == 0
    assert "on NVIDIA H200" not in capsys.readouterr().out


def test_a_policy_of_your_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from pyllamabatch.scheduler import Policy\n"
        "from pyllamabatch.scheduler.policies import sarathi\n"
        "def narrow(budget: int = 16) -> Policy:\n"
        "    return sarathi(budget=budget)\n"
    )
    mine = f"{path}:narrow:budget=8"
    assert main([*PROFILE, *TRACE, "--policy", f"sarathi:budget=8,{mine}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sarathi:budget=8"] == found[mine]
    assert main([*PROFILE, *TRACE, "--policy", f"{path}:wide"]) == 2
    assert "wide" in capsys.readouterr().err


def test_what_can_not_run_leaves_the_file_of_steps_as_it_is(tmp_path: Path) -> None:
    steps = tmp_path / "steps.jsonl"
    steps.write_text('{"timestamp": 0, "input_length": 5, "output_length": 2}\n')
    before = steps.read_text()
    assert main([*PROFILE, *TRACE, "--steps", str(steps), "--acceptance", "2"]) == 2
    assert steps.read_text() == before
    assert main([*PROFILE, "--trace", str(steps), "--steps", str(steps)]) == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["--acceptance", "/none.jsonl"],
            "acceptance='/none.jsonl': a share from 0 to 1.*or a file",
        ),
        (
            ["--acceptance", "0.7", "--batch-invariant"],
            "acceptance='0.7': none with batch_invariant",
        ),
    ],
)
def test_what_is_wrong_with_acceptance(
    options: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*PROFILE, *TRACE, *options]) == 2
    assert re.search(why, capsys.readouterr().err)


def test_splitting_policies() -> None:
    assert split_policies("a,b:x=1,y=2,c") == ["a", "b:x=1,y=2", "c"]
    assert split_policies("a") == ["a"]
    with pytest.raises(ArgumentError):
        split_policies("a,a")


def test_acceptance_of_requests_that_were_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`generate` writes what came of drafts, and `simulate` draws from it."""
    asked, answered = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = ["abcabcabcabc" * 4, "1 2 3 4 5 1 2 3 4 5 1 2 3"]
    asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    bias = {"logit_bias": {"97": 25.0, "98": 25.0}, "ignore_eog": True}
    asked.write_text(asked.read_text() + json.dumps({"prompt": "ab" * 30, **bias}) + "\n")
    words = ["--prompts", str(asked), "--out", str(answered), "-n", "60", "--temperature", "0"]
    words += ["--policy", "tests.support.speculating:always:most=4,steps=8"]  # if it pays or not
    assert main(["generate", "-q", "-t", "1", "--speculate", "ngram", *words]) == 0
    found = load_acceptance(answered)
    assert len(found) == 3
    assert 0 < max(found) <= 1
    failed = json.dumps({"line": 4, **problem_fields("too long")})
    answered.write_text(f"{failed}\n{answered.read_text()}\n")
    assert load_acceptance(answered) == found
    out = tmp_path / "run.jsonl"
    run = [*PROFILE, *TRACE, "--jsonl", str(out)]
    assert main([*run, "--acceptance", str(answered)]) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(line.get("n_accepted", 0) for line in lines) > 0
    capsys.readouterr()
    for text, says in (('{"n_drafts": 1}\n', "line 1"), ("", "with drafts")):
        answered.write_text(text)
        assert main([*run, "--acceptance", str(answered)]) == 2
        assert says in capsys.readouterr().err
