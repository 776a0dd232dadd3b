"""`Engine(batch_invariant=True)` with real weights: all logits as a request has them alone, bit by
bit."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pyllamabatch import Engine, Model, SamplingParams, models
from tests.support.bits import recorded
from tests.support.invariance import Alone, AnyPolicy, assert_alone, each_alone

pytestmark = pytest.mark.real

OPTIONS: dict[str, Any] = {"batch_invariant": True, "n_seq_max": 3, "n_ctx": 1536, "cost": None}
SYSTEM = "Below, a teacher answers what children ask. The answers are short and friendly.\n\nQ: "
PARAGRAPH = "The tide comes in twice a day, and each time it is a little later than before. "
TEXTS = (
    f"{SYSTEM}Why is the sky blue?\nA:",
    f"{SYSTEM}Who was the first on the moon?\nA:",
    "Hi",
    f"{PARAGRAPH * 7}So",
)
"""Two with a common prefix, one of a single chunk, one of more than 128 tokens."""


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    with Model(models.fetch(request.param, progress=False)) as model:
        yield model


@pytest.fixture(scope="module")
def prompts(model: Model) -> list[list[int]]:
    return [model.vocab.tokenize(text).tolist() for text in TEXTS]


@pytest.fixture(scope="module")
def known(model: Model, prompts: list[list[int]]) -> Alone:
    with Engine(model, prefix_cache=False, policy="fcfs", **OPTIONS) as engine:
        return each_alone(engine, prompts, wanted)


def wanted(i: int) -> SamplingParams:
    """Of prompt i; every second one is drawn."""
    return SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=5, ignore_eog=True)


def check_mix(
    model: Model, prompts: list[list[int]], known: Alone, order: list[int], **options: Any
) -> Any:
    """These prompts at once: each as alone. Returns the engine's counters."""
    with Engine(model, **{**OPTIONS, **options}) as engine, recorded(engine) as bits:
        streams = [(i, engine.submit(prompts[i], wanted(i))) for i in order]
        results = [(i, stream.result(timeout=300)) for i, stream in streams]
        assert_alone(results, bits, known)
        return engine.stats()


def test_no_policy_changes_a_bit(model: Model, prompts: list[list[int]], known: Alone) -> None:
    """Chunks, preemption, and prefixes of those that came before."""
    stats = check_mix(
        model, prompts, known, [0, 3, 2, 1, 0], policy=AnyPolicy(2), preemption="recompute"
    )
    assert stats.preemptions > 0
    assert stats.recomputed_rows > 0
    assert stats.prefix_tokens > 0


def test_a_fork_and_its_origin(model: Model, prompts: list[list[int]], known: Alone) -> None:
    """Both go on as a request with the same prompt does, with a request beside them."""
    greedy = SamplingParams(temperature=0, ignore_eog=True)
    tokens, _ = known[0]
    with Engine(model, **OPTIONS) as engine, engine.sequence(greedy) as one:
        beside = engine.submit(prompts[2], wanted(2))
        one.prompt(prompts[0])
        first = one.sample().token
        with one.fork() as other:
            forked = [first, *(other.sample().token for _ in range(4))]
        origin = [first, *(one.sample().token for _ in range(4))]
        assert beside.result(timeout=300).tokens == known[2][0]
    assert origin == forked == tokens


@pytest.mark.slow
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("seed", range(4))
def test_many_mixes(
    model: Model, prompts: list[list[int]], known: Alone, seed: int, preemption: str
) -> None:
    if preemption == "swap" and model.n_swa:
        preemption = "auto"  # refused: see docs/explanation/batch-invariance.md
    draw = random.Random(seed)
    order = [draw.randrange(len(prompts)) for _ in range(12)]
    stats = check_mix(
        model, prompts, known, order, policy=AnyPolicy(seed), preemption=preemption,
        n_threads=1 + seed % 2,
    )  # fmt: skip
    assert stats.swapped_tokens == 0 or preemption == "swap"
