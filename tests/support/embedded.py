"""The embedded model, twelve prompts, and what each gets alone through raw calls."""

from pathlib import Path

import numpy as np

from pyllamabatch.llama.model import Model
from pyllamabatch.models import default_model_path
from tests.support.oracle import TOLERANCE_QUANTISED, Agreement, Reference, raw_model, solo

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
        return [solo(oracle, prompt, N_TOKENS, never=eog) for prompt in texts(model.n_vocab)]


def check(agreement: Agreement, reference: Reference, tokens: list[int]) -> None:
    """They are its first ones."""
    n = len(tokens)
    assert n <= len(reference.tokens)
    if n:
        first = Reference(reference.tokens[:n], reference.logits[:n])
        agreement.check(first, tokens, TOLERANCE_QUANTISED)
