"""The default policy beside the same one that counts only tokens, live.

n streams decode, and clients' prompts come in between.

Both arms have a cost model of the device. The default asks it how many rows a step had better
have, and lets streams take turns, or fills up with rows of prompts; "counted" never asks: every
stream has a row at each step, prompts the rest of an ubatch. Steady: the window in which all n
streams decode and no other is there, by the engine's step trace; tokens of it over its time.
Mixed: N clients take the next of a list of requests when they have their answer; all tokens over
all time. Prompts and answers differ in length, as else all end at once and ask again at once: then
prompts come only when none decodes. Each repeat draws its own. ITL: between two tokens of a
stream, every pair of all streams, in the window. Arms alternate within a run.

The model is that of the profile that an engine finds (`pyllamabatch calibrate`), of `--profile`, or
of `--calibrate S` seconds first.
"""

import argparse
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import ceil
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import harness
from bench.arms import InProcess
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, choose, numbers
from bench.targets import Figure, Target
from bench.views import failures, paired_ratios
from pyllamabatch.cost.calibrate import calibrate
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, load_profile
from pyllamabatch.engine.engine import Engine
from pyllamabatch.report.medians import pairs
from pyllamabatch.report.records import Record
from pyllamabatch.report.tables import Table
from pyllamabatch.scheduler import make_policy
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.trace import Trace
from tools.validation import steps_of

F64 = npt.NDArray[np.float64]
DEFAULT, COUNTED, PACED = "device-aware", "counted", "sarathi"
POLICIES = {DEFAULT: DEFAULT, COUNTED: "sarathi:budget=512", PACED: PACED}
MIXED_ROUNDS = 6  # requests for each client
QUICK = {
    "streams": "2,8,9",
    "mixed": "4",
    "calibrate": 40.0,
    "prompt_tokens": 16,
    "tokens": 32,
    "repeats": 1,
}


