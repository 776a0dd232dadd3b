"""The benches' own arithmetic, files and models.  Nothing here is timed."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from bench import models, report, schema, tools
from bench.__main__ import BENCHES, load, main
from bench.arms import InProcess, StepClock, batched_bench_row
from bench.cache import RESULTS, cache_folder
from bench.case import Arm, Case, Measured, case_row
from bench.decode import measure
from bench.models import BenchModel
from bench.options import Budget, numbers
from bench.shapes import GEMMA3_1B, LLAMA_3_2_1B, MOE_1B, QWEN2_0_5B, SHAPES, Shape
from bench.targets import Target, speed_ratio
from bench.tools import ToolError, source_tree, tool
from pyllamabatch import Model, _native
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib

REPOSITORY = Path(__file__).resolve().parents[2]

FACTS: dict[str, Any] = {
    "backends": "CPU",
    "gpu_info": "",
    "build_number": 11549,
    "build_commit": "b11549",
    "build_options": "",
    "versions": {"python": "3"},
    "model_type": "qwen2",
    "model_size": 1,
    "model_n_params": 1,
    "test_time": "2026-01-01T00:00:00+00:00",
    "load_average": 0.5,
}


def row(arm: str = "engine", *, pl: int = 4, t_tg: float = 2.0, repeat: int = 0) -> schema.Row:
    case = Case(
        model=BenchModel(Path("m.gguf"), "m", 7),
        pp=32,
        tg=16,
        pl=pl,
        n_threads=2,
        sampling="greedy",
        seed=1,
    )
    made = Arm(arm, "everything", True, lambda case: Measured(1.0, t_tg))
    return case_row("decode", made, case, made.run(case), FACTS, "run", repeat)


def failed(arm: str) -> schema.Row:
    made = Arm(arm, "nothing", True, lambda case: Measured(1.0, 1.0))
    case = Case(BenchModel(Path("m.gguf"), "m", 7), 32, 16, 1, 2, "greedy", 1)
    return case_row("decode", made, case, Measured.failed(RuntimeError("it broke")), FACTS, "r", 0)


# -- rows --


def test_the_keys_are_those_of_upstreams_tools() -> None:
    """Read from the sources of llama-bench and llama-batched-bench that we build."""
    tools = source_tree() / "tools"
    text = (tools / "llama-bench" / "llama-bench.cpp").read_text(encoding="utf-8")
    text += (tools / "batched-bench" / "batched-bench.cpp").read_text(encoding="utf-8")
    ours = {
        "bench", "arm", "includes", "run_id", "repeat", "sampling", "n_cores", "memory_bytes",
        "os", "load_average", "build_options", "versions", "model_seed", "seed", "kv_unified",
        "detail", "schema", "error",
    }  # fmt: skip
    names = {field.name for field in dataclasses.fields(schema.Row)}
    assert ours < names
    assert {name for name in names - ours if f'"{name}"' not in text.replace('\\"', '"')} == set()


def test_the_machine_is_named_without_its_host_name() -> None:
    import platform

    facts = schema.machine()
    assert facts["n_cores"] >= 1
    assert facts["cpu_info"]
    assert facts["memory_bytes"] > 0
    node = platform.node()
    assert not node or node not in json.dumps({**facts, "os": facts["os"]})


def test_tools_that_were_built_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "llama-batched-bench" + (".exe" if sys.platform == "win32" else "")
    (tmp_path / name).touch()
    monkeypatch.setenv("PLB_LLAMA_CPP_TOOLS", str(tmp_path))
    assert tool("llama-batched-bench") == tmp_path / name
    with pytest.raises(ToolError, match="llama-server is missing"):
        tool("llama-server")


def test_tools_use_the_packages_ggml_if_it_is_of_the_same_llama_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = Path(_native.__file__).parent / "lib"
    linked = bool(list(package.glob("libggml-cpu.*")))  # not on Windows, nor a portable build
    number = int(ffi.string(lib.plb_llama_cpp_build()).decode().removeprefix("b"))
    monkeypatch.setattr(tools, "build_number", lambda: number)
    assert tools.ggml_folder() == (package if linked else None)
    monkeypatch.setattr(tools, "build_number", lambda: number + 1)
    assert tools.ggml_folder() is None


def test_committed_results_are_rows() -> None:
    rows = [made for path in sorted(RESULTS.glob("*.jsonl")) for made in schema.read(path)]
    for made in rows:  # a speed without its time (no prompt, say) is 0, as schema.speeds makes it
        times = {"t_pp": made.t_pp, "t_tg": made.t_tg}
        expected = schema.speeds(pp=made.pp, tg=made.tg, pl=made.pl, **times)
        assert {name: getattr(made, name) for name in expected} == pytest.approx(expected)
        if made.bench not in ("plan", "validate"):  # memory, and what a model predicts
            assert (made.t_tg == 0) == bool(made.error)
    assert {made.schema for made in rows} <= {schema.SCHEMA}


# -- views --


def test_a_target_looks_at_its_own_rows_only() -> None:
    about = {"n_cores": schema.machine()["n_cores"], "gpu_info": "", "build_commit": "b115"}
    target = Target("t", speed_ratio("ours", "base", 4), at_least=2.0, where=about)
    rows = [row("base", t_tg=2.0), row("ours", t_tg=1.0), row("ours", pl=8, t_tg=9.0)]
    assert target.measured([*rows, failed("ours")]) == pytest.approx(2.0)
    assert target.limit == "≥ 2"
    assert target.met_by(2.0)
    assert not target.met_by(1.99)
    others = [dataclasses.replace(made, gpu_info="a GPU") for made in rows]
    assert target.measured(others) is None
    assert not Target("t", target.figure, at_most=1.0).met_by(2.0)


def test_the_commit_of_a_row_can_be_said_by_whoever_copied_the_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYLLAMABATCH_BENCH_COMMIT", "abc")
    schema.commit.cache_clear()
    assert schema.commit() == "abc"
    monkeypatch.delenv("PYLLAMABATCH_BENCH_COMMIT")
    schema.commit.cache_clear()
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", schema.commit())


def test_what_is_made_before_the_package_does_not_import_it() -> None:
    """bench/measure.sh has llama.cpp's tools and the model built beside the package."""
    code = (
        "import sys; sys.modules['pyllamabatch'] = None\n"
        "from bench.__main__ import main\n"
        "main([sys.argv[1], '--help'])"
    )
    for command, status in (("tool", 0), ("model", 0), ("list", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, command], cwd=REPOSITORY, capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr.decode()


def test_ratios_are_paired_by_repeat() -> None:
    """A machine that halves its speed in the second repeat leaves the ratio alone."""
    rows = [
        row("base", t_tg=1.0, repeat=0),
        row("ours", t_tg=0.8, repeat=0),
        row("base", t_tg=2.0, repeat=1),
        row("ours", t_tg=1.6, repeat=1),
        row("ours", t_tg=0.1, repeat=2),  # no base beside it: not in the ratio
    ]
    assert report.paired_ratios(rows, "base")["ours", 4] == pytest.approx(1.25)
    assert report.paired_ratios(rows, "base")["base", 4] == 1.0
    assert report.median_speeds(rows)["base", 4] == pytest.approx((64 + 32) / 2)
    assert report.spread(rows)["base", 4] == pytest.approx((64 - 32) / 48)


def test_the_table_has_a_line_per_batch_and_a_column_per_arm() -> None:
    rows = [row(arm, pl=pl) for pl in (16, 1) for arm in ("base", "ours")] + [row("rare", pl=1)]
    text = report.table([*rows, failed("lost")], "base")
    assert text.endswith("lost: no result: RuntimeError: it broke")
    assert "spread of an arm, (max - min) / median: 0%" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines] == ["B", "--:", "1", "16"]
    assert len({line.count("|") for line in lines}) == 1
    assert "8.0 (1.000)" in lines[2]
    assert "—" in lines[3]


