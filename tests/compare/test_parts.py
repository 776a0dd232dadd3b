"""What the arms of `pyllamabatch compare` are made of: loops, figures, the held engine, workers and
their router."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.compare.arms import Arm, ArmError, answer, chosen
from pyllamabatch.compare.case import Case, GgufFile, sampling_params
from pyllamabatch.compare.child import Child, ChildFailed, interrupts_later
from pyllamabatch.compare.clients import at_once
from pyllamabatch.compare.job import Job, Outcome, Served, figures, poisson_arrivals
from pyllamabatch.compare.loop import CHAIN, FUSED, loop_of
from pyllamabatch.compare.processes import Processes, completion
from pyllamabatch.compare.run import Plan
from pyllamabatch.compare.scenario import met, ratios
from pyllamabatch.compare.with_engine import StartTogether
from pyllamabatch.llama.context import Context
from pyllamabatch.models import default_model_path
from pyllamabatch.report.records import Record
from pyllamabatch.scheduler import Limits, SequenceView, StepView, sarathi

SECONDS = 60.0


def case_of(pl: int = 2, **values: object) -> Case:
    model = GgufFile(Path(default_model_path()))
    given = {"pp": 12, "tg": 6, "n_threads": 1, "sampling": "greedy", "seed": 3} | values
    return Case(model=model, pl=pl, **given)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default() as model:
        yield model


# -- loops --


def likeliest(model: Model, prompt: list[int], n: int) -> list[int]:
    tokens: list[int] = []
    with Context(model, n_ctx=256, n_threads=1) as context:
        batch = context.batch()
        batch.extend(prompt, 0, 0)
        for i in range(n):
            context.decode(batch)
            tokens.append(int(np.argmax(context.logits())))
            batch.clear()
            batch.extend(tokens[-1:], len(prompt) + i, 0)
    return tokens


@pytest.mark.parametrize("sampler", [CHAIN, FUSED])
@pytest.mark.parametrize("n_batch", [512, 16])
def test_a_loop_samples_what_each_sequence_gets_alone(
    model: Model, sampler: str, n_batch: int
) -> None:
    """Also when prompts take several batches, and one comes while another decodes."""
    case = case_of(n_batch=n_batch, pp=40)
    prompts = case.prompts(model.n_vocab).tolist()
    if sampler == FUSED:
        with Engine(model, n_seq_max=2, n_ctx=512, n_threads=1) as engine:
            params = sampling_params("greedy", 3, 8)
            expected = [result.tokens for result in engine.generate(prompts, params)]
    else:  # which may sample the end of text, and go on
        expected = [likeliest(model, prompt, 8) for prompt in prompts]
    found: list[list[int]] = [[], []]
    with Context(model, **case.context_params()) as context:
        loop = loop_of(sampler, context, "greedy", 1)
        loop.start(0, prompts[0], 3)
        while len(found[1]) < 8:
            for seq, token in loop.step().items():
                found[seq].append(token)
            if len(found[0]) == 2 and not found[1] and not loop.prefilling:
                loop.start(1, prompts[1], 4)
            if len(found[0]) == 8:
                loop.stop(0)
        loop.stop(1)
        assert loop.idle
        loop.close()
    assert [tokens[:8] for tokens in found] == expected


def test_held_sequences_wait_for_a_prompt(model: Model) -> None:
    case = case_of(pp=30, n_batch=16)
    with Context(model, **case.context_params()) as context:
        loop = loop_of(CHAIN, context, "greedy")
        loop.start(0, [5] * 10, 1)
        loop.start(1, [6] * 30, 1)
        sampled = []
        while loop.prefilling:
            sampled += list(loop.step(decode=False))
        loop.close()
    assert sampled == [0, 1]  # each once, though sequence 0 was ready two batches earlier


# -- figures --


def outcome() -> Outcome:
    """Two requests; the first tokens at 1 and 2, the time starts at 3."""
    one = Served(0.0, [1.0, 4.0, 5.0, 7.0])
    two = Served(0.0, [2.0, 5.0, 7.0, 13.0])
    return Outcome(3.0, [one, two])


def test_the_figures_of_a_burst() -> None:
    found = figures(Job("burst", 0, 4, (0.0, 0.0)), outcome())
    assert (found.elapsed, found.error) == (10.0, "")
    assert found.detail["total_tokens_sampled"] == 6
    assert found.detail["fastest_tokens_per_second"] == 3 / 4
    assert found.detail["slowest_tokens_per_second"] == 3 / 10
    assert found.detail["per_sequence_tokens_per_second"] == pytest.approx((0.75 + 0.3) / 2)
    assert found.detail["fairness"] == pytest.approx(0.4)
    assert found.detail["ttft_p50_s"] == 1.5
    assert found.detail["itl_p50_s"] == np.percentile([3, 1, 2, 3, 2, 6], 50)
    assert found.detail["itl_p99_s"] == np.percentile([3, 1, 2, 3, 2, 6], 99)


def test_elsewhere_the_first_tokens_count() -> None:
    came_late = Outcome(0.0, [Served(0.0, [1.0, 2.0]), Served(4.0, [6.0, 8.0])])
    found = figures(Job("poisson", 0, 2, (0.0, 4.0)), came_late)
    assert (found.elapsed, found.detail["total_tokens_sampled"]) == (8.0, 4)
    assert found.detail["fastest_tokens_per_second"] == 1.0
    assert found.detail["slowest_tokens_per_second"] == 0.5
    assert found.detail["ttft_p99_s"] == pytest.approx(1.99)


def test_a_request_that_ends_early_is_an_error() -> None:
    short = outcome()
    del short.served[1].times[2:]
    short.served[1].error = "llama_decode says no"
    found = figures(Job("burst", 0, 4, (0.0, 0.0)), short)
    assert found.error == "1 of 2 requests failed, after 2 of 4 tokens: llama_decode says no"
    assert (found.detail["completed"], found.detail["total_tokens_sampled"]) == (1, 4)
    nothing = figures(Job("burst", 0, 4, (0.0,)), Outcome(3.0, [Served()]))
    assert (nothing.elapsed, nothing.detail["completed"]) == (0.0, 0)
    assert nothing.error


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
    same = Job("ds4", 1, 6, (0.0,) * 3).prompts(case, 100)
    assert (same == same[0]).all()
    other = Job("burst", 1, 6, (0.0,) * 3).prompts(case, 100)
    assert not (other == other[0]).all()
    assert not (other == Job("burst", 2, 6, (0.0,) * 3).prompts(case, 100)).all()


def test_cases_and_jobs_survive_the_pipe() -> None:
    case, job = case_of(2, n_cells=300, kv_unified=True), Job("poisson", 1, 6, (0.0, 1.5))
    assert Case.from_json(case.to_json()) == case
    assert Job.from_json(job.to_json()) == job
    assert Outcome.from_json(outcome().to_json()) == outcome()


# -- what runs when --


def test_arms_take_turns_and_single_runs_once() -> None:
    arms = chosen(["single", "contexts", "engine"], [CHAIN, FUSED])
    names = ["single", "single fused", "contexts", "contexts fused", "engine"]
    assert [arm.name for arm in arms] == names
    assert [arm.name for arm in chosen(["engine", "shared"], [FUSED])] == ["engine", "shared fused"]
    plan = Plan("burst", arms, [case_of(2), case_of(4)], tokens=7, repeats=2)
    runs = [(case.pl, repeat, arm.name) for case, repeat, arm in plan.runs()]
    first = [(1 if "single" in name else 2, 0, name) for name in names]
    assert runs[:10] == first + [(pl, 1, name) for pl, _, name in first[::-1]]
    assert runs[10:13] == [(4, 0, name) for name in names[2:]]
    assert len(runs) == 16


def test_threads_of_an_arm() -> None:
    case = case_of(3, n_threads=8)
    assert Arm("contexts").case_of(case, False).n_threads == 2
    assert Arm("processes").case_of(case_of(16, n_threads=8), False).n_threads == 1
    assert Arm("contexts").case_of(case, True).n_threads == 8
    assert Arm("shared").case_of(case, False).n_threads == 8


def gate_row(arm: str, pl: int, speed: float) -> Record:
    values: dict[str, Any] = dict.fromkeys(Record.__dataclass_fields__, 0)
    values |= {"detail": {}, "error": ""}
    values |= {"bench": "compare", "arm": arm, "pl": pl, "speed_tg": speed, "run_id": "r"}
    return Record(**values)


def test_a_gate_holds_at_every_number_of_sequences() -> None:
    rows = [gate_row("contexts", n, 10.0) for n in (2, 4)]
    rows += [gate_row("engine", 2, 15.0), gate_row("engine", 4, 13.0), gate_row("single", 1, 1.0)]
    for row in rows:
        row.detail["completed"] = row.pl
    found = ratios(rows, "engine", "contexts")
    assert found == {("compare", 2): 1.5, ("compare", 4): pytest.approx(1.3)}
    assert met(found, 1.3 - 1e-9)
    assert not met(found, 1.4)
    assert not met(ratios(rows, "shared", "contexts"), 0.1)
    assert not met({}, 0.1)


# -- the engine's start --


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


def test_nobody_decodes_before_all_have_their_first_token() -> None:
    policy = StartTogether(sarathi())
    assert set(policy.plan(view(1, 1)).tokens) == {0, 10}  # not told to hold
    policy.hold(3)
    waiting = policy.plan(view(2, 0))  # the third has not come yet
    assert not waiting.tokens
    assert waiting.wake is not None
    assert set(policy.plan(view(2, 1)).tokens) == {10}
    assert policy.begin == 0.0
    assert set(policy.plan(view(3, 0)).tokens) == {0, 1, 2}
    assert policy.begin > 0.0
    assert set(policy.plan(view(1, 1)).tokens) == {0, 10}


def test_one_that_fails_at_its_prompt_does_not_hold_the_others() -> None:
    policy = StartTogether(sarathi())
    policy.hold(3)
    assert set(policy.plan(view(2, 1)).tokens) == {10}
    assert set(policy.plan(view(2, 0)).tokens) == {0, 1}


# -- processes --


def test_a_child_that_ends_says_why() -> None:
    with Child("pyllamabatch.compare.host") as child:
        child.tell("no JSON")
        with pytest.raises(ChildFailed, match=r"ended with 1\n(.*\n)*.*JSONDecodeError"):
            child.answer(SECONDS)
        with pytest.raises(ChildFailed, match="ended with 1"):
            child.answer(SECONDS)
    assert child.ended()


def test_a_child_that_does_not_answer_is_not_waited_for() -> None:
    with Child("pyllamabatch.compare.host") as child, pytest.raises(ChildFailed, match="no answer"):
        child.answer(0.05)
    assert child.ended()


def test_an_interrupt_waits_until_the_process_is_somebody_s() -> None:
    done: list[str] = []

    def start() -> None:
        with interrupts_later():
            signal.raise_signal(signal.SIGINT)
            done.append("noted")
        done.append("too late")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["noted"]


@pytest.fixture
def workers() -> Iterator[list[HTTPServer]]:
    """Two that answer with their number."""
    servers = []
    for i in range(2):

        class Handler(BaseHTTPRequestHandler):
            number = i

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()
                for values in ({"token": self.number}, {"done": body["n_predict"]}):
                    self.wfile.write(json.dumps(values).encode() + b"\n")

            def log_message(self, format: str, *arguments: object) -> None: ...

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    yield servers
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_router_gives_each_worker_its_turn(workers: list[HTTPServer]) -> None:
    with Child("pyllamabatch.compare.router") as router:
        router.tell(json.dumps({"ports": [server.server_port for server in workers]}))
        port = answer(router, SECONDS)["port"]
        lines = [list(completion(port, {"n_predict": i}, SECONDS)) for i in range(5)]
        assert lines == [[{"token": i % 2}, {"done": i}] for i in range(5)]
        _, many = at_once(
            8,
            lambda i, began: next(completion(port, {"n_predict": i}, SECONDS))["token"],
            router.stop,
        )
        assert sorted(many) == [0] * 4 + [1] * 4


def test_a_worker_that_has_gone_is_an_error_and_not_a_hang(workers: list[HTTPServer]) -> None:
    with Child("pyllamabatch.compare.router") as router:
        with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as gone:
            ports = [gone.server_port, workers[1].server_port]
        router.tell(json.dumps({"ports": ports}))
        port = answer(router, SECONDS)["port"]
        with pytest.raises(ArmError, match="worker 0 does not answer: ConnectionRefusedError"):
            list(completion(port, {"n_predict": 1}, SECONDS))
        assert list(completion(port, {"n_predict": 1}, SECONDS)) == [{"token": 1}, {"done": 1}]


@pytest.fixture
def processes() -> Iterator[Processes]:
    arm = Processes(case_of(2, n_cells=50_000), CHAIN, 0, False)
    arm.load()
    yield arm
    arm.close()


def test_a_worker_goes_on_with_what_it_kept_and_has_its_own_folder(processes: Processes) -> None:
    ask = {"prompt": list(range(20, 40)), "n_predict": 6, "seed": 1}

    def tokens(**values: object) -> tuple[list[int], int]:
        *lines, last = completion(processes.port, ask | values, SECONDS)
        return [line["token"] for line in lines], last["n_computed"]

    whole, computed = tokens()
    assert (len(whole), computed) == (6, 20)
    tokens()  # the other worker's turn
    first, _ = tokens(n_predict=2, keep=True, cache_prompt=True)
    tokens()
    rest, computed = tokens(prompt=[], n_predict=4)
    assert (first + rest, computed) == (whole, 0)
    assert tokens(cache_prompt=True) == (whole, 20)  # this one's folder has nothing yet
    assert tokens(cache_prompt=True) == (whole, 1)  # that of the first one has


def test_a_worker_that_dies_in_a_run_ends_the_run(processes: Processes) -> None:
    job = Job("ds4", 0, 40_000, (0.0, 0.0))
    killer = threading.Timer(1.0, os.kill, (processes.pids[1], signal.SIGKILL))
    killer.start()
    done = processes.run(job, limit_s=2.0)
    killer.join()
    assert sorted(len(one.times) < 40_000 for one in done.served) == [True, True]
    ended = f"process {processes.pids[1]} ended with -9"
    assert next(one.error for one in done.served if "ended early" in one.error).endswith(ended)
    assert sum("not done after 2 s" in one.error for one in done.served) == 1
    assert math.isfinite(figures(job, done).elapsed)
