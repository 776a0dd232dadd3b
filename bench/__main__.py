"""The one runner: `python -m bench COMMAND`, from the repository's root."""

from __future__ import annotations

import argparse
import sys

from bench import pair, suite, summary
from bench.benches import BENCHES, about, load
from bench.models import quantised
from bench.shapes import SHAPES
from bench.tools import ToolError, tool
from pyllamabatch.cli.command import sigterm_as_ctrl_c
from pyllamabatch.errors import ArgumentError, ProfileError


def main(arguments: list[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    options = parser_of(words).parse_args(words)
    try:
        with sigterm_as_ctrl_c():
            return run(options)
    except (ToolError, ArgumentError, ProfileError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the records until here stay", file=sys.stderr)
        return 130


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="the benches, what they are to show, and the model shapes")
    first = words[0] if words else ""
    for name in (first,) if first in BENCHES else BENCHES:
        add_bench(commands, name, quick="--quick" in words)
    summary.add_arguments(commands.add_parser("report", help="Markdown and plots of the results"))
    whole = commands.add_parser("all", help="every bench, one after the other")
    suite.add_arguments(whole)
    pair.add_arguments(commands.add_parser("pair", help="one bench in two checkouts, in turns"))
    model_parser = commands.add_parser("model", help="write a random-weight model, print its path")
    model_parser.add_argument("shape", choices=sorted(SHAPES))
    model_parser.add_argument("--type", default="Q4_K_M")
    tool_parser = commands.add_parser("tool", help="build tools of llama.cpp, print their paths")
    tool_parser.add_argument("name", nargs="+")
    return parser


def add_bench(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, quick: bool
) -> None:
    bench = load(name)
    parser = commands.add_parser(
        name,
        help=about(bench),
        description=bench.__doc__,
        formatter_class=_Help,
    )
    bench.add_arguments(parser)
    if quick:
        parser.set_defaults(**bench.QUICK)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Docstrings as they are, and every option's default."""


def run(options: argparse.Namespace) -> int:
    if options.command in BENCHES:
        return load(options.command).main(options)
    if options.command == "all":
        return suite.main(options)
    if options.command == "pair":
        return pair.main(options)
    if options.command == "report":
        return summary.main(options, {name: load(name) for name in BENCHES})
    if options.command == "model":
        print(quantised(SHAPES[options.shape], options.type))
    elif options.command == "tool":
        for name in options.name:
            print(tool(name))
    else:
        show_list()
    return 0


def show_list() -> None:
    for name in BENCHES:
        bench = load(name)
        print(f"{name:<10} {about(bench)}")
        for target in bench.TARGETS:
            print(f"{'':<10} - {target.text}: {target.limit}")
    print()
    for shape in SHAPES.values():
        print(f"{shape.name:<14} {shape.n_params / 1e6:6.0f} M  {shape.source}")


if __name__ == "__main__":
    sys.exit(main())
