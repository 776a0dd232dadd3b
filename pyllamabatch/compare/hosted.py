"""The arms that are one process: raw loops on one context or on N, and the engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pyllamabatch.compare.case import I32, Case, GgufFile
from pyllamabatch.compare.child import Child
from pyllamabatch.compare.clients import sleep_until
from pyllamabatch.compare.engine_arm import EngineArm
from pyllamabatch.compare.loop import Loop, loop_of
from pyllamabatch.compare.workload import BURST, RequestTimes, Timings, Workload
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.report import facts

START_S = 300.0  # a model of many gigabytes from a cold disk


class Hosted:
    """An arm in a process of its own, so that its memory can be read, and what ends it ends
    nothing else."""

    def __init__(self, kind: str, sampler: str, case: Case, verbose: bool) -> None:
        self._setup = for_a_child(case), kind, sampler
        self._child = Child(loud=verbose)
        self.pids = [self._child.pid]

    def load(self) -> None:
        self._child.do(host, *self._setup)
        self._child.receive(START_S)

    def run(self, workload: Workload, limit_s: float) -> Timings:
        self._child.send(workload)
        timings: Timings = self._child.receive(limit_s)
        return timings

    def close(self) -> None:
        self._child.stop()


def for_a_child(case: Case) -> Case:
    """Of its model only the path, which any process knows."""
    return replace(case, model=GgufFile(Path(case.model.path)))


def host(pipe: Connection[Any, Any], case: Case, kind: str, sampler: str) -> None:
    """In the process: timings for each workload, after a first word that the arm is ready."""
    model = Model(case.model.path, n_gpu_layers=case.n_gpu_layers)
    arm: EngineArm | RawLoops
    if kind == "engine":
        arm = EngineArm(model, case)
    else:
        arm = RawLoops(model, case, sampler, case.pl if kind == "contexts" else 1)
    pipe.send("ready")
    while True:
        pipe.send(arm.run(pipe.recv()))


def probe(case: Case, verbose: bool) -> dict[str, Any]:
    """What records say of the build and the model, found by a process that ends. ArmError for a
    file that can't be loaded."""
    with Child(loud=verbose) as child:
        child.do(look, for_a_child(case))
        about: dict[str, Any] = child.receive(START_S)
        return about


def look(pipe: Connection[Any, Any], case: Case) -> None:
    with Model(case.model.path, n_gpu_layers=case.n_gpu_layers, no_alloc=True) as model:
        pipe.send(facts.build("") | facts.about(model))


class RawLoops:
    """`n_contexts`, a thread and an equal share of the sequences each."""

    def __init__(self, model: Model, case: Case, sampler: str, n_contexts: int) -> None:
        self._case = case
        self._n_vocab = model.n_vocab
        one = replace(case, pl=case.pl // n_contexts)
        self._n_slots = one.pl
        n_samplers = case.n_threads if n_contexts > 1 else 0
        self._loops = [
            loop_of(sampler, Context(model, **one.context_params()), case.sampling, n_samplers)
            for _ in range(n_contexts)
        ]
        self._threads = ThreadPoolExecutor(n_contexts)

    def run(self, workload: Workload) -> Timings:
        prompts = workload.prompts(self._case, self._n_vocab)
        arrivals = Arrivals(workload, prompts, self._case.seed)
        begin = arrivals.began

        def stamp() -> None:
            nonlocal begin
            begin = time.perf_counter()

        all_ready = threading.Barrier(len(self._loops), action=stamp)

        def thread(loop: Loop) -> None:
            try:
                drive(loop, self._n_slots, arrivals, all_ready.wait)
            except BaseException:
                all_ready.abort()
                raise

        done = [self._threads.submit(thread, loop) for loop in self._loops]
        for error in [one.exception() for one in done]:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return Timings(begin, arrivals.requests)


class Arrivals:
    """Requests in the order in which they come, for any number of threads."""

    def __init__(self, workload: Workload, prompts: I32, seed: int) -> None:
        self.workload = workload
        self.began = time.perf_counter()
        self.requests = [RequestTimes(self.began + arrival) for arrival in workload.arrivals]
        self._prompts = prompts
        self._seed = seed
        self._left = deque(range(len(self.requests)))
        self._lock = threading.Lock()

    def start_one(self, loop: Loop, seq: int) -> RequestTimes | None:
        """The next one that has come, as `seq` of the loop."""
        with self._lock:
            if not self._left or self.requests[self._left[0]].arrived > time.perf_counter():
                return None
            i = self._left.popleft()
        loop.start(seq, self._prompts[i].tolist(), self._seed + i)
        return self.requests[i]

    def wait(self) -> bool:
        """Until the next one comes; whether there is one."""
        with self._lock:
            if not self._left:
                return False
            moment = self.requests[self._left[0]].arrived
        sleep_until(moment)
        return True


def drive(loop: Loop, n_slots: int, arrivals: Arrivals, all_ready: Callable[[], object]) -> None:
    """Serve what comes in `n_slots` sequences of one loop. In a burst `all_ready()` is called when
    each has its first token, before any goes on. A decode that fails ends this loop; its requests
    say why."""
    free = deque(range(n_slots))
    at: dict[int, RequestTimes] = {}
    held = arrivals.workload.protocol == BURST
    try:
        while True:
            while free and (one := arrivals.start_one(loop, free[0])):
                at[free.popleft()] = one
            if loop.idle:
                if not arrivals.wait():
                    return
                continue
            if held and not loop.prefilling:
                all_ready()
                held = False
            sampled = loop.step(decode=not held)
            now = time.perf_counter()
            for seq in sampled:
                at[seq].times.append(now)
                if len(at[seq].times) == arrivals.workload.tokens:
                    del at[seq]
                    loop.stop(seq)
                    free.append(seq)
    except (PyllamabatchError, threading.BrokenBarrierError) as error:
        for seq, one in at.items():
            one.error = str(error) or "another context failed before the time started"
            loop.stop(seq)
        if held:
            raise
