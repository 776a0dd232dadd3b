"""Which replica gets a request: the decisions, on replicas that say what they are told to."""

from collections.abc import Callable

import numpy as np
import pytest

from pyllamabatch.errors import ArgumentError
from pyllamabatch.kv.radix_tree import Tokens
from pyllamabatch.scheduler.router import ROUTERS, PrefixAffinity, ReplicaView, make_router


def prompt(*pieces: tuple[int, int]) -> Callable[[], Tokens]:
    tokens = np.repeat([number for number, _ in pieces], [n for _, n in pieces]).astype(np.int32)
    return lambda: tokens


A, B = prompt((1, 40), (2, 5)), prompt((7, 40), (8, 5))
LIKE_A, LIKE_B = prompt((1, 40), (3, 9)), prompt((7, 40), (3, 9))


def test_turns_and_counts() -> None:
    three = {name: ReplicaView() for name in "abc"}
    turns = make_router("round-robin")
    assert [turns.choose(A, three) for _ in range(4)] == ["a", "b", "c", "a"]
    counts = make_router("least-outstanding")
    three |= {"a": ReplicaView(2), "b": ReplicaView(1), "c": ReplicaView(1)}
    assert counts.choose(A, three) == "b"
    with pytest.raises(ArgumentError, match="one of round-robin, least-outstanding, prefix-aff"):
        make_router("nearest")


@pytest.mark.parametrize("name", ROUTERS)
def test_one_replica_gets_everything(name: str) -> None:
    router, only = make_router(name), {4: ReplicaView(n_open=100, wait=9, row_seconds=1)}
    assert {router.choose(one, only) for one in (A, B, LIKE_A)} == {4}


def test_a_prefix_goes_where_it_was() -> None:
    router, two = PrefixAffinity(), {"a": ReplicaView(), "b": ReplicaView(n_open=1)}
    assert router.choose(A, two) == "a"
    two["a"] = ReplicaView(3)
    assert router.choose(B, two) == "b"
    assert router.choose(LIKE_A, two) == "a"
    two = {"a": ReplicaView(0), "b": ReplicaView(3)}
    assert router.choose(LIKE_B, two) == "b"
    short = prompt((1, 10), (4, 9))  # has too little in common with A
    two = {"a": ReplicaView(4), "b": ReplicaView(3)}
    assert router.choose(short, two) == "b"


def test_load_bounds_affinity() -> None:
    router, two = PrefixAffinity(), {"a": ReplicaView(), "b": ReplicaView()}
    assert router.choose(A, two) == "a"
    two["a"] = ReplicaView(8)
    assert router.choose(LIKE_A, two) == "a"
    two["a"] = ReplicaView(9)
    assert router.choose(LIKE_A, two) == "b"
    assert router.choose(A, two) in "ab"  # both have it now
    # the wait counts where a replica says what a row costs: 40 rows are saved, 0.4 s
    router, two = PrefixAffinity(), {"a": ReplicaView(), "b": ReplicaView()}
    router.choose(A, two)
    two["a"] = ReplicaView(n_open=1, wait=1.1, row_seconds=0.01)
    assert router.choose(LIKE_A, two) == "a"
    two["a"] = ReplicaView(n_open=1, wait=1.5, row_seconds=0.01)  # and now 49, the whole prompt
    assert router.choose(LIKE_A, two) == "b"


def test_prefixes_are_spread_over_replicas_that_are_equally_busy() -> None:
    router, two = PrefixAffinity(), {"a": ReplicaView(), "b": ReplicaView()}
    assert router.choose(prompt((1, 90)), two) == "a"
    assert router.choose(prompt((2, 40)), two) == "b"
    assert router.choose(prompt((1, 90), (3, 9)), two) == "a"
    assert [router.choose(prompt((i, 30)), two) for i in (4, 5, 6)] == ["b", "b", "a"]


