"""Training rows: conversations of unrelated tasks, packed to a fixed length."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from . import tasks
from .tokenizer import END_OF_TEXT, encode_chat, encode_turn

# How often a task is drawn; recall is rare because its prompts are long.
WEIGHTS = {
    "recall": 0.7,
    "recall_long": 0.12,
    "copy": 1.0,
    "reverse": 1.0,
    "upper": 0.7,
    "sort": 2.0,
    "add": 2.5,
    "subtract": 3.0,
    "count": 2.5,
    "qa": 3.0,
}
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer in as few words as you can.",
    "You are a small model that answers exactly.",
)
ROW_LENGTHS = (512, 2048)
ROW_LENGTH_WEIGHTS = (0.7, 0.3)


def conversation(
    rng: random.Random, length: int, weights: Mapping[str, float] = WEIGHTS
) -> tuple[list[int], list[bool]]:
    """``length`` tokens of chat turns, and which of them the model has to predict. ``weights``: how
    often each kind of task is drawn.

    Those are the answers and the token that ends each. The rest of the row is padding.
    """
    kinds, shares = list(weights), list(weights.values())
    row: list[int] = []
    wanted: list[bool] = []
    if rng.random() < 0.1:
        row += encode_turn("system", rng.choice(SYSTEM_PROMPTS))
        wanted += [False] * len(row)
    misfits = 0
    while misfits < 4:
        task = tasks.make_task(rng.choices(kinds, shares)[0], rng, "train")
        prompt = encode_chat([{"role": "user", "content": task.prompt}])
        turn = encode_turn("assistant", task.answer)
        answer = turn[len(encode_chat([])) :]
        if len(row) + len(prompt) + len(answer) > length:
            misfits += 1
            continue
        row += prompt + answer
        wanted += [False] * len(prompt) + [True] * (len(answer) - 1) + [False]
    padding = length - len(row)
    return row + [END_OF_TEXT] * padding, wanted + [False] * padding


class Conversations(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of ``batch_tokens`` tokens in rows of one of ``ROW_LENGTHS``.

    A batch is (tokens int32, wanted bool), both ``(rows, length + 1)``: one more than the model
    reads, because every token is predicted from those before it.
    """

    def __init__(self, batch_tokens: int, seed: int) -> None:
        super().__init__()
        self.batch_tokens = batch_tokens
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        rng = random.Random(f"{self.seed}:{info.id if info else 0}")
        while True:
            length = rng.choices(ROW_LENGTHS, ROW_LENGTH_WEIGHTS)[0]
            rows = [conversation(rng, length + 1) for _ in range(self.batch_tokens // length)]
            tokens: NDArray[np.int32] = np.array([row for row, _ in rows], dtype=np.int32)
            wanted: NDArray[np.bool_] = np.array([mask for _, mask in rows], dtype=np.bool_)
            yield torch.from_numpy(tokens), torch.from_numpy(wanted)
