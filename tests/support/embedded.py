"""The embedded model, twelve prompts, and what each gets alone through raw calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path
from tests.support.oracle import (
    TOLERANCE_QUANTISED,
    Agreement,
    RawModel,
    Reference,
    raw_context,
    raw_model,
)

EXACT: dict[str, Any] = {
    "flash_attn_type": "disabled",
    "type_k": "f32",
    "type_v": "f32",
    "n_threads": 1,
}
N_TOKENS = 24


def texts(n_vocab: int) -> list[list[int]]:
    """Twelve prompts of 3 to 140 tokens: two families with a common prefix, and single ones."""
    random = np.random.default_rng(17)
    families = [
        random.integers(10, n_vocab, 90).tolist(),
        random.integers(10, n_vocab, 40).tolist(),
    ]
    prompts = []
    for i, n in enumerate([3, 9, 17, 30, 50, 5, 12, 33, 70, 20, 110, 48]):
        own = random.integers(10, n_vocab, n).tolist()
        prompts.append([*families[i % 3], *own] if i % 3 < 2 else own)
    return prompts


def solos(model: Model) -> list[Reference]:
    """N_TOKENS greedy tokens of each, none of which ends a text."""
    eog = sorted(model.vocab.eog_tokens)
    with raw_model(Path(default_model_path())) as oracle:
        return [_solo(oracle, prompt, eog) for prompt in texts(model.n_vocab)]


def _solo(oracle: RawModel, prompt: list[int], never: list[int]) -> Reference:
    n_ctx = len(prompt) + N_TOKENS
    with raw_context(oracle, n_ctx=n_ctx, n_batch=512, n_ubatch=512) as context:
        row = context.feed(prompt)
        tokens, rows = [], []
        while True:
            row[never] = -1e9
            tokens.append(int(row.argmax()))
            rows.append(row)
            if len(tokens) == N_TOKENS:
                return Reference(tokens, np.array(rows))
            row = context.feed(tokens[-1:], pos=len(prompt) + len(tokens) - 1)


def check(agreement: Agreement, reference: Reference, tokens: list[int]) -> None:
    """They are its first ones."""
    n = len(tokens)
    assert n <= len(reference.tokens)
    if n:
        first = Reference(reference.tokens[:n], reference.logits[:n])
        agreement.check(first, tokens, TOLERANCE_QUANTISED)
