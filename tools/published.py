"""`python -m tools.published FILE.md`: profiles of the tables that llama.cpp publishes.

Reads the `llama-batched-bench` and `llama-bench` tables of a file in llama.cpp's `benches/` and
writes a profile per model. How a row becomes steps:

- T_TG is TG decode steps of B rows: one takes T_TG / TG, at B * (PP + TG / 2) cells on average.
- T_PP is B * PP prompt rows, n_batch of them in a step, a sequence after the other: a step takes
  T_PP / steps; its rows look at (PP - rows of a sequence in the step) / 2 cells of their own on
  average. Rows with the same step are one sample, their median.
- `ppN @ dD` is N rows at depth D, `tgN @ dD` one row at D + N / 2, both from tokens per second.

The tables give each sequence cells of its own, llama.cpp's default.
"""

import argparse
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from pyllamabatch.cost.kernels import Kernels, Regime, kernels
from pyllamabatch.cost.profile import SHIPPED, Key, Profile, Sample

Step = tuple[int, int, float, int]  # rows, prefill, kv, n_seqs

# What the models' own configurations say: weights, experts, experts that a row uses, window.
MODELS = {
    "gpt-oss-20b": ("MXFP4", 32, 4, 128),
    "gpt-oss-120b": ("MXFP4", 128, 4, 128),
    "qwen3-coder-30b-a3b-instruct-q8_0": ("Q8_0", 128, 8, 0),
    "qwen2.5-coder-7b-q8_0": ("Q8_0", 0, 0, 0),
    "gemma-3-4b-it-qat": ("Q4_0", 0, 0, 1024),
    "glm-4.7-flash": ("Q8_0", 64, 4, 0),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.published", description=__doc__)
    parser.add_argument("file", type=Path, help="benches/NAME/NAME.md of a llama.cpp checkout")
    parser.add_argument("--device", required=True, help="as ggml describes it")
    parser.add_argument("--backend", required=True, choices=["MTL", "CUDA"])
    parser.add_argument("--name", required=True, help="first part of the files' names")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    for name, profile in profiles(
        options.file.read_text(encoding="utf-8"), options.file.stem, options.device, options.backend
    ).items():
        path = options.out / f"{options.name}-{name}.json"
        profile.save(path)
        print(f"{path}: {len(profile.samples)} samples")
    return 0


def profiles(text: str, source: str, device: str, backend: str) -> dict[str, Profile]:
    """By model, lower case and without `-GGUF`."""
    found = {}
    for part in re.split(r"^## (?=\S+/)", text, flags=re.MULTILINE)[1:]:
        full = part.split(maxsplit=1)[0]
        name = full.split("/")[1].lower().removesuffix("-gguf")
        kind, n_expert, n_used, n_swa = MODELS[name]
        settings = dict(re.findall(r"(\w+) = (-?\d+)", part))
        build = re.findall(r"^build: (.*)$", part, flags=re.MULTILINE)[0]
        about: dict[str, Any] = {
            "model": full,
            "llama_cpp": build,
            "source": f"llama.cpp b11549, benches/{source}/{source}.md (MIT)",
        }
        found[name] = Profile(
            Key(device, backend, "", {"n_ubatch": int(settings["n_ubatch"])}),
            known_kernels(backend, kind, n_expert > 0),
            samples(part, int(settings["n_batch"])),
            int(settings["n_ubatch"]),
            n_expert=n_expert,
            n_expert_used=n_used,
            n_swa=n_swa,
            about=about,
        )
    return found


def known_kernels(backend: str, kind: str, moe: bool) -> Kernels:
    """Of the builds that the tables were made with (7941, 7948): Metal had no few-row matrix
    kernels then, small-batch mat-vec went up to 8 rows."""
    if backend != "MTL":
        return kernels(backend, kind, moe=moe)
    regimes = [Regime(1, kernel="mul_mv"), Regime(2, kernel="mul_mv_ext")]
    regimes.append(Regime(9, 32, kernel="mul_mm"))
    if moe:
        regimes.append(Regime(32, 32, kernel="mul_mm, mul_mm_id"))
    return Kernels(tuple(regimes), 20)


def samples(text: str, n_batch: int) -> tuple[Sample, ...]:
    """Of one model's tables."""
    found: dict[Step, list[float]] = defaultdict(list)
    for cells in re.findall(r"^\|((?: +[\d.]+ \|){10})$", text, flags=re.MULTILINE):
        pp, tg, b, _, t_pp, _, t_tg = map(float, cells.split("|")[:7])
        found[int(b), 0, b * (pp + tg / 2), int(b)].append(t_tg / tg)
        rows = int(min(n_batch, b * pp))
        n_seqs = max(1, rows // int(pp))
        own = (pp - rows / n_seqs) / 2
        found[rows, rows, own * n_seqs, n_seqs].append(t_pp * rows / (b * pp))
    for kind, n, depth, rate in re.findall(r"\| +(pp|tg)(\d+)(?: @ d(\d+))? \| +([\d.]+) ±", text):
        at, speed = int(depth or 0), float(rate)
        if kind == "pp":
            found[int(n), int(n), at, 1].append(int(n) / speed)
        else:
            found[1, 0, at + int(n) / 2, 1].append(1 / speed)
    return tuple(
        Sample(*step, False, float(f"{statistics.median(times):.6g}"), 0.0, len(times))
        for step, times in sorted(found.items())
    )


if __name__ == "__main__":
    sys.exit(main())
