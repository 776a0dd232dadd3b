"""The flags that commands share, and what they mean for Model, Engine and SamplingParams."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import make_policy

#: flag, field of SamplingParams, type, help
_SAMPLING = (
    ("--temperature", "temperature", float, "0 takes the likeliest token"),
    ("--top-k", "top_k", int, "keep the k likeliest tokens; 0 keeps all"),
    ("--top-p", "top_p", float, "keep the likeliest tokens that make up this probability"),
    ("--min-p", "min_p", float, "drop tokens below this share of the likeliest one"),
    ("--typical-p", "typical_p", float, "locally typical sampling; 1 is off"),
    ("--repeat-penalty", "repeat_penalty", float, "1 is off"),
    ("--frequency-penalty", "frequency_penalty", float, "0 is off"),
    ("--presence-penalty", "presence_penalty", float, "0 is off"),
    ("--penalty-last-n", "penalty_last_n", int, "tokens that the penalties look back on"),
    ("--min-tokens", "min_tokens", int, "no end before this many tokens"),
    ("--logprobs", "logprobs", int, "report log-probabilities: the token's own and the n best"),
)


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a whole-number flag that argparse refuses below `low` and above `high`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {limit}")
        return value

    return whole_number


def n_bytes(text: str) -> int:
    """A number with K, M, G, T (powers of 1000: 80.8G is 80.8e9) or Ki, Mi, Gi, Ti."""
    powers = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    powers |= {f"{c}i": 2 ** (10 * i) for i, c in enumerate("kmgt", 1)}
    number = text.rstrip("BbiKkMmGgTt")
    unit = text[len(number) :].lower().rstrip("b")
    try:
        value = float(number) * powers[unit]
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text} is not a number of bytes") from None
    if not 0 <= value < 2**60:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bytes")
    return int(value)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-m", "--model", metavar="FILE.gguf", help="default: the embedded model")
    group.add_argument(
        "-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N", help="default: all"
    )


def add_context_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("context")
    group.add_argument(
        "-c", "--n-ctx", type=at_least(0), default=0, metavar="N",
        help="KV cells for all sequences together; 0: as the engine chooses",
    )  # fmt: skip
    group.add_argument(
        "--kv-unified", action=argparse.BooleanOptionalAction,
        help="one pool of cells for all sequences (the default), or an equal share for each, "
        "which is less to attend to",
    )  # fmt: skip
    group.add_argument("-b", "--n-batch", type=at_least(1), metavar="N", help="most rows in a step")
    group.add_argument(
        "-ub", "--n-ubatch", type=at_least(1), metavar="N", help="most rows at a time"
    )
    group.add_argument("-t", "--threads", type=at_least(1), metavar="N", help="CPU threads")
    group.add_argument(
        "--policy", metavar="NAME[:OPTION=VALUE,…]",
        help="batching policy, default device-aware; another name lists all, see docs/policies.md",
    )  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling", "For lines that don't say otherwise; a line's own fields win."
    )
    group.add_argument(
        "-n", "--max-tokens", type=int, dest="max_tokens", metavar="N", help="tokens per answer"
    )
    for flag, name, kind, text in _SAMPLING:
        group.add_argument(flag, dest=name, type=kind, metavar="X", help=text)
    group.add_argument(
        "--seed", type=int, metavar="S", help="line i draws with seed S + i - 1: repeatable"
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end there; may be repeated")
    group.add_argument("--ignore-eog", action="store_true", help="go on after the end of text")
    group.add_argument("--grammar-file", type=Path, metavar="FILE", help="GBNF, start rule root")


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that the command line gives, without the seed; unset ones are absent."""
    names = ("max_tokens", *(name for _, name, _, _ in _SAMPLING))
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.stop:
        options["stop"] = tuple(args.stop)
    if args.ignore_eog:
        options["ignore_eog"] = True
    if args.grammar_file is not None:
        try:
            options["grammar"] = args.grammar_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError("--grammar-file", str(args.grammar_file), str(error)) from None
    return options


def load_model(args: argparse.Namespace) -> Model:
    if args.model is None:
        return Model.default(n_gpu_layers=args.n_gpu_layers)
    return Model(args.model, n_gpu_layers=args.n_gpu_layers)


def open_engine(model: Model, args: argparse.Namespace, n_seq_max: int, **options: Any) -> Engine:
    """An engine with the context flags of `add_context_arguments` and these options."""
    given = {
        "n_ctx": args.n_ctx,
        "n_batch": args.n_batch,
        "n_ubatch": args.n_ubatch,
        "kv_unified": args.kv_unified,
        "n_threads": args.threads,
        "n_threads_batch": args.threads,
    }
    settings = options | {name: value for name, value in given.items() if value is not None}
    if args.policy is not None:
        settings["policy"] = make_policy(args.policy)
    return Engine(model, n_seq_max=n_seq_max, **settings)
