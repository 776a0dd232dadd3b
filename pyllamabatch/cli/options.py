"""The flags that commands share, and what they give to Model, Engine and SamplingParams."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pyllamabatch.cli.console import ProgressBar
from pyllamabatch.engine.drafters import needs_mtp
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError
from pyllamabatch.llama.model import Model
from pyllamabatch.models import CATALOGUE, fetch
from pyllamabatch.models.hub import hub_file
from pyllamabatch.scheduler import make_policy
from pyllamabatch.scheduler.policies import DEFAULT
from pyllamabatch.scheduler.router import ROUTERS
from pyllamabatch.step.sampling_params import SamplingParams

N_TRACE = 2**16  # steps that are written to a file

Add = Callable[..., argparse.Action]
"""`add_argument` of a parser or of a group."""

# -- the types of flags --


def router_named(text: str) -> str:
    """The router whose name begins so; what is none stays as it is, for argparse to refuse."""
    found = [name for name in ROUTERS if name.startswith(text)]
    return found[0] if len(found) == 1 else text


def at_least(low: int, high: int | None = None) -> Callable[[str], int]:
    """The type of a whole-number flag that argparse refuses below `low` and above `high`."""

    def whole_number(text: str) -> int:
        value = int(text)
        if value < low or (high is not None and value > high):
            limit = f"at least {low}" if high is None else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{value} is not {limit}")
        return value

    return whole_number


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """The type of a flag that takes some of these, comma separated."""

    def some(text: str) -> list[str]:
        words = list(dict.fromkeys(text.split(",")))
        if unknown := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(known)}")
        return words

    return some


def counts(text: str) -> list[int]:
    """Numbers of sequences, comma separated."""
    return sorted({at_least(1, 256)(word) for word in text.split(",")})


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 1e9")
    return value


def n_bytes(text: str) -> int:
    """A number with K, M, G, T (powers of 1000: 80.8G is 80.8e9) or Ki, Mi, Gi, Ti."""
    powers = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    powers |= {f"{c}i": 2 ** (10 * i) for i, c in enumerate("kmgt", 1)}
    number = text.rstrip("BbiKkMmGgTt")
    unit = text[len(number) :].lower().rstrip("b")
    try:
        value = float(number) * powers[unit]
    except (KeyError, ValueError):
        value = -1.0
    if not 0 <= value < 2**60:
        raise argparse.ArgumentTypeError(f"{text} is not a number of bytes")
    return int(value)


# -- the flags --
# fmt: off

_N = {"type": at_least(1), "metavar": "N"}
_SHARED: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "n_ctx": (("-c", "--n-ctx"), {
        "type": at_least(0), "metavar": "N",
        "help": "KV cells of all sequences together (0: the engine chooses)"}),
    "n_batch": (("-b", "--n-batch"), _N | {"help": "most rows in a step"}),
    "n_ubatch": (("-ub", "--n-ubatch"),
                 _N | {"help": "most rows that the device computes at once"}),
    "threads": (("-t", "--threads"),
                _N | {"help": "CPU threads (the cores; 1 where a device computes all layers)"}),
    "kv_unified": (("--kv-unified",), {
        "action": argparse.BooleanOptionalAction,
        "help": "one pool of cells for all sequences, or an equal share for each: then a row "
                "attends to fewer cells (what is faster here, and fits)"}),
    "speculate": (("--speculate",), {
        "metavar": "DRAFTER",
        "help": "check several tokens of a sequence in a step where that pays; answers stay the "
                "same. ngram: what followed the same ones earlier in its text (the default, where "
                "a model can take tokens back); draft:FILE: what a smaller model drafts (draft: "
                "the embedded model's); mtp: what a layer of the model predicts, where it has one; "
                "your own, FILE.py:NAME; off"}),
    "prefix_cache": (("--prefix-cache",), {
        "action": argparse.BooleanOptionalAction,
        "help": "reuse the cells of prompts that start alike (the default)"}),
    "batch_invariant": (("--batch-invariant",), {
        "action": "store_true",
        "help": "the same tokens, to the last bit of their logits, whatever runs beside a request; "
                "on CPUs, with an equal share of the cells for each"}),
}
"""The flags and the arguments of `add_argument`, by the name of the option."""

_SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "tokens per answer"),
    "temperature": (float, "0 takes the likeliest token"),
    "top_k": (int, "keep the k likeliest tokens; 0 keeps all"),
    "top_p": (float, "keep the likeliest tokens that make up this probability"),
    "min_p": (float, "drop tokens below this share of the likeliest one"),
    "typical_p": (float, "locally typical sampling; 1 is off"),
    "repeat_penalty": (float, "1 is off"),
    "frequency_penalty": (float, "0 is off"),
    "presence_penalty": (float, "0 is off"),
    "penalty_last_n": (int, "tokens that the penalties look back on"),
    "min_tokens": (int, "no end before this many tokens"),
    "logprobs": (int, "report log-probabilities: the token's own and the N best"),
}
"""Type and help, by the field of SamplingParams. The flag is the field with dashes."""


def add_shared(add: Add, **defaults: Any) -> None:
    """The flags of `_SHARED` that are named, with these defaults. None: what the engine chooses."""
    for name, default in defaults.items():
        flags, given = _SHARED[name]
        if default and not isinstance(default, bool):
            given = given | {"help": f"{given['help']} ({default})"}
        add(*flags, default=default, **given)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    named = ", ".join(CATALOGUE)
    add("-m", "--model", metavar="FILE", help=f"a GGUF file, or {named} (the embedded model)")
    add("-hf", "--hf-repo", metavar="OWNER/REPO[:QUANT]", help="a model of a Hugging Face hub")
    add("-ngl", "--n-gpu-layers", type=int, default=-1, metavar="N", help="layers on the GPU (all)")


def add_sampling_arguments(
    parser: argparse.ArgumentParser,
    about: str = "For lines without these fields. In parentheses: the default.",
    seed: str = "line i draws with seed S + i - 1",
    without: Sequence[str] = (),
) -> None:
    """The flags of `_SAMPLING`, `without` some fields, and those of other types."""
    add = parser.add_argument_group("sampling", about).add_argument
    defaults = {field.name: field.default for field in fields(SamplingParams)}
    for name, (kind, text) in _SAMPLING.items():
        if name in without:
            continue
        flags = ["--" + name.replace("_", "-"), *(["-n"] if name == "max_tokens" else [])]
        default = "off" if defaults[name] is None else f"{defaults[name]:g}"
        add(*flags, type=kind, metavar="N" if kind is int else "X", help=f"{text} ({default})")
    add("--seed", type=int, metavar="S", help=f"{seed} (random seeds)")
    add("--stop", action="append", metavar="TEXT", help="end there; may be repeated")
    add("--ignore-eog", action="store_true", help="go on after the end of text")
    add("--grammar-file", type=Path, metavar="FILE", help="GBNF with the start rule root")


def add_policy_argument(add: Add) -> None:
    add("--policy", metavar="POLICY",
        help="batching policy: NAME, module:name or file.py:name, with options "
        f"NAME:OPTION=VALUE,… ({DEFAULT}); a wrong name lists all")


# fmt: on
# -- what they give --


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that the command line gives, without the seed and without unset ones."""
    options = {name: getattr(args, name, None) for name in _SAMPLING}
    options |= {"stop": args.stop and tuple(args.stop), "ignore_eog": args.ignore_eog or None}
    if args.grammar_file is not None:
        options["grammar"] = read_text("--grammar-file", args.grammar_file)
    return {name: value for name, value in options.items() if value is not None}


