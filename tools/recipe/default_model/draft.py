"""Make the embedded model's draft: some of its layers, with the feed-forward neurons that they use
most, trained to give the same answers.

``python -m tools.recipe.default_model.draft --minutes 12 --out build/draft.pt``
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import gguf
import torch
import torch.nn.functional as F
from torch import Tensor

from pyllamabatch.models import default_model_path

from . import tasks
from .data import WEIGHTS, conversation
from .model import Block, Llama, ModelConfig
from .tokenizer import IM_END, encode, encode_chat
from .train import loss_of

LAYERS = (0, 1, 5)
"""Those of the embedded model that the draft begins with: on their own they agree with it most."""
N_FF = 256
ROW_LENGTH = 320
PEAK_LR = 1.5e-3
WARMUP = 0.03  # share of the run; then a linear decay to nothing

Weights = dict[str, Tensor]


def weights_of(path: Path) -> Weights:
    """The tensors of a GGUF file as float32."""
    return {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in gguf.GGUFReader(path).tensors
    }


def rows(rng: random.Random, n: int, length: int = ROW_LENGTH) -> tuple[Tensor, Tensor]:
    """``n`` rows of short chats: (tokens, wanted), as ``Conversations`` gives them."""
    short = {kind: weight for kind, weight in WEIGHTS.items() if not kind.startswith("recall")}
    short["recall"] = 0.1
    drawn = [conversation(rng, length + 1, short) for _ in range(n)]
    return torch.tensor([row for row, _ in drawn]), torch.tensor([mask for _, mask in drawn])


@torch.no_grad()
def used_neurons(block: Block, x: Tensor, n: int) -> Tensor:
    """The ``n`` neurons of a layer's feed-forward part that add most to its output for ``x``."""
    active = F.silu(block.ffn_gate(x)) * block.ffn_up(x)
    weight = active.abs().mean((0, 1)) * block.ffn_down.weight.norm(dim=0)
    return weight.topk(n).indices.sort().values


@torch.no_grad()
def cut(whole: Weights, tokens: Tensor, config: ModelConfig) -> Llama:
    """A model of ``LAYERS`` and the neurons that they use for ``tokens``."""
    teacher = Llama(ModelConfig(n_layer=len(LAYERS)))
    chosen = {name: w for name, w in whole.items() if not name.startswith("blk.")}
    for i, layer in enumerate(LAYERS):
        prefix = f"blk.{layer}."
        chosen |= {
            f"blk.{i}.{name.removeprefix(prefix)}": w
            for name, w in whole.items()
            if name.startswith(prefix)
        }
    teacher.load_state_dict(chosen)
    inputs: list[Tensor] = []
    hooks = [
        block.ffn_norm.register_forward_hook(lambda _module, _args, out: inputs.append(out))
        for block in teacher.blk
    ]
    teacher(tokens)
    for hook in hooks:
        hook.remove()
    for i, (block, x) in enumerate(zip(teacher.blk, inputs, strict=True)):
        used = used_neurons(block, x, config.n_ff)
        for name, dim in (("ffn_gate", 0), ("ffn_up", 0), ("ffn_down", 1)):
            key = f"blk.{i}.{name}.weight"
            chosen[key] = chosen[key].index_select(dim, used)
    draft = Llama(config)
    draft.load_state_dict(chosen)
    return draft


@torch.no_grad()
def agreement(model: Llama, n: int, seed: int = 0) -> dict[str, float]:
    """The share of the tokens of ``n`` held-out answers a kind that are the most likely ones after
    those before them. The embedded model gives these answers."""
    shares = {}
    for kind in tasks.TASKS:
        if kind == "recall_long":
            continue
        right = total = 0
        for task in tasks.make_tasks(kind, n, seed):
            prompt = encode_chat([{"role": "user", "content": task.prompt}])
            answer = [*encode(task.answer), IM_END]
            chosen = model(torch.tensor([prompt + answer[:-1]]))[0, len(prompt) - 1 :].argmax(-1)
            right += sum(a == b for a, b in zip(chosen.tolist(), answer, strict=True))
            total += len(answer)
        shares[kind] = right / total
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12.0, help="time to train")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument("--rows", type=int, default=6, help="rows of a batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n-eval", type=int, default=25, help="held-out prompts a kind")
    parser.add_argument("--out", type=Path, default=Path("build/draft.pt"))
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    rng = random.Random(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    config = ModelConfig(n_layer=len(LAYERS), n_ff=N_FF)
    model = cut(weights_of(default_model_path()), rows(rng, 8)[0], config)
    if args.start is not None:
        model.load_state_dict(torch.load(args.start, map_location="cpu", weights_only=True))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (progress := (time.monotonic() - started) / (60 * args.minutes)) < 1.0:
        tokens, wanted = rows(rng, args.rows)
        loss = loss_of(model, tokens, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = PEAK_LR * min(progress / WARMUP, 1.0 - progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            line = {"step": step, "loss": round(loss.item(), 4), "progress": round(progress, 3)}
            print(json.dumps(line), flush=True)
            torch.save(model.state_dict(), args.out)
        step += 1
    torch.save(model.state_dict(), args.out)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": LAYERS,
        "minutes": args.minutes,
        "steps": step,
        "tokens": step * args.rows * ROW_LENGTH,
        "agreement": agreement(model, args.n_eval),
    }
    text = json.dumps(report, indent=2)
    args.out.with_suffix(".json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
