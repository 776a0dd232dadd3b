"""What the arms of `pyllamabatch compare` are made of: loops, figures, the held engine, processes,
clients and the router."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Context, Model
from pyllamabatch.compare import run
from pyllamabatch.compare.arms import ARMS, threads_of
from pyllamabatch.compare.case import Arm, Case, ModelFile, request_body
from pyllamabatch.compare.child import ArmError, Child
from pyllamabatch.compare.clients import ask_all
from pyllamabatch.compare.completion import Client
from pyllamabatch.compare.hosted import StartTogether
from pyllamabatch.compare.loop import Loop
from pyllamabatch.compare.processes import Processes
from pyllamabatch.compare.round_robin import route
from pyllamabatch.compare.run import Experiment
from pyllamabatch.compare.scenario import gate
from pyllamabatch.compare.workload import (
    RequestTimes,
    Timings,
    Workload,
    failure,
    figures,
    poisson_arrivals,
)
from pyllamabatch.models import default_model_path
from pyllamabatch.raw import lib
from pyllamabatch.report import facts
from pyllamabatch.scheduler import Limits, SequenceView, StepView, sarathi
from tests.support.decoding import likeliest
from tests.support.made_up_rows import row

SECONDS = 60.0


def case_of(pl: int = 2, **values: object) -> Case:
    model = ModelFile(Path(default_model_path()))
    given = {"pp": 12, "tg": 6, "n_threads": 1, "sampling": "greedy", "seed": 3} | values
    return Case(model=model, pl=pl, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_batch", [512, 16])
def test_a_loop_samples_what_each_sequence_gets_alone(embedded_model: Model, n_batch: int) -> None:
    """Also when prompts take several batches, and one comes while another decodes."""
    case = case_of(n_batch=n_batch, pp=40)
    prompts = case.prompts(embedded_model.n_vocab).tolist()
    with Context(embedded_model, n_ctx=256, n_threads=1) as context:
        expected = [likeliest(context, prompt, 8) for prompt in prompts]
    found: list[list[int]] = [[], []]
    with Context(embedded_model, **case.context_params()) as context:
        loop = Loop(context, "greedy")
        loop.start(0, prompts[0], 3)
        while len(found[1]) < 8:
            for seq, token in loop.step().items():
                found[seq].append(token)
            if len(found[0]) == 2 and not found[1] and not loop.prefilling:
                loop.start(1, prompts[1], 4)
            if len(found[0]) == 8:
                loop.stop(0)
        loop.close()
    assert [tokens[:8] for tokens in found] == expected


def test_held_sequences_wait_for_a_prompt(embedded_model: Model) -> None:
    case = case_of(pp=30, n_batch=16)
    with Context(embedded_model, **case.context_params()) as context:
        loop = Loop(context, "greedy")
        loop.start(0, [5] * 10, 1)
        loop.start(1, [6] * 30, 1)
        sampled = []
        while loop.prefilling:
            sampled += list(loop.step(decode=False))
        loop.close()
    assert sampled == [0, 1]  # each once, though sequence 0 was ready two batches earlier


def timings() -> Timings:
    """Two requests; the first tokens at 1 and 2, the time starts at 3."""
    one = RequestTimes(0.0, [1.0, 4.0, 5.0, 7.0])
    two = RequestTimes(0.0, [2.0, 5.0, 7.0, 13.0])
    return Timings(3.0, [one, two])


def test_the_figures_of_a_burst() -> None:
    workload = Workload("burst", 0, 4, (0.0, 0.0))
    found = figures(workload, timings())
    assert failure(workload, timings()) == ""
    assert (found["elapsed_seconds"], found["total_tokens_sampled"]) == (10.0, 6)
    assert found["fastest_tokens_per_second"] == 3 / 4
    assert found["slowest_tokens_per_second"] == 3 / 10
    assert found["per_sequence_tokens_per_second"] == pytest.approx((0.75 + 0.3) / 2)
    assert found["fairness"] == pytest.approx(0.4)
    assert found["ttft_p50_s"] == 1.5
    assert found["itl_p50_s"] == np.percentile([3, 1, 2, 3, 2, 6], 50)
    assert found["itl_p99_s"] == np.percentile([3, 1, 2, 3, 2, 6], 99)


def test_elsewhere_the_first_tokens_count() -> None:
    came_late = Timings(0.0, [RequestTimes(0.0, [1.0, 2.0]), RequestTimes(4.0, [6.0, 8.0])])
    found = figures(Workload("poisson", 0, 2, (0.0, 4.0)), came_late)
    assert (found["elapsed_seconds"], found["total_tokens_sampled"]) == (8.0, 4)
    assert found["fastest_tokens_per_second"] == 1.0
    assert found["slowest_tokens_per_second"] == 0.5
    assert found["ttft_p99_s"] == pytest.approx(1.99)


def test_a_request_that_ends_early_is_an_error() -> None:
    workload, short = Workload("burst", 0, 4, (0.0, 0.0)), timings()
    del short.requests[1].times[2:]
    short.requests[1].error = "llama_decode says no"
    assert failure(workload, short) == (
        "1 of 2 requests failed, after 2 of 4 tokens: llama_decode says no"
    )
    found = figures(workload, short)
    assert (found["completed"], found["total_tokens_sampled"]) == (1, 4)
    nothing = Timings(3.0, [RequestTimes()])
    found = figures(Workload("burst", 0, 4, (0.0,)), nothing)
    assert (found["elapsed_seconds"], found["completed"]) == (0.0, 0)
    assert failure(workload, nothing)


def test_arrivals_are_those_of_a_poisson_process() -> None:
    arrivals = poisson_arrivals(4001, 5.0, [1, 2])
    assert arrivals == poisson_arrivals(4001, 5.0, [1, 2])
    assert arrivals != poisson_arrivals(4001, 5.0, [1, 3])
    assert arrivals[0] == 0.0
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 5, rel=0.08)  # as large as the mean: exponential


def test_prompts_are_equal_where_the_protocol_says_so() -> None:
    case = case_of(3)
    same = Workload("ds4", 1, 6, (0.0,) * 3).prompts(case, 100)
    assert (same == same[0]).all()
    other = Workload("burst", 1, 6, (0.0,) * 3).prompts(case, 100)
    assert not (other == other[0]).all()
    assert not (other == Workload("burst", 2, 6, (0.0,) * 3).prompts(case, 100)).all()


def test_clients_of_a_burst_wait_for_each_other_after_the_first_token() -> None:
    events: list[str] = []

    def ask(k: int, i: int) -> Iterator[int]:
        for token in range(3):
            events.append(f"{token}")
            yield token

    def go() -> None:
        events.append("go")
        let_go.append(time.perf_counter())

    let_go: list[float] = []
    timings = ask_all(Workload("burst", 0, 3, (0.0,) * 3), 3, ask, let_go=go)
    assert sorted(events[:3]) == ["0"] * 3
    assert events[3] == "go"
    assert timings.begin <= let_go[0]
    for one in timings.requests:
        assert one.times[0] <= timings.begin <= one.times[1]


def test_a_client_that_fails_ends_the_burst_of_the_others() -> None:
    def ask(k: int, i: int) -> Iterator[int]:
        if i == 1:
            raise ArmError("broken")
        yield from range(3)

    one, two = ask_all(Workload("burst", 0, 3, (0.0,) * 2), 2, ask).requests
    assert (two.error, two.times) == ("broken", [])
    assert (one.error, len(one.times)) == ("another request failed before the time started", 1)


def test_a_request_is_asked_once_and_not_before_it_comes() -> None:
    asked: list[tuple[int, float]] = []

    def ask(k: int, i: int) -> Iterator[int]:
        asked.append((i, time.perf_counter()))
        yield 0

    arrivals = (0.0, 0.01, 0.02, 0.04)
    timings = ask_all(Workload("poisson", 0, 1, arrivals), 2, ask)
    assert sorted(i for i, _ in asked) == [0, 1, 2, 3]
    for (_, moment), one, arrival in zip(sorted(asked), timings.requests, arrivals, strict=True):
        assert one.arrived == timings.begin + arrival <= moment


def test_arms_take_turns_and_single_runs_once() -> None:
    names = ["single", "contexts", "engine"]
    arms = [ARMS[name] for name in names]
    experiment = Experiment("burst", arms, [case_of(2), case_of(4)], tokens=7, repeats=2)
    runs = [(case.pl, repeat, arm.name) for case, repeat, arm in experiment.runs()]
    first = [(1 if name == "single" else 2, 0, name) for name in names]
    assert runs[:6] == first + [(pl, 1, name) for pl, _, name in first[::-1]]
    assert runs[6:] == [(4, 0, "contexts"), (4, 0, "engine"), (4, 1, "engine"), (4, 1, "contexts")]


def test_arms_that_stay_loaded_are_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside `single`, which has one sequence."""
    events: list[str] = []

    class Opened:
        def __init__(self, arm: Arm, case: Case, *_: Any) -> None:
            self.name, self.pids = f"{arm.name} {case.pl}", [os.getpid()]
            events.append(self.name)

        def load(self) -> None: ...

        def run(self, workload: Workload, limit_s: float) -> Timings:
            times = [float(i + 1) for i in range(workload.tokens)]
            return Timings(0.0, [RequestTimes(0.0, list(times)) for _ in workload.arrivals])

        def close(self) -> None:
            events.append(f"no {self.name}")

    monkeypatch.setattr(run, "opened", Opened)
    arms = [ARMS[name] for name in ("single", "contexts")]
    cases = [case_of(2), case_of(4)]
    experiment = Experiment("burst", arms, cases, tokens=7, repeats=3, keep_loaded=True)
    about = facts.build("") | {"model_type": "", "model_size": 0, "model_n_params": 0}
    assert len(list(run.measure(experiment, about))) == 9
    assert events == [
        *("single 1", "contexts 2", "no contexts 2", "no single 1"),
        *("contexts 4", "no contexts 4"),
    ]


