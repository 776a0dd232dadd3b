"""Parse the command line, run one command, and turn every known failure into one line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from pyllamabatch.cli import calibrate, compare, demo, generate, info, plan, simulate
from pyllamabatch.errors import ArgumentError, PyllamabatchError

#: Exit statuses, beside 0 and those that a command documents.
FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own); returns the exit status."""
    args = build_parser().parse_args(argv)
    if args.verbose:
        logging.basicConfig(level=logging.DEBUG, format="%(name)s: %(message)s")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except ArgumentError as error:
        print(f"pyllamabatch: {error}", file=sys.stderr)
        return USAGE
    except PyllamabatchError as error:
        print(f"pyllamabatch: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("pyllamabatch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyllamabatch", description="Many sequences in one llama.cpp context."
    )
    parser.add_argument(
        "--version", action="version", version=f"pyllamabatch {metadata.version('pyllamabatch')}"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, generate, compare, calibrate, plan, simulate, info):
        sub = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.add_argument("--verbose", action="store_true", help="show what llama.cpp logs")
        sub.set_defaults(run=command.run)
    return parser
