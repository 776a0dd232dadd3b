"""A trace on a live engine, in real time.

Prompts are random tokens. Two prompts share a prefix where the trace says so. Each request
generates exactly as many tokens as the trace says.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from time import perf_counter, sleep

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost import where
from pyllamabatch.cost.model import CostModel
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Result
from pyllamabatch.sim import EngineSpec, Outcome, TraceRequest
from pyllamabatch.sim.replica import with_switch
from pyllamabatch.step.sampling_params import SamplingParams

_LEAD = 0.2  # s before the first arrival, to start the threads


def describe(engine: Engine) -> str:
    """Device and model."""
    device, _ = where.device_of(engine._stepper._ready())
    return f"{device.description}, {engine.model.description}"


def spec_of(
    engine: Engine, overhead: float, latency: float = 0.0, cost: CostModel | None = None
) -> EngineSpec:
    """The simulated twin of this engine. cost: by default a copy of the engine's own as it is
    now."""
    cache = engine._core.scheduler.admission.cache
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
    )


def run_live(engine: Engine, requests: Iterable[TraceRequest]) -> list[Outcome]:
    """Submit every request at its arrival and wait for all, in real time. Queueing, preemption, ITL
    and prefixes of the outcomes are unknown, and 0. Raises the error of a failed request."""
    live = _Live(engine)
    requests = list(requests)
    chains: dict[int, list[TraceRequest]] = {}  # those after one another, by the last of them
    for request in requests:
        chain = [] if request.after is None else chains.pop(request.after)
        chains[request.id] = [*chain, request]
    alone = sorted((c[0] for c in chains.values() if len(c) == 1), key=lambda r: r.arrival)
    threads = [
        threading.Thread(target=live.run, args=(chain,), daemon=True)
        for chain in chains.values()
        if len(chain) > 1
    ]
    for thread in threads:
        thread.start()
    live.run_alone(alone)
    for thread in threads:
        thread.join()
    if live.errors:
        raise live.errors[0]
    return sorted(live.outcomes, key=lambda o: o.id)


def warm_up(engine: Engine) -> None:
    """Two requests: an engine's first calls are slower."""
    params = SamplingParams(max_tokens=8, ignore_eog=True)
    engine.generate([[0] * 8, [1] * 8], params)


class _Live:
    def __init__(self, engine: Engine) -> None:
        self.outcomes: list[Outcome] = []
        self.errors: list[Exception] = []
        self._engine = engine
        self._n_vocab = engine.model.n_vocab
        self._answers: dict[int, npt.NDArray[np.int32]] = {}
        self._began = threading.Event()
        self._start = 0.0

    def run_alone(self, requests: Sequence[TraceRequest]) -> None:
        """Start the clock; submit each at its time, and wait for all."""
        prompts = [self._prompt(request) for request in requests]
        streams = []
        self._start = perf_counter() + _LEAD
        self._began.set()
        try:
            for request, prompt in zip(requests, prompts, strict=True):
                sleep(max(0.0, self._start + request.arrival - perf_counter()))
                came = perf_counter() - self._start
                streams.append((request, came, self._engine.submit(prompt, _params(request))))
            for request, came, stream in streams:
                self._take(request, came, stream.result())
        except Exception as error:
            self.errors.append(error)
            for _, _, stream in streams:
                stream.cancel()

    def run(self, chain: Sequence[TraceRequest]) -> None:
        """Requests one after the other; the first one comes at its time."""
        self._began.wait()
        due = self._start
        try:
            for request in chain:
                due += request.arrival
                prompt = self._prompt(request)
                sleep(max(0.0, due - perf_counter()))
                came = perf_counter() - self._start
                result = self._engine.submit(prompt, _params(request)).result()
                due = self._start + self._take(request, came, result).end
        except Exception as error:
            self.errors.append(error)

    def _take(self, request: TraceRequest, came: float, result: Result) -> Outcome:
        if result.error is not None:
            raise result.error
        assert result.ttft_s is not None
        self._answers[request.answer] = np.array(result.tokens, dtype=np.int32)
        outcome = Outcome(request.id, came, request.n_prompt, request.n_output, request.tenant)
        outcome.admitted = came
        outcome.first, outcome.end = came + result.ttft_s, came + result.e2el_s
        self.outcomes.append(outcome)
        return outcome

    def _prompt(self, request: TraceRequest) -> npt.NDArray[np.int32]:
        return np.concatenate([self._tokens(piece, n) for piece, n in request.content])

    def _tokens(self, piece: int, n: int) -> npt.NDArray[np.int32]:
        answer = self._answers.get(piece)
        if answer is not None:
            return answer[:n]
        generator = np.random.default_rng(piece)
        return generator.integers(0, self._n_vocab, n, dtype=np.int32)


def _params(request: TraceRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.n_output, ignore_eog=True, seed=request.id)
