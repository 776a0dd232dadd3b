"""Answer a file of prompts, many at once.

Each input line is a JSON object with one of
  prompt    text, tokenized as it is
  tokens    token ids
  messages  a chat, [{"role": ..., "content": ...}]: the model's chat template
and, if you like, `id` (text or a whole number; else the line number) and
sampling fields such as max_tokens, temperature, top_k, top_p, min_p, seed,
stop, logit_bias, grammar, json_schema: all those of SamplingParams.

Each output line has id, line, text, tokens, finish_reason, n_prompt,
n_generated, n_drafts, n_drafted, n_accepted, ttft_ms, e2el_ms and key (a digest
of the request), in the order of the input. A line that can't be run is reported
on the standard error and has an output line with finish_reason "error" and the
field error.

Run the same command again after an interruption: finished lines stay, those
with an error, too; the others are answered.
Exit status: 0 all answered, 1 some lines failed, 2 nothing could be run,
130 interrupted."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from pyllamabatch.cli.batch_file import BatchFile
from pyllamabatch.cli.console import ProgressBar
from pyllamabatch.cli.input_lines import InputLine, digest, read_lines
from pyllamabatch.cli.options import (
    N_TRACE,
    add_model_arguments,
    add_policy_argument,
    add_sampling_arguments,
    add_shared,
    at_least,
    check_writable,
    load_model,
    open_engine,
    read_text,
    sampling_options,
)
from pyllamabatch.cli.result_file import ResultFile, Row, result_file
from pyllamabatch.engine.chat import with_prompt
from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.stream import Stream
from pyllamabatch.errors import ArgumentError, ChatTemplateError
from pyllamabatch.llama.chat import ChatPrompt, Message
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SEED_MAX, SamplingParams
from pyllamabatch.step.trace import to_chrome

# fmt: off


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--prompts", default="-", metavar="FILE", help="input (-: stdin)")
    add("--out", default="-", metavar="FILE", help="output (-: stdout)")
    add("-np", "--parallel", type=at_least(1), default=16, metavar="N",
        help="requests that run at once (16)")
    add("--window", type=at_least(1), metavar="N",
        help="lines read ahead of the last one written (4 times --parallel)")
    add("--chat-template", metavar="NAME|FILE",
        help="for messages, instead of the model's: chatml, gemma, llama3, … or a file")
    add("--ignore-unknown", action="store_true", help="leave out fields that are not known")
    add("--overwrite", action="store_true", help="forget what --out holds")
    add("--trace", type=Path, metavar="FILE",
        help=f"write the last {N_TRACE} steps as JSON, for `pyllamabatch view` and "
        "https://ui.perfetto.dev")
    add("-q", "--quiet", action="store_true", help="report bad lines only")
    add_model_arguments(parser)
    add = parser.add_argument_group("context").add_argument
    add_shared(add, n_ctx=0, kv_unified=None, prefix_cache=None, speculate=None, n_batch=None,
               n_ubatch=None, threads=None, batch_invariant=None)
    add_policy_argument(add)
    add_sampling_arguments(parser)


# fmt: on
def run(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        lines = _input(args.prompts, stack)
        results = _results(args, stack)
        options = sampling_options(args)
        SamplingParams(**options)  # a bad flag is the command's failure, not that of every line
        check_writable(args.trace)  # likewise
        model = stack.enter_context(load_model(args, quiet=args.quiet))
        requests = Requests(model, options, args.seed, args.chat_template)
        engine = None
        if args.overwrite:
            engine = _engine(args, model, stack)  # before the rows are lost: it may be refused
            results.clear()
        n_lines = _count_lines(args.prompts)
        quiet = args.quiet or (args.out == "-" and sys.stdout.isatty())  # rows are the progress
        progress = stack.enter_context(ProgressBar("generate", n_lines, quiet=quiet))
        notes = Notes(progress, results, args.prompts)
        batch = BatchFile(
            read_lines(lines, ignore_unknown=args.ignore_unknown), results, requests.key,
            window=args.window or 4 * args.parallel, on_row=notes.row,
        )  # fmt: skip
        batch.resume()
        progress.update(batch.n_resumed)
        if batch.n_resumed != n_lines:
            engine = engine or _engine(args, model, stack)
            try:
                batch.run(partial(requests.submit, engine))
            except KeyboardInterrupt:
                progress.note("interrupted: run the same command to answer the other lines")
                raise
        if notes.n_same:
            progress.note(f"{notes.n_same} more with the same problems: see the field error")
        if batch.n_resumed and not args.quiet:
            failed = f", {batch.n_failed} of them with an error" if batch.n_failed else ""
            progress.note(f"{batch.n_resumed} lines were finished before{failed}")
        return 1 if notes.problems or batch.n_failed else 0


class Requests:
    """What a line asks of the engine, given the flags of the command line."""

    def __init__(
        self, model: Model, options: dict[str, Any], seed: int | None, template: str | None
    ) -> None:
        """template: the name or the file of a chat template, None for the model's."""
        self._vocab, self._options, self._seed = model.vocab, options, seed
        if template is not None and Path(template).exists():
            template = read_text("--chat-template", Path(template))
        self._template = template
        self._asked = [Path(str(model.path)).name, model.size_bytes, model.n_params]
        if template is not None:
            self._asked.append(template)
            self._chat([{"role": "user", "content": "?"}])  # a bad one is said now
        self._has_template = template is not None or model.chat_template() is not None

    def options(self, line: InputLine) -> dict[str, Any]:
        """Fields of SamplingParams: the line's own, else the command line's."""
        options = {**self._options, **line.options}
        if self._seed is not None:
            options.setdefault("seed", (self._seed + line.number - 1) % (SEED_MAX + 1))
        return options

    def key(self, line: InputLine) -> str:
        """Changes when the line, a sampling flag or the model changes; not with other flags."""
        if line.problem:
            return digest(line.raw.decode("utf-8", "backslashreplace"))
        return digest(self._asked, line.kind, line.prompt, self.options(line))

    def submit(self, engine: Engine, line: InputLine) -> Stream:
        params = SamplingParams(**self.options(line))
        if line.kind != "messages":
            return engine.submit(line.prompt, params)
        if not self._has_template:
            raise ChatTemplateError("the model has no chat template: name one, --chat-template")
        prompt = self._chat(line.prompt)
        return engine.submit(prompt, with_prompt(params, prompt))

    def _chat(self, messages: Sequence[Message]) -> ChatPrompt:
        return self._vocab.apply_chat_template(messages, template=self._template)


