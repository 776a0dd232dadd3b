"""Request bodies: reading them, and the fields that every kind of completion shares.

A wire name is checked in three places: a field of the model is used; one of `IGNORED` has no say in
the text and is left out; one of `OFF` belongs to what the engine has not, and is taken at the value
that switches it off. Any other is an error that names the nearest field."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from ..errors import ArgumentError, GrammarError, unknown_keyword
from ..step.sampling_params import SEED_MAX
from .errors import ApiError, invalid

IGNORED = frozenset({
    # OpenAI's
    "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "prompt_cache_options", "prediction", "verbosity", "client_metadata",
    "access_programs",
    # of Text Embeddings Inference
    "truncation_direction",
    # Anthropic's
    "cache_control", "container", "inference_geo", "speed", "diagnostics", "user_profile_id",
    "workspace_id", "context_management",
    # llama-server's
    "cache_prompt", "n_cache_reuse", "id_slot", "n_keep", "n_discard", "dry_base",
    "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers",
    "xtc_threshold", "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "adaptive_decay",
    "backend_sampling", "speculative.n_max", "speculative.n_min", "speculative.p_min",
    "speculative.type", "speculative.ngram_size_n", "speculative.ngram_size_m",
    "speculative.ngram_min_hits",
})  # fmt: skip
OFF: Mapping[str, tuple[object, ...]] = {
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "mirostat": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1, 0),
    "adaptive_target": (-1,),
    "min_keep": (0, 1),
    "n_indent": (0,),
    "t_max_prompt_ms": (-1, 0),
    "t_max_predict_ms": (-1, 0),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "preserved_tokens": ([],),
    "suffix": ("",),
    "audio": (),
    "modalities": (["text"],),
    "echo": (False,),
    "truncate": (False,),
}
SAMPLERS: Mapping[str, Mapping[str, float]] = {
    "penalties": {"repeat_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0},
    "top_k": {"top_k": 0},
    "typ_p": {"typical_p": 1.0},
    "top_p": {"top_p": 1.0},
    "min_p": {"min_p": 0.0},
    "temperature": {"temperature": 1.0},
}
"""llama-server's names of the engine's samplers, in their order, and what switches each one off."""
ALWAYS_OFF = ("dry", "top_n_sigma", "xtc", "adaptive_p")  # see `OFF`; they may be named, too
SPELLINGS = {"temp": "temperature", "typ": "typ_p", "nucleus": "top_p"} | {
    name.replace("_", dash): name
    for name in (*SAMPLERS, *ALWAYS_OFF, "infill")
    for dash in ("_", "-", "")
}
"""llama-server's, in any case of letters."""

RENAMED = {
    "n_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "repeat_last_n": "penalty_last_n",
    "repetition_penalty": "repeat_penalty",
    "ignore_eos": "ignore_eog",
    "typ_p": "typical_p",
}
"""Wire names of fields of `SamplingParams`; the others are called the same."""
SAME = (
    "max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repeat_penalty", "frequency_penalty", "presence_penalty", "penalty_last_n", "stop_token_ids",
    "ignore_eog", "grammar",
)  # fmt: skip

LONG_BYTES = 4096  # of a body whose prompt is tokenized in the event loop at most
PARSED_HERE_BYTES = 2**18  # of a body that is parsed in the event loop at most
VALUES_MAX = 2**18  # of a body: each costs many times its bytes once it is parsed
NAME_MAX = 100  # characters of a name that an error repeats
STOPS_MAX = 64
STOP_CHARS_MAX = 1000
BIAS_CHARS_MAX = 1000

B = TypeVar("B", bound="Body")
T = TypeVar("T")


class Body(BaseModel):
    """A JSON object. `null` is as if the field were not there."""

    model_config = ConfigDict(extra="forbid", strict=True)
    _n_bytes: int = PrivateAttr(0)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @property
    def is_long(self) -> bool:
        """What is made of it may take longer than a step."""
        return self._n_bytes > LONG_BYTES


async def read(request: Request, kind: type[B]) -> B:
    """The body as `kind`. ApiError for one that is too large, no JSON, or says what is unknown."""

    def made(content: bytes) -> B:
        values = _json(content)
        if not isinstance(values, dict):
            raise ApiError(400, "the body must be a JSON object", code="invalid_json")
        body = parsed(kind, values)
        body._n_bytes = len(content)
        return body

    return await _read(request, made)


async def read_list(request: Request, kind: type[B]) -> list[B]:
    """A body that is a list of these."""

    def made(content: bytes) -> list[B]:
        values = _json(content)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ApiError(400, "the body must be a list of JSON objects", code="invalid_json")
        return [parsed(kind, value) for value in values]

    return await _read(request, made)


