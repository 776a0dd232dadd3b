"""What a stream gives: Token, Chunk (new text and tokens) and, at the end, Result."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token.

    `text`: what it adds to the text, "" where a character or a stop string is only partly there.
    `logprob`, `top_logprobs` (token -> log-probability, the most likely first): None unless asked
    for."""

    token: int
    text: str
    index: int
    logprob: float | None = None
    top_logprobs: dict[int, float] | None = None


class Chunk(NamedTuple):
    """What is new of a stream: the tokens from `start` up to `stop`, and their text."""

    text: str
    start: int
    stop: int


class PromptProgress(NamedTuple):
    """Of the `n_prompt` tokens of a prompt `n_computed` are computed, of which `n_cached` were in
    the prefix cache, `seconds` after it got its first slot."""

    n_prompt: int
    n_cached: int
    n_computed: int
    seconds: float


class TimesSoFar(NamedTuple):
    """What a request has taken so far: fields of `Result`, whose `e2el_s` is until now."""

    n_prompt: int
    n_cached: int
    n_generated: int
    queue_s: float | None
    ttft_s: float | None
    e2el_s: float
    n_drafted: int = 0
    n_accepted: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """A finished request.

    - tokens: all that were generated, without the end-of-generation or stop token that ended them.
      The tokens of a stop string are there, its text is not.
    - stop: the text or the token that ended it.
    - error: why, when `finish_reason` is "error".
    - ttft_s: seconds from submission to the first token, None when there was none.
    - e2el_s: seconds from submission to the end.
    - queue_s: seconds from submission to its first slot, None when it had none. n_cached: tokens of
      the prompt that were in the prefix cache then.
    - n_drafted: drafted tokens that were checked, of which `n_accepted` were right, in `n_drafts`
      steps."""

    id: int
    text: str
    tokens: list[int]
    finish_reason: FinishReason
    n_prompt: int
    n_generated: int
    ttft_s: float | None
    e2el_s: float
    stop: str | int | None = None
    error: Exception | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    queue_s: float | None = None
    n_cached: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_drafts: int = 0
