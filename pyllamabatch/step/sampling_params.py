"""SamplingParams: how one request wants its tokens chosen, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pyllamabatch.errors import ArgumentError, flag, integer, number, unknown_keyword
from pyllamabatch.llama.grammar import Grammar
from pyllamabatch.step.json_schema import Schema, schema_text

INT32_MAX = 2**31 - 1
FLOAT32_MAX = 3e38  # about: the native side computes in float32
SEED_MAX = 2**32 - 2  # 2**32 - 1 is libllama's "draw one at random"
LOGPROBS_MAX = 1024
GRAMMAR_BYTES_MAX = 1 << 20
TEMPERATURE_MIN = 1e-4  # smaller ones overflow float32 on their way to what 0 gives exactly
PENALTY_MAX = 1e6


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What a request asks of sampling. Raises `ArgumentError` for a value out of its range.

    The order is llama.cpp's default one: logit bias, penalties, top-k, typical, top-p, min-p,
    temperature, draw. `temperature=0` is greedy: the most likely token (the smallest id among
    equals) after bias, penalties and grammar; the truncations have no say then.

    - max_tokens: tokens to generate. 0: an engine computes the prompt, which its prefix cache has
      afterwards, and generates nothing. A recurrent or hybrid model can go on from there only with
      a longer prompt: the same one is computed again. min_tokens: as many are generated before an
      end-of-generation token or a stop token id may be chosen, and stop strings are looked for
      behind them. A grammar that allows nothing but the end ends the text before.
    - top_k <= 0, top_p = 1, min_p = 0, typical_p = 1, repeat_penalty = 1, frequency_penalty = 0
      and presence_penalty = 0 are each "off".
    - penalty_last_n: how many tokens back the penalties look, prompt included; -1 is all of them.
    - logit_bias: token id -> what is added to its logit; -inf excludes the token.
    - seed: 0 to 2**32 - 2; None draws one at random.
    - grammar: GBNF whose start rule is `root`, or a `Grammar`, which may begin later. json_schema:
      a JSON schema instead, as a mapping or as JSON text (it is stored as text). The generated
      text is JSON that it allows, see `pyllamabatch.step.json_schema`.
    - stop: texts that end the request (looked for in the generated text by the engine).
      stop_token_ids: token ids that do.
    - preserved_tokens: special tokens that are written out in the text; of others it has nothing.
    - ignore_eog: end-of-generation tokens are not chosen, unless a grammar allows nothing else.
    - logprobs: None is off, 0 gives the chosen token's log-probability, n also the n most likely
      tokens'. They are a log-softmax of the raw logits over the whole vocabulary, before bias,
      penalties, grammar and truncation."""

    max_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    grammar: str | Grammar | None = None
    json_schema: Schema | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eog: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    preserved_tokens: Sequence[int] = ()

    def __new__(cls, **values: object) -> SamplingParams:
        for name, value in values.items():
            if name not in cls.__dataclass_fields__:
                raise unknown_keyword(name, value, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._integer("max_tokens", 0, INT32_MAX)
        self._integer("min_tokens", 0, self.max_tokens)
        self._number("temperature", 0.0, FLOAT32_MAX)
        if 0 < self.temperature < TEMPERATURE_MIN:
            limit = f"0 (greedy) or at least {TEMPERATURE_MIN}"
            raise ArgumentError("temperature", self.temperature, limit)
        self._integer("top_k", -1, INT32_MAX)
        self._number("top_p", 0.0, 1.0)
        self._number("min_p", 0.0, 1.0)
        self._number("typical_p", 0.0, 1.0)
        self._number("repeat_penalty", 1 / PENALTY_MAX, PENALTY_MAX)
        self._number("frequency_penalty", -PENALTY_MAX, PENALTY_MAX)
        self._number("presence_penalty", -PENALTY_MAX, PENALTY_MAX)
        self._integer("penalty_last_n", -1, INT32_MAX)
        self._freeze_logit_bias()
        if self.seed is not None:
            self._integer("seed", 0, SEED_MAX)
        self._check_grammar()
        if self.json_schema is not None:
            if self.grammar is not None:
                raise ArgumentError("json_schema", self.json_schema, "grammar is given already")
            self._set("json_schema", schema_text(self.json_schema))
        self._freeze_stops()
        flag("ignore_eog", self.ignore_eog)
        if self.logprobs is not None:
            self._integer("logprobs", 0, LOGPROBS_MAX)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def with_seed(self, seed: int) -> SamplingParams:
        """These parameters with another seed, taken from 0 on again behind the largest."""
        return replace(self, seed=seed % (SEED_MAX + 1))

    def _integer(self, name: str, low: int, high: int) -> None:
        given = getattr(self, name)
        value = integer(name, given, low, high)
        if value is not given:
            self._set(name, value)

    def _number(self, name: str, low: float, high: float) -> None:
        given = getattr(self, name)
        value = number(name, given, low, high)
        if value is not given:
            self._set(name, value)

    def _freeze_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise ArgumentError("logit_bias", self.logit_bias, "a mapping of token id to bias")
        frozen: dict[int, float] = {}
        for token, bias in self.logit_bias.items():
            key = integer("logit_bias", token, 0, INT32_MAX)
            frozen[key] = -math.inf
            if bias != -math.inf:
                frozen[key] = number(f"logit_bias[{key}]", bias, -1e30, 1e30)
        self._set("logit_bias", frozen)

    def _check_grammar(self) -> None:
        grammar = self.grammar
        if grammar is None:
            return
        if isinstance(grammar, Grammar):
            grammar = grammar.text
        limit = f"GBNF text of 1 to {GRAMMAR_BYTES_MAX} bytes, without NUL"
        if not isinstance(grammar, str) or not grammar.strip() or "\0" in grammar:
            raise ArgumentError("grammar", grammar, limit)
        try:
            size = len(grammar.encode())
        except UnicodeEncodeError:
            raise ArgumentError("grammar", grammar, "text that UTF-8 can hold") from None
        if size > GRAMMAR_BYTES_MAX:
            raise ArgumentError("grammar", f"{size} bytes", limit)

    def _freeze_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        texts = tuple(stop) if isinstance(stop, Iterable) else (stop,)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ArgumentError("stop", text, "texts of at least one character")
        self._set("stop", texts)
        for name in ("stop_token_ids", "preserved_tokens"):
            tokens = getattr(self, name)
            ids = tokens if isinstance(tokens, Iterable) else (tokens,)
            self._set(name, tuple(integer(name, token, 0, INT32_MAX) for token in ids))
