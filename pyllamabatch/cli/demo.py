"""The embedded model answers 32 different prompts at once, then one by one.

Every prompt has one right answer, so a token that went to the wrong sequence
shows. Before that, steps of 1 to 32 rows are timed: what a wider batch is worth
on this machine.

Exit status: 0 if at least 8 in 10 answers of each pass are right, else 1."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllamabatch.cli.console import live_console, say
from pyllamabatch.cli.options import add_shared, at_least
from pyllamabatch.cost.profile import Shape
from pyllamabatch.cost.rig import Rig
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.results import Result
from pyllamabatch.engine.stream import Stream
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.llama.model import Model
from pyllamabatch.models import DefaultPrompt, default_prompts
from pyllamabatch.step.sampling_params import SamplingParams

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RIGHT_AT_LEAST = 0.8  # the model is right on more than 98%; crossed sequences, on nearly none
LITTLE_GAIN = 2.0
THREADS = (1, 2, 4, 8, 16)
WIDTHS = (1, 2, 4, 8, 16, 32)
DEPTH = 8  # cells that each sequence of a timed step holds
N_CELLS = 512  # of a sequence: the longest prompt with its answer fits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    n = len(default_prompts())
    add = parser.add_argument
    add("-p", "--prompts", type=at_least(1, n), default=n, metavar="N", help=f"the first N ({n})")
    add_shared(add, threads=None)
    add("--plain", action="store_true", help="plain lines, also on a terminal")


def run(args: argparse.Namespace) -> int:
    tasks = default_prompts()[: args.prompts]
    with Model.default() as model:
        say(f"timing steps of 1 to {WIDTHS[-1]} rows")
        threads, milliseconds = time_steps(model, args.threads)
        # The prompts share nothing, so each sequence has cells of its own to attend to.
        params: dict[str, Any] = {
            "kv_unified": False,
            "n_threads": threads,
            "n_threads_batch": threads,
        }
        n = len(tasks)
        # Without drafts: a batch is to be seen, and one by one they would fill its rows.
        with Engine(model, n_seq_max=n, n_ctx=n * N_CELLS, speculate=None, **params) as engine:
            requests = [request(model, task) for task in tasks]
            engine.submit(*requests[0]).result()  # warm: neither pass pays for it
            with board(tasks, plain=args.plain) as shown:
                together = Pass.of(engine, f"{n} at once", shown.at_once, requests)
                alone = Pass.of(engine, "one by one", shown.one_by_one, requests)
    report(tasks, together, alone, threads)
    report_steps(milliseconds)
    if together.speed < LITTLE_GAIN * alone.speed:
        say(
            "The embedded model (4 MiB) fits a CPU's cache, so reading its weights costs little "
            "and a batch saves little. Larger models and GPUs gain much more: see README.md."
        )
    right = min(together.n_right(tasks), alone.n_right(tasks))
    return 0 if right >= RIGHT_AT_LEAST * len(tasks) else 1


def time_steps(model: Model, threads: int | None) -> tuple[int, dict[int, float]]:
    """The number of CPU threads, and the milliseconds of a step for each number of rows.

    Threads that are not given are those that decode wide steps fastest here, now. A step of the
    embedded model is so short that waiting for a busy core can make it many times longer."""
    widest = WIDTHS[-1]
    with Rig(model, n_seq_max=widest, n_ctx=256 * widest, kv_unified=False) as rig:

        def seconds(n_rows: int, n_threads: int, n_steps: int = 16) -> list[float]:
            rig.context.set_threads(n_threads)
            took = rig.time(Shape(n_rows, depth=DEPTH), n_steps)
            return [step.seconds for step in took[1:]]

        if threads is None:
            counts = [n for n in THREADS if n <= usable_cores()]
            threads = min(counts, key=lambda n: sum(seconds(widest, n, n_steps=8)))
        return threads, {n_rows: 1e3 * min(seconds(n_rows, threads)) for n_rows in WIDTHS}


def request(model: Model, task: DefaultPrompt) -> tuple[Any, SamplingParams]:
    """The prompt's tokens; greedy, with room for a wrong answer that is a bit longer."""
    text = model.vocab.apply_chat_template([{"role": "user", "content": task.prompt}])
    n_answer = len(model.vocab.tokenize(task.answer, add_special=False))
    params = SamplingParams(temperature=0, max_tokens=n_answer + 16)
    return model.vocab.tokenize(text), params


@dataclass
class Pass:
    """One way to answer all prompts."""

    name: str
    seconds: float  # from the first submission to the last answer
    results: list[Result]
    n_steps: int
    n_rows: int

    @classmethod
    def of(cls, engine: Engine, name: str, answer: Callable[..., list[Result]], to: Any) -> Pass:
        before, began = engine.stats(), time.perf_counter()
        results = answer(engine, to)
        seconds, after = time.perf_counter() - began, engine.stats()
        return cls(name, seconds, results, after.steps - before.steps, after.rows - before.rows)

    @property
    def n_tokens(self) -> int:
        return sum(result.n_generated for result in self.results)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.n_tokens / self.seconds

    def n_right(self, tasks: Sequence[DefaultPrompt]) -> int:
        return sum(is_right(task, r.text) for task, r in zip(tasks, self.results, strict=True))


