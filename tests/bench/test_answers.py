"""bench/answers.py: where two answers part, and how near their tokens are there."""

from math import inf

import pytest

from bench.answers import Answer, chats, completions, parting

TOPS = [{1: -0.1, 2: -3.0}, {3: -0.7, 4: -0.71}]


@pytest.mark.parametrize(
    ("mine", "its", "expected"),
    [
        (Answer([1, 3], TOPS), Answer([1, 4], TOPS), (1, 0.01)),
        (Answer([1, 3], TOPS), Answer([1, 4], [TOPS[0], {3: -0.5, 4: -0.4}]), (1, 0.1)),
        (Answer([2, 3], TOPS), Answer([1, 4], TOPS), (0, 2.9)),
        (Answer([1, 3], TOPS[:1]), Answer([1, 4], TOPS), (1, 0.01)),  # it ended with 3
        (Answer([1, 9], TOPS), Answer([1, 4], TOPS), (1, inf)),
        (Answer([1], TOPS), Answer([1, 4], TOPS), (1, inf)),
    ],
    ids=["a near tie", "the wider side", "far apart", "ended", "unlikely", "the other's prefix"],
)
def test_where_they_part(mine: Answer, its: Answer, expected: tuple[int, float]) -> None:
    at, gap = parting(mine, its)
    assert at == expected[0]
    assert gap == pytest.approx(expected[1])


def test_fifty_requests_of_each_kind() -> None:
    texts, talks = list(completions()), list(chats())
    assert len(set(texts)) == len(texts) == len(talks) == 50
    assert {len(talk) for talk in talks} == {1, 2, 3, 4}
    assert max(map(len, texts)) > 2000
