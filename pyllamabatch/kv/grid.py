"""Where prompts are cut when it may depend on nothing but positions of their own.

Chunks end at multiples of a step, and the first ones at `EARLY` too: the turns that a chat template
begins with are no longer than these, and with them short prompts have a prefix to share."""

EARLY = (16, 24, 32, 64)
"""More of them would save rows of prompts that share a little more, and cost each prompt a call."""


def last_end(n: int, step: int) -> int:
    """Of the first `n` positions those up to where a chunk ends; with a step of 1, all."""
    if n >= step:
        return n - n % step
    return max((end for end in EARLY if end <= n and end < step), default=0)


def next_end(n: int, step: int) -> int:
    """Where the chunk ends that position `n` is in."""
    if n >= step:
        return n - n % step + step
    return next((end for end in EARLY if n < end < step), step)
