"""The graph of decoding: what may come between two steps without a new one (vendor/patches)."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pyllamabatch.llama.context import Context
from pyllamabatch.llama.memory import Memory
from pyllamabatch.llama.model import Model
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import begin, write
from tests.support.engines import greedy
from tests.support.models_gguf import gguf_path
from tests.support.oracle import EXACT, random_prompts

SEQS = np.array([0, 1], np.int32)
OTHER = 2  # has cells, and does not decode
N = 6  # steps, before and after
PROMPTS = random_prompts(3, seed=3, shortest=9, longest=9)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def stepper(request: pytest.FixtureRequest) -> Iterator[Stepper]:
    with (
        Model(gguf_path(request.param)) as model,
        Context(
            model, n_ctx=1024, n_batch=64, n_seq_max=4, kv_unified=False, n_threads=1, **EXACT
        ) as context,
        Stepper(context) as stepper,
    ):
        yield stepper


def nothing(memory: Memory, stepper: Stepper) -> None:
    pass


def a_copy(memory: Memory, stepper: Stepper) -> None:
    memory.seq_cp(0, 3)


def a_prompt(memory: Memory, stepper: Stepper) -> None:
    """No row of it gives an output."""
    stepper.rows.flags[: write(stepper, PROMPTS[OTHER][:4], seq=3)] = 0
    stepper.step(4).raise_for_code()


def a_shift(memory: Memory, stepper: Stepper) -> None:
    memory.seq_add(OTHER, 0, -1, 5)


Between = Callable[[Memory, Stepper], None]


def decode(stepper: Stepper, between: Between) -> tuple[list[int], Any]:
    """Tokens, and how many graphs were used again in the steps behind `between`."""
    memory = stepper._ready().memory
    memory.clear()
    for seq, prompt in enumerate(PROMPTS):
        begin(stepper, greedy(99), prompt, seq=seq)
    before = stepper.run(SEQS, N)
    tokens, reused = before.token.tolist(), int(before.steps["n_reused"][-1])
    between(memory, stepper)
    after = stepper.run(SEQS, N)
    return tokens + after.token.tolist(), int(after.steps["n_reused"][-1]) - reused


@pytest.mark.parametrize("between", [a_copy, a_prompt])
def test_it_stays(stepper: Stepper, between: Between) -> None:
    tokens, reused = decode(stepper, nothing)
    assert reused == N
    assert decode(stepper, between) == (tokens, N)


def test_a_graph_of_the_memorys_own_takes_it_away(stepper: Stepper) -> None:
    tokens, _ = decode(stepper, nothing)
    assert decode(stepper, a_shift) == (tokens, N - 1)


def test_the_rows_of_others_are_a_batch_behind(stepper: Stepper) -> None:
    """In one call: the decode's outputs stay, and so does its graph."""
    tokens, _ = decode(stepper, nothing)
    seen: list[int] = []

    def in_one_call(memory: Memory, stepper: Stepper) -> None:
        stepper.rows.flags[: write(stepper, PROMPTS[OTHER][:4], seq=3)] = 0
        assert stepper._run_native(4, SEQS, 1) == 0
        seen.extend(stepper.slot(int(seq)).next_token for seq in SEQS)
        assert memory.pos_max(3) == 3

    got, reused = decode(stepper, in_one_call)
    assert (got[: 2 * N] + seen + got[2 * N :])[: len(tokens)] == tokens
    assert reused == N + 1
