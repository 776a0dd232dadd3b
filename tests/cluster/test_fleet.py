"""Two replicas of the embedded model on Ray Serve, on this machine: pytest -m ray tests/cluster."""

import json
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from tests.support.fleet import CHAT, SERVE, TEXT, Asked, Fleet, endless, started
from tests.support.served import ANSWER, SUM, SUM_CHAT, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with started([*SERVE, "--replicas", "2"]) as (pid, line):
        yield Fleet(line.split()[1].rstrip(","), psutil.Process(pid))


def test_answers_are_those_of_a_server(fleet: Fleet) -> None:
    answer = fleet.client.post(CHAT, json=SUM_CHAT).json()
    assert answer["choices"][0]["message"]["content"] == ANSWER
    with fleet.client.stream("POST", CHAT, json={**SUM_CHAT, "stream": True}) as response:
        *events, done = [line[6:] for line in response.iter_lines() if line]
    assert done == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"].get("content") for event in events]
    assert "".join(delta or "" for delta in deltas) == ANSWER
    refused = fleet.client.post(TEXT, json={"promt": SUM})
    assert refused.status_code == 400
    assert "prompt" in refused.json()["error"]["message"]
    assert fleet.client.get("/health").json() == {"status": "ok"}
    assert fleet.client.get("/v1/models").json()["data"][0]["id"] == "default.gguf"
    assert fleet.client.get("/v1/models/default.gguf").json()["id"] == "default.gguf"


def test_requests_are_spread_and_their_prefixes_found(fleet: Fleet) -> None:
    """Eight at once on two engines of four slots: none waits. Then each conversation goes on."""
    asked = [Asked(fleet, endless(i, 200)) for i in range(8)]
    until(lambda: fleet.metric("vllm:num_requests_running") == 8, 60)
    assert [one.end for one in asked] == ["[DONE]"] * 8
    systems = [f"Animal {i} is fond of giraffes. " * 12 for i in range(4)]
    for turn in ("zebras", "lions", "giraffes"):
        before = fleet.metric("vllm:prefix_cache_hits_total")
        for system in systems:
            body = {"prompt": system + turn, "max_tokens": 2}
            assert fleet.client.post(TEXT, json=body).status_code == 200
        found = fleet.metric("vllm:prefix_cache_hits_total") - before
        assert turn == "zebras" or found > 4 * 50


def test_what_one_replica_says_names_it(fleet: Fleet) -> None:
    slots = fleet.client.get("/slots").json()
    assert [slot["id"] for slot in slots] == [0, 1, 2, 3] * 2
    names = {slot["replica"] for slot in slots}
    assert len(names) == 2
    steps = [fleet.client.get("/steps").headers["x-replica"] for _ in range(3)]
    assert set(steps) == {steps[0]} <= names
    assert fleet.client.post("/lora-adapters", json=[]).status_code == 501


def test_who_leaves_is_cancelled(fleet: Fleet) -> None:
    ended = 'vllm:request_success_total{finished_reason="cancelled"}'
    before = fleet.metric(ended)
    with fleet.client.stream("POST", TEXT, json={**endless(1), "stream": True}) as response:
        next(response.iter_lines())
    until(lambda: fleet.metric(ended) == before + 1, 60)
    assert fleet.metric("vllm:num_requests_running") == 0


def assert_one_answer(asked: Asked, n_tokens: int) -> None:
    """Its events are of one answer, which is whole unless it was lost."""
    events = [json.loads(event) for event in asked.events if event != "[DONE]"]
    assert len({event["id"] for event in events if "error" not in event}) == 1
    if asked.end == "[DONE]":
        ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
        assert [end for end in ends if end] == ["length"]
        assert events[-1]["usage"]["completion_tokens"] == n_tokens


def test_a_replica_that_is_killed(fleet: Fleet) -> None:
    """Its streams end with an error that says so, those of the other one go on, a new one takes its
    place; what had no token yet is computed by another one."""
    counted = {"stream_options": {"include_usage": True}}
    asked = [Asked(fleet, endless(i) | counted) for i in range(6)]
    until(lambda: all(len(one.events) > 3 for one in asked), 60)
    late = [Asked(fleet, endless(100 + i, 20) | counted) for i in range(4)]
    victim = fleet.replicas()[0]
    victim.kill()
    ends = [one.end for one in asked]
    for one in asked:
        assert_one_answer(one, 400)
    lost = [json.loads(end)["error"]["code"] for end in ends if end != "[DONE]"]
    assert 0 < len(lost) < 6
    assert set(lost) == {"replica_lost"}
    assert [one.end for one in late] == ["[DONE]"] * 4
    for one in late:
        assert_one_answer(one, 20)
    until(lambda: len(fleet.replicas()) == 2 and victim not in fleet.replicas(), 120)
    until(lambda: fleet.client.get("/health").status_code == 200, 120)
    assert fleet.metric("vllm:num_requests_running") == 0


def test_a_body_that_is_too_large(fleet: Fleet) -> None:
    big = {"prompt": "a" * 40 * 2**20}
    assert fleet.client.post(TEXT, json=big).status_code == 413


def test_a_replica_that_hangs(fleet: Fleet) -> None:
    """It is as one that died, before clients have given up."""
    victim = fleet.replicas()[0]
    victim.suspend()
    try:
        asked = [Asked(fleet, endless(200 + i, 20)) for i in range(8)]
        assert [one.end for one in asked] == ["[DONE]"] * 8
    finally:
        with suppress(psutil.NoSuchProcess):
            victim.resume()
    until(lambda: len(fleet.replicas()) == 2 and victim not in fleet.replicas(), 120)
