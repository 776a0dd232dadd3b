"""Show the steps of a recorded trace in the browser, as the live page of `serve` does.

  pyllamabatch generate --prompts in.jsonl --out out.jsonl --trace steps.json
  pyllamabatch view steps.json
  pyllamabatch simulate --trace poisson:rate=4 --steps steps.json    # likewise

The page is one HTML file without any address in it: --out says where it goes."""

import argparse
import tempfile
import webbrowser
from pathlib import Path

from pyllamabatch.cli.console import say
from pyllamabatch.server import live


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "file",
        type=Path,
        metavar="FILE",
        help="what `generate --trace` or `simulate --steps` wrote",
    )
    add("--out", type=Path, metavar="FILE.html", help="write the page there, and open no browser")


def run(args: argparse.Namespace) -> int:
    page = live.page(live.recorded(args.file), args.file.name)
    out = args.out or Path(tempfile.mkdtemp(prefix="pyllamabatch-")) / "steps.html"
    out.write_text(page, encoding="utf-8")
    say(str(out))
    if args.out is None:
        webbrowser.open(out.resolve().as_uri())
    return 0
