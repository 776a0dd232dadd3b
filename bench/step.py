"""What a step takes besides computing: Python in the engine and the stepper, and the device's gaps.

`python`: CPU time of the engine's two threads for a step, on a machine that computes nothing.
`stepper`: one `Stepper.step` from Python, besides the native call, over the same in the C loop.
`gap`: a real engine; from the end of sampling of one step to the beginning of the next decode.
"""

from __future__ import annotations

import argparse
import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import numpy as np
import numpy.typing as npt

from bench import report, schema
from bench.arms import InProcess, compute_prompts
from bench.case import Arm, Case, Measured, case_row
from bench.models import resolve
from bench.options import Budget, add_run, choose, out_file
from bench.quiet import undisturbed
from bench.targets import Figure, Target
from pyllamabatch.compare.case import sampling_params

N_SEQS = 64
N_TOKENS = 128  # of a request, where requests come and go
RUN = 32  # steps of a run, where nobody does
QUICK = ("--quick",)


def detail_of(arm: str, name: str) -> Figure:
    """Median over the runs of an arm."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        return report.median_of(row.detail.get(name) for row in rows if row.arm == arm)

    return figure


TARGETS = (
    Target(
        f"Python: us a step, steady decode, {N_SEQS} sequences",
        detail_of("python: steady", "step_us"),
        at_most=20.0,
    ),
    Target(
        "Stepper.step from Python: us over the C loop, 1 sequence",
        detail_of("stepper: 1", "over_c_us"),
        at_most=15.0,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="default", help="of stepper and gap: as in decode")
    parser.add_argument("--arms", default="", help="comma separated; all by default")
    parser.add_argument("--threads", type=int, default=1, help="that compute, in stepper and gap")
    parser.add_argument("--tokens", type=int, help="of each request in gap (128; --quick 32)")
    parser.add_argument("--repeats", type=int, help="of each arm (5; --quick 1)")
    add_run(parser)


def main(options: argparse.Namespace) -> int:
    model = resolve(options.model)
    inside = InProcess(model, -1)
    arms = choose(options.arms, all_arms(inside))
    case = Case(
        model=model,
        pp=N_PROMPT,
        tg=options.tokens or (32 if options.quick else N_TOKENS),
        pl=N_SEQS,
        n_threads=options.threads,
        sampling="greedy",
        seed=options.seed,
        kv_unified=True,
    )
    out = out_file(options, "step", model.path.stem)
    rows = []
    for row in measure(arms, case, inside, options):
        schema.append(out, [row])
        rows.append(row)
    print(view(rows))
    print("\nWhat each contains:")
    for arm in arms:
        print(f"- {arm.name}: {arm.includes}")
    print(f"\nrows: {out}")
    return int(any(row.error for row in rows))


N_PROMPT = 8


def measure(
    arms: list[Arm], case: Case, inside: InProcess, options: argparse.Namespace
) -> Iterator[schema.Row]:
    """Rows as they are measured: in each repeat every arm in turn, odd repeats backwards."""
    run_id, facts = uuid.uuid4().hex[:12], inside.facts()
    budget = Budget(options.budget)
    for repeat in range(options.repeats or (1 if options.quick else 5)):
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            if budget.spent():
                return
            moment = schema.now()
            try:
                measured, others = undisturbed(partial(arm.run, case), options.undisturbed)
                measured.detail["other_cpu"] = round(others, 3)
            except Exception as failure:
                measured = Measured.failed(failure)
            yield case_row("step", arm, case, measured, facts | moment, run_id, repeat)


def all_arms(inside: InProcess) -> list[Arm]:
    nothing = "on a machine that computes nothing: CPU time of the decoder's and the delivery"
    return [
        Arm(
            "python: steady",
            f"{nothing} thread's work; nobody comes or goes, calls of {RUN} steps",
            False,
            partial(python_time, Workload(most=RUN)),
        ),
        Arm(
            "python: each step planned",
            f"{nothing} thread's work; a plan and a call for every step",
            False,
            partial(python_time, Workload(most=1)),
        ),
        Arm(
            "python: each step read",
            f"{nothing} thread's work; planned as above, and every stream has a reader to wake",
            False,
            partial(python_time, Workload(most=1, read=True)),
        ),
        Arm(
            "python: stop strings",
            f"{nothing} thread's work; planned as above, two stop strings for every request",
            False,
            partial(python_time, Workload(most=1, stops=("Human:", "###"))),
        ),
        Arm(
            "python: turnover",
            f"{nothing} thread's work; requests of {N_TOKENS} tokens, one ends and one is admitted "
            "every other step; submitting is the caller's time",
            False,
            partial(python_time, Workload(most=RUN, turnover=True)),
        ),
        *(
            Arm(
                f"stepper: {n}",
                f"Python: {n} rows written, Stepper.step; over_c_us: time outside of the native "
                "step, less that of plb_run's loop over the same steps",
                True,
                partial(stepper_time, inside, n),
            )
            for n in (1, N_SEQS)
        ),
        Arm(
            "gap: steady",
            f"engine, {N_SEQS} requests of the same length, results at the end",
            True,
            partial(gaps, inside, Load()),
        ),
        Arm(
            "gap: each token read",
            "the same, and a thread for each stream reads every token",
            True,
            partial(gaps, inside, Load(read=True)),
        ),
        Arm(
            "gap: turnover",
            "engine, two requests in line for each sequence, of different lengths",
            True,
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
    from bench.null import NullEngine

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
    from pyllamabatch.step.stepper import SAMPLE, Stepper

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
                native = result.build_ns + result.decode_ns + result.sync_ns + result.sample_ns
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
    from pyllamabatch.engine.engine import Engine

    with Engine(
        inside.model,
        n_seq_max=case.pl,
        n_ctx=case.pl * (case.pp + case.tg + 8),
        n_threads=case.n_threads,
        n_threads_batch=case.n_threads,
        n_trace=2**16,
    ) as engine:
        n = case.pl * load.rounds
        lengths = itertools.cycle(np.linspace(case.tg // 4, case.tg, 37).astype(int).tolist())
        each = [case.tg if load.rounds == 1 else next(lengths) for _ in range(n)]
        prompts = np.concatenate(
            [case.prompts(inside.model.n_vocab, i) for i in range(load.rounds)]
        )
        params = [sampling_params(case.sampling, i, length) for i, length in enumerate(each)]
        if load.read:
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


# -- views


def view(rows: Sequence[schema.Row]) -> str:
    """Medians over the repeats."""

    def figure(arm: str, name: str, form: str = "{:.1f}") -> str:
        value = detail_of(arm, name)(rows)
        return "—" if value is None else form.format(value)

    arms = list(dict.fromkeys(row.arm for row in rows if not row.error))
    lines = []
    if own := [arm for arm in arms if arm.startswith("python")]:
        lines += ["| us a step | both | decoder | delivery |", "|---|--:|--:|--:|"]
        for arm in own:
            names = ("step_us", "decoder_us", "delivery_us")
            lines.append(f"| {arm} | " + " | ".join(figure(arm, name) for name in names) + " |")
    if own := [arm for arm in arms if arm.startswith("stepper")]:
        lines += ["", "| us a step | over C | Python | C |", "|---|--:|--:|--:|"]
        for arm in own:
            names = ("over_c_us", "python_us", "c_us")
            lines.append(f"| {arm} | " + " | ".join(figure(arm, name) for name in names) + " |")
    if own := [arm for arm in arms if arm.startswith("gap")]:
        lines += [
            "",
            "| between two decodes | p50 us | p99 us | share of the time | us a step |",
            "|---|--:|--:|--:|--:|",
        ]
        for arm in own:
            cells = [figure(arm, name) for name in ("gap_p50_us", "gap_p99_us")]
            cells += [figure(arm, "gap_share", "{:.2%}"), figure(arm, "step_us", "{:.0f}")]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, *report.failures(rows)])
