"""Train the default model for a given number of minutes and print its held-out accuracy.

``python -m tools.recipe.default_model.train --minutes 5 --out build``
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from . import tasks
from .data import Conversations
from .model import Llama, ModelConfig
from .tokenizer import IM_END, encode, encode_chat

PEAK_LR = 4e-3
WARMUP, DECAY = 0.02, 0.6  # shares of the run
WEIGHT_DECAY = 0.05


def learning_rate(progress: float) -> float:
    """Linear warm-up, a plateau, linear decay to nothing; ``progress`` runs from 0 to 1."""
    return PEAK_LR * min(1.0, progress / WARMUP, max(0.0, 1.0 - progress) / DECAY)


def make_optimizers(model: Llama) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.blk.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(
            matrices, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@torch.no_grad()
def exact_match(model: Llama, kind: str, n: int, batch: int = 250) -> float:
    """Share of ``n`` held-out tasks that greedy decoding answers to the byte.

    Greedy decoding gives the answer exactly when every token of it is the most likely one after
    the right ones before it, so one forward pass decides.
    """
    device = model.token_embd.weight.device
    right = 0
    held_out = tasks.make_tasks(kind, n)
    for start in range(0, n, batch):
        rows, answers = [], []
        for task in held_out[start : start + batch]:
            prompt = encode_chat([{"role": "user", "content": task.prompt}])
            answer = [*encode(task.answer), IM_END]
            rows.append(prompt + answer)
            answers.append((len(prompt), answer))
        width = max(map(len, rows))
        tokens = torch.tensor([row + [IM_END] * (width - len(row)) for row in rows], device=device)
        with torch.autocast(device.type, torch.bfloat16):
            chosen = model(tokens).argmax(-1).tolist()
        for choice, (first, answer) in zip(chosen, answers, strict=True):
            right += choice[first - 1 : first - 1 + len(answer)] == answer
    return right / n


def loss_of(model: Llama, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross entropy of the wanted tokens, each predicted from those before it."""
    labels = tokens[:, 1:].masked_fill(~wanted[:, 1:], -100)
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="time to train, compiling aside")
    parser.add_argument("--batch-tokens", type=int, default=1 << 18)
    parser.add_argument("--workers", type=int, default=14, help="processes that generate text")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n-eval", type=int, default=1000, help="held-out prompts per task")
    parser.add_argument("--out", type=Path, default=Path("build"))
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Llama(ModelConfig()).to(device)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters on {device}", flush=True)
    optimizers = make_optimizers(model)
    compiled_loss = torch.compile(loss_of, dynamic=False)
    loader = DataLoader(
        Conversations(args.batch_tokens, args.seed),
        batch_size=None,
        num_workers=args.workers,
        prefetch_factor=4 if args.workers else None,
        pin_memory=device.type == "cuda",
    )

    seen_shapes: set[torch.Size] = set()
    trained_for, started = 0.0, time.monotonic()
    for step, (tokens, wanted) in enumerate(loader):
        compiling = tokens.shape not in seen_shapes
        seen_shapes.add(tokens.shape)
        progress = trained_for / (60 * args.minutes)
        if progress >= 1.0:
            break
        tokens = tokens.to(device, non_blocking=True).long()
        wanted = wanted.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled_loss(model, tokens, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or compiling:
            line = {"step": step, "loss": round(loss.item(), 5), "minutes": trained_for / 60}
            print(json.dumps(line), flush=True)
        now = time.monotonic()
        if not compiling:
            trained_for += now - started
        started = now
        if step % 2000 == 1999:
            torch.save(model.state_dict(), args.out / "model.pt")
            quick = {kind: exact_match(model, kind, 250) for kind in tasks.TASKS}
            print(json.dumps({"step": step, "held_out": quick}), flush=True)
            started = time.monotonic()

    torch.save(model.state_dict(), args.out / "model.pt")
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "parameters": n_parameters,
        "minutes": args.minutes,
        "seed": args.seed,
        "steps": step,
        "tokens": step * args.batch_tokens,
        "held_out_prompts_per_task": args.n_eval,
        "exact_match_bf16": {kind: exact_match(model, kind, args.n_eval) for kind in tasks.TASKS},
    }
    text = json.dumps(report, indent=2)
    (args.out / "training.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
