"""Where prompts are cut when that depends on their own positions alone."""

from itertools import pairwise

import pytest

from pyllamabatch.kv.grid import EARLY, last_end, next_end

STEPS = (1, 2, 16, 20, 32, 64, 128, 200)


@pytest.mark.parametrize("step", STEPS)
def test_chunks_end_where_prefixes_do(step: int) -> None:
    ends = sorted({last_end(n, step) for n in range(600)})
    assert ends[:2] == [0, min(step, EARLY[0])]
    assert [next_end(end, step) for end in ends[:-1]] == ends[1:]
    assert max(b - a for a, b in pairwise(ends)) <= step
    for n in range(600):
        assert last_end(n, step) <= n < next_end(n, step)
        assert next_end(n, step) == next_end(last_end(n, step), step)


def test_a_short_system_prompt_is_shared() -> None:
    assert [last_end(n, 128) for n in (15, 16, 27, 60, 64, 127, 128, 300)] == [
        0, 16, 24, 32, 64, 64, 128, 256,
    ]  # fmt: skip