@pytest.mark.parametrize(
    ("arm", "pl", "oversubscribe", "each"),
    [
        ("contexts", 3, False, 2),
        ("processes", 16, False, 1),
        ("contexts", 3, True, 8),
        ("shared", 3, False, 8),
    ],
)
def test_threads_of_an_arm(arm: str, pl: int, oversubscribe: bool, each: int) -> None:
    assert threads_of(ARMS[arm], case_of(pl, n_threads=8), oversubscribe) == each


def test_a_gate_holds_at_every_number_of_sequences() -> None:
    rows = [row("contexts", n, 10.0) for n in (2, 4)]
    rows += [row("engine", 2, 15.0), row("engine", 4, 13.0), row("single", 1, 1.0)]
    judged = gate(rows, "engine", 1.4)
    assert [(one["num_sequences"], one["ratio"], one["met"]) for one in judged] == [
        (2, pytest.approx(1.5), True),
        (4, pytest.approx(1.3), False),
    ]
    assert [one["met"] for one in gate(rows, "engine", 1.3 - 1e-9)] == [True, True]
    assert [one["met"] for one in gate(rows, "shared", 0.1)] == [False, False]
    assert gate([], "engine", 0.1) == []


def view(decoding: int, prefilling: int) -> StepView:
    ready = [
        SequenceView(id=i, arrival=0.0, n_prompt=4, computed=4, generated=1, running=True)
        for i in range(decoding)
    ]
    late = [
        SequenceView(id=10 + i, arrival=0.0, n_prompt=4, computed=2, running=True)
        for i in range(prefilling)
    ]
    return StepView.of(Limits(64, 64, 8, 1024, 128), ready + late)


