"""What a front answers for all replicas, without a cluster: pytest -m ray tests/cluster."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from pyllamabatch import SamplingParams
from pyllamabatch.cli import serve
from pyllamabatch.cluster.call import RoutedCall, Whole, whole_answer
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.server.options import ServerOptions
from tests.server.conftest import served  # noqa: F401  # a fixture
from tests.support.engines import held
from tests.support.served import Served, serving, until

pytestmark = pytest.mark.ray


class Replicas:
    """A handle of these applications. What fails, fails once."""

    def __init__(self, *of: Served, failure: Exception | None = None) -> None:
        self._apps = [one.server.config.app for one in of]
        self._failure = failure

    def broadcast(self, method: str, call: RoutedCall) -> "Replicas":
        assert method == "whole"
        self._call = call
        return self

    async def results_async(self) -> list[Whole]:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        answers = (whole_answer(app, self._call, f"r{i}") for i, app in enumerate(self._apps))
        return await asyncio.gather(*answers)


class Broken:
    """A handle of a replica that fails with this, each time."""

    def __init__(self, failure: Exception) -> None:
        self._failure = failure

    def broadcast(self, method: str, call: RoutedCall) -> "Broken":
        return self

    async def results_async(self) -> list[Whole]:
        raise self._failure


class Pending:
    """A request that is not sent yet, as Ray's router has it."""

    def __init__(self, id: str) -> None:
        self.metadata = SimpleNamespace(internal_request_id=id)
        self.args = [SimpleNamespace(prompt=lambda: np.arange(9, dtype=np.int32), key="")]
        self.future = SimpleNamespace(cancelled=lambda: False)


class Unpicklable(Exception):
    def __reduce__(self) -> Any:
        raise TypeError("no way")


def asked(
    handle: Any, method: str, path: str, options: ServerOptions | None = None, **more: Any
) -> httpx.Response:
    from pyllamabatch.cluster.front import Front

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Front(handle, options or ServerOptions()))
        async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
            return await client.request(method, path, **more)

    return asyncio.run(ask())


def test_slots_are_those_of_all(served: Served, embedded_model: Model) -> None:  # noqa: F811
    with serving(embedded_model, n_seq_max=2) as other:
        response = asked(Replicas(served, other), "GET", "/slots")
    assert response.status_code == 200
    slots = [(slot["replica"], slot["id"]) for slot in response.json()]
    assert slots == [*(("r0", i) for i in range(4)), *(("r1", i) for i in range(2))]
    assert "x-replica" not in response.headers


def test_what_replicas_do_not_show_a_front_does_not(embedded_model: Model) -> None:
    with serving(embedded_model, ServerOptions(metrics=False, slots=False)) as hidden:
        for path in ("/metrics", "/slots"):
            response = asked(Replicas(hidden, hidden), "GET", path)
            assert response.status_code == 501
            assert response.json()["error"]["type"] == "not_supported_error"


def test_pages_of_other_origins_are_told_once(embedded_model: Model) -> None:
    """A browser takes no header twice."""
    options, page = ServerOptions(cors_origins=["*"]), "https://page.example"
    with serving(embedded_model, options) as replica:
        response = asked(Replicas(replica), "GET", "/slots", options, headers={"Origin": page})
    assert response.headers.get_list("access-control-allow-origin") == [page]
    assert response.headers.get_list("access-control-allow-credentials") == ["true"]


