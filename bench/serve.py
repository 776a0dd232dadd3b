"""N clients at once: generated tokens over wall time, prompts included, beside llama-server.

Every arm gets the same model, threads, batch sizes and sampling, a prompt of random tokens per
client, and room for all clients at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import sys
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench import plots, report, schema
from bench.arms import InProcess, build_words
from bench.cache import cache_folder
from bench.case import Case, Measured, case_row, cases_of
from bench.models import resolve
from bench.options import Budget, add_model, add_run, choose, numbers, out_file
from bench.peers import run_all_in, run_parallel
from bench.quiet import undisturbed
from bench.server import ServerProcess, endpoint, llama_server
from bench.serving import EngineClients, HttpClients, Serving, Tool
from bench.targets import Target, speed_ratio
from bench.tools import tool

BASE = "llama-server"
BACKEND = "llama-server-backend-sampling"
QUICK = ("--quick",)
draw = plots.draw
ON_H200 = {"gpu_info": "H200", "model_type": "gemma3 1B", "pp": 256, "tg": 128}
TARGETS = tuple(
    Target(
        f"{pl} clients: engine over {base}, default sampling, Gemma 3 1B on an H200",
        speed_ratio("engine", base, pl, sampling="default"),
        at_least=least,
        where=ON_H200,
    )
    for pl, base, least in ((64, BASE, 5.0), (8, BASE, 1.8), (64, BACKEND, 2.0))
)

Open = Callable[[Case], Serving]


@dataclass(frozen=True)
class ServeArm:
    """`package`: a peer that is measured when it is installed.  `tool`: one of llama.cpp's."""

    name: str
    includes: str
    open: Open
    package: str = ""
    tool: str = ""
    sampling: bool = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--clients", help="comma separated (1,8,32,64; --quick 1,4)")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    parser.add_argument("--prompt-tokens", type=int, help="per client (256; --quick 32)")
    parser.add_argument("--tokens", type=int, help="generated per client (128; --quick 16)")
    parser.add_argument("--repeats", type=int, help="runs of each arm (3; --quick 1)")
    parser.add_argument(
        "--answer-limit", type=float, default=300.0, metavar="S", help="of one answer"
    )
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    quick = options.quick
    pp = options.prompt_tokens or (32 if quick else 256)
    tg = options.tokens or (16 if quick else 128)
    repeats = options.repeats or (1 if quick else 3)
    clients = numbers(options.clients or ("1,4" if quick else "1,8,32,64"))
    if importlib.util.find_spec("httpx") is None:
        raise SystemExit("serve needs httpx: python -m pip install '.[bench]'")
    model = resolve(options.model)
    inside = InProcess(model, options.gpu_layers)
    arms = choose(options.arms, all_arms(inside, options.answer_limit))
    for name in dict.fromkeys(arm.tool for arm in arms if arm.tool):
        tool(name)
    cases = cases_of(options, model, pp, tg, clients)
    out = out_file(
        options, "serve", Path(options.model).name.removesuffix(".gguf"), inside.facts()["gpu_info"]
    )
    rows = []
    budget = Budget(options.budget)
    running = measure(arms, cases, repeats, inside, options.undisturbed, budget)
    with contextlib.closing(running):  # ends the servers, also on Ctrl-C
        for row in running:
            schema.append(out, [row])
            rows.append(row)
            print(f"{row.pl:>3} clients  {report.in_words(row)}", file=sys.stderr, flush=True)
    print(f"\n{model.name}, {pp} prompt tokens and {tg} generated per client, ", end="")
    print(f"{options.threads} threads, KV {options.kv}, medians of {repeats}; ", end="")
    print("generated tokens / wall time, 1/s (ratio)\n")
    print(view(rows))
    print("\nWhat each time contains:")
    for arm in arms:
        print(f"- {arm.name}: {arm.includes}")
    print(f"\nrows: {out}")
    optional = {arm.name for arm in arms if arm.package}
    return int(any(row.error and row.arm not in optional for row in rows))


def view(rows: Sequence[schema.Row]) -> str:
    return report.table(rows, BASE, "clients")


