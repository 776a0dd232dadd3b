"""Drafters: what may come next in a text, for a step that checks several tokens of a sequence.

`Engine(speculate=...)` takes a drafter or its name. Three of them are native, and cost no Python in
a step: `Ngram`, `Draft` and `Mtp`. One of your own is an object with a method `draft`, see
`Drafter`:

    class Again:
        "What followed the last token where it was there before."

        def draft(self, wanted):
            return [self.after(one.tokens.tolist())[: one.n] for one in wanted]

        def after(self, tokens):
            before = [i for i, token in enumerate(tokens[:-1]) if token == tokens[-1]]
            return tokens[before[-1] + 1 :] if before else []

    engine = Engine(model, speculate=Again())

Whatever a drafter says, answers are the same as without: a drafted token stays where it is the one
that is sampled."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..errors import ArgumentError, integer
from ..llama.host import PathLike
from ..llama.limits import MAX_CTX
from ..llama.model import Model
from ..llama.vocab import TokenArray
from ..scheduler.registry import Registry
from ..step.stepper_options import CORPUS_LIMIT

GROUP = "pyllamabatch.drafters"


class Wanted(NamedTuple):
    """A sequence that may have drafts in the next step.

    - id: of its request, the same from its first step to its last one.
    - tokens: all that it knows, of which the first `n_prompt` were given: int32, read-only.
    - n: drafted tokens at most."""

    id: int
    tokens: TokenArray
    n_prompt: int
    n: int


class Drafter(Protocol):
    """One of your own. The engine's thread calls it between two steps, and the step waits for it:
    what drafts gain has to pay for its time as well. Where that is not enough, it is seldom asked.
    What it raises is logged, and it is not asked again.

    With a method `ended(id)` it hears that a request is over."""

    def draft(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[int]]:
        """For each of these, in their order, up to `n` tokens that may come next; none: []."""
        ...


@dataclass(frozen=True, slots=True)
class Ngram:
    """Native: what followed the same tokens earlier in the sequence's own text. It costs next to
    nothing, and is often right where an answer repeats its prompt. In an answer of more than 8192
    tokens it looks so far back as its prompt is long, and 4096 tokens further.

    - corpus: so many tokens of requests that have ended, prompts and answers, stay for that,
      too, the last ones; a longer match there wins. Some 24 bytes each. Answers stay what they
      are; but how soon they come may show that another one has asked for the same. ArgumentError
      outside of 0 to CORPUS_LIMIT."""

    corpus: int = 0

    def __post_init__(self) -> None:
        integer("corpus", self.corpus, 0, CORPUS_LIMIT)

    def __str__(self) -> str:
        return f"ngram:corpus={self.corpus}" if self.corpus else "ngram"


@dataclass(frozen=True, slots=True)
class Draft:
    """Native: a second, smaller model with the same vocabulary drafts for all sequences in the same
    calls; its memory follows what the steps keep.

    - model: a GGUF file, which is loaded beside the engine's model, or a `Model`, which stays the
      caller's. "": the draft that ships with the embedded model.
    - n_ctx: its KV cells; 0: as many as the engine has.

    ArgumentError for another kind of model, and outside of 0 to MAX_CTX."""

    model: Model | PathLike = ""
    n_ctx: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.model, Model | str | os.PathLike):
            raise ArgumentError("Draft.model", self.model, "must be a GGUF file or a Model")
        integer("Draft.n_ctx", self.n_ctx, 0, MAX_CTX)

    def __str__(self) -> str:
        return f"draft:{self.model}" if self.model else "draft"


@dataclass(frozen=True, slots=True)
class Mtp:
    """Native: the layer of the engine's own model that predicts further tokens (MTP, NextN), where
    it has one; the first one of several. It drafts for all sequences in the same calls. The model
    is loaded with `Model(path, load_mtp=True)`.

    - n_ctx: its KV cells; 0: as many as the engine has. ArgumentError outside of 0 to MAX_CTX."""

    n_ctx: int = 0

    def __post_init__(self) -> None:
        integer("Mtp.n_ctx", self.n_ctx, 0, MAX_CTX)

    def __str__(self) -> str:
        return "mtp"


AnyDrafter = Ngram | Draft | Mtp | Drafter


def check_drafter(drafter: Any, given: object) -> AnyDrafter:
    """`drafter`, which `given` names; ArgumentError when it is none."""
    if isinstance(drafter, Ngram | Draft | Mtp):
        return drafter
    if isinstance(drafter, type) or not callable(getattr(drafter, "draft", None)):
        limit = (
            'must be "ngram", "draft:FILE", "mtp", a Model, or have draft(wanted), as Drafter has'
        )
        raise ArgumentError("speculate", given, limit)
    made: Drafter = drafter
    return made


SHIPPED: dict[str, Callable[..., AnyDrafter]] = {"ngram": Ngram, "draft": Draft, "mtp": Mtp}

_DRAFTERS = Registry("speculate", GROUP, SHIPPED, check_drafter)


def make_drafter(spec: str) -> AnyDrafter:
    """The drafter that `spec` names: "ngram", "ngram:corpus=100000", "draft" for the embedded
    model's, "draft:FILE", or as `Registry.make` reads it: "FILE.py:NAME", "MODULE:NAME" or the name
    of an entry point in the group `pyllamabatch.drafters`. ArgumentError."""
    name, colon, file = spec.partition(":")
    if name == "draft" and colon:
        if not file:
            raise ArgumentError("speculate", spec, 'draft:FILE, or "draft" for the embedded model')
        return Draft(file)
    return _DRAFTERS.make(spec)


def needs_mtp(name: str | None) -> bool:
    """Whether the drafter of this name drafts from layers that the model is to be loaded with."""
    return (name or "").partition(":")[0] == "mtp"


def drafter_of(given: Any) -> AnyDrafter | None:
    """A drafter, also by its name or its model. ArgumentError for what is none."""
    if given is None:
        return None
    if isinstance(given, Model):
        return Draft(given)
    return make_drafter(given) if isinstance(given, str) else check_drafter(given, given)
