"""How a bench runs: arms in turns, a record of every run, and what is printed at the end."""

import argparse
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.benches import load, view_of
from bench.case import Arm, Case, Measured, record_of
from bench.options import Budget, out_file
from bench.quiet import undisturbed
from bench.targets import judged
from bench.tools import own_ggml
from pyllamabatch.report import facts
from pyllamabatch.report.disturbed import unwatched, warning
from pyllamabatch.report.records import Record, append
from pyllamabatch.report.tables import in_words


@cache
def commit() -> str:
    """Of the checkout that the bench is run from, which need not be the installed package's."""
    return facts.commit(Path(__file__))


def facts_of(model: Any = None) -> dict[str, Any]:
    """The build's and the model's part of a record. `versions` has `tools` where llama.cpp's have a
    ggml of their own, so as upstream has it and without our patches."""
    none = {"model_type": "", "model_size": 0, "model_n_params": 0}
    found = facts.build(commit())
    if own_ggml():
        found["versions"]["tools"] = "with a ggml of their own"
    return found | (none if model is None else facts.about(model))


class Recorder:
    """Makes the records of one invocation of a bench. `about`: of the build and the model
    (`facts_of`)."""

    def __init__(self, bench: str, about: dict[str, Any], options: argparse.Namespace) -> None:
        self.budget = Budget(options.budget)
        self._bench = bench
        self._about = about
        self._limit = options.undisturbed
        self._run_id = uuid.uuid4().hex[:12]

    def run(
        self,
        arm: Arm,
        case: Case,
        repeat: int,
        work: Callable[[], Measured],
        pids: Sequence[int] = (),
        **own: Any,
    ) -> Record:
        """One run, or why there is no result. `pids`: processes that work for it; `own`: facts
        that differ from those of this build."""
        own = facts.now() | own
        try:
            measured = undisturbed(work, self._limit, pids)
        except Exception as failure:
            measured = Measured.failed(failure)
        return self.record(arm, case, repeat, measured, **own)

    def record(self, arm: Arm, case: Case, repeat: int, measured: Measured, **own: Any) -> Record:
        known = self._about | facts.now() | own
        return record_of(self._bench, arm, case, measured, known, self._run_id, repeat)


def measure(
    bench: str,
    arms: Sequence[Arm],
    cases: Sequence[Case],
    about: dict[str, Any],
    options: argparse.Namespace,
) -> Generator[Record, None, None]:
    """Records as they are measured: in each repeat every case, in each case every arm. Odd repeats
    go through the arms backwards, so that no arm always runs after the same one. An arm that fails
    gives a record that says why, and the others go on."""
    recorder = Recorder(bench, about, options)
    for repeat in range(options.repeats):
        for case in cases:
            for arm in arms if repeat % 2 == 0 else arms[::-1]:
                if recorder.budget.spent():
                    return
                yield recorder.run(arm, case, repeat, partial(arm.run, case))


def run(
    options: argparse.Namespace,
    arms: Sequence[Arm],
    cases: Sequence[Case],
    about: dict[str, Any],
    title: str,
    subject: str | None = None,
) -> int:
    """`measure`, then `show`; the exit status."""
    running = measure(options.command, arms, cases, about, options)
    return show(options, running, len(arms) * len(cases) * options.repeats, title, subject)


def show(
    options: argparse.Namespace,
    running: Generator[Record, None, None],
    n_runs: int,
    title: str,
    subject: str | None = None,
    optional: Sequence[str] = (),
) -> int:
    """Writes every record as soon as it is there, and prints at the end what they show, by the
    bench's own `view` and `TARGETS`. What `running` started is ended, also on Ctrl-C.

    `title`: what was run; `subject`: of the file's name (the model's); `optional`: arms that may
    have no result. Returns the exit status: 1 where another arm has none, and where a target is
    missed that must be met.
    """
    name = options.command
    bench = load(name)
    if subject is None:
        subject = Path(options.model).name.removesuffix(".gguf")
        title = f"{options.model}: {title}, {options.threads} threads, KV {options.kv}"
    records: list[Record] = []
    # no thread of its own, which would take time from what is measured
    with Progress(console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task(name, total=n_runs)
        with closing(running):
            for record in running:
                append(out_file(options, name, subject, record.gpu_info), [record])
                records.append(record)
                words = f"{record.pl:>5}  {in_words(record)}"
                progress.console.print(words, markup=False, highlight=False)
                progress.advance(task)
                progress.refresh()
    if not records:
        return 1
    print(f"\n{title}, medians of {options.repeats}\n\n{view_of(bench)(records)}\n")
    if busy := warning(records):
        print(f"{busy} Their speeds may be far off: --undisturbed waits, and repeats these.\n")
    if unknown := unwatched(records):
        print(f"{unknown}\n")
    print(judged(bench.TARGETS, records), end="")
    print("What each time contains:")
    arms = {record.arm: record.includes for record in records}
    for includes in dict.fromkeys(arms.values()):
        print(f"- {', '.join(arm for arm in arms if arms[arm] == includes)}: {includes}")
    print(f"\nrecords: {out_file(options, name, subject, records[0].gpu_info)}")
    failed = any(record.error and record.arm not in optional for record in records)
    return int(failed or any(target.must and target.missed_by(records) for target in bench.TARGETS))
