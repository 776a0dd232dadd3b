"""Streams that become a pool of cells when a sequence needs more than one of them has."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.errors import RequestTooLong
from pyllamabatch.kv import Sharing
from pyllamabatch.scheduler import Limits, SequenceView, fcfs
from pyllamabatch.scheduler.kv_options import Pool
from tests.support.made_up_costs import Linear
from tests.support.scheduler_machine import Machine

STREAMS = Limits(32, 16, 3, 300, 100, unified=False)
POOL = Pool(
    replace(STREAMS, n_cells_seq=300, unified=True),
    Sharing(copy_part=True, copy_whole=True, trim=True, n_cached=1),
)
BESIDE = Sharing(copy_whole=True, trim=True, n_cached=1)


def machine() -> Machine:
    return Machine(STREAMS, sharing=BESIDE, pool=POOL)


def test_a_long_request_gets_a_pool_and_what_runs_is_computed_again() -> None:
    m = machine()
    for id in range(3):
        m.add(id, 30, 40, 40, alike=20)
    for _ in range(8):
        m.step()
    generated = dict(m.generated)
    assert all(generated.values())
    m.add(3, 200, 20, 20, alike=20)
    m.step()
    assert m.moved["pool"] == 1
    assert m.scheduler.limits == POOL.limits
    assert not m.owner
    assert m.generated == generated | {3: 0}  # what was sampled stays
    m.run()
    assert sorted(m.done) == [0, 1, 2, 3]
    assert all(m.generated[id] == m.ends[id] for id in range(4))
    m.add(4, 290, 11, 11)
    m.run()
    assert m.moved["pool"] == 1


def test_what_a_sequence_can_have_is_the_same_while_there_comes_a_pool() -> None:
    """Other threads ask at any time whether a request fits."""
    found = []
    policy = replace(fcfs(), ended=lambda seq: found.append(m.scheduler.most_cells))
    m = Machine(STREAMS, policy, sharing=BESIDE, pool=POOL)
    m.add(0, 30, 40, 40)
    m.step()
    m.add(1, 200, 20, 20)
    m.run()
    assert m.moved["pool"] == 1
    assert found == [300] * 3  # what ran made way for the pool, and both have ended


def test_what_fits_the_pool_no_more_than_a_stream_is_refused() -> None:
    m = machine()
    with pytest.raises(RequestTooLong, match="can have 300"):
        m.add(0, 300, 2, 2)
    m.scheduler.check_fits(300, 1)
    assert not m.scheduler.limits.unified  # asked for, and not submitted
    m.add(1, 50, 5, 5)
    m.run()
    assert not m.moved["pool"]


def test_a_large_budget_is_no_reason_for_a_pool() -> None:
    """Those beside it are computed as they were, and it has the cells of a stream."""
    m = machine()
    m.add(0, 30, 20, 20)
    m.step()
    m.add(1, 2, 250, 60)
    m.run()
    assert not m.moved["pool"]
    assert m.scheduler.counters.preemptions == 0
    assert m.generated == {0: 20, 1: 60}


def test_an_answer_that_reaches_the_end_of_its_stream_goes_on_in_a_pool() -> None:
    m = machine()
    m.add(0, 30, 60, 60)
    m.add(1, 40, 200, 90)
    while m.step_many(1000) is not None:
        if not m.moved["pool"]:
            assert len(m.tokens[1]) <= 101
    assert m.moved["pool"] == 1
    assert m.generated == {0: 60, 1: 90}


def test_an_answer_that_ends_with_its_stream_needs_no_pool() -> None:
    m = machine()
    m.add(0, 40, 200, 61)  # the last one is never computed
    m.run()
    assert not m.moved["pool"]


def test_one_that_is_gone_before_it_runs_makes_no_pool() -> None:
    m = machine()
    m.add(0, 30, 20, 20)
    m.step()
    m.add(1, 200, 20, 20)
    m.remove(1)
    m.run()
    assert not m.moved["pool"]
    assert not m.scheduler.limits.unified


def test_an_interactive_sequence_has_a_pool_when_its_owner_asks_for_one_more_token() -> None:
    m = machine()
    m.add_interactive(0, 100)
    m.run()
    m.scheduler.interactive.ask(0)
    m.run()
    assert len(m.tokens[0]) == 101
    m.add(1, 30, 20, 20)
    m.run()
    assert not m.moved["pool"]
    m.scheduler.interactive.ask(0)
    m.trim(0, 50)  # its owner goes back
    m.run()
    assert not m.moved["pool"]


COSTS = {
    "streams": Linear(row_s=1.0, unified=False),
    "pool": Linear(row_s=1.0, cell_s=0.01),
}


def goes_back(renewal_s: float = 0.0) -> Machine:
    """In a pool each cell makes a step longer."""
    m = Machine(STREAMS, sharing=BESIDE, pool=POOL, cost=COSTS["streams"], costs=COSTS)
    m.renewal_s = renewal_s
    return m


def test_a_pool_is_streams_again_when_that_pays() -> None:
    """Not at once: what its steps have lost must pay for what is computed again, and for the next
    way to a pool. What runs goes on with the tokens that it has."""
    m = goes_back()
    streams = m.scheduler.limits
    m.add(0, 200, 5, 5)
    m.run()
    assert (m.moved["pool"], m.moved["streams"]) == (1, 0)
    m.add(1, 10, 85, 85)
    lost, again = 0.0, 0
    while m.step() is not None:
        if m.moved["streams"]:
            break
        used = m.scheduler.accounting.used
        lost, again = lost + 0.01 * used, used
    assert not m.scheduler.limits.unified
    assert m.scheduler.limits == streams
    assert 2 * again <= lost <= 2 * again + 10
    assert 0 < m.generated[1] < 85
    m.add(2, 250, 5, 5)
    m.run()
    assert m.moved["pool"] == 2
    assert m.generated == {0: 5, 1: 85, 2: 5}


def test_what_needs_the_pool_now_and_then_keeps_it() -> None:
    def n_changes(between: int) -> int:
        m = goes_back(renewal_s=20.0)
        for id in range(0, 20, 2):
            m.add(id, 150, 2, 2)
            m.run()
            for more in range(between):
                m.add(1000 * id + 1001 + more, 20, 20, 20)
                m.run()
        return m.moved["streams"]

    assert n_changes(1) == 0
    assert n_changes(40) == 10


def test_where_the_pool_is_needed_too_soon_the_next_way_back_waits_for_twice_as_much() -> None:
    m = goes_back(renewal_s=100.0)

    def run(id: int, n_prompt: int, n: int) -> None:
        m.add(id, n_prompt, n, n)
        m.run()

    def until_back() -> int:
        n, before = 0, m.moved["streams"]
        run(next(ids), 150, 2)
        while m.moved["streams"] == before:
            run(next(ids), 20, 20)
            n += 1
        return n

    ids = iter(range(10_000))
    first, second = until_back(), until_back()
    assert 1.5 * first < second < 2.5 * first
    for _ in range(8 * first):  # now streams bring in what they have cost
        run(next(ids), 20, 20)
    assert until_back() < 1.5 * first


def test_a_pool_that_has_paid_goes_with_the_next_request() -> None:
    """What is cached would have to be computed again: that alone was in the way. With nothing to
    do it stays: its engine may have given the memory of its cells up."""
    m = goes_back(renewal_s=1.0)
    m.add(0, 150, 2, 2)
    m.run()
    m.add(1, 90, 10, 10)
    m.run()
    assert m.scheduler.idle
    assert not m.moved["streams"]
    assert not m.scheduler.has_kv_operations
    m.drop_cached()
    while m.step() is not None:
        pass
    assert not m.scheduler.has_kv_operations
    assert m.scheduler.limits.unified
    m.add(2, 20, 5, 5)
    m.run()
    assert not m.scheduler.limits.unified
    assert m.generated[2] == 5


def test_where_one_does_not_fit_the_count_begins_anew() -> None:
    """So that not every plan looks at all sequences."""
    m = goes_back()
    m.add_interactive(0, 150)
    m.run()
    n_looks, every = 0, m.scheduler.sequences.all

    def look() -> Iterator[SequenceView]:
        nonlocal n_looks
        n_looks += 1
        return every()

    m.scheduler.sequences.all = look  # type: ignore[method-assign]
    for id in range(1, 20):
        m.add(id, 20, 20, 20)
        m.run()
    assert m.scheduler.limits.unified
    assert 1 <= n_looks < 20


def test_steps_of_a_sequence_that_is_alone_pay_and_count_as_others_do() -> None:
    """However many of them are accounted at once."""
    costs = COSTS | {"pool": Linear(row_s=1.0, cell_s=0.05)}
    m = Machine(STREAMS, sharing=BESIDE, pool=POOL, cost=COSTS["streams"], costs=costs)
    m.add(0, 150, 2, 2)
    m.run()
    m.add_interactive(1, 20)
    m.run()
    m.scheduler.interactive.ask(1)
    step = m.step()
    assert step is not None
    assert step.stands > 70
    assert m.scheduler.admission.cache.n_cached
    assert not m.scheduler.has_kv_operations
    m.scheduler.advance_alone(step, 70, m.now, 0.1)
    assert not m.scheduler.admission.cache.n_cached
    m.scheduler.interactive.ask(1)
    (*_, last) = m.scheduler.plan(m.now).kv_operations  # type: ignore[union-attr]
    assert last.kind == "streams"


def test_where_a_pool_is_not_slower_it_stays() -> None:
    m = Machine(STREAMS, sharing=BESIDE, pool=POOL, cost=COSTS["streams"])
    m.add(0, 150, 2, 2)
    m.run()
    for id in range(1, 50):
        m.add(id, 20, 20, 20)
        m.run()
    assert m.scheduler.limits.unified


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 60), st.integers(0, 6), st.integers(0, 40)),
        min_size=1,
        max_size=10,
    ),
    st.booleans(),
)
def test_every_request_ends_with_its_tokens(
    requests: list[tuple[int, int, int, int]], back: bool
) -> None:
    m = goes_back() if back else machine()
    for id, (n_prompt, n, steps, alike) in enumerate(requests):
        m.add(id, n_prompt, n, n, alike=alike)
        for _ in range(steps):
            m.step()
    m.run()
    assert sorted(m.done) == list(range(len(requests)))
    assert all(m.generated[id] == m.ends[id] for id in m.done)
    long = any(n_prompt + n - 1 > 100 for n_prompt, n, _, _ in requests)
    assert m.moved["pool"] - m.moved["streams"] == m.scheduler.limits.unified
    assert (m.moved["pool"] > 0) == long
    assert back or m.scheduler.limits.unified == long
