"""Requests with pinned output lengths, and workloads that are drawn.

Arrivals are a Poisson process, a gamma process (the same rate in bursts), or a closed loop: each
client asks again when it has its answer. The same seed draws the same requests."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any, get_type_hints

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import ArgumentError, integer, number

Piece = tuple[int, int]
LONGEST = 2**30  # tokens of a prompt, or of an output
LATEST = 1e12  # seconds
_INTEGERS = {
    "id": (0, 2**62),
    "n_prompt": (1, LONGEST),
    "n_output": (1, LONGEST),
    "max_tokens": (0, LONGEST),
}


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. Times in seconds. ArgumentError for what can be none.

    - arrival: with `after`, the time from the end of that request.
    - n_prompt, n_output: tokens of its prompt and its output. max_tokens: its budget, where a token
      ends it earlier; 0: `n_output`.
    - content: the (piece, tokens) of its prompt: prompts with the same first pieces share a prefix.
      answer: the piece of its output. Pieces are at least 0 and below 2**31.
    - priority, tenant, deadline (after its arrival), ttft_target, itl_target: see `SequenceView`.
    - acceptance: the probability that the next token of a draft is right; None: it has no drafts.
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
    ttft_target: float | None = None
    itl_target: float | None = None
    acceptance: float | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():  # NumPy's become Python's, as JSON needs them
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        if sum([n for _, n in self.content]) != self.n_prompt:
            raise ArgumentError("content", self.content, f"must have {self.n_prompt} tokens in all")
        if 0 < self.max_tokens < self.n_output:
            raise ArgumentError("max_tokens", self.max_tokens, f"0, or {self.n_output} at least")
        object.__setattr__(self, "arrival", number("arrival", self.arrival, 0, LATEST))
        for name in ("deadline", "ttft_target", "itl_target"):
            if (seconds := getattr(self, name)) is not None:
                number(name, seconds, 0)
        if self.acceptance is not None:
            number("acceptance", self.acceptance, 0, 1)

    def tokens(self, n_generated: int = 0) -> npt.NDArray[np.int32]:
        """Stand-ins for the tokens of its prompt and its output so far, int32: the numbers of their
        pieces."""
        pieces = np.array([*self.content, (self.answer, n_generated)], dtype=np.int32)
        return np.repeat(pieces[:, 0], pieces[:, 1])


def draw_lengths(text: str, rng: np.random.Generator, n: int, name: str = "length") -> list[int]:
    """n numbers of tokens. "512": all the same; "100-1000": uniform; "512~0.8": log-normal around
    this median, with that standard deviation of the logarithm. ArgumentError for anything else,
    by this name."""
    a, b, spread = 0, 0, 0.0
    try:
        if "~" in text:
            first, last = text.split("~")
            a, spread = int(first), float(last)
        else:
            first, _, last = text.partition("-")
            a, b = int(first), int(last or first)
    except ValueError:
        pass
    if not 1 <= a <= LONGEST or not 0 <= spread < 10 or (not spread and not a <= b <= LONGEST):
        raise ArgumentError(name, text, "like 512, 100-1000 or 512~0.8 (log-normal)")
    if spread:
        lengths = np.rint(np.exp(rng.normal(np.log(a), spread, n)))
        drawn = np.clip(lengths, 1, LONGEST).astype(np.int64)
    else:
        drawn = rng.integers(a, b, n, endpoint=True)
    found: list[int] = drawn.tolist()
    return found


def draw_acceptance(
    requests: Sequence[TraceRequest], how: str | Sequence[float], seed: int
) -> list[TraceRequest]:
    """These requests, with an `acceptance` where they have none. "0.7": all the same; "0.3-0.9":
    uniform; or one of these. ArgumentError for another text."""
    rng, n = np.random.default_rng([seed, 1]), len(requests)
    if isinstance(how, str):
        first, _, last = how.partition("-")
        try:
            low, high = float(first), float(last or first)
        except ValueError:
            low, high = 1.0, 0.0
        if not 0 <= low <= high <= 1:
            raise ArgumentError(
                "acceptance",
                how,
                "a share from 0 to 1, like 0.7 or 0.3-0.9, or a file, and none has this name",
            )
        drawn = rng.uniform(low, high, n).tolist()
    else:
        drawn = rng.choice(how, n).tolist()
    return [
        replace(request, acceptance=share) if request.acceptance is None else request
        for request, share in zip(requests, drawn, strict=True)
    ]


def acceptance_of(n_drafts: int, n_drafted: int, n_accepted: int) -> float | None:
    """The acceptance of a request whose `n_drafts` drafts had `n_drafted` tokens, of which
    `n_accepted` were right (`Result`): that with which drafts of their mean length have as many
    right ones on average. None without drafts."""
    if n_drafts < 1 or n_drafted < 1:
        return None
    length, each = n_drafted / n_drafts, n_accepted / n_drafts
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        whole = int(length)
        expected = sum(middle**i for i in range(1, whole + 1))
        expected += (length - whole) * middle ** (whole + 1)
        low, high = (middle, high) if expected < each else (low, middle)
    return (low + high) / 2


_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("n", "prefixes", "clients"), (1, 10**8)),
    "prefix": (0, LONGEST),
    "rate": (1e-9, 1e9),
    "cv": (0.01, 100),
    "think": (0, 1e9),
}


@dataclass(frozen=True, kw_only=True)
class DrawnWorkload:
    """n: requests. prompt, output: see `draw_lengths`. prefix: tokens that a prompt shares with
    others: one of `prefixes` prefixes."""

    n: int = 1000
    prompt: str = "512"
    output: str = "128"
    prefix: int = 0
    prefixes: int = 1

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name, low)
            if not low <= value <= high:
                raise ArgumentError(name, value, f"from {low:g} to {high:g}")

    def arrivals(self, rng: np.random.Generator) -> tuple[Sequence[float], Sequence[int | None]]:
        """`arrival` and `after` of each request."""
        raise NotImplementedError

    def draw(self, seed: int) -> list[TraceRequest]:
        rng = np.random.default_rng(seed)
        arrivals, after = self.arrivals(rng)
        n_prompts = draw_lengths(self.prompt, rng, self.n, "prompt")
        n_outputs = draw_lengths(self.output, rng, self.n, "output")
        begins = rng.integers(0, self.prefixes, self.n).tolist() if self.prefix else [0] * self.n
        found = []
        for i, (begin, n_prompt) in enumerate(zip(begins, n_prompts, strict=True)):
            own = self.prefixes + 2 * i
            shared = min(self.prefix, n_prompt - 1)
            content = ((begin, shared), (own, n_prompt - shared)) if shared else ((own, n_prompt),)
            found.append(
                TraceRequest(i, arrivals[i], n_prompt, n_outputs[i], content, own + 1, after[i])
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Gamma(DrawnWorkload):
    """rate: requests a second. cv: standard deviation of the time between two requests over its
    mean: 1 is Poisson, more comes in bursts."""

    rate: float
    cv: float = 2.0

    def arrivals(self, rng: np.random.Generator) -> tuple[Sequence[float], Sequence[int | None]]:
        shape = self.cv**-2.0
        gaps = rng.gamma(shape, 1 / (self.rate * shape), self.n)
        return np.cumsum(gaps).tolist(), [None] * self.n


@dataclass(frozen=True, kw_only=True)
class Poisson(Gamma):
    cv: float = field(default=1.0, init=False)


@dataclass(frozen=True, kw_only=True)
class Closed(DrawnWorkload):
    """`clients` ask at once, and again `think` seconds (exponential, on average) after an answer,
    until `n` requests have been made."""

    clients: int
    think: float = 0.0

    def arrivals(self, rng: np.random.Generator) -> tuple[Sequence[float], Sequence[int | None]]:
        pauses = rng.exponential(self.think, self.n).tolist()
        first = min(self.clients, self.n)
        return [0.0] * first + pauses[first:], [None] * first + list(range(self.n - first))


DRAWN: dict[str, type[DrawnWorkload]] = {"poisson": Poisson, "gamma": Gamma, "closed": Closed}


def draw(spec: str, seed: int) -> list[TraceRequest]:
    """The requests of "poisson:rate=4,n=1000,prompt=100-900", "gamma:…" or "closed:…".
    ArgumentError names the options, or what is wrong with one."""
    name, _, rest = spec.partition(":")
    if name not in DRAWN:
        raise ArgumentError("trace", spec, f"one of {', '.join(DRAWN)}, as in poisson:rate=4")
    kind = DRAWN[name]
    options = {f.name: f for f in fields(kind) if f.init}
    types, known = get_type_hints(kind), ", ".join(options)
    given: dict[str, Any] = {}
    for item in rest.split(",") if rest else ():
        option, _, text = (part.strip() for part in item.partition("="))
        if option not in options:
            raise ArgumentError("trace", spec, f"no option {option!r}; options of {name}: {known}")
        try:
            given[option] = types[option](text)
        except ValueError:
            raise ArgumentError(option, text, f"a number, in {spec!r}") from None
    missing = [f.name for f in options.values() if f.default is MISSING and f.name not in given]
    if missing:
        raise ArgumentError("trace", spec, f"needs {', '.join(missing)}; options: {known}")
    return kind(**given).draw(seed)
