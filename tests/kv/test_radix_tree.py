"""RadixTree against a list of all sequences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch.kv.radix_tree import RadixTree, Tokens, n_common


def array(tokens: list[int]) -> Tokens:
    return np.array(tokens, dtype=np.int32)


def common(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


@pytest.mark.parametrize(
    ("a", "b", "n"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([1], [1], 1)]
)
def test_n_common(a: list[int], b: list[int], n: int) -> None:
    assert n_common(array(a), array(b)) == n


words = st.lists(st.integers(0, 2), max_size=9)


def size(tree: RadixTree) -> int:
    """Nodes below the root; every invariant of the structure is checked on the way."""
    total, nodes = 0, [tree._root]
    while nodes:
        node = nodes.pop()
        for first, child in node.children.items():
            assert int(child.label[0]) == first
            assert child.parent is node
            assert child.keys
            assert child.keys <= node.keys
            total += 1
            nodes.append(child)
    return total


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 7), st.none() | words), max_size=40), words)
def test_it_finds_what_a_search_of_all_finds(
    changes: list[tuple[int, list[int] | None]], query: list[int]
) -> None:
    tree, known = RadixTree(), dict[int, list[int]]()
    for key, tokens in changes:
        if tokens is None:
            tree.remove(key)
            known.pop(key, None)
        else:
            tree.insert(key, array(tokens))
            known[key] = tokens
        for text in (query, *known.values()):
            found = list(tree.matches(array(text)))
            expected = {k: common(text, t) for k, t in known.items() if common(text, t)}
            assert dict(found) == expected
            assert len(found) == len(expected)
            assert [n for _, n in found] == sorted(expected.values(), reverse=True)
        assert [key for key in range(8) if key in tree] == sorted(known)
        assert len(tree) == len(known)
        distinct = {tuple(tokens) for tokens in known.values() if tokens}
        assert size(tree) <= max(0, 2 * len(distinct) - 1)