def read_text(flag: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(flag, str(path), str(error)) from None


def check_writable(*paths: Path | None) -> None:
    """OSError for one that can't be written; nothing is written, and no file is left behind."""
    for path in filter(None, paths):
        there = path.exists()
        open(path, "ab").close()
        if not there:
            os.remove(os.path.realpath(path))  # not the link to it


def load_model(args: argparse.Namespace, *, quiet: bool = False) -> Model:
    """The model of -m or -hf, with progress while it loads."""
    path = model_path(args, quiet=quiet)
    if path is None:
        return Model.default(n_gpu_layers=args.n_gpu_layers)
    with ProgressBar(f"loading {path.name}", quiet=quiet, keep=False) as progress:
        mtp = needs_mtp(getattr(args, "speculate", None))
        n = args.n_gpu_layers
        return Model(path, n_gpu_layers=n, progress=progress.update, load_mtp=mtp)


def model_path(args: argparse.Namespace, *, quiet: bool = False) -> Path | None:
    """The file that -m or -hf names, downloaded where need be; None for the embedded model."""
    if args.hf_repo is not None:
        if args.model is not None:
            raise ArgumentError("-hf", args.hf_repo, "-m is given already")
        return hub_file(args.hf_repo)
    if args.model is None:
        return None
    path = Path(args.model)
    if not path.exists() and get_close_matches(args.model, CATALOGUE) and not path.suffix:
        return fetch(args.model, progress=not quiet)  # which says how a misspelled one is spelled
    return path


def open_engine(model: Model, args: argparse.Namespace, n_seq_max: int, **options: Any) -> Engine:
    """An engine with the shared flags, the policy and these options."""
    given = {name: getattr(args, name) for name in _SHARED if name != "threads"}
    given |= dict.fromkeys(("n_threads", "n_threads_batch"), args.threads)
    options |= {name: value for name, value in given.items() if value is not None}
    if given["speculate"] == "off":
        options["speculate"] = None
    if args.policy is not None:
        options["policy"] = make_policy(args.policy)
    return Engine(model, n_seq_max=n_seq_max, **options)
