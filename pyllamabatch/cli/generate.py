"""Answer a file of prompts, many at once.

Each input line is a JSON object with one of
  prompt    text, tokenized as it is
  tokens    token ids
  messages  a chat: [{"role": ..., "content": ...}], in the model's chat template
and, if you like, `id` (text or a whole number; else the line number) and sampling fields such as
max_tokens, temperature, top_k, top_p, min_p, seed, stop, logit_bias, grammar. Other fields are
ignored.

Each output line has id, line, text, tokens, finish_reason, n_prompt, n_generated, ttft_ms, e2el_ms
and key (a digest of the request), in the order of the input. A line that can't be run is reported
on the standard error and has an output line with finish_reason "error" and the field error.

Run the same command again after an interruption: finished lines are kept, the rest is answered.
Exit status: 0 all answered, 1 some lines failed, 2 nothing could be run, 130 interrupted.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from pyllamabatch.cli.console import progress
from pyllamabatch.cli.job import BadRequest, Item, Job
from pyllamabatch.cli.options import (
    add_context_arguments,
    add_model_arguments,
    add_sampling_arguments,
    at_least,
    load_model,
    open_engine,
    sampling_options,
)
from pyllamabatch.cli.results import FileSink, ResultsProblem, Row, Sink, StreamSink
from pyllamabatch.cli.rows import BadLine, Request, digest, read_rows
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import EngineClosed, FatalDecodeError, PyllamabatchError
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SEED_MAX, SamplingParams
from pyllamabatch.step.trace import to_chrome

NAME = "generate"
HELP = "answer a file of prompts, many at once"

INTERRUPTED = 130
N_TRACE = 2**16  # steps
OPTION_NAMES = frozenset(field.name for field in fields(SamplingParams))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", default="-", metavar="FILE", help="input; - for stdin")
    parser.add_argument("--out", default="-", metavar="FILE", help="output; - for stdout")
    parser.add_argument("--parallel", type=at_least(1), default=16, metavar="N", help="default 16")
    parser.add_argument(
        "--window", type=at_least(1), metavar="N",
        help="lines read ahead of the last one written; default 4 times --parallel",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="forget what --out holds")
    parser.add_argument(
        "--trace", metavar="FILE",
        help=f"write the last {N_TRACE} steps as JSON for https://ui.perfetto.dev",
    )  # fmt: skip
    parser.add_argument("-q", "--quiet", action="store_true", help="report bad lines only")
    add_model_arguments(parser)
    add_context_arguments(parser)
    add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        with ExitStack() as stack:
            return _run(args, stack)
    except ResultsProblem as problem:
        print(f"pyllamabatch generate: {problem}", file=sys.stderr)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        print(f"pyllamabatch generate: {error}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace, stack: ExitStack) -> int:
    lines = stack.enter_context(_input(args.prompts))
    sink = _sink(args, stack)
    options = sampling_options(args)
    SamplingParams(**options)  # a bad flag is the command's failure, not that of every line
    model = stack.enter_context(load_model(args))
    requests = Requests(model, options, args.seed)
    window = args.window or 4 * args.parallel
    name = "stdin" if args.prompts == "-" else args.prompts
    bar = stack.enter_context(progress(_count_lines(args.prompts), quiet=args.quiet))
    unknown: set[str] = set()

    def items() -> Iterator[Item]:
        for item in read_rows(lines, OPTION_NAMES):
            if isinstance(item, Request) and not unknown.issuperset(item.ignored):
                unknown.update(item.ignored)
                bar.note(f"{name}:{item.line}: not used: {', '.join(item.ignored)}")
            yield item

    def on_problem(row: Row) -> None:
        bar.note(f"{name}:{row['line']}: id {row['id']!r}: {row['error']}")

    traced = {}
    if args.trace is not None:
        open(args.trace, "w").close()  # if it can't be written, that is said now
        traced["n_trace"] = N_TRACE
    engine = stack.enter_context(open_engine(model, args, args.parallel, **traced))
    if args.trace is not None:
        stack.callback(lambda: to_chrome(engine.trace(), args.trace))
    if args.overwrite and isinstance(sink, FileSink):  # only now that nothing else can be wrong
        sink.clear()
    job = Job(
        items(), sink, requests.starter(engine), finish, requests.key,
        window=window, on_progress=bar.update, on_problem=on_problem,
    )  # fmt: skip
    try:
        with calling_on_signals(job.interrupt):
            job.run()
    except KeyboardInterrupt:
        job.stop()
        bar.note("interrupted: what is finished is kept; run the same command to go on")
        return INTERRUPTED
    if job.n_resumed and not args.quiet:
        bar.note(f"{job.n_resumed} lines were finished before")
    return 1 if job.n_failed else 0


@contextmanager
def calling_on_signals(interrupt: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `interrupt`, so that no row is cut; the next one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handler(number: int, frame: FrameType | None) -> None:
        restore()
        interrupt()

    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        restore()


class Requests:
    """What a line asks of the engine, given the flags of the command line."""

    def __init__(self, model: Model, options: dict[str, Any], seed: int | None) -> None:
        self._vocab = model.vocab
        self._options, self._seed = options, seed
        self._model_key = [Path(str(model.path)).name, model.size_bytes, model.n_params]

    def options(self, request: Request) -> dict[str, Any]:
        """Fields of SamplingParams: the line's own, else the command line's."""
        options = {**self._options, **request.options}
        if self._seed is not None:
            options.setdefault("seed", (self._seed + request.line - 1) % (SEED_MAX + 1))
        return options

    def key(self, item: Item) -> str:
        """Changes when the line, a sampling flag or the model changes; not with other flags."""
        if isinstance(item, BadLine):
            return digest("bad", item.raw)
        asked = [item.prompt, item.tokens, item.messages]
        return digest(self._model_key, asked, self.options(item))

    def starter(self, engine: Engine) -> Callable[[Request, Callable[[], None]], Stream]:
        def start(request: Request, ended: Callable[[], None]) -> Stream:
            try:
                params = SamplingParams(**self.options(request))
                stream = engine.submit(self.prompt(request), params)
            except (EngineClosed, FatalDecodeError):
                raise
            except (PyllamabatchError, TypeError) as error:
                raise BadRequest(str(error)) from error
            stream.add_done_callback(lambda _: ended())
            return stream

        return start

    def prompt(self, request: Request) -> Any:
        """Text or token ids; a chat goes through the model's template, special tokens parsed."""
        if request.messages is None:
            return request.prompt if request.tokens is None else request.tokens
        text = self._vocab.apply_chat_template(request.messages)
        return self._vocab.tokenize(text, parse_special=True)


