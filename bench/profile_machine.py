"""`bench traffic --machine`: policies live on a profile machine, beside the simulator.

The engine, its threads and its clients run in real time; the device is a profile, which computes
nothing and takes as long as the profile says. So what the scheduler wins on that device is measured
live, without the device. Steady: n streams decode, and no other comes. Clients: n of them, as in
`bench traffic`. A thread for each reads token by token.

An arm is a policy in the layout of --kv, without a prefix cache; `engine` is an engine without
options, which chooses its layout, too. Live over simulated: in virtual time, with the same cost
model and requests.

Others' programs do not slow a profile; they matter where the engine's threads wake late. With a
priority above theirs (`chrt -f 1 python -m bench traffic --machine ...`, a few percent of a core) a
run is good on busy cores, too: one counts where the device had nearly all of the time.
"""

import argparse
import copy
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import harness
from bench.case import Arm, Case, Measured, ModelFile
from bench.policies import COUNTED, M2, streams_of
from bench.serving import seen, spread
from bench.targets import Figure, Target
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.compare.clients import at_once
from pyllamabatch.engine.engine import Engine
from pyllamabatch.machine.profile_machine import ProfileMachine
from pyllamabatch.report.disturbed import is_disturbed
from pyllamabatch.report.medians import pairs
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import NO_RESULT, Table
from pyllamabatch.scheduler.policies import DEFAULT, SHIPPED
from pyllamabatch.sim import TraceRequest, simulate
from pyllamabatch.sim.replica import OVERHEAD
from tools.live import spec_of

GEMMA, QWEN, GPT = M2, "m2-ultra-qwen2.5-coder-7b-q8_0", "m2-ultra-gpt-oss-20b"
STEADY, CLIENTS = "steady", "clients"
PROMPTS = {STEADY: (128, 128), CLIENTS: (100, 400)}  # tokens, from and to
ANSWERS = {STEADY: (256, 256), CLIENTS: (32, 224)}
POOL = {"kv_unified": True}  # streams decode in turns only with their neighbours
HOST_MOST = 0.05  # share of a run's time that was not the device's, though others used the cores
ENGINE = "engine"
POLICIES = (ENGINE, COUNTED, *(name for name in SHIPPED if name != "static"))


def steady_ratio(profile: str, n: int) -> Figure:
    """Throughput of the default over that of "counted", n streams."""

    def figure(records: Sequence[Record]) -> float | None:
        ratios = pairs(counted(of(records, profile, STEADY, n)), COUNTED)
        found = ratios.get((DEFAULT, n))
        return median(found) if found else None

    return figure


def over_simulated(profile: str, n: int) -> Figure:
    """Live throughput of the default over the simulated one, n streams."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = counted(of(records, profile, STEADY, n))
        found = [r.detail["over_simulated"] for r in mine if r.arm == DEFAULT]
        return median(found) if found else None

    return figure


def over_best(mine: str, profile: str, n: int) -> Figure:
    """Throughput over the best policy's, n clients, by medians."""

    def figure(records: Sequence[Record]) -> float | None:
        speeds: dict[str, list[float]] = {}
        for record in counted(of(records, profile, CLIENTS, n)):
            speeds.setdefault(record.arm, []).append(record.speed_tg)
        middle = {arm: median(found) for arm, found in speeds.items()}
        others = [speed for arm, speed in middle.items() if arm not in (mine, ENGINE)]
        return middle[mine] / max(others) if mine in middle and others else None

    return figure


