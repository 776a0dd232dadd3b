"""RadixTree: which of many token sequences begin like a given one.

A radix tree: an edge is a run of tokens, a path from the root is a prefix of every sequence
below it. Keys are small integers (slots); a key has one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


class _Node:
    """`label`: the tokens of the edge that leads here. `keys`: whose sequence goes through here.
    `children`: by the first token of their label."""

    __slots__ = ("children", "keys", "label", "parent")

    def __init__(self, label: Tokens, keys: set[int], parent: _Node | None) -> None:
        self.label = label
        self.keys = keys
        self.parent = parent
        self.children: dict[int, _Node] = {}


class RadixTree:
    def __init__(self) -> None:
        self._root = _Node(np.zeros(0, dtype=np.int32), set(), None)
        self._ends: dict[int, _Node] = {}

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, key: int) -> bool:
        return key in self._ends

    def insert(self, key: int, tokens: Tokens) -> None:
        """`key` stands for `tokens` (int32, not changed afterwards) from now on."""
        self.remove(key)
        node, at = self._root, 0
        node.keys.add(key)
        while at < len(tokens):
            first = int(tokens[at])
            child = node.children.get(first)
            if child is None:
                node.children[first] = node = _Node(tokens[at:].copy(), {key}, node)
                break
            n = n_common(child.label, tokens[at:])
            if n < len(child.label):
                child = self._split(child, n)
            child.keys.add(key)
            node, at = child, at + n
        self._ends[key] = node

    def remove(self, key: int) -> None:
        """Forget `key`; fine when it is not there."""
        node: _Node | None = self._ends.pop(key, None)
        if node is None:
            return
        while node is not None:
            node.keys.discard(key)
            parent = node.parent
            if parent is not None:
                if not node.keys:
                    del parent.children[int(node.label[0])]
                elif len(node.children) == 1 and not self._ends_at(node):
                    self._join(node)
            node = parent

    def matches(self, tokens: Any) -> Iterator[tuple[int, int]]:
        """(key, how many tokens it has in common with `tokens`) of every key that has any, most
        first; keys with equally many in no particular order. The tree must not change meanwhile."""
        path: list[tuple[_Node, int]] = []
        node, at = self._root, 0
        while at < len(tokens):
            child = node.children.get(int(tokens[at]))
            if child is None:
                break
            n = n_common(child.label, tokens[at:])
            at += n
            path.append((child, at))
            if n < len(child.label):
                break
            node = child
        seen: set[int] = set()
        for node, depth in reversed(path):
            new = node.keys - seen if seen else node.keys
            for key in new:
                yield key, depth
            seen = node.keys

    # -- inside

    def _ends_at(self, node: _Node) -> bool:
        """Whether some sequence ends here: not all of its keys go on."""
        return sum(len(child.keys) for child in node.children.values()) < len(node.keys)

    def _split(self, node: _Node, n: int) -> _Node:
        """Cut the edge to `node` after `n` tokens; the new node there."""
        parent = node.parent
        assert parent is not None
        upper = _Node(node.label[:n], set(node.keys), parent)
        parent.children[int(upper.label[0])] = upper
        node.label = node.label[n:]
        node.parent = upper
        upper.children[int(node.label[0])] = node
        return upper

    def _join(self, node: _Node) -> None:
        """Put `node` and its only child together."""
        (child,) = node.children.values()
        child.label = np.concatenate((node.label, child.label))
        child.parent = node.parent
        assert node.parent is not None
        node.parent.children[int(child.label[0])] = child


def n_common(a: Tokens, b: Tokens) -> int:
    """How many tokens `a` and `b` begin with in common."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
