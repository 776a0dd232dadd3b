"""Sequences that go on in another slot: no token is another one, and what they hold goes along."""

import pytest

from pyllamabatch import Engine, SamplingParams
from tests.properties.test_invariance_engine import assert_as_alone
from tests.support.decoding import loaded
from tests.support.engines import Checked, check_idle, engine_on, greedy
from tests.support.oracle import random_prompts, solos, tolerance

N_SEQ = 6
# Whose answers have no near tie.
PROMPTS = random_prompts(N_SEQ, seed=89, shortest=3, longest=60)
BUDGETS = [4, 40, 9, 25, 14, 60]  # gaps on all sides


def made(name: str) -> Engine:
    sizes = {"n_seq_max": N_SEQ, "n_ctx": N_SEQ * 256, "kv_unified": False}
    return engine_on(loaded(name), cost=None, **sizes)


def closing(name: str) -> Engine:
    engine = made(name)
    engine._core.scheduler.compaction.due = lambda n_moves, graphs: True  # type: ignore[method-assign]
    return engine


def moved(engine: Engine) -> int:
    """Requests that had rows in more than one slot."""
    ids = engine.trace()["ids"]
    return sum(len((ids == id).any(axis=0).nonzero()[0]) > 1 for id in set(ids[ids > 0].tolist()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3moe"])
def test_no_token_and_no_cell_is_another_one(name: str) -> None:
    alone = [solos(name, [p], n)[0] for p, n in zip(PROMPTS, BUDGETS, strict=True)]
    with closing(name) as engine:
        checked = Checked(engine)
        results = engine.generate(PROMPTS, [greedy(n) for n in BUDGETS])
        assert moved(engine) >= 2
        assert engine.stats().preemptions == 0
        check_idle(engine)
    assert checked.n_checks > 10
    assert_as_alone([r.tokens for r in results], alone, tolerance(name), 1.0)


def test_the_sampler_goes_along() -> None:
    """Seeds, penalties and log-probabilities: as in an engine in which none moves."""
    params = [
        SamplingParams(max_tokens=n, seed=i, repeat_penalty=1.3, logprobs=2)
        for i, n in enumerate(BUDGETS)
    ]

    def answers(engine: Engine) -> list[object]:
        with engine:
            results = engine.generate(PROMPTS, params)
            return [(r.tokens, r.finish_reason, len(r.logprobs or ())) for r in results]

    still = made("llama")
    still._core.scheduler.compaction.possible = False
    assert answers(closing("llama")) == answers(still)


def test_an_interactive_sequence_goes_along() -> None:
    with closing("llama") as engine:
        short = [engine.submit(PROMPTS[i], greedy(3)) for i in range(2)]
        sequence = engine.sequence(greedy(60))
        sequence.prompt(PROMPTS[2])
        found = [sequence.sample() for _ in range(4)]
        for stream in short:
            stream.result()
        other = engine.submit(PROMPTS[3], greedy(30))
        found += [sequence.sample() for _ in range(20)]
        other.result()
        assert [one.token for one in found] == solos("llama", [PROMPTS[2]], 24)[0].tokens
        sequence.close()
        check_idle(engine)
