"""Clients that ask again at once, prompts and answers of mixed lengths: the engine as it comes.

Each of N clients takes the next request of a list that all share, reads its tokens as they come,
and takes another one when it has all. Prompts have 100 to 400 tokens, answers 32 to 224, evenly
spread: every repeat and every arm has the same sum. At the end of the list clients run out of
requests, and the device is not full any more, as it always is in the tool that says what it can
do: so there is a second speed, of the tokens that came before the last request was taken.

With --loads requests come by themselves, as a Poisson process, at shares of what the device can do
with all at once. The engine's arms differ in what a user would have to know:

- engine: no option but the number of sequences and threads, and no drafts: random text is no
  measure of them.
- engine-pool, engine-fcfs, engine-prefill-first: the other layout, the simple policies.
- engine-best: the best options known.
- engine-invariant: with batch_invariant; nearly so on a GPU.
- serve: `pyllamabatch serve` in a process of its own, without options or drafts, too.

The prefixes that others leave are of no use here: every prompt is another one.
"""

import argparse
import itertools
import sys
import time
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from bench import harness, profile_machine
from bench.arms import InProcess
from bench.arrivals import ALL_IN, Load, beside, kinds_of, loads_of, quiet
from bench.cache import cache_folder
from bench.case import I32, Case, Measured, cases_of
from bench.new_graphs import WHY_NEW, why_new
from bench.options import add_model, add_run, choose, numbers
from bench.profile_machine import ANSWERS, CLIENTS, PROMPTS
from bench.serve import ServeArm, llama_server, measure, run_all_in
from bench.serving import (
    Clients,
    EngineClients,
    HttpClients,
    ServerProcess,
    Tool,
    WrongAnswer,
    busy,
    events_of,
    seen,
    spread,
)
from bench.targets import Figure, Target, median_detail, speed_ratio
from bench.tools import tool
from bench.views import Column, by_arm, median_of, speed_table
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.compare.clients import at_once
from pyllamabatch.compare.completion import HOST
from pyllamabatch.engine.engine import Engine
from pyllamabatch.report.records import Record
from pyllamabatch.step.ring_reader import TIMES
from pyllamabatch.step.trace import Trace

PROMPT, ANSWER = PROMPTS[CLIENTS], ANSWERS[CLIENTS]
BASE, SERVER, BACKEND = "engine", "llama-server", "llama-server-backend-sampling"
SERVE, INVARIANT = "serve", "engine-invariant"
BOUND = "llama-batched-bench"
OPTIONS: dict[str, dict[str, Any]] = {
    BASE: {},
    "engine-pool": {"kv_unified": True},
    "engine-fcfs": {"kv_unified": False, "policy": "fcfs"},
    "engine-prefill-first": {"kv_unified": False, "policy": "prefill-first"},
    "engine-best": {"kv_unified": False, "n_ubatch": 2048, "prefix_cache": False},
    INVARIANT: {"batch_invariant": "nearly"},  # wholly on a CPU
}


