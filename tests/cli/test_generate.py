"""`pyllamabatch generate` with the embedded model, as a process and in this one."""

import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.cli import main
from pyllamabatch.cli.console import ProgressBar
from pyllamabatch.cli.generate import Notes
from pyllamabatch.cli.result_file import ResultFile
from pyllamabatch.llama.chat import ChatPrompt
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from tests.support.decoding import likeliest
from tests.support.models_special import mimo2_path
from tools.recipe.default_model.tasks import Task, make_tasks

KINDS = ("copy", "add", "upper", "reverse", "qa", "sort", "count")
N_TOKENS = 48
GREEDY = ("-n", N_TOKENS, "--temperature", 0)

Rows = list[dict[str, Any]]


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


def command(*args: str | Path | int | float) -> list[str]:
    """One thread: on a model this small, more of them mostly wait for each other."""
    return [sys.executable, "-m", "pyllamabatch", "generate", "-t", "1", *map(str, args)]


@dataclass
class Files:
    folder: Path

    @property
    def names(self) -> tuple[str | Path, ...]:
        return "--prompts", self.folder / "in.jsonl", "--out", self.folder / "out.jsonl"

    def write(self, lines: Sequence[Any]) -> None:
        """Objects, or lines as they are."""
        text = (line if isinstance(line, str) else json.dumps(line) for line in lines)
        (self.folder / "in.jsonl").write_text("".join(f"{line}\n" for line in text))

    def run(self, *args: str | Path | int | float) -> int:
        return main(["generate", "-t", "1", *map(str, (*self.names, *args))])

    def start(self, *args: str | Path | int | float) -> subprocess.Popen[str]:
        return subprocess.Popen(command(*self.names, *args), stderr=subprocess.PIPE, text=True)

    def wait_for_rows(self, process: subprocess.Popen[str], n: int) -> None:
        """Until n rows are written and the process still runs."""
        out = self.folder / "out.jsonl"
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < n):
            time.sleep(0.002)
        assert process.poll() is None, "it has ended"

    def rows(self, name: str = "out.jsonl") -> Rows:
        path = self.folder / name
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_200_prompts_are_what_they_are_one_by_one(files: Files) -> None:
    lines = make_lines(200)
    files.write(lines)
    assert files.run("--parallel", 16, *GREEDY) == 0
    rows = files.rows()
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    with Model.default() as model, Context(model, n_ctx=2048, n_threads=1) as context:
        for line, row in zip(lines, rows, strict=True):
            text = model.vocab.apply_chat_template(line["messages"])
            prompt = model.vocab.tokenize(text, parse_special=True).tolist()
            alone = likeliest(context, prompt, N_TOKENS, ends=model.vocab.eog_tokens)
            ended = alone[:-1] if model.vocab.is_eog(alone[-1]) else alone
            assert row["text"] == model.vocab.detokenize(ended), line["id"]
            assert row["tokens"] in (alone, ended)
            assert row["finish_reason"] == ("length" if ended is alone else "stop")
            assert row["n_prompt"] == len(prompt)
            assert row["n_generated"] == len(row["tokens"])
            assert row["n_accepted"] <= row["n_drafted"] >= row["n_drafts"] >= 0
            assert 0 < row["ttft_ms"] <= row["e2el_ms"]
    assert sorted(path.name for path in files.folder.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_interrupted_killed_and_resumed(files: Files) -> None:
    lines = make_lines(80)
    files.write(lines)
    finished: dict[int, dict[str, Any]] = {}
    for number in (signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        with files.start("--parallel", 8, *GREEDY) as process:
            files.wait_for_rows(process, 3 + len(files.rows()))
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        killed = number == signal.SIGKILL
        assert process.returncode == (-number if killed else 130), errors
        assert ("run the same command" in errors) != killed
        assert "Traceback" not in errors
        for row in files.rows() + files.rows("out.jsonl.part"):
            assert row["finish_reason"] in ("stop", "length")
            assert finished.setdefault(row["line"], row) == row, "a finished line was redone"
    assert 9 <= len(finished) < 80
    with open(files.folder / "out.jsonl", "ab") as torn:
        torn.write(b'{"id": "copy-')  # as a kill in the middle of a write leaves it
    assert files.run("--parallel", 8, *GREEDY) == 0
    rows = files.rows()
    assert [row["id"] for row in rows] == [line["id"] for line in lines]
    for line, row in finished.items():
        assert rows[line - 1] == row  # its timings too: it was not run again
    assert not (files.folder / "out.jsonl.part").exists()


def test_bad_lines_are_reported_and_the_rest_goes_on(files: Files, capsys: Any) -> None:
    good = make_lines(3)
    lines: list[Any] = [
        good[0],
        "{nonsense",
        {"id": "hot", "prompt": "a", "temperature": -1},
        {"id": "huge", "tokens": [5] * 5000},
        {"id": "alien", "tokens": [10**6]},
        {"id": "typed", "prompt": "a", "max_tokens": "many"},
        "",
        good[1],
        {"id": "both", "prompt": "a", "tokens": [1]},
        {**good[2], "comments": "mine", "temp": 0},
        {"prompt": "no id"},
    ]
    files.write(lines)
    args = ("-n", 8, "-c", 2048)
    assert files.run(*args) == 1
    rows = {row["line"]: row for row in files.rows()}
    assert list(rows) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    bad = {line for line, row in rows.items() if row["finish_reason"] == "error"}
    assert bad == {2, 3, 4, 5, 6, 9, 10}
    errors = capsys.readouterr().err
    for line, row in rows.items():
        assert row["id"] == (line if line in (2, 11) else lines[line - 1]["id"])
        assert (f"in.jsonl:{line}: id " in errors) == (line in bad)
        assert ("error" in row) == (line in bad)
    assert "'temp' (temperature?)" in errors
    assert files.run(*args) == 1, "error rows count as finished, not as answered"
    assert "10 lines were finished before, 7 of them with an error" in capsys.readouterr().err
    assert files.run(*args, "--overwrite", "--ignore-unknown") == 1
    assert "error" not in files.rows()[-2], "line 10"


def test_a_finished_file_is_not_answered_again(
    files: Files, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(make_lines(3))
    assert files.run(*GREEDY) == 0
    rows = files.rows()
    with monkeypatch.context() as without:
        without.setattr("pyllamabatch.cli.generate.open_engine", None)  # none is needed
        assert files.run(*GREEDY) == 0
    assert files.rows() == rows
    assert "3 lines were finished before" in capsys.readouterr().err
    assert files.run(*GREEDY, "--no-prefix-cache", "--overwrite") == 0
    assert [row["tokens"] for row in files.rows()] == [row["tokens"] for row in rows]


def test_a_model_without_a_chat_template(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Model, "chat_template", lambda model: None)
    files.write(make_lines(3))
    assert files.run("-n", 2) == 1
    first, more = capsys.readouterr().err.splitlines()
    assert "1: id " in first
    assert "the model has no chat template: name one, --chat-template" in first
    assert "2 more with the same problems" in more
    template = files.folder / "template.jinja"
    with Model.default() as model:
        template.write_text(model.metadata["tokenizer.chat_template"])
    for named in ("chatml", template):
        assert files.run("-n", 2, "--overwrite", "--chat-template", named) == 0
    assert files.run("-n", 2, "--overwrite", "--chat-template", "no-such-name") in (1, 2)
    assert len(capsys.readouterr().err) < 2000


def test_a_chat_ends_at_the_stops_of_its_template(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(make_lines(1))
    assert files.run(*GREEDY) == 0
    text = files.rows()[0]["text"]
    stop, of = text[1:3], ChatPrompt.of
    monkeypatch.setattr(ChatPrompt, "of", lambda rendered, p: of({**rendered, "stops": [stop]}, p))
    assert files.run(*GREEDY, "--overwrite") == 0
    assert files.rows()[0]["text"] == text[: text.index(stop)]


def test_a_row_that_comes_before_the_clock_ticks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    with ProgressBar("generate", 1, quiet=True) as progress:
        notes = Notes(progress, ResultFile("stdout", io.BytesIO()), "-")
        notes.row({"n_generated": 5})
    assert not notes.problems


@pytest.mark.parametrize("terminal", [False, True])
def test_rows_on_a_terminal_have_no_bar_among_them(
    terminal: bool, files: Files, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    quiet = []

    def bar(title: str, total: float, **options: Any) -> ProgressBar:
        quiet.append(options["quiet"])
        return ProgressBar(title, total, **options)

    files.write(make_lines(1))
    monkeypatch.setattr("pyllamabatch.cli.generate.ProgressBar", bar)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert files.run("-n", 1, "--out", "-") == 0
    assert quiet == [terminal]
    assert json.loads(capsys.readouterr().out)["n_generated"] == 1


def test_messages_are_read_as_a_chat_reads_them(files: Files) -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "two")]
    good = {"role": "user", "content": parts}
    bad = [[], ["hi"], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]]
    files.write([{"messages": messages} for messages in [[good], *bad]])
    assert files.run(*GREEDY) == 1
    first, *others = files.rows()
    with Model.default() as model:
        prompt = model.vocab.apply_chat_template([good])
        assert first["n_prompt"] == len(model.vocab.tokenize(prompt, parse_special=True))
    assert ["messages" in row["error"] for row in others] == [True] * 4


def test_answers_come_while_the_input_is_still_open() -> None:
    pipe = subprocess.PIPE
    args = command("--temperature", 0, "-n", 4, "--parallel", 2)
    with subprocess.Popen(args, stdin=pipe, stdout=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in make_lines(3):
            process.stdin.write(json.dumps(line).encode() + b"\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == line["id"]
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_a_reader_that_goes_away() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(command("-n", 8), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        first, second = (json.dumps(line).encode() + b"\n" for line in make_lines(2))
        process.stdin.write(first)
        process.stdin.flush()
        process.stdout.readline()
        process.stdout.close()
        process.stdin.write(second)  # whose row has no reader
        process.stdin.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(timeout=60) == 1


@pytest.mark.parametrize(("to", "status"), [("&-", 2), ("/dev/null", 0)])
def test_a_closed_output(files: Files, to: str, status: int) -> None:
    files.write(make_lines(1))
    words = ["sh", "-c", f'exec "$@" >{to}', "sh", *command("-n", 2, *files.names[:2])]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, "output is closed" in ended.stderr) == (status, status == 2)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (None, 1)])
def test_the_end_waits_for_no_input(number: signal.Signals | None, status: int) -> None:
    """It is told to end, or its reader goes away, while more lines may come."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command("-n", 8), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = [json.dumps(line).encode() + b"\n" for line in make_lines(2)]
        process.stdin.write(lines[0])
        process.stdin.flush()
        process.stdout.readline()
        if number is not None:
            process.send_signal(number)
        else:
            process.stdout.close()
            process.stdin.write(lines[1])
            process.stdin.flush()
        try:
            assert process.wait(timeout=60) == status
        finally:
            process.kill()


def test_seeds_make_sampling_repeatable(files: Files) -> None:
    """One at a time: steps with another number of rows may round the logits otherwise."""
    files.write([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "a", "seed": 5}])
    found = []
    for _ in range(2):
        assert files.run(
            "-q", "--seed", 5, "-n", 24, "--parallel", 1, "--ignore-eog", "--overwrite",
            "--temperature", 3, "--top-k", 0, "--top-p", 1, "--min-p", 0,
        ) == 0  # fmt: skip
        found.append([row["tokens"] for row in files.rows()])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    assert found[0][0] == found[0][2]


def test_a_trace_of_what_the_engine_did(files: Files) -> None:
    files.write([{"prompt": "a", "max_tokens": 3 + i} for i in range(4)])
    trace = files.folder / "steps.json"
    assert files.run("-q", "--parallel", 2, "--ignore-eog", "--trace", trace) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "step"]
    assert sum(step["args"]["sampled"] for step in steps) == 3 + 4 + 5 + 6
    tracks = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert tracks == {"steps", *(f"request {i}" for i in range(1, 5))}
    written = trace.read_bytes()
    assert files.run("-q", "--ignore-eog", "--trace", trace) == 0  # no step: all is answered
    assert trace.read_bytes() == written


@pytest.mark.parametrize("words", ["--policy none", "--n-batch 1", "--speculate none"])
def test_what_an_engine_refuses_overwrites_nothing(files: Files, words: str) -> None:
    files.write([{"prompt": "a"}])
    assert files.run("-q", "-n", 1) == 0
    rows = files.rows()
    assert files.run("-q", "-n", 1, "--overwrite", *words.split()) != 0
    assert files.rows() == rows


def test_layers_that_predict_are_loaded_where_they_are_asked_for(files: Files) -> None:
    files.write([{"prompt": "hello world"}, {"prompt": "the key"}])
    found = []
    for drafter in ("off", "mtp"):
        words = ("-m", mimo2_path(), "--speculate", drafter, "--ignore-eog", "--overwrite")
        assert files.run("-q", *words, "-n", 16, "--temperature", 0) == 0
        found.append([row["tokens"] for row in files.rows()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--prompts nowhere.jsonl", "nowhere.jsonl"),
        ("--trace nowhere/steps.json", "nowhere"),
        ("--out nowhere/out.jsonl", "nowhere"),
        ("--out in.jsonl", "input and the output"),
        ("--out notes.txt", "--overwrite"),
        ("--temperature -1", "temperature"),
        ("--grammar-file nowhere.gbnf", "nowhere.gbnf"),
        ("--policy nonsense", "nonsense"),
        ("-m nowhere.gguf", "nowhere.gguf"),
        ("-m notes.txt", "notes.txt"),
        ("--speculate mtp", "no layers that predict"),
        ("--parallel 0", "at least 1"),
        ("--parallel 100000", "n_seq_max"),
    ],
)
def test_what_can_not_run_says_so_in_one_line(
    files: Files, args: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    files.write(make_lines(1))
    (files.folder / "notes.txt").write_text("some notes\n")
    monkeypatch.chdir(files.folder)
    try:
        status = main(["generate", "--prompts", "in.jsonl", *args.split()])
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert (files.folder / "notes.txt").read_text() == "some notes\n"