# -- models --


@pytest.mark.parametrize(
    ("shape", "n_params"),
    [
        (QWEN2_0_5B, 494_032_768),
        (GEMMA3_1B, 999_885_952),
        (LLAMA_3_2_1B, 1_235_814_400),
        # its source has 49,155 tokens and no norms of queries and keys
        (MOE_1B, 1_334_628_352 + (151_936 - 49_155) * 1024 + 24 * 2 * 64),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shapes_have_the_published_number_of_parameters(shape: Shape, n_params: int) -> None:
    assert shape.n_params == n_params


def small(shape: Shape) -> Shape:
    reduced = shape.scaled(n_layer=shape.sliding_pattern or 2, divide=2)
    width = reduced.n_head * reduced.head_dim
    return dataclasses.replace(reduced, n_embd=width, n_ff=256, n_vocab=300)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_scaled_down_shape_is_written_quantised_and_run(name: str, tmp_path: Path) -> None:
    shape = small(SHAPES[name])
    half, quantised = tmp_path / "half.gguf", tmp_path / "quantised.gguf"
    models.write_f16(shape, half, None, seed=3)
    found = {t.name: tuple(int(n) for n in t.shape[::-1]) for t in gguf.GGUFReader(half).tensors}
    assert found == {spec.name: spec.shape for spec in shape.tensors()}

    models.quantise(half, quantised, "Q4_K_M", n_threads=1)
    types = {t.tensor_type.name for t in gguf.GGUFReader(quantised).tensors}
    assert "Q4_K" in types
    assert quantised.stat().st_size < half.stat().st_size / 2
    with Model(quantised) as model, Context(model, n_ctx=256, n_threads=1) as context:
        assert model.architecture == shape.architecture
        assert model.n_params == shape.n_params
        assert model.n_swa == shape.sliding_window
        batch = context.batch()
        batch.extend([5, 6, 7], 0, 0)
        context.decode(batch)
        assert np.isfinite(context.logits()).all()


def test_values_depend_on_name_and_seed_alone() -> None:
    first, second, *_ = QWEN2_0_5B.scaled(n_layer=1, divide=7).tensors()
    small_first = dataclasses.replace(first, shape=(9000, 8))
    one = models.random_tensor(small_first, 1)
    np.testing.assert_array_equal(one, models.random_tensor(small_first, 1))
    assert not np.array_equal(one, models.random_tensor(small_first, 2))
    assert one.dtype == np.float16
    assert np.std(one.astype(np.float32)) == pytest.approx(1 / np.sqrt(8), rel=0.02)
    assert second.norm
    assert np.mean(models.random_tensor(second, 1)) == pytest.approx(1.0, abs=0.02)


def test_a_vocabulary_of_another_size_is_refused(tmp_path: Path) -> None:
    models.write_f16(small(LLAMA_3_2_1B), tmp_path / "v.gguf", None)
    other = dataclasses.replace(small(LLAMA_3_2_1B), n_vocab=301)
    with pytest.raises(ValueError, match="has 300 tokens, the shape says 301"):
        models.write_f16(other, tmp_path / "m.gguf", tmp_path / "v.gguf")


def test_a_vocabulary_is_copied_whole(tmp_path: Path) -> None:
    from tests.support.models_gguf import N_VOCAB, gguf_path, vocabulary

    shape = dataclasses.replace(small(LLAMA_3_2_1B), n_vocab=N_VOCAB)
    models.write_f16(shape, tmp_path / "m.gguf", gguf_path("llama"))
    with Model(tmp_path / "m.gguf", vocab_only=True) as model:
        assert model.vocab.n_tokens == N_VOCAB
        assert model.vocab.tokenize("the secret word").size < 10
        piece = vocabulary()[0][-2]
        assert model.vocab.token_to_piece(N_VOCAB - 2) == piece.encode()


def test_the_cache_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYLLAMABATCH_BENCH_CACHE", str(tmp_path / "here"))
    assert cache_folder("models") == tmp_path / "here" / "models"
    assert (tmp_path / "here" / "models").is_dir()


# -- arms --


@pytest.fixture(scope="module")
def case() -> Case:
    from tests.support.models_gguf import gguf_path

    model = BenchModel(gguf_path("llama"), "tiny", 1)
    return Case(model=model, pp=9, tg=5, pl=3, n_threads=1, sampling="greedy", seed=2)


@pytest.mark.parametrize("sampling", ["greedy", "default"])
def test_every_arm_of_ours_does_the_work(case: Case, sampling: str) -> None:
    inside = InProcess(case.model, 0)
    arms = [Arm(name, name, True, getattr(inside, name)) for name in ("raw", "stepper", "engine")]
    cases = [dataclasses.replace(case, sampling=sampling, pl=pl, n_batch=16) for pl in (1, 3)]
    rows = list(measure(arms, cases, 2, inside))
    order = [(made.repeat, made.pl, made.arm) for made in rows]
    names = [arm.name for arm in arms]
    assert order == [
        (repeat, pl, name)
        for repeat in (0, 1)
        for pl in (1, 3)
        for name in (names if repeat == 0 else names[::-1])
    ]
    for made in rows:
        assert made.t_pp > 0
        assert made.t_tg > 0
        assert (made.sampling, made.tg, made.n_kv) == (sampling, 5, made.pl * 14)
        assert made.build_commit == "b11549" or made.build_number == 0


def test_an_arm_that_fails_leaves_a_row_and_the_others_go_on(case: Case) -> None:
    def broken(case: Case) -> Measured:
        raise RuntimeError("no memory")

    inside = InProcess(case.model, 0)
    arms = [Arm("broken", "", True, broken), Arm("stepper", "", True, inside.stepper)]
    lost, good = measure(arms, [case], 1, inside)
    assert (lost.arm, lost.error, lost.t_tg) == ("broken", "RuntimeError: no memory", 0.0)
    assert good.t_tg > 0
    assert list(measure(arms, [case], 1, inside, budget=Budget(0.0))) == []


def test_the_step_clock_counts_steady_steps_only() -> None:
    from pyllamabatch.scheduler import StepView, sarathi
    from pyllamabatch.scheduler.view import Limits, SequenceView

    limits = Limits(n_batch=8, n_ubatch=8, n_seq_max=2, n_cells=64, n_cells_seq=64)
    done: dict[str, Any] = {
        "n_prompt": 3,
        "computed": 3,
        "generated": 1,
        "max_tokens": 9,
        "running": True,
    }
    both = [SequenceView(id=i, arrival=0.0, **done) for i in (1, 2)]
    begun = SequenceView(id=2, arrival=0.0, n_prompt=9, computed=3, max_tokens=9, running=True)
    clock = StepClock(sarathi(), 2, 6)
    for running, waiting in (([both[0], begun], []), (both[:1], []), (both, [begun])):
        clock.plan(StepView.of(limits, running, waiting))
    assert clock.starts == []
    for steps in (0, 1, 4, 6):  # a plan may stand for several steps, but ends with the last one
        assert not clock.done.is_set()
        now = [dataclasses.replace(s, computed=3 + steps, generated=1 + steps) for s in both]
        plan = clock.plan(StepView.of(limits, now))
        assert dict(plan.tokens) == {1: 1, 2: 1}
        assert plan.repeat == 6 - steps or steps == 6
    assert clock.done.is_set()
    assert clock.steps == [0, 1, 4, 6]
    assert len(clock.starts) == 4


def test_a_tool_that_prints_nothing_is_asked_again(tmp_path: Path) -> None:
    """llama-batched-bench may end before its logger has written."""
    script = tmp_path / "tool.py"
    script.write_text(
        "import pathlib, sys\n"
        "seen = pathlib.Path(sys.argv[1])\n"
        "n = len(seen.read_text()) if seen.exists() else 0\n"
        "seen.write_text('x' * (n + 1))\n"
        "print('noise')\n"
        "n and print('{\"t_tg\": 1.5}')\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "seen")]
    assert batched_bench_row(command) == {"t_tg": 1.5}
    assert (tmp_path / "seen").read_text() == "xx"
    with pytest.raises(ToolError, match="gave no result"):
        batched_bench_row([sys.executable, "-c", "raise SystemExit('broken')"])


def test_the_runner_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BENCHES, *SHAPES))
    for name in BENCHES:
        assert all(target.text in printed for target in load(name).TARGETS)
    with pytest.raises(SystemExit, match="not one of"):
        main(["decode", "--model", "nowhere.gguf"])


def test_numbers() -> None:
    assert numbers("1,16,4") == [1, 16, 4]
    for words in ("", "1,x", "0", "2,-1"):
        with pytest.raises(SystemExit, match="1 or more"):
            numbers(words)
