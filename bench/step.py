"""What a step takes besides computing: Python in the engine and the stepper, and the device's gaps.

`python`: CPU time of the engine's two threads for a step, on a device that computes nothing.
`stepper`: one `Stepper.step` from Python, besides the native call, over the same in the C loop.
`gap`: a real engine; from the end of sampling of one step to the start of the next decode.
"""

import argparse
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt

from bench import harness
from bench.arms import InProcess, compute_prompts
from bench.case import Arm, Case, Measured, cases_of
from bench.options import add_model, add_run, choose
from bench.targets import Target, median_detail
from bench.views import Column, by_arm
from pyllamabatch.compare.case import sampling_params
from pyllamabatch.engine.engine import Engine
from pyllamabatch.report.records import Record
from pyllamabatch.step.stepper import SAMPLE, Stepper

N_SEQS = 64
N_PROMPT = 8
N_TOKENS = 128  # of a request, where requests come and go
RUN = 32  # steps of a run, where none does
QUICK = {"tokens": 32, "repeats": 1}
TARGETS = (
    Target(
        f"Python: us a step, steady decode, {N_SEQS} sequences",
        median_detail("python: steady", "step_us"),
        at_most=20.0,
    ),
    Target(
        "Stepper.step from Python: us over the C loop, 1 sequence",
        median_detail("stepper: 1", "over_c_us"),
        at_most=15.0,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, model="default", kv="unified", threads=1)
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--tokens", type=int, default=N_TOKENS, help="of each request in gap")
    parser.set_defaults(sampling="greedy")
    add_run(parser, repeats=5)


def main(options: argparse.Namespace) -> int:
    inside = InProcess.of(options)
    arms = choose(options.arms, all_arms(inside))
    cases = cases_of(options, inside.file, N_PROMPT, options.tokens, [N_SEQS])
    title = "what a step takes besides computing"
    return harness.run(options, arms, cases, inside.facts(), title)


def view(records: Sequence[Record]) -> str:
    """A table for each kind of arm."""
    kinds = {kind: [r for r in records if r.arm.startswith(kind)] for kind in COLUMNS}
    return "\n\n".join(by_arm(mine, COLUMNS[kind]) for kind, mine in kinds.items() if mine)


COLUMNS = {
    "python": (
        Column("us a step", "step_us"),
        Column("core's thread", "decoder_us"),
        Column("output thread", "delivery_us"),
    ),
    "stepper": (
        Column("us a step over C", "over_c_us"),
        Column("Python", "python_us"),
        Column("C", "c_us"),
    ),
    "gap": (
        Column("between two decodes: p50 us", "gap_p50_us"),
        Column("p99 us", "gap_p99_us"),
        Column("share of the time", "gap_share", ".2%"),
        Column("us a step", "step_us", ".0f"),
    ),
}


def all_arms(inside: InProcess) -> list[Arm]:
    nothing = "on a device that computes nothing: CPU time of the core's and the output thread's"
    return [
        Arm(
            "python: steady",
            f"{nothing} work; no request comes or goes, calls of {RUN} steps",
            partial(python_time, Workload(most=RUN)),
        ),
        Arm(
            "python: each step planned",
            f"{nothing} work; a plan and a call for every step",
            partial(python_time, Workload(most=1)),
        ),
        Arm(
            "python: each step read",
            f"{nothing} work; planned as above, and every stream has a reader to wake",
            partial(python_time, Workload(most=1, read=True)),
        ),
        Arm(
            "python: stop strings",
            f"{nothing} work; planned as above, two stop strings for every request",
            partial(python_time, Workload(most=1, stops=("Human:", "###"))),
        ),
        Arm(
            "python: turnover",
            f"{nothing} work; requests of {N_TOKENS} tokens, one ends and one is admitted "
            "every other step; submitting is the caller's time",
            partial(python_time, Workload(most=RUN, turnover=True)),
        ),
        *(
            Arm(
                f"stepper: {n}",
                f"Python: {n} rows written, Stepper.step; over_c_us: time outside of the native "
                "step, less that of plb_run's loop over the same steps",
                partial(stepper_time, inside, n),
            )
            for n in (1, N_SEQS)
        ),
        Arm(
            "gap: steady",
            f"engine, {N_SEQS} requests of the same length, results at the end",
            partial(gaps, inside, Load()),
        ),
        Arm(
            "gap: each token read",
            "the same, and a thread for each stream reads every token",
            partial(gaps, inside, Load(read=True)),
        ),
        Arm(
            "gap: turnover",
            "engine, two requests wait for each sequence, of different lengths",
            partial(gaps, inside, Load(rounds=3)),
        ),
    ]


# -- Python's time alone


@dataclass(frozen=True)
class Workload:
    most: int  # steps of a call
    read: bool = False
    stops: tuple[str, ...] = ()
    turnover: bool = False


def python_time(load: Workload, case: Case) -> Measured:
    from tests.support.null_engine import NullEngine

    engine = NullEngine(case.pl, load.most, stops=load.stops, read=load.read)
    n_tokens = N_TOKENS if load.turnover else 2**20
    for i in range(case.pl):  # in turnover they have come one by one
        engine.submit(n_tokens * (i + 1) // case.pl if load.turnover else n_tokens)
    for _ in range(20):
        engine.turn()
    n_finished = engine.n_finished
    decoder_ns, delivery_ns, n_before = [], [], engine.machine.n_recorded
    n_wanted = 40 * case.tg
    while engine.machine.n_recorded - n_before < n_wanted:
        for _ in range(engine.n_finished - n_finished):
            engine.submit(n_tokens)
        n_finished = engine.n_finished
        decoder, delivery = engine.turn()
        decoder_ns.append(decoder)
        delivery_ns.append(delivery)
    n = engine.machine.n_recorded - n_before
    each = [1e-3 * sum(ns) / n for ns in (decoder_ns, delivery_ns)]
    seconds = 1e-9 * (sum(decoder_ns) + sum(delivery_ns))
    detail = {"step_us": sum(each), "decoder_us": each[0], "delivery_us": each[1], "n_steps": n}
    return Measured(0.0, seconds * case.tg / n, {}, detail)


# -- the stepper beside the C loop


def stepper_time(inside: InProcess, n: int, case: Case) -> Measured:
    case = replace(case, pl=n)
    n_steps = case.tg
    with inside.context(case) as context, Stepper(context, n_steps_max=n_steps) as stepper:
        rows, phases = stepper.rows, ("build_ns", "decode_ns", "sync_ns", "sample_ns")

        def begin() -> npt.NDArray[np.int32]:
            context.memory.clear()
            return compute_prompts(stepper, case)

        def from_python() -> float:
            token = begin()
            rows.seq[:n], rows.pos[:n], rows.flags[:n] = np.arange(n), case.pp - 1, SAMPLE
            times, clock = [], time.perf_counter_ns
            last = clock()
            for _ in range(n_steps):
                rows.token[:n] = token
                rows.pos[:n] += 1
                result = stepper.step(n)
                token = result.token
                now = clock()
                native = sum(int(result.steps[0][name]) for name in phases)
                times.append(now - last - native)
                last = clock()
            return median(times)

        def in_c() -> float:
            begin()
            steps = stepper.run(np.arange(n, dtype=np.int32), n_steps).steps
            native = np.sum([steps[name] for name in phases], axis=0)
            return float(np.median(np.diff(steps["t_start_ns"]) - native[:-1]))

        pairs = [(from_python(), in_c()) for _ in range(3)]
    python_us, c_us = (1e-3 * median(values) for values in zip(*pairs, strict=True))
    detail = {"over_c_us": python_us - c_us, "python_us": python_us, "c_us": c_us}
    return Measured(0.0, 1e-6 * python_us * n_steps, {}, detail)


# -- what the device waits for


@dataclass(frozen=True)
class Load:
    rounds: int = 1  # requests for each sequence
    read: bool = False


def gaps(inside: InProcess, load: Load, case: Case) -> Measured:
    with Engine(
        inside.model,
        n_seq_max=case.pl,
        n_ctx=case.pl * (case.pp + case.tg + 8),
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        n_trace=2**16,
        speculate=None,
    ) as engine:
        n = case.pl * load.rounds
        lengths = itertools.cycle(np.linspace(case.tg // 4, case.tg, 37).astype(int).tolist())
        each = [case.tg if load.rounds == 1 else next(lengths) for _ in range(n)]
        prompts = np.concatenate(
            [case.prompts(inside.model.n_vocab, i) for i in range(load.rounds)]
        )
        params = [sampling_params(case.sampling, i, length) for i, length in enumerate(each)]
        if load.read:
            with engine._core.state:  # none ends before the last one comes
                streams = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
            _in_threads([partial(list, stream) for stream in streams])
        else:
            engine.generate(list(prompts), params)
        trace = engine.trace()
    decoding = trace["decode_rows"] == case.pl  # all sequences decode, in this step and the next
    both = decoding[:-1] & decoding[1:] if load.rounds == 1 else slice(None)
    native = np.sum([trace[f"{name}_ns"] for name in ("build", "decode", "sync", "sample")], axis=0)
    ends = trace["t_start_ns"] + native
    gap = (trace["t_start_ns"] + trace["build_ns"])[1:] - ends[:-1]
    gap, steps = gap[both], native[1:][both]
    if len(gap) == 0:
        raise RuntimeError(f"no two steps in which {case.pl} sequences decode")
    seconds = 1e-9 * float(gap.sum() + steps.sum())
    detail = {
        "gap_p50_us": 1e-3 * float(np.median(gap)),
        "gap_p99_us": 1e-3 * float(np.percentile(gap, 99)),
        "gap_max_us": 1e-3 * float(gap.max()),
        "gap_share": float(gap.sum()) / (1e9 * seconds),
        "step_us": 1e-3 * float(steps.mean()),
        "n_steps": len(gap),
        "native_calls": len(np.unique(trace["run"])),
    }
    return Measured(0.0, seconds * case.tg / len(gap), {"kv_unified": True}, detail)


def _in_threads(works: list[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
