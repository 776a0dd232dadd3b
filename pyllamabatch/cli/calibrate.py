"""Measure what steps cost on this device with this model: a profile.

Steps of many shapes (rows, prompt rows, KV depth, sequences; one pool of cells
or cells of each sequence's own) are timed with random tokens until the budget
is spent. The cost model is fitted to them. The profile goes into the user's
cache folder, where `Engine` and `pyllamabatch simulate` find it. Steps of a
layout that is not measured anew stay in it. Ctrl-C saves what is measured.
Where other load disturbed too many steps of a kind, nothing is saved, and the
exit status is 1."""

import argparse
import json
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np

from pyllamabatch.cli.console import ProgressBar, say
from pyllamabatch.cli.options import add_model_arguments, add_shared, load_model, positive
from pyllamabatch.cost.calibrate import calibrate
from pyllamabatch.cost.model import CostModel, held_out
from pyllamabatch.cost.profile import Profile, file_name, profile_folder
from pyllamabatch.engine.context_defaults import ubatch_of
from pyllamabatch.errors import ArgumentError, ProfileError
from pyllamabatch.report.disturbed import UNWATCHED
from pyllamabatch.report.tables import Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--budget", type=positive, default=120.0, metavar="S", help="seconds to measure (120)")
    layout = "one pool of cells for all sequences, or cells of each one's own (both)"
    add("--layout", choices=("both", "unified", "streams"), default="both", help=layout)
    add_shared(add, n_ubatch=None, threads=None)
    add("--type-k", metavar="TYPE", help="of the keys in KV cells: f16, q8_0, ...")
    add("--type-v", metavar="TYPE", help="of the values in KV cells")
    add("--out", type=Path, metavar="FILE", help="instead of the cache folder")
    add("--json", action="store_true", help="print the result as JSON")
    add("-q", "--quiet", action="store_true", help="no progress")


def run(args: argparse.Namespace) -> int:
    names = {"n_threads": "threads", "type_k": "type_k", "type_v": "type_v"}
    given = {name: getattr(args, flag) for name, flag in names.items()}
    params = {name: value for name, value in given.items() if value is not None}
    layouts = ("unified", "streams") if args.layout == "both" else (args.layout,)
    folder = profile_folder() if args.out is None else args.out.parent
    folder.mkdir(parents=True, exist_ok=True)
    if args.out is not None and args.out.is_dir():
        raise ArgumentError("--out", str(args.out), "a file, not a folder")
    with TemporaryFile(dir=folder):
        pass  # where none can be written is said before anything is measured
    with (
        load_model(args, quiet=args.quiet) as model,
        ProgressBar("calibrate", quiet=args.quiet) as progress,
    ):
        params["n_ubatch"] = ubatch_of(model, args.n_ubatch).value
        profile = calibrate(
            model, budget=args.budget, layouts=layouts, progress=progress.update, **params
        )
    path = args.out or folder / file_name(profile.key)
    if args.out is None:
        with suppress(ProfileError):  # there is none, or it is damaged
            profile = profile.beside(Profile.load(path))
    profile.save(path)
    found = {"profile": str(path), **summary(profile)}
    if args.json:
        print(json.dumps(found))
    else:
        say(in_words(found))
    return 0


def summary(profile: Profile) -> dict[str, Any]:
    """What was found, for each layout: how well the model fits, and what decoding costs."""
    found: dict[str, Any] = {
        "device": profile.key.device,
        "backend": profile.key.backend,
        "model": profile.about["model"],
        "samples": len(profile.samples),
        "disturbed": sum(sample.n == 0 for sample in profile.samples),
        "complete": profile.about["complete"],
        "watched": profile.about["watched"],
        "layouts": {},
    }
    for unified in sorted({s.unified for s in profile.samples}, reverse=True):
        unseen = held_out(profile, unified=unified)
        if not unseen:  # too few, or disturbed throughout
            continue
        cost = CostModel.fit(profile, unified=unified, swa_full=False)
        samples = profile.only(unified=unified).samples
        decode = {s.rows: s for s in reversed(samples) if s.prefill == 0}
        found["layouts"]["unified" if unified else "streams"] = {
            "held_out_median": round(float(np.median(unseen)), 4),
            "held_out_p95": round(float(np.percentile(unseen, 95)), 4),
            "decode": [
                {
                    "rows": n,
                    "kv": s.kv,
                    "measured_ms": round(1e3 * s.seconds, 3),
                    "model_ms": round(1e3 * cost.predict(n, 0, s.kv, s.n_seqs), 3),
                }
                for n, s in sorted(decode.items())
            ],
        }
    return found


def in_words(found: dict[str, Any]) -> str:
    """The summary for people to read."""
    end = "" if found["complete"] else ", interrupted"
    out = [
        f"{found['device']} ({found['backend']}), {found['model']}: {found['samples']} shapes{end}"
    ]
    if found["disturbed"]:
        out.append(
            f"{found['disturbed']} of them were disturbed at every try: "
            "measure again when nothing else uses the processor"
        )
    if not found["watched"]:
        out.append(UNWATCHED)
    for name, layout in found["layouts"].items():
        rows = []
        for step in layout["decode"]:
            n, ms = step["rows"], step["measured_ms"]
            rows.append([n, f"{ms:.2f}", f"{step['model_ms']:.2f}", f"{1e3 * n / ms:.0f}"])
        out += [
            f"{name}: the model is {layout['held_out_median']:.1%} off where it was not measured "
            f"(median; 95th percentile {layout['held_out_p95']:.1%})",
            Table(["rows", "measured ms", "model ms", "tok/s"], rows, text=()).plain(),
        ]
    return "\n".join([*out, f"saved as {found['profile']}"])
