"""N clients at once: generated tokens over wall time, prompts included, beside llama-server.

Every arm gets the same model, threads, batch sizes and sampling, a prompt of random tokens for each
client, and room for all clients at once.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench import harness, summary
from bench.arms import InProcess, build_words, run_batched_bench
from bench.cache import cache_folder
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, add_work, choose, numbers
from bench.serving import EngineClients, HttpClients, ServerProcess, Serving, Tool
from bench.targets import Target, speed_ratio
from bench.tools import tool
from bench.views import speed_table
from pyllamabatch.compare.completion import HOST
from pyllamabatch.report.records import Record

BASE = "llama-server"
BACKEND = "llama-server-backend-sampling"
QUICK = {"clients": "1,4", "prompt_tokens": 32, "tokens": 16, "repeats": 1}
draw = summary.draw
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
class ServeArm(Arm):
    """`run` opens it. `package`: a peer that is measured when it is installed. `tool`: one of
    llama.cpp's."""

    package: str = ""
    tool: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_work(parser, prompt_tokens=256, tokens=128)
    parser.add_argument("--clients", default="1,8,32,64", help="comma separated")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument(
        "--answer-limit", type=float, default=300.0, metavar="S", help="of one answer"
    )
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms(inside, options.answer_limit))
    for name in dict.fromkeys(arm.tool for arm in arms if arm.tool):
        tool(name)
    pp, tg = options.prompt_tokens, options.tokens
    cases = cases_of(options, inside.file, pp, tg, numbers(options.clients))
    return harness.show(
        options,
        measure(arms, cases, inside, options),
        len(arms) * len(cases) * options.repeats,
        f"{pp} prompt tokens and {tg} generated per client, generated tokens/s (ratio)",
        optional=[arm.name for arm in arms if arm.package],
    )


def view(records: Sequence[Record]) -> str:
    return speed_table(records, BASE, "clients")


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
            "pyllamabatch serve, a slot per client; httpx clients",
            http("engine", our_server),
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
            "one Llama, one user at a time, behind uvicorn; httpx clients",
            http("llama-cpp-python", partial(endpoint, kind="llama-cpp-python", gpu=gpu)),
            package="llama_cpp",
        ),
    ]


def llama_server(case: Case, *, backend_sampling: bool) -> list[str]:
    """llama-server with a slot per client, without anything that caches prompts for later."""
    command = [
        str(tool("llama-server", log=False)), "-m", str(case.model.path), "--host", HOST,
        "-c", str(case.n_ctx), "-np", str(case.pl), "-kvu" if case.kv_unified else "-no-kvu",
        "-b", str(case.n_batch), "-ub", str(case.n_ubatch),
        "-t", str(case.n_threads), "-tb", str(case.n_threads),
        "--cache-ram", "0", "--ctx-checkpoints", "0", "--no-cache-prompt", "-fit", "off",
        "--offline",
    ]  # fmt: skip
    if case.n_gpu_layers >= 0:
        command += ["-ngl", str(case.n_gpu_layers)]
    return [*command, "--backend-sampling"] if backend_sampling else command


def our_server(case: Case) -> list[str]:
    """`pyllamabatch serve` with the same settings."""
    command = [
        sys.executable, "-m", "pyllamabatch", "serve", "-m", str(case.model.path), "--host", HOST,
        "-c", str(case.n_ctx), "-np", str(case.pl), "-b", str(case.n_batch),
        "--kv-unified" if case.kv_unified else "--no-kv-unified",
        "-ub", str(case.n_ubatch), "-t", str(case.n_threads), "--no-prefix-cache",
        "--speculate", "off",
    ]  # fmt: skip
    return command if case.n_gpu_layers < 0 else [*command, "-ngl", str(case.n_gpu_layers)]


def endpoint(case: Case, kind: str, *, gpu: bool) -> list[str]:
    """`bench.endpoint`, which serves with the library `kind`; `gpu`: it must use one."""
    values = vars(case) | {"model": str(case.model.path)}
    command = [sys.executable, "-m", "bench.endpoint", kind, json.dumps(values)]
    return [*command, "--gpu"] if gpu else command


def run_all_in(case: Case) -> Measured:
    """llama-batched-bench, its prompt and decode time together."""
    measured = run_batched_bench(case)
    return replace(measured, t_pp=0.0, t_tg=measured.t_pp + measured.t_tg)


def measure(
    arms: Sequence[ServeArm], cases: Sequence[Case], inside: InProcess, options: argparse.Namespace
) -> Generator[Record, None, None]:
    """Records as they are measured. All arms of a case are open together and idle but for the one
    that runs; odd repeats go through them backwards. One that cannot be opened or fails gives one
    record that says why."""
    about = inside.facts()
    recorder = harness.Recorder(options.command, about, options)
    own = {arm: own_facts(arm, about["versions"]) for arm in arms}
    for case in cases:
        with contextlib.ExitStack() as open_arms:
            ready: dict[ServeArm, Serving] = {}
            for arm in arms:
                if recorder.budget.spent():
                    return
                try:
                    ready[arm] = opened(arm, case, open_arms)
                except Exception as failure:
                    yield recorder.record(arm, case, 0, Measured.failed(failure), **own[arm])
            for repeat in range(options.repeats):
                for arm in list(ready) if repeat % 2 == 0 else list(ready)[::-1]:
                    if recorder.budget.spent():
                        return
                    work, pids = partial(ready[arm].run, repeat), ready[arm].pids
                    record = recorder.run(arm, case, repeat, work, pids, **own[arm])
                    if record.error:
                        del ready[arm]
                    yield record


class NotInstalled(Exception):
    """A peer that is measured only where it is installed."""


def opened(arm: ServeArm, case: Case, stack: contextlib.ExitStack) -> Serving:
    """Ready and warm; `stack` closes it."""
    if arm.package and importlib.util.find_spec(arm.package) is None:
        raise NotInstalled(f"{arm.name} is not installed")
    serving: Serving = arm.run(case)
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