TARGETS = (
    *(
        target
        for n in (9, 10, 11, 12)
        for target in (
            Target(
                f"gemma-3-4b, {n} streams in a pool: default over counted",
                steady_ratio(GEMMA, n),
                at_least=1.25,
                where=POOL,
            ),
            Target(
                f"gemma-3-4b, {n} streams in a pool: live over simulated",
                over_simulated(GEMMA, n),
                at_least=0.95,
                at_most=1.05,
                where=POOL,
            ),
        )
    ),
    *(
        Target(f"{name}, {n} clients: {what} over the best policy", over_best(arm, name, n), 0.97)
        for arm, what in ((DEFAULT, "default"), (ENGINE, "engine without options"))
        for name in (GEMMA, QWEN, GPT)
        for n in (8, 16, 32)
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on profile machines, where --model and --arms say nothing")
    group.add_argument("--machine", default="", help="profiles, comma separated: names, files")
    group.add_argument("--streams", default="", help="that only decode: numbers and ranges")
    words = f"separated by ; ({ENGINE}: an engine without options)"
    group.add_argument("--policies", default=";".join(POLICIES), help=words)


def main(options: argparse.Namespace) -> int:
    includes = (
        "Engine on a machine of which only a profile is there, in real time, a thread per client "
        "that reads token by token; no HTTP, no model"
    )
    policies = options.policies.split(";")
    arms = [Arm(name, includes, partial(live, name), sampling=False) for name in policies]
    about = harness.facts_of()
    names = options.machine.split(",")
    cases = [one for name in names for one in cases_of(name, options)]

    def measured() -> Generator[Record, None, None]:
        for name in names:
            machine = ProfileMachine.named(name)
            mine = [case for case in cases if case.machine == name]
            yield from harness.measure(
                options.command, arms, mine, about | machine.facts(), options
            )
            machine.queue.close()

    return harness.show(
        options,
        measured(),
        len(arms) * len(cases) * options.repeats,
        "live on profile machines: default over counted, and beside the simulator",
        subject="profile-machines",
    )


@dataclass(frozen=True)
class Load(Case):
    """`jobs`: of each client, (prompt, tokens to generate) in their order."""

    kind: str = field(kw_only=True)
    n_requests: int = field(kw_only=True)  # of each client, one by one

    @property
    def jobs(self) -> list[list[tuple[int, int]]]:
        """Of each client (prompt tokens, tokens to generate): all loads have the same sums."""
        generator, n = np.random.default_rng(self.seed), self.pl * self.n_requests
        prompts, answers = (
            spread(generator, n, *of[self.kind]).tolist() for of in (PROMPTS, ANSWERS)
        )
        each = list(zip(prompts, answers, strict=True))
        return [each[i :: self.pl] for i in range(self.pl)]

    def requests(self) -> list[TraceRequest]:
        """The same for the simulator."""
        found: list[TraceRequest] = []
        for jobs in self.jobs:
            after: int | None = None
            for n_prompt, n_output in jobs:
                id = len(found)
                content = ((2 * id, n_prompt),)
                found.append(TraceRequest(id, 0.0, n_prompt, n_output, content, 2 * id + 1, after))
                after = id
        return found


def cases_of(name: str, options: argparse.Namespace) -> Iterator[Load]:
    for kind, words in ((STEADY, options.streams), (CLIENTS, options.clients)):
        n_requests = 1 if kind == STEADY else options.requests
        pp, tg = (n_requests * sum(each[kind]) // 2 for each in (PROMPTS, ANSWERS))
        for n in streams_of(words):
            file, pool = ModelFile(Path(name)), options.kv == "unified"
            own: dict[str, Any] = {"machine": name, "kind": kind, "n_requests": n_requests}
            yield Load(file, pp, tg, n, 1, "default", options.seed, pool, **own)


def live(arm: str, load: Load) -> Measured:
    jobs, policy = load.jobs, DEFAULT if arm == ENGINE else arm
    options: dict[str, Any] = {}
    if arm != ENGINE:
        options = {"kv_unified": load.kv_unified, "policy": policy, "prefix_cache": False}
    with Engine(machine=load.machine, n_seq_max=load.pl, **options) as engine:
        limits, cost = engine.limits, copy.deepcopy(engine.cost)
        spec = spec_of(engine, OVERHEAD, cost=cost)
        n_vocab = engine.model.n_vocab

        def client(i: int, began: float) -> list[tuple[float, list[float]]]:
            generator, answers = np.random.default_rng([load.seed, i]), []
            for n_prompt, n_output in jobs[i]:
                prompt = generator.integers(0, n_vocab, n_prompt, dtype=np.int32)
                asked = time.perf_counter()
                stream = engine.submit(prompt, sampling_params(load.sampling, 1, n_output))
                answers.append((asked, [time.perf_counter() for _ in stream]))
            return answers

        began, found = at_once(load.pl, client, lambda: engine.close(wait=False))
        detail = seen(answer for each in found for answer in each)
        detail["host_share"] = host_share(engine)
    wall = max(came[-1] for each in found for _, came in each) - began
    n_tokens = sum(len(came) for each in found for _, came in each)
    simulated = simulate(load.requests(), spec, policy).summary()
    detail["simulated_tokens_per_s"] = simulated["tokens_per_s"]
    detail["over_simulated"] = n_tokens / wall / simulated["tokens_per_s"]
    detail["simulated_itl_p99_s"] = simulated["itl_p99"]
    detail["steady"] = float(load.kind == STEADY)
    settings = {
        "n_kv_max": limits.n_cells,
        "kv_unified": limits.unified,
        "n_batch": limits.n_batch,
        "n_ubatch": limits.n_ubatch,
        "n_gpu_layers": 0,
        "type_k": "",
        "type_v": "",
    }
    return Measured(0.0, wall * load.tg * load.pl / n_tokens, settings, detail)


def host_share(engine: Engine) -> float:
    """Of the engine's time, what was not the device's."""
    table = engine.trace()
    device = float(table["decode_ns"].sum())
    began, end = table["t_start_ns"][0], table["t_start_ns"][-1] + table["decode_ns"][-1]
    return 1 - device / float(end - began)


def counted(records: Sequence[Record]) -> list[Record]:
    """Those that others did not disturb: on calm cores, or where the engine lost little time."""
    return [r for r in records if not is_disturbed(r) or r.detail["host_share"] <= HOST_MOST]


def of(records: Sequence[Record], profile: str, kind: str, n: int) -> list[Record]:
    mine = (r for r in records if (r.model_filename, r.pl) == (profile, n) and not r.error)
    return [r for r in mine if bool(r.detail["steady"]) == (kind == STEADY)]


def view(records: Sequence[Record]) -> str:
    """By profile and load, tokens/s of each policy, live over simulated in brackets; then the p99
    of the ITL. A run that was disturbed has none."""
    loads = dict.fromkeys(
        (r.model_filename, STEADY if r.detail.get("steady") else CLIENTS, r.pl)
        for r in records
        if not r.error
    )
    arms = list(dict.fromkeys(record.arm for record in records))

    def table(write: Callable[[list[Record]], str]) -> str:
        lines = []
        for profile, kind, n in loads:
            mine = counted(of(records, profile, kind, n))
            cells = [[r for r in mine if r.arm == arm] for arm in arms]
            lines.append([f"{profile}: {n} {kind}", *(write(c) if c else NO_RESULT for c in cells)])
        return Table(["machine: load", *arms], lines).markdown()

    def middle(mine: list[Record], value: Callable[[Record], float]) -> float:
        return median(map(value, mine))

    speed = table(
        lambda mine: (
            f"{middle(mine, lambda r: r.speed_tg):.1f} "
            f"({middle(mine, lambda r: r.detail['over_simulated']):.2f})"
        )
    )
    itl = table(lambda mine: f"{1e3 * middle(mine, lambda r: r.detail['itl_p99_s']):.1f}")
    return f"tokens/s (over simulated)\n\n{speed}\n\nITL p99, ms\n\n{itl}"