async def _read(request: Request, made: Callable[[bytes], T]) -> T:
    service = request.app.state.service
    content = await content_of(request, service.options.body_bytes_max)
    made_of_it = partial(made, content)
    found: T = await service.run(made_of_it, long=len(content) > PARSED_HERE_BYTES)
    return found


async def content_of(request: Request, limit: int) -> bytes:
    """The bytes of the body. ApiError for more than `limit`."""
    declared = request.headers.get("content-length", "0")
    parts, size = [], int(declared) if declared.isdecimal() else 0
    if size <= limit:
        size = 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > limit:
                break
    if size > limit:
        message = f"the body has {size} bytes or more, at most {limit} are allowed"
        raise ApiError(413, message, code="body_too_large")
    return b"".join(parts)


def _json(content: bytes) -> Any:
    """What the body says."""
    if (n := content.count(b",")) > VALUES_MAX:
        message = f"the body has too many values: {n} commas, at most {VALUES_MAX} are allowed"
        raise ApiError(413, message, code="too_many_values")
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def parsed(kind: type[B], values: Mapping[str, Any]) -> B:
    """ArgumentError or pydantic's ValidationError."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or name in IGNORED:
            continue
        if name in kind.model_fields:
            fields[name] = value
        elif name in OFF:
            if value not in OFF[name]:
                raise ArgumentError(name, value, "this server has no such sampler or feature")
        elif len(name) > NAME_MAX:
            message = f"no parameter has a name of {len(name)} characters"
            raise ApiError(400, message, code="invalid_value")
        else:
            raise unknown_keyword(name, value, kind.model_fields)
    return kind.model_validate(fields)


# -- what completions share

Number = Annotated[float, Field(allow_inf_nan=False)]
Lora = str | dict[str, Number] | list[dict[str, Any]]
LogitBias = dict[str, Number | bool] | list[list[int | str | float | bool]]


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")  # llama-server's

    def schema_of(self) -> Mapping[str, Any] | None:
        if self.type == "text":
            return None
        schema = self.schema_
        if self.type == "json_schema":
            if self.json_schema is None:
                raise invalid("response_format.json_schema", None, "missing")
            schema = self.json_schema.schema_
        return schema or {"type": "object"}  # no chat's grammar has an empty one


class StreamOptions(Body):
    """`continuous_usage_stats`: vLLM's, each event has the counts so far. The last two say nothing
    here."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    reasoning_summary_delivery: str = ""


class SamplingBody(Body):
    """Fields of every kind of completion, by OpenAI's, llama-server's and vLLM's names.

    timings_per_token: each event of a stream has the timings so far. return_progress: it has events
    before the first token that say how much of the prompt is computed."""

    NAMES: ClassVar[Mapping[str, str]] = {}
    """Where a body has other names than the fields that it sets: theirs by these fields."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    timings_per_token: bool = False
    return_progress: bool = False
    n: Annotated[int, Field(ge=1, le=2**16)] = 1
    best_of: int | None = None

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_predict: int | None = None
    min_tokens: int | None = None
    temperature: Number | None = None
    top_k: int | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    typical_p: Number | None = None
    typ_p: Number | None = None
    repeat_penalty: Number | None = None
    repetition_penalty: Number | None = None
    repeat_last_n: int | None = None
    penalty_last_n: int | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    logit_bias: LogitBias | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    samplers: list[str] | None = None

    priority: int = 0
    user: str = ""
    tenant: str = ""
    timeout: Number | None = None
    deadline: Number | None = None
    ttft_target: Number | None = None
    itl_target: Number | None = None
    lora: Lora | None = None

    @property
    def makes_long_turn(self) -> bool:
        """The prompt of its chat, with tools or a schema, may take longer than a step to make."""
        return (
            self.is_long or bool(getattr(self, "tools", None)) or self.schema_wanted() is not None
        )

    def sampling(self, n_logprobs: int | None) -> dict[str, Any]:
        """Fields of `SamplingParams`, those that were given. max_tokens -1: no limit; seed -1: a
        random one."""
        if self.best_of not in (None, 1, self.n):
            raise invalid("best_of", self.best_of, "must be 1 or n: no answer is left out")
        fields: dict[str, Any] = {}
        for name in (*SAME, *RENAMED):
            value = getattr(self, name, None)
            if value is not None:  # "": llama-server's word for no grammar
                fields[RENAMED.get(name, name)] = None if value == "" else value
        if fields.get("max_tokens", 1) < 0:
            del fields["max_tokens"]
        if self.samplers is not None:
            fields |= without_others(samplers_named(self.samplers))
        if self.stop is not None:
            fields["stop"] = stops_of(self.stop, self.name_of("stop"))
        if self.seed is not None:
            fields["seed"] = None if self.seed == -1 else self.seed % (SEED_MAX + 1)
        schema = self.schema_wanted()
        if schema is not None:
            fields["json_schema"] = schema
        return {**fields, "logprobs": n_logprobs}  # none that the answer does not show

    def name_of(self, field: str) -> str:
        """The name that the body has for a field of `SamplingParams`."""
        if field == "json_schema" and self.response_format is not None:
            field = "response_format"
        names = [name for name, of in RENAMED.items() if of == field]
        given = (name for name in names if getattr(self, name) is not None)
        return self.NAMES.get(field) or next(given, field)

    def named(self, error: ArgumentError) -> ApiError:
        """An error of `SamplingParams`, by the name that the body has for the field."""
        return invalid(self.name_of(error.argument), error.value, error.limit)

    def of_grammar(self, error: GrammarError) -> ApiError:
        """By what the grammar was made of."""
        made_of = "tools" if self.schema_wanted() is None else self.name_of("json_schema")
        name = made_of if self.grammar in (None, "") else "grammar"
        return ApiError(400, f"{name}: {error}", param=name, code="invalid_value")

    def schema_wanted(self) -> Mapping[str, Any] | None:
        """The JSON schema of the answer, wherever it was given."""
        schema = self.response_format.schema_of() if self.response_format else None
        if schema is not None and self.json_schema is not None:
            raise invalid("json_schema", self.json_schema, "response_format is given already")
        return self.json_schema if schema is None else schema

    def options(self, now_wall: float) -> dict[str, Any]:
        """Of the engine's `Options`, those that were given. `now_wall`: `time.time()`."""
        options: dict[str, Any] = {"priority": self.priority, "tenant": self.tenant or self.user}
        for name in ("ttft_target", "itl_target"):
            if (target := getattr(self, name)) is not None:
                options[name] = target
        seconds = [
            self.timeout,
            None if self.deadline is None else max(0.0, self.deadline - now_wall),
        ]
        given = [value for value in seconds if value is not None and value >= 0]
        if given:
            options["timeout"] = min(given)
        return options