def medians_ratio(pl: int, ours: Figure, theirs: Figure) -> Figure:
    """Of runs with so many clients."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = [record for record in records if record.pl == pl]
        top, bottom = ours(mine), theirs(mine)
        return top / bottom if top and bottom else None

    return figure


def bound(records: Sequence[Record]) -> float | None:
    """What the device can do."""
    return median_of(record.speed_tg for record in records if record.arm == BOUND)


def full_ratio(pl: int) -> Figure:
    """Speed while every client has a request, over what the device can do."""
    return medians_ratio(pl, median_detail(BASE, "full_speed"), bound)


def ttft_ratio(name: str, pl: int) -> Figure:
    """Median time to the first token over that of another arm."""
    ours, theirs = (median_detail(arm, "ttft_p50_s") for arm in (BASE, name))
    return medians_ratio(pl, ours, theirs)


NAMES = ("traffic", "live")  # the second: on profile machines, when that was a bench of its own
QUICK = {"model": "default", "clients": "2", "requests": 1, "repeats": 1, "arms": "engine"}
ON_GPU = {"gpu_info": "NVIDIA", "model_type": "gemma3 1B"}
TARGETS = (
    *profile_machine.TARGETS,
    Target(
        "8 clients: with batch_invariant, over without",
        quiet(speed_ratio(INVARIANT, BASE, 8)),
        at_least=0.9,
    ),
    *(
        Target(
            f"{pl} clients: all busy, over llama-batched-bench with its prompts",
            full_ratio(pl),
            at_least=0.85,
            where=ON_GPU,
        )
        for pl in (16, 64)
    ),
    Target("64 clients: over llama-server", speed_ratio(BASE, BACKEND, 64), at_least=6.0),
    Target("64 clients: serve over the engine", speed_ratio(SERVE, BASE, 64), at_least=0.95),
    Target("64 clients: serve over llama-server", speed_ratio(SERVE, BACKEND, 64), at_least=5.5),
    Target("8 clients: over llama-server", quiet(speed_ratio(BASE, SERVER, 8)), at_least=1.15),
    Target(
        "8 clients, one busy process beside: over llama-server",
        beside(speed_ratio(BASE, SERVER, 8)),
        at_least=1.15,
    ),
    *(
        target
        for name in OPTIONS
        if name not in (BASE, INVARIANT)
        for target in (
            Target(f"8 clients: over {name}", quiet(speed_ratio(BASE, name, 8)), at_least=0.97),
            Target(
                f"8 clients: TTFT p50 over that of {name}",
                quiet(ttft_ratio(name, 8)),
                at_most=1.1,
            ),
        )
    ),
    *(
        Target(
            f"64 clients: {what}, s",
            quiet(median_detail(BASE, name, 64)),
            at_most=most,
            where=ON_GPU,
        )
        for what, name, most in (
            ("TTFT p50", "ttft_p50_s", 0.12),
            ("TTFT p99", "ttft_p99_s", 1.0),
            ("ITL p99", "itl_p99_s", 0.06),
        )
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--clients", default="8", help="comma separated")
    parser.add_argument("--requests", type=int, default=8, help="for each client")
    parser.add_argument(
        "--loads", default="", help="Poisson arrivals at these shares of what the device can do"
    )
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="processes beside that never sleep"
    )
    profile_machine.add_arguments(parser)
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    if options.machine:
        return profile_machine.main(options)
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms(inside, options.requests))
    for name in dict.fromkeys(arm.tool for arm in arms if arm.tool):
        tool(name)
    tg = options.requests * sum(ANSWER) // 2
    cases = cases_of(options, inside.file, sum(PROMPT) // 2, tg, numbers(options.clients))
    cases = [replace(case, n_cells=sum((PROMPT[1], ANSWER[1]))) for case in cases]
    loads = [load for case in cases for load in loads_of(case, options.loads, options.busy)]
    how = f"Poisson at {options.loads} of all-in" if options.loads else "closed loop"
    beside = f", {options.busy} busy processes beside" if options.busy else ""
    with busy(options.busy):
        return harness.show(
            options,
            measure(arms, loads, inside, options),
            len(arms) * len(loads) * options.repeats,
            f"{how}, prompts of {PROMPT}, answers of {ANSWER} tokens{beside}",
        )


def view(records: Sequence[Record]) -> str:
    if any("steady" in record.detail for record in records):
        return profile_machine.view(records)
    kinds = kinds_of(records)
    if set(kinds) == {"closed loop"}:
        return view_of(records)
    return "\n\n".join(f"{kind}:\n\n{view_of(mine)}" for kind, mine in kinds.items())


def view_of(records: Sequence[Record]) -> str:
    """Of one kind of load."""
    columns = [
        Column("tok/s while all have a request", "full_speed", ".0f"),
        Column("TTFT p50, ms", "ttft_p50_s", scale=1e3),
        Column("p99", "ttft_p99_s", scale=1e3),
        Column("ITL p50, ms", "itl_p50_s", scale=1e3),
        Column("p99", "itl_p99_s", scale=1e3),
    ]
    steps = [
        *(
            Column(f"{kind}, n", f"{kind}_steps", ".0f") if of == "n" else Column("s", f"{kind}_s")
            for kind in ("prompt", "reused", "new")
            for of in ("n", "s")
        ),
        *(Column(f"new for {name}", f"new_{name}", ".0f") for name in WHY_NEW[1:]),
        Column("Python, s", "python_s"),
    ]
    tables = [speed_table(records, BASE, "clients")]
    for pl in sorted({record.pl for record in records}):
        mine = [r for r in records if r.pl == pl and "ttft_p50_s" in r.detail]
        if mine:
            tables.append(f"{pl} clients\n\n{by_arm(mine, columns)}")
        engines = [r for r in mine if "prompt_steps" in r.detail]
        if engines:
            tables.append(
                f"{pl} clients: steps with prompts, and others by graph\n\n{by_arm(engines, steps)}"
            )
    return "\n\n".join(tables)


def all_arms(inside: InProcess, n_requests: int) -> list[ServeArm]:
    def server(case: Case, *, name: str) -> HttpTraffic:
        backend_sampling = name == BACKEND
        command = (
            serve(case) if name == SERVE else llama_server(case, backend_sampling=backend_sampling)
        )
        process = ServerProcess(command, cache_folder("logs") / f"{name}.log")
        extra = {"backend_sampling": True} if backend_sampling else {}
        made = HttpTraffic(case, inside.model.n_vocab, process, 300.0, **extra)
        made.n_requests = n_requests
        return made

    def engine(case: Case, *, options: dict[str, Any]) -> EngineTraffic:
        return EngineTraffic(case, inside, n_requests, options)

    return [
        *(
            ServeArm(
                name,
                "Engine in this process, a thread per client; no HTTP",
                partial(engine, options=options),
            )
            for name, options in OPTIONS.items()
        ),
        *(
            ServeArm(
                name,
                "a slot per client, no cache of prompts; httpx clients, streamed",
                partial(server, name=name),
                tool="llama-server",
            )
            for name in (SERVER, BACKEND)
        ),
        ServeArm(
            SERVE,
            "Engine in a process of its own, no options and no drafts; httpx clients, streamed",
            partial(server, name=SERVE),
        ),
        ServeArm(
            BOUND,
            "256 + 128 tokens each, all at once, in C++: what the device can do; no sampling",
            lambda case: Tool(replace(case, **ALL_IN), run_bound(case)),
            tool="llama-batched-bench",
            sampling=False,
        ),
    ]


def serve(case: Case, machine: str = "") -> list[str]:
    """`pyllamabatch serve` with a slot per client. machine: a profile machine instead."""
    command = [sys.executable, "-m", "pyllamabatch", "serve", "-q", "--host", HOST]
    command += ["--machine", machine] if machine else ["-m", str(case.model.path)]
    command += ["-np", str(case.pl), "-t", str(case.n_threads), "--speculate", "off"]
    return command if case.n_gpu_layers < 0 else [*command, "-ngl", str(case.n_gpu_layers)]


def run_bound(case: Case) -> Any:
    """The tool's time for as many tokens as the other arms'."""

    def run(own: Case) -> Measured:
        measured = run_all_in(own)
        return replace(measured, t_tg=measured.t_tg * case.tg / own.tg)

    return run


class Traffic(Clients):
    """Clients with `n_requests` each, and what their readers see."""

    n_requests = 1

    @abstractmethod
    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        """When each token of an answer comes."""

    def run(self, repeat: int) -> Measured:
        return self.measured(self._n_vocab, repeat)

    def give_up(self) -> None:
        self.close(now=True)

    def jobs(self, n_vocab: int, which: int) -> list[tuple[I32, int]]:
        """(prompt, tokens to generate) of each request, in their order."""
        generator = np.random.default_rng([self.case.seed, which])
        n = self.case.pl * self.n_requests

        answers = spread(generator, n, *ANSWER)
        answers[-1] += self.case.pl * self.case.tg - int(answers.sum())
        sizes = spread(generator, n, *PROMPT)
        prompts = [generator.integers(0, n_vocab, k, dtype=np.int32) for k in sizes]
        return list(zip(prompts, answers.tolist(), strict=True))

    def measured(self, n_vocab: int, repeat: int) -> Measured:
        jobs, times, numbers = self.jobs(n_vocab, repeat), self.times, itertools.count()
        load = self.case if isinstance(self.case, Load) else None

        def answer(k: int, asked: float) -> tuple[float, list[float]]:
            prompt, tokens = jobs[k]
            came = list(times(prompt, tokens, k))
            if len(came) != tokens:
                raise WrongAnswer(f"{len(came)} of {tokens} tokens came")
            return asked, came

        def client(_: int, began: float) -> list[tuple[float, list[float]]]:
            answers = []
            while (k := next(numbers)) < len(jobs):
                answers.append(answer(k, time.perf_counter()))
            return answers

        def caller(k: int, began: float) -> list[tuple[float, list[float]]]:
            due = began + arrivals[k]
            time.sleep(max(0.0, due - time.perf_counter()))
            return [answer(k, due)]

        at_once(self.case.pl, lambda i, began: self.connect(), self.give_up)
        if load is not None and load.rate:
            arrivals = load.arrivals(len(jobs), repeat)
            began, found = at_once(len(jobs), caller, self.give_up)
        else:
            began, found = at_once(self.case.pl, client, self.give_up)
        answers = [answer for each in found for answer in each]
        end = max(came[-1] for _, came in answers)
        detail = seen(answers) | (load.detail if load else {})
        if self.n_requests > 1 and "load" not in detail:
            detail["full_speed"] = full_speed(answers, began)
        return Measured(0.0, end - began, detail=detail)


def full_speed(answers: Sequence[tuple[float, Sequence[float]]], began: float) -> float:
    """Tokens per second until the last answer was asked for: every client had a request."""
    last = max(asked for asked, _ in answers)
    return sum(bisect_right(came, last) for _, came in answers) / (last - began)


class EngineTraffic(Traffic, EngineClients):
    def __init__(
        self, case: Case, inside: InProcess, n_requests: int, options: dict[str, Any]
    ) -> None:
        self.case, self.n_requests, self._n_vocab = case, n_requests, inside.model.n_vocab
        self._limit_s = 300.0
        self._engine = Engine(
            inside.model,
            n_seq_max=case.pl,
            n_threads=case.n_threads,
            n_trace=2**16,
            speculate=None,
            **options,
        )

    def run(self, repeat: int) -> Measured:
        before = self._engine.stats().steps
        measured = super().run(repeat)
        n_steps = self._engine.stats().steps - before
        measured.detail.update(account(self._engine.trace(n_steps)))
        return replace(measured, settings=self._settings())

    def _settings(self) -> dict[str, Any]:
        limits = self._engine.limits
        return {
            "n_kv_max": self._engine.n_ctx,
            "kv_unified": limits.unified,
            "n_batch": limits.n_batch,
            "n_ubatch": limits.n_ubatch,
        }

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        for _ in self._engine.submit(prompt, sampling_params(self.case.sampling, seed, tokens)):
            yield time.perf_counter()


def account(trace: Trace) -> dict[str, float]:
    """Where the time of an engine's steps went: how many steps of each kind, and their ms; why
    graphs were new; ms of Python between the steps."""
    why = why_new(trace)
    seconds = np.sum([trace[name] for name in TIMES], axis=0) / 1e9
    prompt, new = trace["prefill_rows"] > 0, why != ""
    found = {"steps": float(len(trace)), "python_s": float(trace["python_ns"].sum()) / 1e9}
    for kind, steps in (("prompt", prompt), ("reused", ~prompt & ~new), ("new", ~prompt & new)):
        found[f"{kind}_steps"] = float(steps.sum())
        found[f"{kind}_s"] = float(seconds[steps].sum())
    decode = trace[~prompt]
    found["decode_rows"] = float(decode["decode_rows"].sum())
    found["filled_rows"] = float(decode["filled"].sum())
    return found | {f"new_{name}": float((why == name).sum()) for name in WHY_NEW}


class HttpTraffic(Traffic, HttpClients):
    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        own = {"prompt": prompt.tolist(), "n_predict": tokens, "seed": seed, "stream": True}
        with self._http.stream("POST", "/completion", json=self._body | own) as answer:
            if answer.status_code != 200:
                raise WrongAnswer(f"status {answer.status_code}: {answer.read()[:300]!r}")
            n_before = 0
            for values in events_of(answer):
                if values.get("stop"):  # tokens that were held back come with the end
                    n = values["tokens_predicted"] - n_before
                else:
                    n = len(values.get("tokens") or [0])
                now = time.perf_counter()
                n_before += n
                yield from [now] * n
