"""A trace on a live engine, in real time.

Prompts are random tokens. Two prompts share a prefix where the trace says so. Each request
generates exactly as many tokens as the trace says.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable
from heapq import heapify, heappop, heappush
from queue import Empty, SimpleQueue
from time import perf_counter

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost import where
from pyllamabatch.cost.model import CostModel
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.options import Options
from pyllamabatch.engine.stream import Stream
from pyllamabatch.sim import EngineSpec, Outcome, TraceRequest
from pyllamabatch.sim.replica import with_switch
from pyllamabatch.step.sampling_params import SamplingParams


def describe(engine: Engine) -> str:
    """Device and model."""
    device = where.shares_of(engine._stepper._ready()).device
    return f"{device.description}, {engine.model.description}"


def spec_of(
    engine: Engine, overhead: float, latency: float = 0.0, cost: CostModel | None = None
) -> EngineSpec:
    """The simulated twin of this engine as it is laid out now: its streams become no pool. cost: by
    default a copy of the engine's own as it is now."""
    scheduler = engine._core.scheduler
    cache = scheduler.admission.cache
    chosen = copy.deepcopy(engine.cost) if cost is None else cost
    assert chosen is not None
    return EngineSpec(
        with_switch(chosen),
        engine.limits,
        cache.sharing,
        cache.retain,
        overhead,
        latency,
        chosen.new_graph,
        scheduler.invariance,
        swap=copy.copy(scheduler.admission.swap),
    )


def run_live(engine: Engine, requests: Iterable[TraceRequest]) -> list[Outcome]:
    """Submit every request at its arrival and wait for all, in real time. Queueing, preemption, ITL
    and prefixes of the outcomes are unknown, and 0. Raises the error of a failed request."""
    due: list[tuple[float, int, TraceRequest]] = []
    after: dict[int, list[TraceRequest]] = defaultdict(list)
    for request in requests:
        if request.after is None:
            due.append((request.arrival, request.id, request))
        else:
            after[request.after].append(request)
    heapify(due)
    answers: dict[int, npt.NDArray[np.int32]] = {}  # by piece
    running: dict[Stream, tuple[TraceRequest, float]] = {}  # and when it was submitted
    ended: SimpleQueue[Stream] = SimpleQueue()
    outcomes = []
    start = perf_counter()
    try:
        while due or running:
            wait = due[0][0] - (perf_counter() - start) if due else None
            if wait is not None and wait <= 0:
                request = heappop(due)[-1]
                prompt = _prompt(request, answers, engine.model.n_vocab)
                params = SamplingParams(
                    max_tokens=request.n_output, ignore_eog=True, seed=request.id
                )
                came = perf_counter() - start
                stream = engine.submit(prompt, params, **_options(request))
                running[stream] = request, came
                stream.add_done_callback(ended.put)
                continue
            try:
                stream = ended.get(timeout=wait)
            except Empty:
                continue
            result = stream.result()
            if result.error is not None:
                raise result.error
            request, came = running.pop(stream)
            answers[request.answer] = np.array(result.tokens, dtype=np.int32)
            n_output = result.n_generated
            outcome = Outcome(request.id, came, request.n_prompt, n_output, request.tenant)
            outcome.admitted, outcome.first = came, came + (result.ttft_s or 0.0)
            outcome.end = came + result.e2el_s
            outcome.deadline = result.finish_reason == "deadline"
            outcomes.append(outcome)
            for later in after[request.id]:
                heappush(due, (outcome.end + later.arrival, later.id, later))
    finally:
        for stream in running:
            stream.cancel()
    return sorted(outcomes, key=lambda outcome: outcome.id)


def _options(request: TraceRequest) -> Options:
    found: Options = {"priority": request.priority, "tenant": request.tenant}
    if request.deadline is not None:
        found["timeout"] = request.deadline
    if request.ttft_target is not None:
        found["ttft_target"] = request.ttft_target
    if request.itl_target is not None:
        found["itl_target"] = request.itl_target
    return found


def _prompt(
    request: TraceRequest, answers: dict[int, npt.NDArray[np.int32]], n_vocab: int
) -> npt.NDArray[np.int32]:
    """Of the answers so far, and of random tokens, the same ones for the same piece; also in place
    of those that an answer has not got by its deadline."""
    pieces = []
    for piece, n in request.content:
        tokens = np.random.default_rng(piece).integers(0, n_vocab, n, dtype=np.int32)
        answer = answers.get(piece, tokens)[:n]
        tokens[: len(answer)] = answer
        pieces.append(tokens)
    return np.concatenate(pieces)