def finish(request: Request, stream: Stream) -> Row | None:
    """The row of an ended stream, None if it was cancelled."""
    try:
        result = stream.result()
    except (EngineClosed, FatalDecodeError):
        raise
    except PyllamabatchError as error:
        raise BadRequest(str(error)) from error
    if result.finish_reason == "cancelled":
        return None
    row: Row = {
        "text": result.text,
        "tokens": [int(token) for token in result.tokens],
        "finish_reason": result.finish_reason,
        "n_prompt": result.n_prompt,
        "n_generated": result.n_generated,
        "ttft_ms": _ms(result.ttft_s),
        "e2el_ms": _ms(result.e2el_s),
    }
    if result.logprobs is not None:
        row["logprobs"] = [_finite(value) for value in result.logprobs]
    if result.top_logprobs is not None:
        row["top_logprobs"] = [
            {str(token): _finite(value) for token, value in top.items()}
            for top in result.top_logprobs
        ]
    return row


def _finite(value: float) -> float | None:
    """JSON has no infinity: an excluded token's log-probability is null."""
    return value if math.isfinite(value) else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 3)


def _input(name: str) -> BinaryIO:
    # Not sys.stdin: a reader that still waits on it at exit would hold its lock.
    return open(0, "rb", closefd=False) if name == "-" else open(name, "rb")


def _sink(args: argparse.Namespace, stack: ExitStack) -> Sink:
    if args.out == "-":
        return StreamSink(sys.stdout.buffer)
    path = Path(args.out)
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to resume
        return StreamSink(stack.enter_context(open(path, "wb")))
    if args.prompts != "-" and path.exists() and path.samefile(args.prompts):
        raise ResultsProblem(f"{path}: is the input and the output")
    return stack.enter_context(FileSink(path))


def _count_lines(name: str) -> int | None:
    """How many requests the input holds, None if it can be read only once."""
    if name == "-" or not Path(name).is_file():
        return None
    with open(name, "rb") as lines:
        return sum(1 for line in lines if line.strip())