class Notes:
    """What is said of a run on the standard error: progress, and each problem once."""

    def __init__(self, progress: ProgressBar, results: ResultFile, name: str) -> None:
        self._progress, self._results = progress, results
        self._name = "stdin" if name == "-" else name
        self._began = time.monotonic()
        self._n_tokens = 0
        self.problems: set[str] = set()
        self.n_same = 0

    def row(self, row: Row) -> None:
        problem = row.get("error")
        if problem in self.problems:
            self.n_same += 1
        elif problem is not None:
            self.problems.add(problem)
            self._progress.note(f"{self._name}:{row['line']}: id {row['id']!r}: {problem}")
        self._n_tokens += row["n_generated"]
        seconds = time.monotonic() - self._began  # 0 where the clock has not ticked yet
        shown = f"{self._n_tokens / seconds:.1f} tok/s" if self._n_tokens and seconds else ""
        self._progress.update(self._results.n_written, shown)


def _engine(args: argparse.Namespace, model: Model, stack: ExitStack) -> Engine:
    """An engine that is closed at the end; its trace is written before, if asked for."""
    traced = {} if args.trace is None else {"n_trace": N_TRACE}
    engine = stack.enter_context(open_engine(model, args, args.parallel, **traced))
    if args.trace is not None:
        stack.callback(lambda: to_chrome(engine.trace(), args.trace))
    return engine


def _input(name: str, stack: ExitStack) -> BinaryIO:
    """A pipe stays open: a reader that waits for its next line holds the lock that closing it
    takes, and at the end of the process that of sys.stdin."""
    if name != "-" and Path(name).is_file():
        return stack.enter_context(open(name, "rb"))
    return open(0, "rb", closefd=False) if name == "-" else open(name, "rb")


def _results(args: argparse.Namespace, stack: ExitStack) -> ResultFile:
    if args.out == "-":
        if getattr(sys.stdout, "name", "") == os.devnull:  # `main` has opened it
            raise ArgumentError("--out", "-", "the output is closed")
        return ResultFile("stdout", sys.stdout.buffer)
    path = Path(args.out)
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to resume
        return ResultFile(args.out, stack.enter_context(open(path, "wb")))
    if args.prompts != "-" and path.exists() and path.samefile(args.prompts):
        raise ArgumentError("--out", args.out, "is the input and the output")
    return stack.enter_context(result_file(path))


def _count_lines(name: str) -> int | None:
    """How many requests the input holds, None if it can be read only once."""
    if name == "-" or not Path(name).is_file():
        return None
    with open(name, "rb") as lines:
        return sum(1 for line in lines if line.strip())
