"""Log-probabilities, usage and timings as the interfaces write them."""

import codecs
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from ..engine.results import PromptProgress, Result, TimesSoFar, Token
from .bodies import StreamOptions

PieceOf = Callable[[int], bytes]


def prompt_usage(results: Sequence[Result]) -> tuple[int, int]:
    """Tokens of a prompt with these results, and how many of them were cached, as the first says:
    the others share what it computed. None of a prompt that was not computed."""
    if all(map(came_too_late, results)):
        return 0, 0
    return results[0].n_prompt, results[0].n_cached


def usage(results: Sequence[Result], n_samples: int) -> dict[str, Any]:
    """OpenAI's counts, of prompts with `n_samples` results each."""
    firsts = range(0, len(results), n_samples)
    prompts = [prompt_usage(results[i : i + n_samples]) for i in firsts]
    n_prompt, n_cached = map(sum, zip(*prompts, strict=True))
    n_generated = sum(result.n_generated for result in results)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


def stream_usage(options: StreamOptions, n_prompt: int, n_generated: int) -> dict[str, Any]:
    """What an event of a stream says of usage before the last one."""
    if not options.include_usage:
        return {}
    if not options.continuous_usage_stats:
        return {"usage": None}
    total = n_prompt + n_generated
    counts = {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": total}
    return {"usage": counts}


def finish_reason(result: Result) -> str:
    """OpenAI's word. A deadline cuts a text off as a budget does."""
    return "stop" if result.finish_reason == "stop" else "length"


def came_too_late(result: Result) -> bool:
    """Its time was over before its prompt was computed."""
    return result.finish_reason == "deadline" and result.ttft_s is None


def prompt_progress(progress: PromptProgress) -> dict[str, Any]:
    """llama-server's."""
    return {
        "total": progress.n_prompt,
        "cache": progress.n_cached,
        "processed": progress.n_computed,
        "time_ms": int(1e3 * progress.seconds),
    }


def prompt_timings(progress: PromptProgress) -> dict[str, Any]:
    """`timings` before the first token."""
    seconds = progress.seconds
    return timings(TimesSoFar(progress.n_computed, progress.n_cached, 0, 0.0, None, seconds))


def timings(result: Result | TimesSoFar) -> dict[str, Any]:
    """llama-server's `timings`, in ms. The prompt ends with the first token; 0 tokens of one that
    was not computed to its end. Drafts are told of where there were any."""
    first = result.e2el_s if result.ttft_s is None else result.ttft_s
    queue = first if result.queue_s is None else result.queue_s
    prompt_ms = 1e3 * (first - queue)
    predicted_ms = 1e3 * (result.e2el_s - first)
    n_prompt, n = result.n_prompt - result.n_cached, result.n_generated
    if isinstance(result, Result) and came_too_late(result):
        n_prompt = 0
    drafts = {"draft_n": result.n_drafted, "draft_n_accepted": result.n_accepted}
    return (drafts if result.n_drafted else {}) | {
        "cache_n": result.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(1, n_prompt),
        "prompt_per_second": 1e3 * n_prompt / max(prompt_ms, 1e-6),
        "predicted_n": n,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / (n - 1) if n > 1 else 0.0,
        "predicted_per_second": 1e3 * max(0, n - 1) / max(predicted_ms, 1e-6),
        "queue_ms": 1e3 * queue,
    }


def tokens_of(result: Result) -> list[Token]:
    """The tokens of a result with their log-probabilities; `text` is not filled in."""
    n = len(result.tokens)
    logprobs: Sequence[float | None] = result.logprobs or [None] * n
    tops: Sequence[dict[int, float] | None] = result.top_logprobs or [None] * n
    each = zip(result.tokens, logprobs, tops, strict=False)
    return [Token(token, "", i, logprob, top) for i, (token, logprob, top) in enumerate(each)]


def chat_logprobs(tokens: Sequence[Token], piece: PieceOf) -> list[dict[str, Any]]:
    """Of a chat, and of llama-server's completions: an object for each token."""
    return [
        {
            **_one(token.token, token.logprob, piece),
            "top_logprobs": [
                _one(other, logprob, piece) for other, logprob in (token.top_logprobs or {}).items()
            ],
        }
        for token in tokens
    ]


def _one(token: int, logprob: float | None, piece: PieceOf) -> dict[str, Any]:
    data = piece(token)
    text = data.decode("utf-8", "replace")
    return {"id": token, "token": text, "bytes": list(data), "logprob": logprob}


def n_within(text: str, tokens: Sequence[int], piece: PieceOf) -> int:
    """How many of the tokens a part of their text has; 0 where it is not one piece of it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(piece(token)) for token in tokens]
    begin, ends = "".join(texts).find(text), list(accumulate(map(len, texts)))
    if begin < 0 or not text:
        return 0
    return bisect_left(ends, begin + len(text)) + 1 - bisect_right(ends, begin)


class TextLogprobs:
    """Of `/v1/completions`: a column for each property. Offsets, in characters of the text, go on
    from call to call. Tokens of one character have the same."""

    def __init__(self, piece: PieceOf) -> None:
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def __call__(self, tokens: Sequence[Token]) -> dict[str, Any]:
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._piece(token.token)))
        return {
            "tokens": [self._text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float | None]:
        """With the sampled one, also where it is none of these."""
        if token.top_logprobs is None:
            return {}
        top = {**token.top_logprobs, token.token: token.logprob}
        return {self._text(t): logprob for t, logprob in top.items()}

    def _text(self, token: int) -> str:
        return self._piece(token).decode("utf-8", "replace")
