"""Sampling alone: rows of random logits, no model."""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from bench import harness
from bench.case import NO_CONTEXT, Arm, Case, Measured, ModelFile
from bench.options import add_run, numbers
from bench.targets import Figure, Target
from bench.views import Column, by_arm, failures, median_of, paired_ratios
from pyllamabatch.raw import ffi, lib
from pyllamabatch.report.facts import machine
from pyllamabatch.report.records import Record

SCANNED = "one vectorised scan of the row for its maximum: the yardstick"
PARAMS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0},
    "default": {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    "top-p": {"top_p": 0.95, "temperature": 1},
    "temperature": {"temperature": 0.8},
}
LIMITS = {"greedy": 1.5, "default": 3.0, "top-p": 15.0, "temperature": 6.0}
QUICK = {"repeats": 1, "least": 0.02}
VOCAB = 262144
SPREAD = 3.0  # standard deviation of the logits

F32 = npt.NDArray[np.float32]


def over_scan(sampling: str) -> Figure:
    """Time of one row on one thread over one scan of it."""

    def figure(records: Sequence[Record]) -> float | None:
        return median_of(
            record.detail["over_scan"]
            for record in records
            if record.arm == f"{sampling}, 1 thread" and record.pl == 1
            if record.detail["spread"] == SPREAD and record.model_filename == subject(VOCAB)
        )

    return figure


def speed_up(sampling: str, n_rows: int, n_threads: int) -> Figure:
    """Time of all rows on one thread over that on several, paired by repeat."""

    def figure(records: Sequence[Record]) -> float | None:
        mine = [record for record in records if record.detail["spread"] == SPREAD]
        ratios = paired_ratios(mine, f"{sampling}, 1 thread")
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


@dataclass(frozen=True)
class RowsCase(Case):
    """`pl` rows of `n_vocab` logits."""

    n_vocab: int = VOCAB
    spread: float = SPREAD

    def logits(self) -> F32:
        generator = np.random.default_rng(self.seed)
        logits = generator.standard_normal((self.pl, self.n_vocab), dtype=np.float32)
        logits *= np.float32(self.spread)
        return logits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1, help="rows sampled in one call")
    parser.add_argument("--vocab", type=int, default=VOCAB, help="logits per row")
    parser.add_argument(
        "--spread", type=float, default=SPREAD, help="standard deviation of the normal logits"
    )
    parser.add_argument("--arms", default=",".join(PARAMS), help="comma separated")
    parser.add_argument("--chain", action="store_true", help="libllama's chain beside each arm")
    parser.add_argument(
        "--threads", help="comma separated (1; with several rows 1 and one per core)"
    )
    parser.set_defaults(least=0.4)  # s of a run, so that the watch on others sees them
    add_run(parser, repeats=7)


def main(options: argparse.Namespace) -> int:
    names = options.arms.split(",")
    if set(names) - set(PARAMS) or options.vocab % 64 or options.vocab < 64 or options.rows < 1:
        raise SystemExit(f"--arms {', '.join(PARAMS)}; --vocab a multiple of 64; --rows 1 or more")
    cores = machine()["n_cores"]
    threads = numbers(options.threads or ("1" if options.rows == 1 else f"1,{cores}"))
    paths = ("fused", "chain") if options.chain else ("fused",)
    model = ModelFile(Path(subject(options.vocab)), options.seed)
    case = RowsCase(
        model, 0, 1, options.rows, 1, "none", options.seed,
        n_vocab=options.vocab, spread=options.spread,
    )  # fmt: skip
    arms = [
        sampler_arm(name, path, n, case, options.least)
        for name in names
        for path in paths
        for n in dict.fromkeys(threads)
    ]
    return harness.run(
        options, arms, [case], harness.facts_of(), f"{options.vocab} logits a row", subject=""
    )


def subject(n_vocab: int) -> str:
    """What stands for the model's file in a record."""
    return f"{n_vocab} normal logits"


def sampler_arm(name: str, path: str, n_threads: int, case: RowsCase, least: float) -> Arm:
    """Each call follows a scan of the same row, so that both see the same machine."""
    logits = case.logits()
    scan, sample = scanner(logits), sampler(name, path, n_threads, logits, case.seed)
    sample()  # pages and threads are there before anything counts

    def run(case: RowsCase) -> Measured:
        t_scan, t_call = times(scan, sample, least)
        detail = {"scan_s": t_scan, "over_scan": t_call / t_scan, "spread": case.spread}
        threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
        return Measured(0.0, t_call, NO_CONTEXT | threads, detail)

    includes = {
        "fused": "one plb_rows_sample: check, penalties, truncation and draw of all rows",
        "chain": "the same with a chain of libllama's samplers per row",
    }[path]
    words = [name, "chain" if path == "chain" else "", f"{n_threads} thread{'s' * (n_threads > 1)}"]
    return Arm(
        ", ".join(filter(None, words)), f"{includes}; scan_s: {SCANNED}", run, sampling=False
    )


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


def scanner(logits: F32) -> Callable[[], None]:
    row = ffi.from_buffer("float[]", logits[0])
    return partial(lib.plb_rows_maximum, row, logits.shape[1])


def sampler(name: str, path: str, n_threads: int, logits: F32, seed: int) -> Callable[[], None]:
    """A function that samples all rows once. SystemExit where that fails."""
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
    sample = partial(
        lib.plb_rows_sample, rows, n_rows, buffer, n_vocab, results, ffi.NULL, ffi.NULL
    )
    sample()
    if any(result.error for result in results):
        raise SystemExit(f"{name}: a row was not sampled")
    return sample


def view(records: Sequence[Record]) -> str:
    """A table for each number of rows and spread of the logits: time over one scan for one row,
    speed-up over one thread for several."""
    kinds: dict[tuple[int, float], list[Record]] = {}
    for record in (record for record in records if not record.error):
        kinds.setdefault((record.pl, record.detail["spread"]), []).append(record)
    parts = []
    for (n_rows, spread), mine in kinds.items():
        beside = Column("over one scan", "over_scan", ".2f")
        if n_rows > 1:
            beside = Column("speed-up over 1 thread", partial(over_one_thread, mine), ".2f")
        columns = (
            Column("us a call", lambda record: record.t_tg, ".1f", 1e6),
            beside,
            Column("one scan, us", "scan_s", ".1f", 1e6),
        )
        heading = f"{n_rows} row{'s' * (n_rows > 1)} of normal logits, spread {spread:g}:"
        parts.append(f"{heading}\n\n{by_arm(mine, columns)}")
    return "\n".join(["\n\n".join(parts), *failures(records)])


def over_one_thread(records: Sequence[Record], record: Record) -> float | None:
    alone = record.arm.rpartition(", ")[0] + ", 1 thread"
    return paired_ratios(records, alone).get((record.arm, record.pl))
