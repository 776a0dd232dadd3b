"""The one runner: `python -m bench COMMAND`, from the repository's root."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Protocol, cast

from bench import pair, suite
from bench.models import quantised
from bench.shapes import SHAPES
from bench.tools import ToolError, tool

if TYPE_CHECKING:
    from bench.summary import Shown
    from bench.targets import Target

BENCHES = (
    "coalesce",
    "compare",
    "decode",
    "plan",
    "policies",
    "prefix",
    "sampler",
    "scheduler",
    "serve",
    "simulator",
    "soak",
    "stall",
    "step",
    "width",
)
"""One module each, `bench/NAME.py`; a new one needs no other entry.  For the report it may have
`view(rows)`, Markdown of its rows (else `summary.plain`), `draw(rows, path)` (`bench.plots.draw`
plots `speed_tg` over `pl`), and `NAMES`, what its rows call it where that is not its own name."""


class Bench(Protocol):
    """What such a module has.  The first line of its docstring says what it compares."""

    QUICK: tuple[str, ...]  # its arguments in `all --quick`
    TARGETS: tuple[Target, ...]  # what it is to show

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """`--out FILE` (JSONL to append rows to) at least."""

    def main(self, options: argparse.Namespace) -> int:
        """Measure; write every row as soon as it is there; the exit status."""


def load(name: str) -> Bench:
    return cast(Bench, importlib.import_module(f"bench.{name}"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benches, what they are to show, and the model shapes")
    words = sys.argv[1:] if arguments is None else arguments
    for name in needed(words[0] if words else ""):
        bench = load(name)
        bench.add_arguments(commands.add_parser(name, help=about(bench), description=bench.__doc__))
    whole = commands.add_parser("all", help="every bench, one after the other")
    suite.add_arguments(whole)
    pair.add_arguments(commands.add_parser("pair", help="one bench in two checkouts, in turns"))
    if needed(words[0] if words else ""):  # it reads rows, whose type is the package's
        from bench import summary

        page = commands.add_parser("report", help="Markdown and plots of the result rows")
        summary.add_arguments(page)
    model_parser = commands.add_parser("model", help="write a random-weight model, print its path")
    model_parser.add_argument("shape", choices=sorted(SHAPES))
    model_parser.add_argument("--type", default="Q4_K_M")
    tool_parser = commands.add_parser("tool", help="build tools of llama.cpp, print their paths")
    tool_parser.add_argument("name", nargs="+")
    options = parser.parse_args(words)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        return run(options)
    except ToolError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; the rows until here stay", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def needed(command: str) -> tuple[str, ...]:
    """The benches that a command imports: itself, or none for what is made before the package."""
    if command in BENCHES:
        return (command,)
    return () if command in ("pair", "tool", "model") else BENCHES


def run(options: argparse.Namespace) -> int:
    if options.command in BENCHES:
        return load(options.command).main(options)
    if options.command == "all":
        return suite.main(options, {name: load(name).QUICK for name in BENCHES})
    if options.command == "pair":
        return pair.main(options)
    if options.command == "report":
        from bench import summary

        return summary.main(options, {name: shown(load(name)) for name in BENCHES})
    if options.command == "model":
        print(quantised(SHAPES[options.shape], options.type))
    elif options.command == "tool":
        for name in options.name:
            print(tool(name))
    else:
        for name in BENCHES:
            bench = load(name)
            print(f"{name:<10} {about(bench)}")
            for target in bench.TARGETS:
                print(f"{'':<10} - {target.text}: {target.limit}")
        print()
        for shape in SHAPES.values():
            print(f"{shape.name:<14} {shape.n_params / 1e6:6.0f} M  {shape.source}")
    return 0


def shown(bench: Bench) -> Shown:
    from bench import summary

    return summary.Shown(
        about(bench),
        bench.TARGETS,
        getattr(bench, "view", summary.plain),
        getattr(bench, "draw", None),
        getattr(bench, "NAMES", ()),
    )


def about(bench: Bench) -> str:
    return (bench.__doc__ or "").splitlines()[0]


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends as Ctrl-C does: servers that a bench started are ended on the way out."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
