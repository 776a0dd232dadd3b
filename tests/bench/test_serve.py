"""The serve bench: same work for every arm, failures that end no other, nothing left running."""

import dataclasses
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import serve, start
from bench.arms import InProcess
from bench.case import Case
from bench.serve import ServeArm, measure, our_server
from bench.serving import Clients, EngineClients, HttpClients, ServerProcess
from tests.bench.conftest import Run, options

FAKE = """
import argparse, time
from bench.endpoint import serve
parser = argparse.ArgumentParser()
parser.add_argument("answer")
parser.add_argument("--port", type=int)
options = parser.parse_args()
if options.answer == "ends":
    raise SystemExit("no such model")

def answer(body):
    if options.answer == "refuses":
        raise ValueError("full")
    if options.answer == "hangs":
        time.sleep(60)
    return {"tokens_evaluated": len(body["prompt"]), "tokens_predicted": 1}

serve(answer, options.port)
"""


@pytest.fixture(scope="module")
def inside(case: Case) -> InProcess:
    return InProcess(case.model, 0)


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """A server process that gives a wrong answer, or none."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)

    def start(answer: str) -> ServerProcess:
        return ServerProcess([sys.executable, str(script), answer], tmp_path / "fake.log")

    return start


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_engine_serves_the_same_with_and_without_http(
    case: Case, inside: InProcess, tmp_path: Path
) -> None:
    opened: list[HttpClients] = []

    def over_http(case: Case) -> HttpClients:
        process = ServerProcess(our_server(case), tmp_path / "log")
        opened.append(HttpClients(case, inside.model.n_vocab, process, 60.0))
        return opened[-1]

    arms = [
        ServeArm("engine", "", lambda case: EngineClients(case, inside.model, 60.0)),
        ServeArm("engine-http", "", over_http),
    ]
    cases = [dataclasses.replace(case, pl=pl, kv_unified=pl == 3) for pl in (1, 3)]
    rows = list(measure(arms, cases, inside, options()))
    assert [(row.pl, row.repeat, row.arm, row.error) for row in rows] == [
        (pl, repeat, name, "")
        for pl in (1, 3)
        for repeat, names in enumerate((("engine", "engine-http"), ("engine-http", "engine")))
        for name in names
    ]
    for row in rows:
        assert row.speed_tg == pytest.approx(5 * row.pl / row.t_tg)
        assert row.t_pp == 0
        assert 0 < row.detail["e2el_p50_s"] <= row.detail["e2el_max_s"] <= row.t_tg
    assert not any(alive(pid) for clients in opened for pid in clients.pids)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("short", r"WrongAnswer: \(prompt, generated\) tokens were \(9, 1\), asked were \(9, 5\)"),
        ("refuses", "WrongAnswer: status 500.*full"),
        ("ends", r"ToolError: ended with 1: no such model"),
        ("hangs", "ReadTimeout"),
    ],
)
def test_a_server_that_fails_leaves_a_row_and_the_others_go_on(
    case: Case, inside: InProcess, fake: Any, answer: str, message: str
) -> None:
    limit_s = 1.0 if answer == "hangs" else 60.0
    arms = [
        ServeArm(
            "broken",
            "",
            lambda case: HttpClients(case, inside.model.n_vocab, fake(answer), limit_s),
        ),
        ServeArm("absent", "", lambda case: pytest.fail("opened"), package="no_such_package"),
        ServeArm("engine", "", lambda case: EngineClients(case, inside.model, 60.0)),
    ]
    broken, absent, good = measure(arms, [case], inside, options(repeats=1))
    assert broken.arm == "broken"
    assert broken.t_tg == broken.speed_tg == 0
    assert re.match(message, broken.error)
    assert absent.error == "NotInstalled: absent is not installed"
    assert good.error == ""
    assert good.t_tg > 0


def test_nothing_runs_on_when_the_bench_is_left(case: Case, inside: InProcess, fake: Any) -> None:
    started: list[ServerProcess] = []

    class Asked(Clients):
        """Work that takes no server's time, of a server that waits."""

        def __init__(self, case: Case) -> None:
            super().__init__(case, inside.model.n_vocab)
            started.append(fake("hangs"))

        def ask(self, prompt: Any, tokens: int, seed: int) -> None: ...

        def close(self, *, now: bool = False) -> None:
            started[-1].stop()

    arms = [ServeArm("one", "", Asked)]
    rows = measure(arms, [case], inside, options(repeats=5))
    next(rows)
    assert alive(started[0].pid)
    with pytest.raises(KeyboardInterrupt):
        rows.throw(KeyboardInterrupt())
    assert not alive(started[0].pid)
    assert list(measure(arms, [case], inside, options(budget=0.0))) == []
    assert len(started) == 1


def test_one_answer_that_is_wrong_frees_the_clients_that_still_wait(
    case: Case, inside: InProcess, fake: Any
) -> None:
    process = fake("hangs")
    clients = HttpClients(case, inside.model.n_vocab, process, 30.0)
    ask = clients.ask

    def one_fails(prompt: Any, tokens: int, seed: int) -> None:
        if seed == case.seed:
            raise RuntimeError("first")
        ask(prompt, tokens, seed)

    clients.ask = one_fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="first"):
        clients.run(0)
    assert not alive(process.pid)


def test_every_arm_is_there_and_says_whether_http_is_in_its_time(inside: InProcess) -> None:
    arms = serve.all_arms(inside, 60.0)
    names = [arm.name for arm in arms]
    assert {target.text.split(" over ")[1].split(",")[0] for target in serve.TARGETS} <= set(names)
    for arm in arms:
        assert "HTTP" in arm.includes or "http" in arm.includes


def test_a_start_is_measured_until_there_is_text(run: Run) -> None:
    status, (record,) = run("start", "--quick", "--threads", "1")
    assert status == 0
    detail = record.detail
    assert 0 < detail["healthy_s"] < detail["first_token_s"] == record.t_tg
    assert detail["cpu_s"] > 0
    slow = dataclasses.replace(record, model_filename="SmolLM2-135M-Instruct.Q4_1.gguf", n_cores=2)
    assert start.TARGETS[0].measured([slow]) == detail["first_token_s"]
    assert start.TARGETS[0].measured([record]) is None