def samplers_named(samplers: Sequence[str]) -> list[str]:
    """Those of `SAMPLERS` among these. Names that llama-server does not know are left out, as
    there."""
    known = (SPELLINGS.get(name.lower()) for name in samplers)
    named = [name for name in known if name is not None and name not in ALWAYS_OFF]
    if named != [name for name in SAMPLERS if name in named]:
        raise invalid("samplers", samplers, f"must be some of {', '.join(SAMPLERS)}, in this order")
    return named


def without_others(named: Sequence[str]) -> dict[str, float]:
    """Fields of `SamplingParams` that switch off all samplers but these."""
    others = (off for name, off in SAMPLERS.items() if name not in named)
    return {field: value for off in others for field, value in off.items()}


def stops_of(given: str | list[str], name: str) -> tuple[str, ...]:
    """Texts that end an answer; empty ones are left out. `name`: for errors."""
    stops = [given] if isinstance(given, str) else given
    if len(stops) > STOPS_MAX:
        raise invalid(name, f"{len(stops)} texts", f"at most {STOPS_MAX}")
    for text in stops:
        if len(text) > STOP_CHARS_MAX:
            limit = f"at most {STOP_CHARS_MAX} in one text"
            raise invalid(name, f"{len(text)} characters", limit)
    return tuple(text for text in stops if text)


def bias_of(given: LogitBias | None, tokens_of: Any) -> dict[int, float]:
    """llama-server's pairs, whose token may be a text (`tokens_of` gives its tokens); or OpenAI's
    object. A bias may be false (never)."""
    bias: dict[int, float] = {}
    pairs = given.items() if isinstance(given, dict) else given or ()
    for pair in pairs:
        key, value = pair if len(pair) == 2 else (None, "")
        if not isinstance(key, (int, str)) or isinstance(value, str) or value is True:
            raise invalid("logit_bias", pair, "must be a token (id or text) and a number or false")
        if isinstance(key, str) and len(key) > BIAS_CHARS_MAX:
            limit = f"at most {BIAS_CHARS_MAX} for a token"
            raise invalid("logit_bias", f"{len(key)} characters", limit)
        amount = -math.inf if value is False else float(value)
        if amount <= -100 and isinstance(given, dict):
            amount = -math.inf  # OpenAI's word for never
        if isinstance(key, int) or (isinstance(given, dict) and key.isdecimal()):
            bias[int(key)] = amount
        else:
            bias |= dict.fromkeys(tokens_of(key), amount)
    return bias