def test_who_has_got_less_that_was_new_is_less_busy() -> None:
    router, two = PrefixAffinity(), {"a": ReplicaView(), "b": ReplicaView()}
    assert router.choose(prompt((1, 90)), two) == "a"
    assert router.choose(prompt((2, 400)), two) == "b"
    two = {"a": ReplicaView(1), "b": ReplicaView(1)}
    for i in (3, 4, 5):  # they begin as what is there
        assert router.choose(prompt((1, 90), (i, 20)), two) == "a"
        two["a"] = ReplicaView(two["a"].n_open + 1)
    assert router.choose(prompt((6, 200)), two) == "a"  # 150 elements and four requests, not 400
    two["b"] = ReplicaView()
    assert router.choose(prompt((7, 20)), two) == "b"  # which has nothing to do
    two = {"a": ReplicaView(10), "b": ReplicaView(1)}
    assert router.choose(prompt((8, 40)), two) == "b"  # too many requests


def test_a_full_replica_gets_no_prompts_that_another_has_time_for() -> None:
    router = PrefixAffinity()
    idle = ReplicaView(row_seconds=1e-4)
    assert router.choose(prompt((1, 4000)), {"a": idle, "b": ReplicaView(9)}) == "a"
    full = ReplicaView(8, wait=20, row_seconds=1e-4)  # has got fewer elements, all of which decode
    for i in range(8):
        two = {"a": ReplicaView(i, row_seconds=1e-4), "b": full}
        assert router.choose(prompt((2 + i, 1500)), two) == "a"
    # 100 rows take 10 ms: three times as long is no wait
    two = {"a": ReplicaView(1, 0, 1e-4), "b": ReplicaView(1, 0.031, 1e-4)}
    assert router.choose(prompt((11, 100)), two) == "a"
    two["b"] = ReplicaView(1, 0.029, 1e-4)
    assert router.choose(prompt((12, 100)), two) == "b"


def test_too_many_requests_where_a_prefix_is_the_next_one_that_has_it() -> None:
    router = PrefixAffinity()
    for name in ("a", "b"):
        assert router.choose(A, {name: ReplicaView()}) == name
    three = {"a": ReplicaView(9), "b": ReplicaView(3), "c": ReplicaView()}
    assert router.choose(LIKE_A, three) == "b"


def test_replicas_come_and_go() -> None:
    router = PrefixAffinity()
    assert router.choose(A, {"a": ReplicaView()}) == "a"
    assert router.choose(LIKE_A, {"b": ReplicaView()}) == "b"
    assert router.choose(LIKE_A, {"c": ReplicaView(), "b": ReplicaView(n_open=2)}) == "b"


def test_a_key_brings_together_what_has_no_prefix_in_common() -> None:
    router, two = PrefixAffinity(), {"a": ReplicaView(n_open=1), "b": ReplicaView()}
    assert router.choose(A, two, "user 1") == "b"
    two["a"] = ReplicaView(0)
    two["b"] = ReplicaView(2)
    assert router.choose(B, two, "user 1") == "b"
    assert router.choose(prompt((5, 30)), two, "user 2") == "a"
    two["b"] = ReplicaView(9)
    assert router.choose(prompt((6, 30)), two, "user 1") == "a"


def test_memory_and_reach_are_bounded() -> None:
    router = PrefixAffinity(memory=2, reach=32)
    two = {"a": ReplicaView(), "b": ReplicaView()}
    assert router.choose(A, two, "k") == "a"
    two["a"] = ReplicaView(2)
    for i in range(10, 13):
        assert router.choose(prompt((i, 50)), two, str(i)) == "b"
    assert router.choose(LIKE_A, two, "k") == "b"  # forgotten
    assert len(router._tree) == len(router._went) == len(router._keys) == 2
    assert router.choose(prompt((99, 33)), two) == "b"
    found = max(n for _, n in router._tree.matches(prompt((99, 33))()))
    assert found == 32
    for i in (100, 101):
        router.choose(prompt((i, 9)), {"c": ReplicaView()})
    assert list(router._held) == ["c"]  # the others are forgotten


def test_bytes_of_a_text() -> None:
    router, two = PrefixAffinity(unit=4), {"a": ReplicaView(), "b": ReplicaView(n_open=1)}
    assert router.choose(prompt((1, 63), (2, 5)), two) == "a"
    two["a"] = ReplicaView(2)
    assert router.choose(prompt((1, 63), (3, 5)), two) == "b"  # under 64 bytes in common
    assert router.choose(prompt((1, 63), (3, 5), (4, 90)), two) == "b"
