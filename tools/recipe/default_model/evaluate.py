"""Measure the default model through pyllamabatch itself: greedy, many prompts in one batch.

``python -m tools.recipe.default_model.evaluate --n 1000 --out tools/recipe/default_model/results``
``python -m tools.recipe.default_model.evaluate --draft --n 200 --out …`` measures how many of its
greedy tokens its draft says, too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.models import default_draft_path, default_model_path

from . import tasks
from .tokenizer import IM_END, encode, encode_chat

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


def agreement(context: Context, kind: str, n: int) -> float:
    """Share of the tokens of ``n`` held-out answers, and of their ends, that are the context's most
    likely ones after those before them. The default model gives these answers."""
    right = total = 0
    for task in tasks.make_tasks(kind, n):
        prompt = encode_chat([{"role": "user", "content": task.prompt}])
        answer = [*encode(task.answer), IM_END]
        context.memory.clear()
        batch = Batch(context.n_batch)
        for pos, token in enumerate([*prompt, *answer[:-1]]):
            batch.add(token, pos, 0, logits=pos >= len(prompt) - 1)
        context.decode(batch)
        chosen = context.logits_all().argmax(axis=1).tolist()
        right += sum(a == b for a, b in zip(chosen, answer, strict=True))
        total += len(answer)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=default_model_path())
    parser.add_argument("--n", type=int, default=1000, help="held-out prompts per task")
    parser.add_argument("--sequences", type=int, default=16, help="prompts in the batch at once")
    parser.add_argument("--threads", type=int, default=1, help="a model this small gains little")
    parser.add_argument("--cpu", action="store_true", help="keep every layer off the GPU")
    parser.add_argument("--draft", action="store_true", help="measure the draft instead")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json, or agreement.json")
    args = parser.parse_args()
    if args.draft:
        measure_draft(args)
        return

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


def measure_draft(args: argparse.Namespace) -> None:
    path, shares = default_draft_path(), {}
    with Model(path, n_gpu_layers=0) as model, Context(model, n_threads=args.threads) as context:
        for kind in tasks.TASKS:
            shares[kind] = round(agreement(context, kind, args.n), 4)
            print(f"{kind:12} {shares[kind]:7.1%}", flush=True)
    report = {
        "bytes": path.stat().st_size,
        "held_out_prompts_per_task": args.n,
        "agreement": shares,
    }
    if args.out is not None:
        (args.out / "agreement.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