def test_metrics_are_asked_again_where_a_replica_has_gone(served: Served) -> None:  # noqa: F811
    response = asked(Replicas(served, served, failure=OSError("gone")), "GET", "/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "vllm:num_requests_running 0.0" in response.text


def test_scales_for_all_requests_are_refused() -> None:
    response = asked(None, "POST", "/lora-adapters", json=[{"id": 0, "scale": 0.5}])
    assert response.status_code == 501
    assert '"lora"' in response.json()["error"]["message"]


@pytest.mark.parametrize("replicas", ["0", "2-1", "0-4", "10001", "1-10001", "four", "-1"])
def test_a_number_of_replicas_that_can_not_be(replicas: str) -> None:
    from pyllamabatch.cluster.deploy import FleetOptions

    with pytest.raises(ArgumentError, match=f"replicas='{replicas}'"):
        FleetOptions.of(replicas)


def test_flags_of_a_file_for_serve_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As YAML has them."""
    from pyllamabatch.cluster import deploy

    monkeypatch.setattr(deploy, "application", lambda open_app, *_: open_app.args[0])
    flags = {
        "parallel": 64, "embeddings": False, "rerank": True, "kv-unified": False, "slots": False,
        "prefix-cache": True, "alias": None, "lora": ["a.gguf", "b.gguf"], "metrics": True,
        "speculate": False, "reasoning": True, "stop": ["--x"],  # off and on
    }  # fmt: skip
    args = serve.application(flags)
    assert (args.parallel, args.embeddings, args.rerank, args.alias) == (64, False, True, None)
    assert (args.kv_unified, args.no_slots, args.prefix_cache) == (False, True, True)
    assert args.lora == ["a.gguf", "b.gguf"]
    assert (args.speculate, args.reasoning, args.stop) == ("off", "on", ["--x"])
    assert not args.no_metrics


@pytest.mark.parametrize(
    "flag",
    [
        {"embedings": False}, {"m": False}, {"p": False}, {"no-no-page": False}, {"help": True},
        {"seed": False}, {"speculate": True}, {"pooling": False}, {"quiet": "yes"},
        {"policy": ["fcfs", "slo"]}, {"cors-origins": ["a", "b"]}, {"lora": [None]},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_flag_of_a_file_for_serve_run(flag: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(flag))):
        serve.application(flag)


def test_replicas_of_other_versions_are_routed_to() -> None:
    from pyllamabatch.cluster.router import FleetRouter

    router: Any = FleetRouter.__new__(FleetRouter)
    router.initialize_state()
    said = {"old": {"wait_s": 1.0}, "new": {"wait": 1.0, "row_seconds": 0.1, "later": 2}, "": None}
    replicas = [SimpleNamespace(replica_id=id, routing_stats=said[id]) for id in said]
    ranked = asyncio.run(router.choose_replicas(replicas, Pending("a")))
    assert {one.replica_id for (one,) in ranked} == set(said)


def test_what_all_replicas_are_asked_is_no_open_request() -> None:
    """Ray tells the router of its end only."""
    from pyllamabatch.cluster.router import FleetRouter

    router: Any = FleetRouter.__new__(FleetRouter)
    router.initialize_state()
    request = SimpleNamespace(metadata=SimpleNamespace(internal_request_id="a"))
    router.on_request_routed(request, "r0", None)
    router.on_request_completed("r0", "b")
    assert router._n_open()["r0"] == 1
    router.on_request_completed("r0", "a")
    assert router._n_open()["r0"] == 0


def test_what_a_replica_refused_another_one_answers() -> None:
    """Ray may tell of the end of a request that was refused after another replica has taken it."""
    from pyllamabatch.cluster.router import FleetRouter

    router: Any = FleetRouter.__new__(FleetRouter)
    router.initialize_state()
    other, again = (
        SimpleNamespace(metadata=SimpleNamespace(internal_request_id=id)) for id in ("o", "x")
    )
    router.on_request_routed(other, "r0", None)
    router.on_request_routed(again, "r1", None)
    router.on_request_completed("r0", "x")
    assert router._n_open() == {"r0": 1, "r1": 1}
    router.on_request_completed("r1", "x")
    assert router._n_open() == {"r0": 1}


@pytest.mark.parametrize("sent", [True, False])
def test_who_leaves_before_a_replica_has_taken_its_request_is_no_open_one(sent: bool) -> None:
    """Ray tells of the end of what was sent, and forgets the rest."""
    from pyllamabatch.cluster.router import FleetRouter

    router: Any = FleetRouter.__new__(FleetRouter)
    router.initialize_state()
    request = Pending("a")
    replicas = [SimpleNamespace(replica_id="r0", routing_stats={})]
    asyncio.run(router.choose_replicas(replicas, request))
    assert router._n_open() == {"r0": 1}
    if sent:
        router.on_request_completed("r0", "a")
    else:
        del request
    assert router._n_open() == {}


@pytest.mark.parametrize(
    ("cause", "status", "message"),
    [
        (ArgumentError("n", 0, "at least 1"), 400, "n=0: at least 1"),
        (KeyError("a bug"), 500, "KeyError: 'a bug'"),
        (OSError(28, "no space"), 503, "no space"),
        (Unpicklable(), 500, "RayError"),
    ],
)
def test_tracebacks_of_a_replica_stay_there(cause: Exception, status: int, message: str) -> None:
    from ray.exceptions import RayTaskError

    raised = RayTaskError("whole", "File /home/me/x.py, line 3", cause, "title", 9, "10.0.0.9")
    response = asked(Broken(raised.as_instanceof_cause()), "GET", "/slots")
    assert response.status_code == status
    assert message in response.json()["error"]["message"]
    for inner in ("/home/me", "10.0.0.9", "Traceback", "pid"):
        assert inner not in response.text


def test_a_sum_of_some_replicas_is_none(served: Served, embedded_model: Model) -> None:  # noqa: F811
    with serving(embedded_model, ServerOptions(metrics=False)) as hidden:
        response = asked(Replicas(served, hidden), "GET", "/metrics")
    assert response.status_code == 501


def test_a_full_replica_shows_its_slots(embedded_model: Model) -> None:
    with (
        serving(embedded_model, n_seq_max=1) as full,
        serving(embedded_model, n_seq_max=1) as free,
        held(full.engine),
    ):
        full.engine.submit("a", SamplingParams(max_tokens=9, ignore_eog=True))
        until(lambda: full.engine.slots()[0].request is not None)
        response = asked(Replicas(full, free), "GET", "/slots?fail_on_no_slot=1")
        assert [slot["is_processing"] for slot in response.json()] == [True, False]
        response = asked(Replicas(full, full), "GET", "/slots?fail_on_no_slot=1")
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "no_slot"
        assert asked(Replicas(full, full), "GET", "/slots").status_code == 200


def test_an_empty_part_is_no_chunk() -> None:
    """It would be the last one, and end the answer."""
    from pyllamabatch.cluster.front import Sent

    async def send_nothing() -> list[bool]:
        messages: list[Any] = []

        async def send(message: Any) -> None:
            messages.append(message)

        sent = Sent({"path": "/metrics"}, send)
        await sent.part((200, []))
        await sent.part(b"")
        await sent.end()
        return [message["more_body"] for message in messages[1:]]

    assert asyncio.run(send_nothing()) == [False]


def test_a_bug_is_told_in_the_one_form(served: Served) -> None:  # noqa: F811
    response = asked(Replicas(served, failure=ValueError("a bug")), "GET", "/slots")
    assert response.status_code == 500
    assert "a bug" in response.json()["error"]["message"]
