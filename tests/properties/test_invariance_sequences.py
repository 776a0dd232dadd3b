"""`Engine(batch_invariant=True)`: an interactive sequence has the logits that it has alone, bit by
bit, for the same prompts, samples, trims and forks: whatever runs beside it, however often it is
preempted, after a failure of the backend, and when it goes on from a snapshot of itself, in this
engine or in another one."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.sequence import Sequence
from pyllamabatch.errors import DecodeError
from pyllamabatch.llama.model import Model
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.bits import Bits, recorded
from tests.support.faults import set_fault
from tests.support.invariance import AnyPolicy
from tests.support.models_gguf import gguf_path

OPTIONS: dict[str, Any] = {
    "batch_invariant": True, "n_ubatch": 32, "cost": None, "flash_attn_type": "disabled",
}  # fmt: skip
N_CELLS = 512
GREEDY = SamplingParams(temperature=0, ignore_eog=True)
REQUEST = replace(GREEDY, max_tokens=9)
MOST = 60  # tokens that one step of an owner adds

Op = tuple[str, int]
OPS = st.lists(
    st.tuples(
        st.sampled_from(["prompt", "sample", "sample", "move", "move", "trim", "fork", "become"]),
        st.integers(1, MOST),
    ),
    min_size=3,
    max_size=9,
).map(
    lambda ops: [("prompt", MOST), *ops],
)  # fmt: skip


def text(n: int) -> list[int]:
    return [5 + (7 * i + 13 * n) % 250 for i in range(n)]


class Owner:
    """Of one sequence at a time, in the first of these engines until it moves to another one.
    `bits`: what each engine computes."""

    def __init__(self, engines: list[Engine], bits: list[dict[int, Bits]]) -> None:
        self._engines, self._bits, self._at = engines, bits, 0
        self.sequence = engines[0].sequence(GREEDY)
        self.seen: list[tuple[int, bytes]] = []

    def act(self, what: str, n: int) -> None:
        """A call that raises has changed nothing: it is made again."""
        one = self.sequence
        if what == "prompt" and one.position + n < N_CELLS - 100:
            again(lambda: one.prompt(text(n)))
        elif what == "trim":
            one.trim(min(n, one.position))
        elif what == "move" and one.position > 1 and len(self._engines) > 1:
            self._move(n % len(self._engines))
        elif what in ("sample", "fork", "become") and one.position:
            self._sample(one, 1 + n % 6)
            if what != "sample":
                fork = again(lambda: one.fork())
                self._sample(fork, 2)
                old = one if what == "become" else fork
                self.sequence = fork if what == "become" else one
                old.close()

    def _sample(self, one: Sequence, n: int) -> None:
        for _ in range(n):
            position = one.position - 1
            token = again(one.sample).token
            self.seen.append((token, self._bits[self._at][one._request.id][position]))

    def _move(self, to: int) -> None:
        saved = again(self.sequence.snapshot)
        self.sequence.close()
        self.sequence, self._at = self._engines[to].sequence(GREEDY), to
        self.sequence.restore(saved)


def again(call: Any) -> Any:
    try:
        return call()
    except DecodeError:
        return call()


def seen(engines: list[Engine], ops: list[Op], n_beside: int = 0) -> list[tuple[int, bytes]]:
    """Tokens, and digests of the logits that they were sampled from. `n_beside`: so many requests
    come before each call."""
    with ExitStack() as stack:
        owner = Owner(engines, [stack.enter_context(recorded(engine)) for engine in engines])
        beside = []
        for i, (what, n) in enumerate(ops):
            texts = [text(7 * i + j + 1) for j in range(n_beside)]
            beside += [engines[0].submit(tokens, REQUEST) for tokens in texts]
            owner.act(what, n)
        owner.sequence.close()
        for stream in beside:
            stream.result(60)
        return owner.seen


@pytest.fixture(scope="module", params=["embedded", "gemma3"])
def quiet(request: pytest.FixtureRequest, embedded_model: Model) -> Iterator[Engine]:
    """Nothing is cached in it, and nothing runs beside a sequence."""
    with ExitStack() as stack:
        model = embedded_model
        if request.param != "embedded":
            model = stack.enter_context(Model(gguf_path(request.param)))
        own: dict[str, Any] = {"n_seq_max": 2, "n_ctx": 2 * N_CELLS, "prefix_cache": False}
        yield stack.enter_context(Engine(model, **own, **OPTIONS))


MOVED: list[Op] = [
    ("prompt", 60), ("sample", 4), ("prompt", 33), ("sample", 4), ("move", 2), ("sample", 3),
    ("move", 1), ("sample", 5), ("trim", 40), ("sample", 3),
]  # fmt: skip


@settings(max_examples=3)
@example(ops=MOVED, seed=3, n_seq_max=2, n_beside=2, preemption="recompute", fault=None)
@given(
    ops=OPS, seed=st.integers(0, 2**32 - 1), n_seq_max=st.integers(2, 4),
    n_beside=st.integers(0, 3), preemption=st.sampled_from(["auto", "recompute"]),
    fault=st.none() | st.integers(1, 60),
)  # fmt: skip
def test_an_owner_sees_what_it_sees_alone(
    quiet: Engine,
    ops: list[Op],
    seed: int,
    n_seq_max: int,
    n_beside: int,
    preemption: str,
    fault: int | None,
) -> None:
    known = seen([quiet], ops)
    own: dict[str, Any] = {"preemption": preemption, "patience": 0.0, "n_ctx": n_seq_max * N_CELLS}
    with Engine(
        quiet.model, n_seq_max=n_seq_max, policy=AnyPolicy(seed), **own, **OPTIONS
    ) as engine:
        if fault is not None:
            set_fault(engine._stepper, fault, -3, n_times=2)
        assert seen([engine, quiet], ops, n_beside) == known
        set_fault(engine._stepper, 0, 0)


@pytest.mark.parametrize(("name", "loads"), [("llama", True), ("gemma3", False)])
def test_a_state_has_not_all_cells_of_a_window(name: str, loads: bool) -> None:
    """What was saved is computed again there, as it was: chunks as chunks, and rows that decoded
    as such."""
    own: dict[str, Any] = {"n_seq_max": 2, "n_ctx": 2 * N_CELLS}
    with Model(gguf_path(name)) as model, Engine(model, **own, **OPTIONS) as engine:
        with engine.sequence(GREEDY) as one:
            one.prompt(text(MOST))
            tokens = [one.sample().token for _ in range(5)]
            saved = one.snapshot()
            tokens.append(one.sample().token)
        with Engine(model, **own, **OPTIONS) as other, other.sequence(GREEDY) as two:
            two.restore(saved)
            assert two.tokens[MOST:] == tokens[:-1]
            assert two.sample().token == tokens[-1]
            stats = other.stats()
    assert (stats.swapped_tokens > 0) == loads
    assert stats.rows == (1 if loads else MOST + 5)
