"""The embedded model answers 32 different prompts at once, then the same ones one by one.

Every prompt has one right answer, so a token that went to the wrong sequence shows. Exit status: 0
if at least 8 in 10 answers of each pass are right, 1 if not.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyllamabatch.cli.demo_board import Board, board
from pyllamabatch.cli.options import at_least
from pyllamabatch.engine.engine import Engine
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.host import usable_cores
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.vocab import Vocab
from pyllamabatch.models.tasks import Task, make_tasks
from pyllamabatch.step.sampling_params import SamplingParams

NAME = "demo"
HELP = "32 prompts at once with the embedded model"

KINDS = ("copy", "count", "upper", "qa", "sort", "add", "reverse", "subtract", "recall")
DRAWS = 8  # for each prompt that is shown: those with the most answer for their length are taken
RIGHT_AT_LEAST = 0.8  # the model is right on more than 98%; crossed sequences, on nearly none
LITTLE_GAIN = 2.0


@dataclass
class Pass:
    """One way to answer all prompts."""

    name: str
    seconds: float  # from the first submission to the last answer
    answers: list[str]
    tokens: list[list[int]]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        return self.n_tokens / self.seconds

    def n_right(self, tasks: list[Task]) -> int:
        return sum(t.answer == a.strip() for t, a in zip(tasks, self.answers, strict=True))

    def line(self, tasks: list[Task]) -> str:
        return (
            f"{self.name}: {self.n_tokens} tokens in {self.seconds:.2f} s, "
            f"{self.tokens_per_second:.0f} tok/s, {self.n_right(tasks)} of {len(tasks)} right"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p", "--prompts", type=at_least(1, 128), default=32, metavar="N", help="default 32"
    )
    parser.add_argument("--seed", type=int, default=0, help="other prompts")
    parser.add_argument(
        "-t", "--threads", type=at_least(1), metavar="N",
        help="CPU threads; default: what is fastest here, 1 or more, tried first",
    )  # fmt: skip
    parser.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")


def run(args: argparse.Namespace) -> int:
    tasks = pick(args.prompts, args.seed)
    with Model.default() as model:
        prompts = [chat(model.vocab, task.prompt) for task in tasks]
        params = [greedy(model.vocab, task.answer) for task in tasks]
        longest = max(len(p) + q.max_tokens for p, q in zip(prompts, params, strict=True))
        threads = args.threads or fastest_threads(model, len(tasks))
        settings: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads}
        # The prompts share nothing, so each sequence has cells of its own to attend to.
        settings |= {"kv_unified": False, "n_ctx": len(tasks) * -(-longest // 256) * 256}
        with Engine(model, n_seq_max=len(tasks), **settings) as engine:
            engine.submit(prompts[0], params[0]).result()  # warm: neither pass pays for it
            with board(tasks, plain=args.plain) as shown:
                together = at_once(engine, prompts, params, shown)
                alone = one_by_one(engine, prompts, params, shown)
    report(tasks, together, alone, threads)
    right = min(together.n_right(tasks), alone.n_right(tasks))
    return 0 if right >= RIGHT_AT_LEAST * len(tasks) else 1


def fastest_threads(model: Model, n_rows: int) -> int:
    """The number of CPU threads that decodes `n_rows` sequences fastest on this machine, now.

    A step of the embedded model is so short that threads which wait for a busy core, or for each
    other, can make it many times longer.
    """
    counts = [n for n in (1, 2, 4, 8, 16) if n <= usable_cores()]
    batch = Batch(n_rows)
    with Context(model, n_ctx=256 * n_rows, n_seq_max=n_rows, kv_unified=False) as context:
        seconds = {n: step_seconds(context, batch, n) for n in counts}
    return min(counts, key=seconds.__getitem__)


def step_seconds(context: Context, batch: Batch, threads: int, n_steps: int = 9) -> float:
    """The mean time of a step with one row of every sequence, the first step left out."""
    context.set_threads(threads)
    context.memory.clear()
    times = []
    for pos in range(n_steps):
        batch.clear()
        for seq in range(context.n_seq_max):
            batch.add(seq % 256, pos, seq, logits=True)
        began = time.perf_counter()
        context.decode(batch)
        context.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.mean(times[1:])


def pick(n: int, seed: int) -> list[Task]:
    """`n` different held-out tasks, all kinds in turn."""
    each = -(-n // len(KINDS))
    best = []
    for kind in KINDS:
        drawn = make_tasks(kind, each * DRAWS, seed)
        best.append(sorted(drawn, key=lambda t: len(t.prompt) / len(t.answer))[:each])
    return [best[i % len(KINDS)][i // len(KINDS)] for i in range(n)]


def chat(vocab: Vocab, text: str) -> list[int]:
    """The prompt's tokens: `text` as the user's message in the model's chat template."""
    prompt = vocab.apply_chat_template([{"role": "user", "content": text}])
    return [int(token) for token in vocab.tokenize(prompt, parse_special=True)]


def greedy(vocab: Vocab, answer: str) -> SamplingParams:
    """Room for the right answer and for a wrong one that is a bit longer."""
    n_tokens = len(vocab.tokenize(answer, add_special=False))
    return SamplingParams(temperature=0, max_tokens=n_tokens + 16)


def at_once(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], shown: Board
) -> Pass:
    began = time.perf_counter()
    streams = [engine.submit(p, q) for p, q in zip(prompts, params, strict=True)]
    shown.watch(streams)
    results = [stream.result() for stream in streams]
    return finished(f"{len(prompts)} at once", began, results, shown.answered)


def one_by_one(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams], shown: Board
) -> Pass:
    began = time.perf_counter()
    results = []
    for prompt, param in zip(prompts, params, strict=True):
        results.append(engine.submit(prompt, param).result())
        shown.one_by_one(len(results))
    return finished("one by one", began, results, lambda i, text: None)


def finished(name: str, began: float, results: list[Any], each: Callable[[int, str], None]) -> Pass:
    seconds = time.perf_counter() - began
    for i, result in enumerate(results):
        each(i, result.text)
    return Pass(
        name, seconds, [r.text for r in results], [[int(t) for t in r.tokens] for r in results]
    )


def report(tasks: list[Task], together: Pass, alone: Pass, threads: int) -> None:
    pairs = zip(together.tokens, alone.tokens, strict=True)
    n_same = sum(a == b for a, b in pairs)
    ratio = together.tokens_per_second / alone.tokens_per_second
    print(together.line(tasks))
    print(alone.line(tasks))
    print(
        f"{ratio:.2f} times as fast at once; {n_same} of {len(tasks)} answers the same to the token"
    )
    print(
        "tok/s = generated tokens / wall time, prompts included; greedy, one context, "
        f"{threads} CPU thread{'s' if threads > 1 else ''}"
    )
    if ratio < LITTLE_GAIN:
        print(
            "The embedded model fits a CPU's cache, so a row costs nearly as much in a batch as "
            "alone. Larger models and GPUs gain much more: see README.md."
        )
