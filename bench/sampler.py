"""Sampling alone: rows of random logits, no model."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import report, schema
from bench.options import Budget, add_run, out_file
from bench.quiet import undisturbed
from bench.targets import Figure, Target

SCAN = "scan"
SCANNED = "one vectorised scan of the row for its maximum: the yardstick"
PARAMS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "default": {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    "top-p": {"top_p": 0.95, "temperature": 1},
    "temperature": {"temperature": 0.8},
}
LIMITS = {"greedy": 1.5, "default": 3.0, "top-p": 15.0, "temperature": 6.0}
QUICK = ("--quick",)
VOCAB = 262144
SPREAD = 3.0  # standard deviation of the logits
LEAST_S = 0.4  # of a repeat of one arm, so that the watch on others sees them


F32 = npt.NDArray[np.float32]


def over_scan(sampling: str) -> Figure:
    """Time of one row on one thread over one scan of it."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        values = [
            row.detail["over_scan"]
            for row in rows
            if row.arm == f"{sampling}, 1 thread" and row.pl == 1
            if row.detail["spread"] == SPREAD and row.model_filename == f"{VOCAB} normal logits"
        ]
        return median(values) if values else None

    return figure


def speed_up(sampling: str, n_rows: int, n_threads: int) -> Figure:
    """Time of all rows on one thread over that on several, paired by repeat."""

    def figure(rows: Sequence[schema.Row]) -> float | None:
        one = f"{sampling}, 1 thread"
        ratios = report.paired_ratios((row for row in rows if row.detail["spread"] == SPREAD), one)
        return ratios.get((f"{sampling}, {n_threads} threads", n_rows))

    return figure


TARGETS = (
    *(
        Target(f"{name}: time of a row of {VOCAB} over one scan of it", over_scan(name), at_most=x)
        for name, x in LIMITS.items()
    ),
    *(
        Target(
            f"{name}: speed-up of 16 threads, 64 rows",
            speed_up(name, 64, 16),
            at_least=10.0,
            where={"n_cores": 16},
        )
        for name in LIMITS
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1, help="rows sampled in one call")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="logits per row")
    parser.add_argument(
        "--spread",
        default=f"{SPREAD:g}",
        help="standard deviations of the normal logits, comma separated",
    )
    parser.add_argument("--arms", default="", help=f"comma separated; {','.join(PARAMS)}")
    parser.add_argument("--chain", action="store_true", help="libllama's chain beside each arm")
    parser.add_argument(
        "--threads", help="comma separated (1; with several rows 1 and one per core)"
    )
    parser.add_argument("--repeats", type=int, default=7)
    add_run(parser)


@dataclass(frozen=True)
class SamplerArm:
    """`call()` samples all rows once."""

    name: str
    sampling: str
    path: str
    n_threads: int
    call: Callable[[], None]
    keep: Any


def main(options: argparse.Namespace) -> int:
    names = options.arms.split(",") if options.arms else list(PARAMS)
    unknown = [name for name in names if name not in PARAMS]
    if unknown or options.vocab % 64 or options.vocab < 64 or options.rows < 1:
        raise SystemExit(f"--arms {', '.join(PARAMS)}; --vocab a multiple of 64; --rows 1 or more")
    cores = schema.machine()["n_cores"]
    some = options.threads or ("1" if options.rows == 1 else f"1,{cores}")
    threads = list(dict.fromkeys(int(word) for word in some.split(",")))
    out = out_file(options, "sampler", "")
    for spread in (float(word) for word in options.spread.split(",")):
        rows = []
        for row in measure(options, names, threads, spread):
            schema.append(out, [row])
            rows.append(row)
        if not rows:
            break
        print(f"\n{options.vocab} logits a row, medians of {rows[-1].repeat + 1} repeats; ", end="")
        print(view(rows))
    print(f"\nrows: {out}")
    return 0


def measure(
    options: argparse.Namespace, names: list[str], threads: list[int], spread: float
) -> Iterator[schema.Row]:
    """Rows as they are measured.  In each repeat every arm in turn, odd repeats backwards; within a
    repeat each call of an arm follows a scan of the same row, so that both see the same machine."""
    logits = normal_logits(options.rows, options.vocab, spread, options.seed)
    arms = [
        make_arm(name, path, n, logits, options.seed)
        for name in names
        for path in (("fused", "chain") if options.chain else ("fused",))
        for n in threads
    ]
    scan = scanner(logits)
    facts = schema.build() | {"model_type": "", "model_size": 0, "model_n_params": 0}
    run_id = uuid.uuid4().hex[:12]
    budget = Budget(options.budget)
    for arm in arms:  # pages and threads are there before anything counts
        arm.call()
    for repeat in range(1 if options.quick else options.repeats):
        for arm in arms if repeat % 2 == 0 else arms[::-1]:
            if budget.spent():
                return
            moment = schema.now()
            least = 0.02 if options.quick else LEAST_S
            run = partial(times, scan, arm.call, least)
            (t_scan, t_call), others = undisturbed(run, options.undisturbed)
            detail = {"scan_s": t_scan, "over_scan": t_call / t_scan, "spread": spread}
            yield make_row(arm, options, t_call, facts | moment, run_id, repeat, detail, others)


def times(scan: Callable[[], None], call: Callable[[], None], least: float) -> tuple[float, float]:
    """Medians, in s, of one scan and of one call."""
    scans: list[int] = []
    calls: list[int] = []
    began = time.perf_counter_ns()
    while len(calls) < 5 or time.perf_counter_ns() - began < least * 1e9:
        t0 = time.perf_counter_ns()
        scan()
        t1 = time.perf_counter_ns()
        call()
        t2 = time.perf_counter_ns()
        scans.append(t1 - t0)
        calls.append(t2 - t1)
    return median(scans) / 1e9, median(calls) / 1e9


