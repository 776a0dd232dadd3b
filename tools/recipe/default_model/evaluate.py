"""Measure the default model through pyllamabatch itself: greedy, many prompts in one batch.

``python -m tools.recipe.default_model.evaluate --n 1000 --out tools/recipe/default_model/results``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.models import default_model_path

from . import tasks

GREEDY = SamplingParams(temperature=0.0, max_tokens=128)


def exact_match(engine: Engine, model: Model, kind: str, n: int) -> float:
    """Share of ``n`` held-out tasks of ``kind`` that the engine answers to the byte."""
    held_out = tasks.make_tasks(kind, n)
    prompts = [
        model.vocab.tokenize(
            model.vocab.apply_chat_template([{"role": "user", "content": task.prompt}]),
            parse_special=True,
        )
        for task in held_out
    ]
    results = engine.generate(prompts, GREEDY)
    right = 0
    for task, result in zip(held_out, results, strict=True):
        if result.text == task.answer:
            right += 1
        else:
            print(f"{task.prompt!r}: {task.answer!r}, but the model said {result.text!r}")
    return right / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_path())
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts per task")
    parser.add_argument("--sequences", type=int, default=16, help="prompts in the batch at once")
    parser.add_argument("--threads", type=int, default=1, help="a model this small gains little")
    parser.add_argument("--cpu", action="store_true", help="keep every layer off the GPU")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json")
    args = parser.parse_args()

    accuracy = {}
    with (
        Model(args.model, n_gpu_layers=0 if args.cpu else -1) as model,
        Engine(
            model,
            n_seq_max=args.sequences,
            n_ctx=args.sequences * model.n_ctx_train,
            kv_unified=False,
            n_threads=args.threads,
            n_threads_batch=args.threads,
        ) as engine,
    ):
        for kind in tasks.TASKS:
            accuracy[kind] = exact_match(engine, model, kind, args.n)
            print(f"{kind:12} {accuracy[kind]:7.1%}", flush=True)
    report = {
        "bytes": args.model.stat().st_size,
        "sequences_at_once": args.sequences,
        "held_out_prompts_per_task": args.n,
        "exact_match": accuracy,
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
