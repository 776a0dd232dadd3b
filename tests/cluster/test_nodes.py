"""More than one fixed fleet on one machine: Ray's own ways to start one, to scale it, and several
nodes. pytest -m ray tests/cluster."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.support.fleet import CHAT, SERVE, Asked, Fleet, endless, started
from tests.support.served import ANSWER, SUM_CHAT, until

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
SERVE_RUN = [sys.executable, "-m", "ray.serve.scripts", "run"]
OPEN = {**os.environ, "RAY_AUTH_MODE": "disabled"}  # no token: all is on loopback
FILE = Path(__file__).resolve().parents[2] / "examples" / "fleet.yaml"


@contextmanager
def node(*options: str) -> Iterator[tuple[psutil.Process, str]]:
    """A node with one CPU: its process, and the address of the cluster."""
    command = [*RAY, "start", "--block", "--num-cpus", "1", "--node-ip-address", "127.0.0.1",
               "--disable-usage-stats", *options]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=OPEN) as process:
        assert process.stdout is not None
        children: list[psutil.Process] = []
        try:
            said = ""
            last = "--address='" if "--head" in options else "Ray runtime started"
            while last not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
            address = re.search(r"--address='([0-9.:]+)'", said)
            me = psutil.Process(process.pid)
            yield me, address[1] if address else options[-1]
            children = me.children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            children = children or psutil.Process(process.pid).children(recursive=True)
            process.kill()
            _, alive = psutil.wait_procs(children, 30)
            for child in alive:
                child.kill()
    assert not alive


def healthy(fleet: Fleet) -> bool:
    try:
        return fleet.client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def answer(fleet: Fleet) -> str:
    text: str = fleet.client.post(CHAT, json=SUM_CHAT).json()["choices"][0]["message"]["content"]
    return text


def test_replicas_come_and_go_with_the_load() -> None:
    with started([*SERVE, "--replicas", "1-2"]) as (pid, line):
        fleet = Fleet(line.split()[1].rstrip(","), psutil.Process(pid))
        assert answer(fleet) == ANSWER
        assert len(fleet.replicas()) == 1
        enough = threading.Event()

        def ask(i: int) -> None:
            while not enough.is_set():
                assert Asked(fleet, endless(i)).end == "[DONE]"

        with ThreadPoolExecutor(12) as pool:
            clients = [pool.submit(ask, i) for i in range(12)]
            try:
                until(lambda: len(fleet.replicas()) == 2, 180)
            finally:
                enough.set()
            for client in clients:
                client.result()


def test_a_file_of_ray_serve(tmp_path: Path) -> None:
    """examples/fleet.yaml with other numbers, behind Ray's own HTTP proxy."""
    config = yaml.safe_load(FILE.read_text())
    (application,) = config["applications"]
    application["args"] = {"parallel": 4, "threads": 1, "replicas": "1", "router": "round-robin"}
    (deployment,) = application["deployments"]
    scaling = deployment["autoscaling_config"]
    scaling |= {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config["http_options"]["port"] = port
    (tmp_path / "fleet.yaml").write_text(yaml.safe_dump(config))
    command = [*SERVE_RUN, "--blocking", str(tmp_path / "fleet.yaml")]
    env = {**os.environ, "RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    with subprocess.Popen(command, env=env) as process:
        try:
            fleet = Fleet(f"http://127.0.0.1:{port}", psutil.Process(process.pid))
            until(lambda: healthy(fleet), 180)
            assert answer(fleet) == ANSWER
            assert Asked(fleet, endless(1, 20)).end == "[DONE]"
            process.send_signal(signal.SIGINT)
            process.wait(90)
        finally:
            process.kill()


def test_a_cluster_beside_is_left_alone() -> None:
    """Without RAY_ADDRESS a fleet has a cluster of its own."""
    with (
        node("--head", "--port", "0", "--include-dashboard", "false"),
        started([*SERVE, "--replicas", "2"]) as (pid, line),
    ):
        fleet = Fleet(line.split()[1].rstrip(","), psutil.Process(pid))
        assert answer(fleet) == ANSWER
        assert len(fleet.replicas()) == 2


def test_two_nodes() -> None:
    """Two of Ray's nodes, here of one machine, each with room for one replica."""
    head = node("--head", "--port", "0", "--include-dashboard", "false")
    with head as (_, address), node("--address", address) as (other, _):
        env = {**OPEN, "RAY_ADDRESS": address}
        with started([*SERVE, "--replicas", "2"], env=env) as (_, line):
            fleet = Fleet(line.split()[1].rstrip(","), psutil.Process())
            asked = [Asked(fleet, endless(i, 100)) for i in range(8)]
            assert [one.end for one in asked] == ["[DONE]"] * 8
            replicas = fleet.replicas()
            there = [one for one in replicas if other in one.parents()]
            assert (len(replicas), len(there)) == (2, 1)
