"""Replicas on a profile machine, on this machine's Ray: pytest -m ray tests/cluster."""

import psutil
import pytest

from tests.support.fleet import SERVE, Fleet, started
from tests.support.machines import M2

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def test_each_replica_has_a_gpu_of_its_own() -> None:
    asked = ["--machine", M2, "--replicas", "2", "--gpus-per-replica", "1"]
    with started([*SERVE, *asked]) as (pid, line):
        fleet = Fleet(line.split()[1].rstrip(","), psutil.Process(pid))
        gpus = [
            [file.path for file in replica.open_files() if file.path.endswith(".gpu")]
            for replica in fleet.replicas()
        ]
        assert [replica.nice() for replica in fleet.replicas()] == [fleet.process.nice()] * 2
        assert [len(set(files)) for files in gpus] == [1, 1]
        assert gpus[0][0] != gpus[1][0]