def normal_logits(n_rows: int, n_vocab: int, spread: float, seed: int) -> F32:
    generator = np.random.default_rng(seed)
    logits = generator.standard_normal((n_rows, n_vocab), dtype=np.float32)
    logits *= np.float32(spread)
    return logits


def scanner(logits: F32) -> Callable[[], None]:
    from pyllamabatch.raw import ffi, lib

    row = ffi.from_buffer("float[]", logits[0])
    n, maximum = logits.shape[1], lib.plb_rows_maximum

    def scan() -> None:
        maximum(row, n)

    return scan


def make_arm(name: str, path: str, n_threads: int, logits: F32, seed: int) -> SamplerArm:
    from pyllamabatch.raw import ffi, lib

    n_rows, n_vocab = logits.shape
    out = ffi.new("plb_rows **")
    code = lib.plb_rows_new(n_vocab, n_rows, 0, n_threads, out)
    if code:
        raise SystemExit(f"plb_rows_new: {ffi.string(lib.plb_code_text(code)).decode()}")
    rows = ffi.gc(out[0], lib.plb_rows_free)
    sampling = ffi.new("plb_sampling *", lib.plb_sampling_default())
    sampling.max_tokens = 2**31 - 1
    sampling.top_k, sampling.top_p, sampling.min_p = 0, 1, 0
    sampling.path = lib.PLB_PATH_CHAIN if path == "chain" else lib.PLB_PATH_FUSED
    for key, value in PARAMS[name].items():
        setattr(sampling, key, int(value) if key == "top_k" else value)
    for i in range(n_rows):
        sampling.seed = seed + i
        lib.plb_rows_set(rows, i, sampling, ffi.NULL, 0)
    buffer = ffi.from_buffer("float[]", logits.reshape(-1))
    results = ffi.new("plb_result[]", n_rows)
    sample = lib.plb_rows_sample

    def call() -> None:
        sample(rows, n_rows, buffer, n_vocab, results, ffi.NULL, ffi.NULL)

    call()
    if any(result.error for result in results):
        raise SystemExit(f"{name}: a row was not sampled")
    threads = "1 thread" if n_threads == 1 else f"{n_threads} threads"
    label = f"{name}, {threads}" if path == "fused" else f"{name}, chain, {threads}"
    return SamplerArm(label, name, path, n_threads, call, (rows, results, buffer))


def make_row(
    arm: SamplerArm,
    options: argparse.Namespace,
    t_call: float,
    facts: dict[str, Any],
    run_id: str,
    repeat: int,
    detail: dict[str, float],
    others: float,
) -> schema.Row:
    includes = {
        "fused": "one plb_rows_sample: check, penalties, truncation and draw of all rows",
        "chain": "the same with a chain of libllama's samplers per row",
    }[arm.path]
    return schema.Row(
        bench="sampler",
        arm=arm.name,
        includes=f"{includes}; scan_s: {SCANNED}",
        run_id=run_id,
        repeat=repeat,
        sampling=arm.sampling,
        **schema.machine(),
        **facts,
        model_filename=f"{options.vocab} normal logits",
        model_seed=options.seed,
        seed=options.seed,
        n_kv_max=0,
        n_batch=0,
        n_ubatch=0,
        flash_attn=-1,
        kv_unified=False,
        type_k="",
        type_v="",
        n_gpu_layers=0,
        n_threads=arm.n_threads,
        n_threads_batch=arm.n_threads,
        pp=0,
        tg=1,
        pl=options.rows,
        n_kv=0,
        detail=detail | {"other_cpu": round(others, 3)},
        **schema.speeds(pp=0, tg=1, pl=options.rows, t_pp=0.0, t_tg=t_call),
    )


def view(rows: Sequence[schema.Row]) -> str:
    """A table per number of rows and spread of the logits."""
    kinds = dict.fromkeys((row.pl, row.detail["spread"]) for row in rows)
    return "\n\n".join(
        f"{n} row{'s' * (n > 1)} of normal logits, spread {width:g}:\n\n"
        + table([row for row in rows if (row.pl, row.detail["spread"]) == (n, width)])
        for n, width in kinds
    )


def table(rows: Sequence[schema.Row]) -> str:
    """Time over one scan for one row, speed-up over one thread for several."""
    n_rows = rows[0].pl
    if n_rows > 1:
        lines = ["| arm | us a call | speed-up over 1 thread | us a row |", "|---|--:|--:|--:|"]
    else:
        lines = ["| arm | us a call | over one scan | at most |", "|---|--:|--:|--:|"]
    for arm in dict.fromkeys(row.arm for row in rows):
        mine = [row for row in rows if row.arm == arm]
        t = median(row.t_tg for row in mine)
        if n_rows > 1:
            alone = arm.rpartition(", ")[0] + ", 1 thread"
            ratio = report.paired_ratios(rows, alone).get((arm, n_rows))
            figure = "—" if ratio is None else f"{ratio:.2f}"
            last = f"{t * 1e6 / n_rows:.1f}"
        else:
            figure = f"{median(row.detail['over_scan'] for row in mine):.2f}"
            last = f"{LIMITS[mine[0].sampling]:g}" if "chain" not in arm else ""
        lines.append(f"| {arm} | {t * 1e6:.1f} | {figure} | {last} |")
    scan = median(row.detail["scan_s"] for row in rows)
    return "\n".join(lines) + f"\n\none scan: {scan * 1e6:.1f} us"