def advanced(policy: StartTogether, decoding: int, prefilling: int) -> set[int]:
    seen = view(decoding, prefilling)
    return set(policy.plan(seen).advances(seen))


def test_no_sequence_decodes_before_they_are_let_go() -> None:
    policy = StartTogether(sarathi())
    assert advanced(policy, 1, 1) == {0, 10}  # not told to hold
    policy.held = True
    waiting = policy.plan(view(2, 0))
    assert not waiting.tokens
    assert not waiting.decode_all
    assert waiting.wake is not None
    assert advanced(policy, 2, 1) == {10}
    policy.let_go()
    assert advanced(policy, 3, 0) == {0, 1, 2}


def echo(pipe: Connection[Any, Any], add: int) -> None:
    while True:
        pipe.send(pipe.recv() + add)


def abort(pipe: Connection[Any, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lib.ggml_abort(b"a.c", 1, b"gone")


def test_a_child_does_what_it_is_told() -> None:
    with Child() as child:
        child.send((echo, 3))
        for i in range(3):
            child.send(i)
            assert child.receive(SECONDS) == i + 3
        child.send("text")
        with pytest.raises(ArmError, match="TypeError: can only concatenate str"):
            child.receive(SECONDS)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_child_that_ends_says_why() -> None:
    with Child() as child:
        child.send((abort,))
        for _ in range(2):
            with pytest.raises(ArmError, match=r"ended with -6\n(.*\n)*.*gone"):
                child.receive(SECONDS)


def test_a_child_that_does_not_answer_is_not_waited_for() -> None:
    with Child() as child, pytest.raises(ArmError, match="no answer"):
        child.receive(0.05)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def answering(*lines: bytes, status: bytes = b"200 OK") -> socketserver.ThreadingTCPServer:
    """A server that sends this to each client, and ends the connection."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            head = b"".join(iter(self.rfile.readline, b"\r\n"))
            self.rfile.read(int(head.lower().partition(b"content-length: ")[2].split()[0]))
            self.wfile.write(b"HTTP/1.1 %b\r\n\r\n" % status + b"".join(lines))

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[int]:
    """Its port; it serves in the block."""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def event(n: int, **values: object) -> bytes:
    given = {"tokens_predicted": n, "stop": False} | values
    return b"data: " + json.dumps(given).encode() + b"\n\n"


LAST = event(3, stop=True)


def streamed(port: int) -> list[int]:
    with closing(Client(port, SECONDS)) as client:
        return list(client.streamed({}))


def test_tokens_are_counted_as_they_come() -> None:
    """The last event counts those that had no text of their own."""
    with serving(answering(event(1), event(2), event(5, stop=True))) as port:
        assert streamed(port) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("lines", "status", "words"),
    [
        ([event(1)], b"200 OK", "ended early"),
        ([event(1), b'data: {"error": {"message": "no cells"}}\n\n'], b"200 OK", "no cells"),
        ([b'{"error": {"message": "full"}}'], b"429 Too Many Requests", "full"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(
    lines: list[bytes], status: bytes, words: str
) -> None:
    with serving(answering(*lines, status=status)) as port, pytest.raises(ArmError, match=words):
        streamed(port)


def test_the_router_gives_each_server_its_turn_and_a_dead_one_is_no_hang() -> None:
    with (
        socket.socket() as silent,  # bound, so that no other server gets its port
        serving(answering(event(1), event(1, stop=True))) as one,
        serving(answering(LAST)) as three,
        Child() as router,
    ):
        silent.bind(("127.0.0.1", 0))
        router.send((route, [one, three, silent.getsockname()[1]]))
        port = router.receive(SECONDS)
        for _ in range(2):
            assert streamed(port) == [1]
            assert streamed(port) == [1, 2, 3]
            with pytest.raises(ArmError, match=r"Disconnected|Reset|BrokenPipe"):
                streamed(port)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    arm = Processes(case_of(2, n_cells=50_000), 0, False)
    arm.load()
    yield arm
    arm.close()


def test_a_burst_goes_on_where_its_first_tokens_were(processes: Processes) -> None:
    """Greedy: both requests over one connection, to the worker that has the prompt's cells."""
    body = request_body("greedy") | {"prompt": list(range(20, 100)), "return_tokens": True}
    with closing(Client(processes.port, SECONDS)) as client:
        whole = client.whole(body | {"n_predict": 6})["tokens"]
    with closing(Client(processes.port, SECONDS)) as client:
        first = client.whole(body | {"n_predict": 1})["tokens"]
        body["prompt"] += first
        rest = client.whole(body | {"n_predict": 5})
    assert first + rest["tokens"] == whole
    assert rest["timings"]["cache_n"] == 80


def test_a_worker_that_dies_in_a_run_ends_the_run(processes: Processes) -> None:
    workload = Workload("ds4", 0, 40_000, (0.0, 0.0))
    killer = threading.Timer(0.3, os.kill, (processes.pids[1], signal.SIGKILL))
    killer.start()
    done = processes.run(workload, limit_s=2.0)
    killer.join()
    assert sorted(len(one.times) < 40_000 for one in done.requests) == [True, True]
    ended = f"process {processes.pids[1]} ended with -9"
    assert all(one.error.endswith(ended) for one in done.requests)
    assert sum("not done after 2 s" in one.error for one in done.requests) == 1
    assert math.isfinite(figures(workload, done)["elapsed_seconds"])