def all_arms(inside: InProcess, limit_s: float) -> list[ServeArm]:
    n_vocab, gpu = inside.model.n_vocab, bool(inside.facts()["gpu_info"])
    logs = cache_folder("logs")

    def http(name: str, command: Callable[[Case], list[str]], **body: Any) -> Open:
        def start(case: Case) -> Serving:
            server = ServerProcess(command(case), logs / f"{name}.log")
            return HttpClients(case, n_vocab, server, limit_s, **body)

        return start

    return [
        ServeArm(
            "engine",
            "Engine in this process, a thread per client; no HTTP",
            lambda case: EngineClients(case, inside.model, limit_s),
        ),
        ServeArm(
            "engine-http",
            "Engine in a process of its own behind Python's http.server; httpx clients",
            http("engine", partial(endpoint, kind="engine", gpu=gpu)),
        ),
        ServeArm(
            BASE,
            "a slot per client, samplers on the CPU (its default); httpx clients",
            http(BASE, partial(llama_server, backend_sampling=False)),
            tool="llama-server",
        ),
        ServeArm(
            BACKEND,
            "a slot per client, sampling in the graph (--backend-sampling); httpx clients",
            http(BACKEND, partial(llama_server, backend_sampling=True), backend_sampling=True),
            tool="llama-server",
        ),
        ServeArm(
            "llama-parallel",
            "C++ loop, a sampler chain per client, its own prompts (detail.prompt_tokens); no HTTP",
            lambda case: Tool(case, run_parallel),
            tool="llama-parallel",
        ),
        ServeArm(
            "llama-batched-bench",
            "prompts, then random tokens, in C++: what the device can do; no sampling, no HTTP",
            lambda case: Tool(case, run_all_in),
            tool="llama-batched-bench",
            sampling=False,
        ),
        ServeArm(
            "xllamacpp",
            "llama-server's code inside Python, its own HTTP; httpx clients",
            http("xllamacpp", partial(endpoint, kind="xllamacpp", gpu=gpu)),
            package="xllamacpp",
        ),
        ServeArm(
            "llama-cpp-python",
            "one Llama, one user at a time, behind Python's http.server; httpx clients",
            http("llama-cpp-python", partial(endpoint, kind="llama-cpp-python", gpu=gpu)),
            package="llama_cpp",
        ),
    ]


def measure(
    arms: list[ServeArm],
    cases: list[Case],
    repeats: int,
    inside: InProcess,
    limit: float | None = None,
    budget: Budget | None = None,
) -> Generator[schema.Row, None, None]:
    """Rows as they are measured.  All arms of a case are open together and idle but for the one
    that runs; odd repeats go through them backwards.  One that cannot be opened or fails gives one
    row that says why."""
    run_id = uuid.uuid4().hex[:12]
    facts = inside.facts()

    def row(arm: ServeArm, case: Case, measured: Measured, repeat: int) -> schema.Row:
        mine = facts | own_facts(arm, facts["versions"]) | schema.now()
        return case_row("serve", arm, case, measured, mine, run_id, repeat)

    for case in cases:
        with contextlib.ExitStack() as open_arms:
            ready: dict[ServeArm, Serving] = {}
            for arm in arms:
                if budget and budget.spent():
                    return
                try:
                    ready[arm] = opened(arm, case, open_arms)
                except Exception as failure:
                    yield row(arm, case, Measured.failed(failure), 0)
            for repeat in range(repeats):
                for arm in list(ready) if repeat % 2 == 0 else list(ready)[::-1]:
                    if budget and budget.spent():
                        return
                    serving = ready[arm]
                    try:
                        run = partial(serving.run, repeat)
                        measured, others = undisturbed(run, limit, serving.pids)
                        measured.detail["other_cpu"] = round(others, 3)
                    except Exception as failure:
                        measured = Measured.failed(failure)
                        del ready[arm]
                    yield row(arm, case, measured, repeat)


class NotInstalled(Exception):
    """A peer that is measured only where it is installed."""


def opened(arm: ServeArm, case: Case, stack: contextlib.ExitStack) -> Serving:
    """Ready and warm; `stack` closes it."""
    if arm.package and importlib.util.find_spec(arm.package) is None:
        raise NotInstalled(f"{arm.name} is not installed")
    serving = arm.open(case)
    stack.callback(serving.close)
    serving.warm_up()
    return serving


def own_facts(arm: ServeArm, versions: dict[str, str]) -> dict[str, Any]:
    """What differs from our own build."""
    if arm.tool:
        return {"build_options": build_words()}
    if arm.package and importlib.util.find_spec(arm.package) is not None:
        version = importlib.metadata.version(arm.name)
        return {
            "build_number": 0,
            "build_commit": f"in {arm.name} {version}",
            "build_options": "",
            "versions": versions | {arm.name: version},
        }
    return {}