def report(tasks: Sequence[DefaultPrompt], together: Pass, alone: Pass, threads: int) -> None:
    for done in (together, alone):
        say(
            f"{done.name}: {done.n_tokens} tokens in {done.seconds:.2f} s, "
            f"{done.speed:.0f} tok/s, {done.n_right(tasks)} of {len(tasks)} right; "
            f"{done.n_steps} steps, {done.n_rows / done.n_steps:.1f} rows a step"
        )
    n_same = sum(a.tokens == b.tokens for a, b in zip(together.results, alone.results, strict=True))
    say(
        f"{together.speed / alone.speed:.2f} times as fast at once; "
        f"{n_same} of {len(tasks)} answers the same to the token"
    )
    say(
        "tok/s = generated tokens / wall time, prompts included; greedy, one context, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}\n"
    )


def report_steps(ms: dict[int, float]) -> None:
    """ms: of a step, by its rows."""
    say(f"A step reads all weights once, for one row or for {WIDTHS[-1]}. Steps that decode:")
    say("  rows in a step" + "".join(f"{n:>8}" for n in ms))
    say("  ms            " + "".join(f"{each:>8.2f}" for each in ms.values()))
    say("  tok/s         " + "".join(f"{1e3 * n / each:>8.0f}" for n, each in ms.items()))
    best = max(ms, key=lambda n: n / ms[n])
    say(
        f"{best} rows take {ms[best] / ms[1]:.1f} times as long as one: "
        f"{best * ms[1] / ms[best]:.1f} times the tokens."
    )


# -- what is seen while it runs --


def is_right(task: DefaultPrompt, text: str) -> bool:
    return text.strip() == task.answer


def question(task: DefaultPrompt, width: int) -> str:
    """One line of the prompt: its end, where a long one asks its question."""
    text = " ".join(task.prompt.split())
    return text if len(text) <= width else "…" + text[1 - width :]


@contextmanager
def board(tasks: Sequence[DefaultPrompt], *, plain: bool) -> Iterator[Board]:
    """A table with a row for each prompt, redrawn ten times a second; else plain lines."""
    console = live_console(plain=plain, stderr=False)
    shown = Board(tasks, console)
    if console is None:
        yield shown
        return
    from rich.live import Live

    with Live(console=console, get_renderable=shown.table, refresh_per_second=10) as live:
        yield shown
        live.vertical_overflow = "visible"  # the last picture in full, also if it scrolls


class Board:
    """Answers the prompts, and shows the answers as they come."""

    def __init__(self, tasks: Sequence[DefaultPrompt], console: Console | None) -> None:
        self._tasks, self._console = tasks, console
        self.streams: Sequence[Stream] = ()
        self.n_alone = 0

    def at_once(self, engine: Engine, requests: Sequence[Any]) -> list[Result]:
        self.streams = [engine.submit(*request) for request in requests]
        return [stream.result() for stream in self.streams]

    def one_by_one(self, engine: Engine, requests: Sequence[Any]) -> list[Result]:
        if self._console is None:
            self._say_answers()
        results = []
        for self.n_alone, request in enumerate(requests, 1):
            results.append(engine.submit(*request).result())
        return results

    def _say_answers(self) -> None:
        for i, (task, stream) in enumerate(zip(self._tasks, self.streams, strict=True), 1):
            mark = "right" if is_right(task, stream.text) else f"WRONG, not {task.answer!r}"
            say(f"{i:3} {task.kind:8} {question(task, 44)} -> {stream.text.strip()} ({mark})")

    def table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        assert self._console is not None
        table = Table(box=None, expand=True, pad_edge=False, title_justify="left")
        table.title = self.title()
        table.add_column("task", width=8, no_wrap=True)
        table.add_column("prompt", ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("", width=1)
        table.add_column("answer", ratio=1, no_wrap=True, overflow="ellipsis")
        width = max(10, self._console.width // 2 - 8)
        for i, task in enumerate(self._tasks):
            text, mark = "", Text("")
            if self.streams:
                done = self.streams[i].done  # before its text: what is done has all of it
                text = self.streams[i].text
                if done:
                    mark = Text("✓", "green") if is_right(task, text) else Text("✗", "bold red")
            table.add_row(task.kind, Text(question(task, width)), mark, Text(text.strip()))
        return table

    def title(self) -> str:
        n = len(self._tasks)
        if self.n_alone:
            return f"one by one: {self.n_alone} of {n}"
        n_tokens = sum(len(stream.tokens) for stream in self.streams)
        return f"{n} prompts at once: {n_tokens} tokens"
