"""`bench speculate --acceptance`: drafts that are right as often as it says.

The drafter knows the answers: it has heard them in a round without drafts. Of each token that it
drafts it says the right one with the acceptance as probability, else another one. Prompts are
random tokens, answers are greedy and have all of their tokens. With `--model gemma3-1b-still` the
answers do not depend on rounding, so that the acceptance is what was asked for on any device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench.case import I32, Case
from bench.serve import ServeArm
from bench.serving import EngineClients
from bench.speculates import EngineSpeculates
from bench.targets import Target, speed_ratio
from pyllamabatch.engine.drafters import Wanted
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams

OFF, KNOWS = "off", "knows"
PROMPT = 64  # tokens
SAMPLING = "acceptance "


def targets() -> Iterator[Target]:
    for acceptance in (0.8, 0.4, 0.0):
        for pl in (1, 4, 8, 16, 64):
            yield Target(
                f"acceptance {acceptance:g}, {pl} sequences: {KNOWS} over {OFF}",
                speed_ratio(KNOWS, OFF, pl),
                at_least=1.6 if (acceptance, pl) == (0.8, 1) else 0.98,
                where={"sampling": sampling_of(acceptance)},
            )


def shares(words: str) -> list[float]:
    """SystemExit for what is no share."""
    try:
        found = [float(word) for word in words.split(",")]
    except ValueError:
        found = [-1.0]
    if not all(0 <= share <= 1 for share in found):
        raise SystemExit(f"--acceptance {words}: numbers from 0 to 1, comma separated")
    return found


def sampling_of(acceptance: float) -> str:
    """In the records."""
    return f"{SAMPLING}{acceptance:.2f}"


def acceptance_of(case: Case) -> float:
    return float(case.sampling.removeprefix(SAMPLING))


class Knows:
    """A drafter: `answers`, by the prompt's tokens."""

    def __init__(self, acceptance: float, seed: int) -> None:
        self.answers: dict[bytes, I32] = {}
        self._acceptance = acceptance
        self._random = np.random.default_rng(seed)

    def draft(self, wanted: Sequence[Wanted]) -> list[Sequence[int]]:
        return [self._of(one) for one in wanted]

    def _of(self, one: Wanted) -> Sequence[int]:
        answer = self.answers.get(one.tokens[: one.n_prompt].tobytes())
        if answer is None:
            return ()
        at = len(one.tokens) - one.n_prompt
        tokens = answer[at : at + one.n].copy()
        tokens[self._random.random(len(tokens)) >= self._acceptance] ^= 1
        drafted: list[int] = tokens.tolist()
        return drafted


class Known(EngineSpeculates):
    """An engine whose drafter, if it has one, knows the answers."""

    def __init__(self, case: Case, model: Model, *, drafts: bool) -> None:
        self._drafter = Knows(acceptance_of(case), case.seed)
        super().__init__(case, model, {"speculate": self._drafter if drafts else None})
        generator = np.random.default_rng(case.seed)
        shape = (2 * case.pl, PROMPT)
        self._prompts = list(generator.integers(0, model.n_vocab, shape, dtype=np.int32))

    def warm_up(self) -> None:
        streams = [self._engine.submit(prompt, self._params(0)) for prompt in self._prompts]
        for prompt, stream in zip(self._prompts, streams, strict=True):
            answer = np.array(stream.result().tokens, np.int32)
            self._drafter.answers[prompt.tobytes()] = answer

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        for _ in self._engine.submit(prompt, self._params(seed)):
            yield time.perf_counter()

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.case.tg, ignore_eog=True, seed=seed)


def arms(model: Model) -> list[ServeArm]:
    def engine(case: Case, *, drafts: bool) -> EngineClients:
        return Known(case, model, drafts=drafts)

    includes = "Engine in this process, a thread for each reader; no HTTP"
    how: dict[str, Any] = {OFF: False, KNOWS: True}
    return [ServeArm(name, includes, partial(engine, drafts=on)) for name, on in how.items()]
