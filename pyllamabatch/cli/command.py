"""Parse the command line, run one command, and turn every known failure into one line."""

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module, metadata
from io import TextIOWrapper
from typing import NoReturn

from pyllamabatch.cli.console import say
from pyllamabatch.errors import ArgumentError, PyllamabatchError

#: Name of a module of this package → its line in `--help`.
COMMANDS = {
    "demo": "32 prompts at once with the embedded model",
    "generate": "answer a file of prompts, many at once",
    "serve": "an engine over HTTP: OpenAI's interface, llama-server's, Anthropic's",
    "view": "the steps of a recorded trace, in the browser",
    "compare": "N users: processes, contexts, one shared context, the engine",
    "calibrate": "measure this device's step times with a model",
    "plan": "what fits a machine: sequences, contexts, processes",
    "simulate": "a trace of requests in virtual time: policies side by side",
    "info": "versions, backends, devices, and what a model can do",
}

#: Exit statuses, beside 0 and those that a command documents.
FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own). Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    if sys.stdout is None or sys.stderr is None:  # closed, or of a program without a console
        nothing = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for good
        sys.stdout, sys.stderr = sys.stdout or nothing, sys.stderr or nothing
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what its locale has not, as on stderr
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how its line may go on
        import argcomplete

        argcomplete.autocomplete(build_parser(os.environ["COMP_LINE"].split()))
    try:
        args = parse(words)
        if args.verbose:
            logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
        with sigterm_as_ctrl_c():
            status: int = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        say("pyllamabatch: interrupted", sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output is gone: there is nothing to print to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (PyllamabatchError, OSError) as error:  # OSError: a file that can't be read or written
        say(f"pyllamabatch: {error}", sys.stderr)
        return USAGE if isinstance(error, (ArgumentError, OSError)) else FAILED


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt, too: what was started is ended on the way out."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line: the usage of `serve` takes 26."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (--help lists what there is)\n")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command's `run` and its arguments. SystemExit for what is wrong, with a line of it."""
    args, unknown = build_parser(words).parse_known_args(words)
    command: Parser = vars(args).pop("parser")
    if unknown:
        word, known = unknown[0].partition("=")[0], command._option_string_actions
        if word in known:
            command.error(f"{word} goes behind {command.prog}")
        near = get_close_matches(word, known, n=1, cutoff=0.7)
        command.error(f"unknown: {unknown[0]}{f', did you mean {near[0]}?' if near else ''}")
    return args


def build_parser(words: Sequence[str]) -> Parser:
    """The parser of these words: only the command that they name is imported."""
    parser = Parser(prog="pyllamabatch", description="Many sequences in one llama.cpp context.")
    parser.add_argument(
        "--version", action="version", version=f"pyllamabatch {metadata.version('pyllamabatch')}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        sub = commands.add_parser(
            name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in words:
            command = import_module(f"pyllamabatch.cli.{name}")
            sub.description = command.__doc__
            command.add_arguments(sub)
            sub.add_argument("--verbose", action="store_true", help="show what llama.cpp logs")
            sub.set_defaults(run=command.run, parser=sub)
    return parser
