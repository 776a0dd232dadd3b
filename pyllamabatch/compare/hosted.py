"""The arms that are one process: raw loops on N contexts or on one, and the engine."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

from pyllamabatch.compare.case import Case, sampling_params
from pyllamabatch.compare.child import START_S, Child
from pyllamabatch.compare.clients import ask_all
from pyllamabatch.compare.loop import Loop
from pyllamabatch.compare.machine_loop import open_loop
from pyllamabatch.compare.workload import BURST, RequestTimes, Timings, Workload
from pyllamabatch.engine.drafters import needs_mtp
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.results import Token
from pyllamabatch.errors import PyllamabatchError
from pyllamabatch.llama.context import default_threads
from pyllamabatch.llama.model import Model
from pyllamabatch.report import facts
from pyllamabatch.scheduler import Plan, Policy, StepView, sarathi

SOON_S = 0.0002

Run = Callable[[Workload], Timings]


class Hosted:
    """An arm in a process of its own, so that its memory can be read, and what ends it ends
    nothing else. `make`: from a model and a case to what runs there."""

    def __init__(self, make: Callable[[Model, Case], Run], case: Case, verbose: bool) -> None:
        self._setup = host, make, case
        self._child = Child(loud=verbose)
        self.pids = [self._child.pid]

    def load(self) -> None:
        self._child.send(self._setup)
        self._child.receive(START_S)

    def run(self, workload: Workload, limit_s: float) -> Timings:
        self._child.send(workload)
        timings: Timings = self._child.receive(limit_s)
        return timings

    def close(self) -> None:
        self._child.stop()


def host(pipe: Connection[Any, Any], make: Callable[[Model, Case], Run], case: Case) -> None:
    """In the process: timings for each workload, after a first word that the arm is ready."""
    mtp = needs_mtp(case.speculate)
    run = make(Model(case.model.path, n_gpu_layers=case.n_gpu_layers, load_mtp=mtp), case)
    pipe.send("ready")
    while True:
        pipe.send(run(pipe.recv()))


def probe(case: Case, verbose: bool) -> tuple[dict[str, Any], int]:
    """What records say of the build and the model, and CPU threads of an arm that is told none;
    found by a process that ends. ArmError for a file that can't be loaded."""
    with Child(loud=verbose) as child:
        child.send((look, case))
        found: tuple[dict[str, Any], int] = child.receive(START_S)
        return found


def look(pipe: Connection[Any, Any], case: Case) -> None:
    with Model(case.model.path, n_gpu_layers=case.n_gpu_layers, no_alloc=True) as model:
        pipe.send((facts.build("") | facts.about(model), default_threads(model, {})[0]))


def contexts(model: Model, case: Case) -> Run:
    """A context and a client's thread for each sequence."""
    loops = [open_loop(model, replace(case, pl=1)) for _ in range(case.pl)]

    def run(workload: Workload) -> Timings:
        prompts = workload.prompts(case, model.n_vocab)

        def ask(k: int, i: int) -> Iterator[int]:
            loops[k].start(0, prompts[i].tolist(), case.seed + i)
            try:
                yield from loops[k].generate(workload.tokens)
            finally:
                loops[k].stop(0)

        return ask_all(workload, case.pl, ask)

    return run


def shared(model: Model, case: Case) -> Run:
    """One context and one thread, which serves all sequences in each step."""
    loop = open_loop(model, case)
    return lambda workload: drive(loop, workload, case, model.n_vocab)


def drive(loop: Loop, workload: Workload, case: Case, n_vocab: int) -> Timings:
    """Serve what comes in `case.pl` sequences of the loop. In a burst none goes on before all have
    their first token. A decode that fails ends it; the requests say why."""
    prompts = workload.prompts(case, n_vocab)
    began = time.perf_counter()
    timings = Timings(began, [RequestTimes(began + arrival) for arrival in workload.arrivals])
    coming, free = deque(enumerate(timings.requests)), deque(range(case.pl))
    at: dict[int, RequestTimes] = {}
    held = workload.protocol == BURST
    try:
        while coming or at:
            while free and coming and coming[0][1].arrived <= time.perf_counter():
                (i, one), seq = coming.popleft(), free.popleft()
                loop.start(seq, prompts[i].tolist(), case.seed + i)
                at[seq] = one
            if not at:
                time.sleep(max(0.0, coming[0][1].arrived - time.perf_counter()))
                continue
            if held and not loop.prefilling:
                held, timings.begin = False, time.perf_counter()
            sampled = loop.step(decode=not held)
            now = time.perf_counter()
            for seq in sampled:
                at[seq].times.append(now)
                if len(at[seq].times) == workload.tokens:
                    del at[seq]
                    loop.stop(seq)
                    free.append(seq)
    except PyllamabatchError as error:
        for seq, one in at.items():
            one.error = str(error)
            loop.stop(seq)
    return timings


def engine(model: Model, case: Case) -> Run:
    """`Engine` with its own choices of sampling, scheduling and delivery; a thread for each client,
    which reads its stream token by token. Without a prefix cache: it computes as many rows as the
    other arms."""
    policy = StartTogether(sarathi())
    serving = Engine(
        model,
        policy=policy,
        prefix_cache=False,
        machine=case.machine or None,
        speculate=case.speculate or None,
        **case.context_params(),
    )

    def run(workload: Workload) -> Timings:
        prompts = workload.prompts(case, model.n_vocab)
        policy.held = workload.protocol == BURST

        def ask(k: int, i: int) -> Iterator[Token | int]:
            params = sampling_params(case.sampling, case.seed + i, workload.tokens)
            stream = serving.submit(prompts[i], params)
            # no other comes before all have their first one, whose text may need it
            if stream.wait_for_tokens(1):
                yield stream.tokens[0]
            yield from islice(stream, 1, None)

        before = serving.stats()
        timings = ask_all(
            workload, case.pl, ask, let_go=policy.let_go, give_up=lambda: serving.close(wait=False)
        )
        if case.speculate:
            after = serving.stats()
            timings.counts = {
                "draft_n": float(after.drafted_tokens - before.drafted_tokens),
                "draft_n_accepted": float(after.accepted_tokens - before.accepted_tokens),
            }
        return timings

    return run


class StartTogether:
    """A policy that asks another one. While it is `held`, no sequence that has sampled goes on."""

    def __init__(self, policy: Policy) -> None:
        self.held = False
        self._policy = policy

    def let_go(self) -> None:
        self.held = False

    def plan(self, view: StepView) -> Plan:
        plan = self._policy.plan(view)
        if not self.held:
            return plan
        prompts = {id: n for id, n in plan.advances(view).items() if not _has_sampled(view, id)}
        wake = None if prompts else view.now + SOON_S  # an empty plan says how long it waits
        return plan._replace(
            tokens=prompts, decode_all=False, sit_out=frozenset(), repeat=1, wake=wake
        )


def _has_sampled(view: StepView, id: int) -> bool:
    seq = view.running.find(id)
    return seq is not None and seq.generated > 0
