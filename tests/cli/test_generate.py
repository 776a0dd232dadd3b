"""`pyllamabatch generate` with the embedded model, as a process and in this one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.cli import main
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from tools.recipe.default_model.tasks import Task, make_tasks

KINDS = ("copy", "add", "upper", "reverse", "qa", "sort", "count")
N_TOKENS = 48

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default() as model:
        yield model


def make_lines(n: int) -> Rows:
    """`n` different chats; a few of them are long."""
    tasks: list[Task] = make_tasks("recall", 1 + n // 25, seed=7)
    for kind in KINDS:
        tasks += make_tasks(kind, -(-n // len(KINDS)), seed=7)
    tasks = tasks[:n]
    random.Random(7).shuffle(tasks)
    return [
        {"id": f"{task.kind}-{i}", "messages": [{"role": "user", "content": task.prompt}]}
        for i, task in enumerate(tasks[:n])
    ]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def command(*args: str | Path | int | float) -> list[str]:
    """One thread: on a model this small, more of them mostly wait for each other."""
    return [sys.executable, "-m", "pyllamabatch", "generate", "-t", "1", *map(str, args)]


def in_process(*args: str | Path | int | float) -> int:
    return main(["generate", "-t", "1", *map(str, args)])


def greedy(model: Model, context: Context, prompt: np.ndarray) -> list[int]:
    """What the prompt gives alone: one sequence, one row at a time, no engine."""
    context.memory.clear()
    batch = Batch(max(len(prompt), 1))
    tokens: list[int] = []
    batch.extend(prompt, 0, 0, logits=True)
    pos = len(prompt)
    while True:
        context.decode(batch)
        token = int(np.argmax(context.logits(batch.n_tokens - 1)))
        tokens.append(token)
        if model.vocab.is_eog(token) or len(tokens) == N_TOKENS:
            return tokens
        batch.clear()
        batch.add(token, pos, (0,), logits=True)
        pos += 1


def test_200_prompts_are_what_they_are_one_by_one(model: Model, tmp_path: Path) -> None:
    lines = make_lines(200)
    out = tmp_path / "out.jsonl"
    prompts = write(tmp_path / "in.jsonl", lines)
    status = in_process(
        "--prompts", prompts, "--out", out, "--parallel", 16, "-n", N_TOKENS, "--temperature", 0
    )
    assert status == 0
    rows = read(out)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    with Context(model, n_ctx=2048, n_threads=1) as context:
        for line, row in zip(lines, rows, strict=True):
            text = model.vocab.apply_chat_template(line["messages"])
            prompt = model.vocab.tokenize(text, parse_special=True)
            alone = greedy(model, context, prompt)
            ended = alone[:-1] if model.vocab.is_eog(alone[-1]) else alone
            assert row["text"] == model.vocab.detokenize(ended), line["id"]
            assert row["tokens"] in (alone, ended)
            assert row["finish_reason"] == ("length" if ended is alone else "stop")
            assert row["n_prompt"] == len(prompt)
            assert row["n_generated"] == len(row["tokens"])
            assert 0 < row["ttft_ms"] <= row["e2el_ms"]
    assert list(tmp_path.glob("*.part")) == []


def test_killed_and_resumed(tmp_path: Path) -> None:
    lines = make_lines(200)
    prompts, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    args = command(
        "--prompts", prompts, "--out", out, "--parallel", 8, "-n", N_TOKENS, "--temperature", 0
    )
    finished: dict[int, dict[str, Any]] = {}
    for n_before_kill in (15, 60):
        process = subprocess.Popen(args, stderr=subprocess.DEVNULL)
        while process.poll() is None and (
            not out.exists() or out.read_bytes().count(b"\n") < n_before_kill
        ):
            time.sleep(0.002)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.wait()
        for path in (out, tmp_path / "out.jsonl.part"):
            for line in path.read_bytes().split(b"\n")[:-1]:
                row = json.loads(line)
                assert finished.setdefault(row["line"], row) == row, "a finished line was redone"
    assert 60 <= len(finished) < 200
    with open(out, "ab") as torn:
        torn.write(b'{"id": "copy-')  # as a kill in the middle of a write leaves it
    done = subprocess.run(args, capture_output=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    rows = read(out)
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    for number, row in finished.items():
        assert rows[number - 1] == row  # its timings too: it was not run again
    assert not (tmp_path / "out.jsonl.part").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    prompts, out = write(tmp_path / "in.jsonl", make_lines(200)), tmp_path / "out.jsonl"
    args = command("--prompts", prompts, "--out", out, "-n", N_TOKENS, "--temperature", 0)
    process = subprocess.Popen(args, stderr=subprocess.PIPE, encoding="utf-8")
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 10):
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "run the same command" in errors
    assert "Traceback" not in errors
    rows = read(out)
    assert 10 <= len(rows) < 200
    assert all(row["finish_reason"] in ("stop", "length") for row in rows)


def test_bad_lines_are_reported_and_the_rest_goes_on(tmp_path: Path, capsys: Any) -> None:
    good = make_lines(4)
    lines = [
        json.dumps(good[0]),
        "{nonsense",
        json.dumps({"id": "hot", "prompt": "a", "temperature": -1}),
        json.dumps({"id": "huge", "tokens": [5] * 5000}),
        json.dumps({"id": "alien", "tokens": [10**6]}),
        json.dumps({"id": "typed", "prompt": "a", "max_tokens": "many"}),
        "",
        json.dumps(good[1]),
        json.dumps({"id": "both", "prompt": "a", "tokens": [1]}),
        json.dumps({**good[2], "comments": "mine", "temp": 0}),
        json.dumps({"prompt": "no id"}),
    ]
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("\n".join(lines))
    args = ("--prompts", prompts, "--out", out, "-n", 8, "-c", 2048)
    assert in_process(*args) == 1
    rows = {row["line"]: row for row in read(out)}
    assert list(rows) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    bad = {line for line, row in rows.items() if row["finish_reason"] == "error"}
    assert bad == {2, 3, 4, 5, 6, 9, 10}
    errors = capsys.readouterr().err
    for line, row in rows.items():
        assert row["id"] == (line if line in (2, 11) else json.loads(lines[line - 1])["id"])
        assert (f"in.jsonl:{line}: id " in errors) == (line in bad)
        assert ("error" in row) == (line in bad)
    assert "'temp' (temperature?)" in errors
    assert in_process(*args) == 0, "error rows count as finished"
    assert in_process(*args, "--overwrite", "--ignore-unknown") == 1
    assert "error" not in read(out)[-2], "line 10"


def test_a_finished_file_is_not_answered_again(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    prompts, out = write(tmp_path / "in.jsonl", make_lines(3)), tmp_path / "out.jsonl"
    assert in_process("--prompts", prompts, "--out", out, "-n", 4) == 0
    before = out.read_bytes()
    monkeypatch.setattr("pyllamabatch.cli.generate.open_engine", None)  # none is needed
    assert in_process("--prompts", prompts, "--out", out, "-n", 4) == 0
    assert out.read_bytes() == before
    assert "3 lines were finished before" in capsys.readouterr().err


def test_a_model_without_a_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Model, "chat_template", lambda model: None)
    out, template = tmp_path / "out.jsonl", tmp_path / "template.jinja"
    prompts = write(tmp_path / "in.jsonl", make_lines(3))
    common = ("--prompts", prompts, "--out", out, "-n", 2, "--overwrite")
    assert in_process(*common) == 1
    errors = capsys.readouterr().err
    assert "1: id " in errors
    assert "the model has no chat template: name one, --chat-template" in errors
    assert "2 more with the same problems" in errors
    assert len(errors.splitlines()) == 2
    with Model.default() as model:
        template.write_text(model.metadata["tokenizer.chat_template"])
    for named in ("chatml", template):
        assert in_process(*common, "--chat-template", named) == 0
    assert in_process(*common, "--chat-template", "no-such-name") in (1, 2)
    assert len(capsys.readouterr().err) < 2000


def test_without_the_prefix_cache(tmp_path: Path) -> None:
    prompts, out = write(tmp_path / "in.jsonl", make_lines(3)), tmp_path / "out.jsonl"
    args = ("--prompts", prompts, "--out", out, "-n", 4, "--temperature", 0)
    assert in_process(*args) == 0
    rows = read(out)
    assert in_process(*args, "--no-prefix-cache", "--overwrite") == 0
    assert [row["tokens"] for row in read(out)] == [row["tokens"] for row in rows]


def test_standard_input_and_output() -> None:
    lines = make_lines(3)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    done = subprocess.run(
        command("--temperature", 0, "-n", 8, "--parallel", 2),
        input=text, capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [
        line["id"] for line in lines
    ]


def test_answers_come_while_the_input_is_still_open() -> None:
    process = subprocess.Popen(
        command("--temperature", 0, "-n", 4), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for line in make_lines(2):
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == line["id"]
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    prompts = write(tmp_path / "in.jsonl", make_lines(50))
    process = subprocess.Popen(
        command("--prompts", prompts, "-n", 8, "--window", 1),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert b"Traceback" not in errors


def test_seeds_make_sampling_repeatable(tmp_path: Path) -> None:
    """One at a time: steps with another number of rows may round the logits otherwise."""
    lines: Rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 5}]
    prompts = write(tmp_path / "in.jsonl", lines)
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name
        assert in_process(
            "--prompts", prompts, "--out", out, "-q", "--seed", 5, "-n", 24, "--parallel", 1,
            "--ignore-eog", "--temperature", 3, "--top-k", 0, "--top-p", 1, "--min-p", 0,
        ) == 0  # fmt: skip
        texts.append([row["tokens"] for row in read(out)])
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]
    assert texts[0][0] == texts[0][2]


def test_a_trace_of_what_the_engine_did(tmp_path: Path) -> None:
    lines: Rows = [{"prompt": "a", "max_tokens": 3 + i} for i in range(4)]
    prompts, trace = write(tmp_path / "in.jsonl", lines), tmp_path / "steps.json"
    options = ("--parallel", 2, "--ignore-eog", "--trace", trace)
    assert in_process("--prompts", prompts, "--out", tmp_path / "out.jsonl", "-q", *options) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "step"]
    assert sum(step["args"]["sampled"] for step in steps) == 3 + 4 + 5 + 6
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"steps", *(f"request {i}" for i in range(1, 5))}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--prompts", "in.jsonl", "--trace", "nowhere/steps.json"], "nowhere"),
        (["--prompts", "in.jsonl", "--out", "nowhere/out.jsonl"], "nowhere"),
        (["--prompts", "in.jsonl", "--out", "in.jsonl"], "input and the output"),
        (["--prompts", "in.jsonl", "--out", "notes.txt"], "--overwrite"),
        (["--prompts", "in.jsonl", "--temperature", "-1"], "temperature"),
        (["--prompts", "in.jsonl", "--grammar-file", "nowhere.gbnf"], "nowhere.gbnf"),
        (["--prompts", "in.jsonl", "--policy", "nonsense"], "nonsense"),
        (["--prompts", "in.jsonl", "-m", "nowhere.gguf"], "nowhere.gguf"),
        (["--prompts", "in.jsonl", "-m", "notes.txt"], "notes.txt"),
        (["--prompts", "in.jsonl", "--parallel", "0"], "at least 1"),
        (["--prompts", "in.jsonl", "--parallel", "100000"], "n_seq_max"),
    ],
)
def test_what_can_not_run_says_so_in_one_line(
    tmp_path: Path, args: list[str], message: str
) -> None:
    write(tmp_path / "in.jsonl", make_lines(1))
    (tmp_path / "notes.txt").write_text("some notes\n")
    done = subprocess.run(
        command(*args), capture_output=True, encoding="utf-8", cwd=tmp_path, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )  # fmt: skip
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "some notes\n"
