"""`bench speculate --acceptance`: drafts that are right as often as it says.

`ngram:corpus=…` drafts from texts that were made for it: of each place of an answer a few tokens
before it, and what follows, each token with the acceptance as probability the right one. Drafting
costs what it always does, no Python in a step. Prompts are random tokens, answers are greedy and
have all of their tokens. With `--model gemma3-1b-counts` these repeat nothing, and do not depend on
rounding, so that the acceptance is what was asked for on any device.

All engines answer for `--learn` seconds before they are measured: it is about one that has run for
a while, on a device that is as warm. It has forgotten the answers themselves. All arms compute the
texts before each run; `watches` knows what drafts would be, and never has any: what it loses is no
decision's loss.

Each run has a process of its own, as engines of users have. What one process makes first is some
percent quicker on a GPU than what follows, and two engines of it that are alike differ for as long
as they live.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import inf
from multiprocessing import get_context
from typing import Any

import numpy as np

from bench.case import I32, Case, Measured
from bench.quiet import undisturbed
from bench.serve import ServeArm
from bench.serving import Tool
from bench.speculates import EngineSpeculates
from bench.targets import Target, speed_ratio
from pyllamabatch.engine.drafters import Ngram
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler.policies.device_aware import device_aware
from pyllamabatch.scheduler.policies.speculate import ByGain
from pyllamabatch.step.sampling_params import SamplingParams

OFF, WATCHES, KNOWS = "off", "watches", "knows"
PROMPT = 64  # tokens
PROMPTS = 2  # different ones at most, of a round
KNOWN, DRAFTED = 4, 32  # tokens of a text: before a place of an answer, and behind it
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


def texts(prompt: I32, answer: I32, acceptance: float, random: np.random.Generator) -> list[I32]:
    """What drafts of this answer come from, a text for each of its places."""
    every = np.concatenate([prompt, answer])
    made = []
    for at in range(len(prompt), len(every)):
        drafted = every[at : at + DRAFTED].copy()
        drafted[random.random(len(drafted)) >= acceptance] ^= 1
        made.append(np.concatenate([every[at - KNOWN : at], drafted]))
    return made


class Known(EngineSpeculates):
    """An engine that drafts from texts of the answers, or not at all. options: of the engine."""

    def __init__(self, case: Case, model: Model, *, drafts: bool, learn: float,
                 options: dict[str, Any]) -> None:  # fmt: skip
        n = min(PROMPTS, case.pl)
        # As much as it is told, so that the answers themselves are forgotten.
        corpus = n * sum(KNOWN + min(DRAFTED, case.tg - at) for at in range(case.tg))
        super().__init__(case, model, {"speculate": Ngram(corpus) if drafts else None, **options})
        self._learn = learn
        self._random = np.random.default_rng(case.seed)
        shape = (n, PROMPT)
        self._each = 1
        self._prompts = list(self._random.integers(0, model.n_vocab, shape, dtype=np.int32))
        self._texts: list[I32] = []

    def warm_up(self) -> None:
        answers = self._engine.generate(self._prompts, self._params(0))
        share = acceptance_of(self.case)
        for prompt, answer in zip(self._prompts, answers, strict=True):
            tokens = np.array(answer.tokens, np.int32)
            text = np.concatenate(texts(prompt, tokens, share, self._random))
            self._texts += np.array_split(
                text, 1 + len(text) * self.case.pl // (self.case.n_ctx - 64)
            )
        learned, repeat = 0.0, 0
        while not repeat or learned < self._learn:
            learned += self.run(repeat).t_tg
            repeat += 1

    def run(self, repeat: int) -> Measured:
        self._engine.generate(self._texts, SamplingParams(temperature=0, max_tokens=1))
        return super().run(repeat)

    def times(self, prompt: I32, tokens: int, seed: int) -> Iterator[float]:
        for _ in self._engine.submit(prompt, self._params(seed)):
            yield time.perf_counter()

    def _params(self, seed: int) -> SamplingParams:
        return SamplingParams(temperature=0, max_tokens=self.case.tg, ignore_eog=True, seed=seed)


def arms(learn: float) -> list[ServeArm]:
    """learn: seconds of decoding."""

    def each_time(case: Case, **how: Any) -> Tool:
        return Tool(case, partial(apart, learn=learn, **how))

    includes = "Engine of a process of its own, a thread for each reader; no HTTP"
    how: dict[str, dict[str, Any]] = {
        OFF: {"drafts": False},
        WATCHES: {"drafts": True, "never": True},
        KNOWS: {"drafts": True},
    }
    return [ServeArm(name, includes, partial(each_time, **each)) for name, each in how.items()]


def apart(case: Case, **how: Any) -> Measured:
    """`once` in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(once, case, **how).result()


def once(case: Case, *, learn: float, drafts: bool, never: bool = False) -> Measured:
    options: dict[str, Any] = {}
    if never:
        options["policy"] = replace(device_aware(), speculate=ByGain(inf))
    with (
        Model(case.model.path, n_gpu_layers=case.n_gpu_layers) as model,
        closing(Known(case, model, drafts=drafts, learn=learn, options=options)) as one,
    ):
        one.warm_up()
        return undisturbed(partial(one.run, 0), None)