def ratio(n: int, name: str = "speed_tg", mixed: bool = False) -> Figure:
    """Of the default over counted, at n streams: the median of the repeats' ratios of speeds."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = [r for r in records if r.pl == n and bool(r.detail.get("mixed")) == mixed]
        return paired_ratios(mine, COUNTED).get((DEFAULT, n))

    return figure


def worst(records: Sequence[Record], mixed: bool = False) -> float | None:
    """The smallest of these ratios, of all n."""
    mine = [r for r in records if bool(r.detail.get("mixed")) == mixed]
    found = paired_ratios(mine, COUNTED)
    values = [value for (arm, _), value in found.items() if arm == DEFAULT]
    return min(values) if values else None


H200 = {"gpu_info": "H200", "model_type": "gemma3 1B", "kv_unified": True}
TARGETS = (
    Target("9 streams: default over counted, Gemma 3 1B on an H200", ratio(9), 1.10, where=H200),
    Target("10 streams: default over counted, Gemma 3 1B on an H200", ratio(10), 1.06, where=H200),
    Target("any number of streams: default over counted, the smallest", worst, 0.99),
    Target(
        "any number of clients: default over counted, the smallest",
        partial(worst, mixed=True),
        0.99,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.set_defaults(kv="unified")
    parser.add_argument(
        "-n",
        "--streams",
        default="1,4,8,9,10,12,16,20",
        help="that decode, comma separated; '' for none",
    )
    parser.add_argument("--mixed", default="12", help="clients, comma separated; '' for none")
    parser.add_argument("--arms", default=f"{COUNTED},{DEFAULT}", help=f"also {PACED}")
    parser.add_argument("--sampling", choices=["greedy", "default"], default="default")
    parser.add_argument(
        "--device-sampling", choices=["auto", "off"], default="auto", help="see `Engine`"
    )
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--tokens", type=int, default=256, help="of each stream")
    parser.add_argument("--itl", type=float, default=0.1, help="the default's ITL target, seconds")
    parser.add_argument("--calibrate", type=float, metavar="S", help="measure the device first")
    parser.add_argument("--profile", metavar="NAME|FILE", help="shipped, or a file")
    add_run(parser, repeats=3)


def main(options: argparse.Namespace) -> int:
    pp, tg = options.prompt_tokens, options.tokens
    inside = InProcess.of(options)
    streams, clients = (numbers(w) if w else () for w in (options.streams, options.mixed))
    loads = [(case, False) for case in cases_of(options, inside.file, pp, tg, streams)]
    loads += [(case, True) for case in cases_of(options, inside.file, 4 * pp, tg // 2, clients)]
    profile = profile_of(inside, [case for case, _ in loads], options)
    arms = choose(options.arms, [arm_of(inside, name, options, profile) for name in POLICIES])
    return harness.show(
        options,
        measure(inside, arms, loads, options),
        len(arms) * len(loads) * options.repeats,
        "default over counted",
    )


def profile_of(
    inside: InProcess, cases: Sequence[Case], options: argparse.Namespace
) -> Profile | None:
    """None: the engines look for one."""
    if options.profile:
        return load_profile(options.profile)
    if not options.calibrate or not cases:
        return None
    case = cases[0]
    layout = "unified" if case.kv_unified else "streams"
    print(f"measuring the device for {options.calibrate:g} s", file=sys.stderr)
    return calibrate(
        inside.model,
        budget=options.calibrate,
        layouts=(layout,),
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        n_ubatch=case.n_ubatch,
    )


def measure(
    inside: InProcess,
    arms: Sequence[Arm],
    loads: Sequence[tuple[Case, bool]],
    options: argparse.Namespace,
) -> Generator[Record, None, None]:
    recorder = harness.Recorder("width", inside.facts(), options)
    for repeat in range(options.repeats):
        for case, mixed in loads:
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                if recorder.budget.spent():
                    return
                work = partial(arm.run, replace(case, seed=case.seed + repeat), mixed)
                record = recorder.run(arm, case, repeat, work)
                record.detail["mixed"] = float(mixed)
                yield record


def arm_of(
    inside: InProcess, name: str, options: argparse.Namespace, profile: Profile | None
) -> Arm:
    """Its `run` takes a case, and whether it is mixed."""
    includes = (
        "Engine, by its step trace. Steady: pl streams of pp prompt tokens decode up to tg each, "
        f"t_tg: while all do. Mixed: pl clients, {MIXED_ROUNDS} requests for each, prompts of pp/4 "
        "to pp and answers of tg/4 to tg tokens, t_tg: all of it. Lengths: by seed + repeat"
    )
    return Arm(name, includes, partial(run_once, inside, name, options, profile))


def run_once(
    inside: InProcess,
    name: str,
    options: argparse.Namespace,
    profile: Profile | None,
    case: Case,
    mixed: bool,
) -> Measured:
    """One engine, one load. RuntimeError where there is no measured cost model."""
    spec = POLICIES[name] + (f":itl={options.itl}" if name != COUNTED else "")
    steps = case.tg * MIXED_ROUNDS * 4 if mixed else 4 * case.tg
    cost: Any = "auto"
    if profile is not None:
        cost = CostModel.fit(profile, unified=case.kv_unified, n_ubatch=case.n_ubatch)
    with Engine(
        inside.model,
        n_seq_max=case.pl,
        n_ctx=case.n_ctx,
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        policy=make_policy(spec),
        speculate=None,
        kv_unified=case.kv_unified,
        prefix_cache=False,
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        device_sampling="auto" if options.device_sampling == "auto" else False,
        n_trace=steps + 512,
        cost=cost,
    ) as engine:
        if engine.cost is None or not engine.cost.calibrated:
            raise RuntimeError("nothing is known of this device and model: --calibrate")
        seconds, n_tokens, gaps = (mixed_load if mixed else steady_load)(engine, case)
        trace = engine.trace()
        reckoned = reckon(engine.cost, trace)
        switch = engine.cost.switch
        context = engine.n_ctx
    detail: dict[str, float] = {
        "itl_median_s": median(gaps),
        "itl_p99_s": sorted(gaps)[ceil(0.99 * len(gaps)) - 1],
        "itl_max_s": max(gaps),
        "n_tokens": n_tokens,
        "rows_mean": float(trace["rows"].mean()),
        "on_device": float(trace["on_device"].mean()),
        "reused": float((trace["reused"] > 0).mean()),
        "predicted_s": reckoned,
    }
    if switch is not None:
        detail["switch_s"] = switch
    # t_tg is the time for tg tokens of each stream, at the rate of the window
    return Measured(0.0, seconds * case.tg * case.pl / n_tokens, {"n_kv_max": context}, detail)


def reckon(cost: CostModel, trace: Trace) -> float:
    """Seconds of all steps by the cost model, as it was before the engine refined it, with the
    graphs that were new: the same for equal steps, however busy the machine was in one run or the
    other."""
    plain = cost.at_speed()
    return float(steps_of(trace, plain, cost.n_ubatch).reckoned(plain.new_graph).sum())


def params_of(case: Case, seed: int) -> SamplingParams:
    if case.sampling == "greedy":
        return SamplingParams(max_tokens=case.tg, ignore_eog=True, temperature=0.0)
    return SamplingParams(max_tokens=case.tg, ignore_eog=True, seed=seed)


def steady_load(engine: Engine, case: Case) -> tuple[float, int, list[float]]:
    """Seconds, tokens and ITL of the steps in which all streams decode."""
    prompts = case.prompts(engine.model.n_vocab)
    engine.generate(list(prompts), [params_of(case, i) for i in range(len(prompts))])
    trace = engine.trace()
    decodes = (trace["ids"] != 0) & (trace["chunk"] == 0)
    first = int(trace["prefill_rows"].nonzero()[0][-1]) + 1
    had = decodes.cumsum(axis=0)
    over = (had == had[-1]) & (had[-1] > 0)  # a stream's last row, and what follows
    last = int(over.any(axis=1).argmax())
    window = trace[first:last]
    if len(window) < 2:
        raise RuntimeError("the streams do not decode together for long enough: --tokens")
    ends = ends_of(window)
    return float(ends[-1] - ends[0]), int(window["sampled"][1:].sum()), itl(window, ends)


def mixed_load(engine: Engine, case: Case) -> tuple[float, int, list[float]]:
    """Seconds, tokens and ITL of all requests."""
    n = case.pl * MIXED_ROUNDS
    prompts = case.prompts(engine.model.n_vocab, n=n)
    rng = np.random.default_rng(case.seed)
    n_prompt = rng.integers(-(-case.pp // 4), case.pp, n, endpoint=True)
    n_answer = rng.integers(-(-case.tg // 4), case.tg, n, endpoint=True)

    def ask(k: int) -> None:
        params = params_of(replace(case, tg=int(n_answer[k])), k)
        engine.submit(prompts[k, : n_prompt[k]], params).wait()

    began = time.perf_counter()
    with ThreadPoolExecutor(case.pl) as clients:
        list(clients.map(ask, range(n)))
    seconds = time.perf_counter() - began
    trace = engine.trace()
    return seconds, int(n_answer.sum()), itl(trace, ends_of(trace))


def ends_of(trace: Trace) -> F64:
    """When each step was over, s."""
    names = ("t_start_ns", "build_ns", "decode_ns", "sync_ns", "sample_ns")
    total: F64 = np.sum([trace[name] for name in names], axis=0) * 1e-9
    return total


def itl(trace: Trace, ends: F64) -> list[float]:
    """Seconds between two decoding rows of the same request."""
    found: list[float] = []
    for slot in range(trace["ids"].shape[1]):
        ids = trace["ids"][:, slot]
        at = ((ids != 0) & (trace["chunk"][:, slot] == 0)).nonzero()[0]
        same = ids[at][1:] == ids[at][:-1]
        found += np.diff(ends[at])[same].tolist()
    return found


def view(records: Sequence[Record]) -> str:
    """Medians of the repeats; ratios are the medians of ratios within a repeat, and their range.
    Reckoned: the same of the seconds that the cost model says for the steps of a mixed load, in
    which the machine's own speed plays no part."""
    lines = []
    for mixed in (False, True):
        mine = [r for r in records if bool(r.detail.get("mixed")) == mixed and not r.error]
        ratios = pairs(mine, COUNTED)
        by_model = reckoned(mine) if mixed else {}
        for n in dict.fromkeys(record.pl for record in mine):
            both = [[r for r in mine if (r.pl, r.arm) == (n, arm)] for arm in (COUNTED, DEFAULT)]
            if all(both):
                speeds = [f"{median(r.speed_tg for r in arm):.1f}" for arm in both]
                waits = [
                    " → ".join(f"{1e3 * median(r.detail[name] for r in arm):.1f}" for arm in both)
                    for name in ("itl_p99_s", "itl_max_s")
                ]
                found = [in_range(of.get((DEFAULT, n), ())) for of in (ratios, by_model)]
                lines.append([f"{n} {'clients' if mixed else 'streams'}", *speeds, *found, *waits])
    heads = ["load", "counted tok/s", "default tok/s", "ratio", "reckoned"]
    table = Table([*heads, "ITL p99, ms", "longest, ms"], lines).markdown()
    return "\n".join([table, *failures(records)])


def reckoned(records: Sequence[Record]) -> dict[tuple[str, int], list[float]]:
    """As `pairs`, of the speeds that the cost model says."""
    known = [record for record in records if "predicted_s" in record.detail]
    speeds = [replace(record, speed_tg=1 / record.detail["predicted_s"]) for record in known]
    return pairs(speeds, COUNTED)


def in_range(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else ""
