"""The one runner: `python -m bench COMMAND`, from the repository's root."""

from __future__ import annotations

import argparse
import sys

from bench import decode, sampler
from bench.models import quantised
from bench.shapes import SHAPES
from bench.tools import ToolError, tool


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the benches and the model shapes")
    decode_parser = commands.add_parser("decode", help=decode.__doc__)
    decode.add_arguments(decode_parser)
    sampler_parser = commands.add_parser("sampler", help=sampler.__doc__)
    sampler.add_arguments(sampler_parser)
    model_parser = commands.add_parser("model", help="write a random-weight model, print its path")
    model_parser.add_argument("shape", choices=sorted(SHAPES))
    model_parser.add_argument("--type", default="Q4_K_M")
    tool_parser = commands.add_parser("tool", help="build a tool of llama.cpp, print its path")
    tool_parser.add_argument("name")
    options = parser.parse_args(arguments)
    try:
        if options.command == "decode":
            return decode.main(options)
        if options.command == "sampler":
            return sampler.main(options)
        if options.command == "model":
            print(quantised(SHAPES[options.shape], options.type))
        elif options.command == "tool":
            print(tool(options.name))
        else:
            print("decode    decode-only speed of our layers beside llama-batched-bench")
            print("sampler   sampling alone: rows of random logits, no model\n")
            for shape in SHAPES.values():
                print(f"{shape.name:<13} {shape.n_params / 1e6:6.0f} M  {shape.source}")
    except ToolError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
