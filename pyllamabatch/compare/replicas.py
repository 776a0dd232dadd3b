"""The arm of N replicas on Ray Serve."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.case import Case
from pyllamabatch.compare.child import START_S, Child
from pyllamabatch.compare.completion import HOST
from pyllamabatch.compare.processes import OverHttp, open_app
from pyllamabatch.llama import runtime
from pyllamabatch.llama.model import Model
from pyllamabatch.report.meters import descendants

END_S = 60.0  # that Ray gets to end its processes


class Replicas(OverHttp):
    """What `pyllamabatch serve --replicas` runs: a front in a process of its own, and a replica for
    each sequence."""

    def __init__(self, case: Case, verbose: bool) -> None:
        super().__init__(case)
        self._front = self._stack.enter_context(Child(loud=verbose))
        self._stack.callback(self._end)
        self.pids = [self._front.pid]

    def load(self) -> None:
        self._front.send((serve, replace(self._case, pl=1), self._case.pl))
        self.port, self._n_vocab = self._front.receive(START_S)
        self.pids = [self._front.pid, *descendants(self._front.pid)]

    def _end(self) -> None:
        """By itself, so that Ray's processes end with it."""
        if not self._front.end(0):
            os.kill(self._front.pid, signal.SIGTERM)
            self._front.end(END_S)


def serve(pipe: Connection[Any, Any], case: Case, n: int) -> None:
    """The front. Sends its port and the size of the vocabulary."""
    from pyllamabatch.cluster.deploy import FleetOptions, running
    from pyllamabatch.cluster.gpus import share
    from pyllamabatch.server.options import ServerOptions
    from pyllamabatch.server.run import Server, listen

    with Model(case.model.path, vocab_only=True) as model:
        n_vocab = model.n_vocab
    cuda = (device.backend == "CUDA" for device in runtime.devices().values())
    n_gpus = sum(cuda) if case.n_gpu_layers else 0
    options = FleetOptions(
        min_replicas=n, max_replicas=n, gpus_per_replica=share(n, n_gpus), n_seq_max=1
    )
    server = ServerOptions()
    with running(partial(open_app, case), options, server) as front, listen(HOST, 0) as listening:
        port = listening.getsockname()[1]
        Server(front, listening, lambda: pipe.send((port, n_vocab)), front).run_until_signal()
