"""Requests with pinned output lengths, and workloads that are drawn.

Arrivals are a Poisson process, a gamma process (the same rate in bursts), or a closed loop: each
client asks again when it has its answer. The same seed draws the same requests.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError

Piece = tuple[int, int]
MOST_REQUESTS = 10**8


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Times in seconds.

    - arrival: with `after`, the time from the end of that request.
    - n_prompt, n_output: tokens of its prompt and its output. max_tokens: its budget, where a token
      ends it earlier; 0: `n_output`.
    - content: the (piece, tokens) of its prompt: prompts with the same first pieces share a prefix.
      answer: the piece of its output. Pieces are at least 0 and below 2**31.
    - priority, tenant, deadline (after its arrival), itl_target: see `SequenceView`.
    """

    id: int
    arrival: float
    n_prompt: int
    n_output: int
    content: tuple[Piece, ...]
    answer: int
    after: int | None = None
    max_tokens: int = 0
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    itl_target: float | None = None

    def tokens(self, n_generated: int = 0) -> npt.NDArray[np.int32]:
        """Stand-ins for the tokens of its prompt and its output so far, int32: the numbers of their
        pieces."""
        pieces = np.array([*self.content, (self.answer, n_generated)], dtype=np.int32)
        return np.repeat(pieces[:, 0], pieces[:, 1])


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a prompt or an output: `a` alone, uniform from `a` to `b`, or, with `spread`,
    log-normal around the median `a` with that standard deviation of the logarithm."""

    a: int
    b: int = 0
    spread: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """ "512", "100-1000" or "512~0.8". ArgumentError for anything else."""
        try:
            if "~" in text:
                median, spread = text.split("~")
                found = cls(int(median), spread=float(spread))
            else:
                first, _, last = text.partition("-")
                found = cls(int(first), int(last or first))
        except ValueError:
            found = cls(0)
        if found.a < 1 or not 0 <= found.spread < 10 or (not found.spread and found.b < found.a):
            raise ArgumentError("length", text, "like 512, 100-1000 or 512~0.8 (log-normal)")
        return found

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        if self.spread:
            lengths = np.rint(np.exp(rng.normal(np.log(self.a), self.spread, n)))
            drawn = np.clip(lengths, 1, 2**30).astype(np.int64)
        else:
            drawn = rng.integers(self.a, self.b, n, endpoint=True)
        found: list[int] = drawn.tolist()
        return found


def poisson(
    seed: int,
    *,
    rate: float,
    n: int = 1000,
    prompt: str = "512",
    output: str = "128",
    prefix: int = 0,
    prefixes: int = 1,
) -> list[TraceRequest]:
    """`rate`: requests a second. `n`: how many. `prompt`, `output`: see `Lengths.parse`. `prefix`:
    tokens that a prompt shares with others: one of `prefixes` prefixes."""
    return gamma(
        seed, rate=rate, cv=1.0, n=n, prompt=prompt, output=output, prefix=prefix, prefixes=prefixes
    )


def gamma(
    seed: int,
    *,
    rate: float,
    cv: float = 2.0,
    n: int = 1000,
    prompt: str = "512",
    output: str = "128",
    prefix: int = 0,
    prefixes: int = 1,
) -> list[TraceRequest]:
    """`cv`: standard deviation of the time between two requests over its mean: 1 is Poisson, more
    comes in bursts."""
    _check(n=n, prefixes=prefixes)
    if not 0 < rate < 1e9:
        raise ArgumentError("rate", rate, "requests a second, more than 0")
    if not 0 < cv < 100:
        raise ArgumentError("cv", cv, "more than 0, less than 100")
    rng = np.random.default_rng(seed)
    shape = cv**-2.0
    arrivals = np.cumsum(rng.gamma(shape, 1 / (rate * shape), n)).tolist()
    return _drawn(rng, arrivals, [None] * n, prompt, output, prefix, prefixes)


def closed(
    seed: int,
    *,
    clients: int,
    n: int = 1000,
    think: float = 0.0,
    prompt: str = "512",
    output: str = "128",
    prefix: int = 0,
    prefixes: int = 1,
) -> list[TraceRequest]:
    """`clients` ask at once, and again `think` seconds (exponential, on average) after an answer,
    until `n` requests have been made."""
    _check(n=n, clients=clients, prefixes=prefixes)
    if not 0 <= think < 1e9:
        raise ArgumentError("think", think, "seconds, at least 0")
    rng = np.random.default_rng(seed)
    pauses = rng.exponential(think, n).tolist()
    arrivals = [0.0 if i < clients else pause for i, pause in enumerate(pauses)]
    after = [None if i < clients else i - clients for i in range(n)]
    return _drawn(rng, arrivals, after, prompt, output, prefix, prefixes)


DRAWN: dict[str, Callable[..., list[TraceRequest]]] = {
    "poisson": poisson,
    "gamma": gamma,
    "closed": closed,
}


def draw(spec: str, seed: int) -> list[TraceRequest]:
    """The requests of "poisson:rate=4,n=1000,prompt=100-900", "gamma:…" or "closed:…".
    ArgumentError names the options, or what is wrong with one."""
    name, _, rest = spec.partition(":")
    make = DRAWN[name]
    parameters = inspect.signature(make, eval_str=True).parameters
    options: dict[str, object] = {}
    known = ", ".join(itertools.islice(parameters, 1, None))
    for item in rest.split(",") if rest else ():
        option, _, text = (part.strip() for part in item.partition("="))
        if option not in parameters or option == "seed":
            raise ArgumentError("trace", spec, f"no option {option!r}; options of {name}: {known}")
        try:
            options[option] = parameters[option].annotation(text)
        except ValueError:
            raise ArgumentError(option, text, f"a number, in {spec!r}") from None
    missing = [
        p.name for p in parameters.values() if p.default is p.empty and p.name not in options
    ]
    if missing[1:]:
        raise ArgumentError("trace", spec, f"needs {', '.join(missing[1:])}; options: {known}")
    return make(seed, **options)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if not 1 <= value <= MOST_REQUESTS:
            raise ArgumentError(name, value, f"from 1 to {MOST_REQUESTS}")


def _drawn(
    rng: np.random.Generator,
    arrivals: Sequence[float],
    after: Sequence[int | None],
    prompt: str,
    output: str,
    prefix: int,
    prefixes: int,
) -> list[TraceRequest]:
    n = len(arrivals)
    if not 0 <= prefix < 2**30:
        raise ArgumentError("prefix", prefix, "tokens, at least 0")
    n_prompts = Lengths.parse(prompt).draw(rng, n)
    n_outputs = Lengths.parse(output).draw(rng, n)
    begins = rng.integers(0, prefixes, n).tolist() if prefix else [0] * n
    found = []
    for i, (begin, n_prompt) in enumerate(zip(begins, n_prompts, strict=True)):
        own = prefixes + 2 * i
        shared = min(prefix, n_prompt - 1)
        content = ((begin, shared), (own, n_prompt - shared)) if shared else ((own, n_prompt),)
        found.append(
            TraceRequest(i, arrivals[i], n_prompt, n_outputs[i], content, own + 1, after=after[i])
        )
    return found
