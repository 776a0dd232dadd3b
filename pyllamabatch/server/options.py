"""What a server is told at its start."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ArgumentError, integer, number
from ..step.sampling_params import SamplingParams

BODY_BYTES_MAX = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """- model_name: what `/v1/models` says. Default: the name of the file.
    - api_keys: any of them opens every path but `/health`; none: no key is asked for.
    - cors_origins: pages of these origins may ask; "*" for any. Default: none.
    - sampling: fields of `SamplingParams` for requests that don't say. Without `max_tokens`: what
      a sequence has cells for.
    - thinking: whether a template that can think does, for requests that don't say. Default: as the
      template has it.
    - embeddings: there is a second context for `/v1/embeddings`. rerank: for `/rerank`. pooling:
      how it makes one vector of a text. Default: what the model was made for, else "mean".
    - lora_paths: files of the engine's adapters by their names, for `/lora-adapters`.
    - slots, metrics, page: whether `/slots`, `/metrics`, and `/` with its steps are there.
    - n_choices_max: `n` times the prompts of one request, at most.
    - body_bytes_max: of a request's body.
    - request_timeout: seconds that a request may take, waiting included; None for no limit. It ends
      with what it has.
    - drain_timeout: seconds that open requests get when the server is told to end.
    - chat_template: the name or text of a template instead of the model's."""

    model_name: str | None = None
    api_keys: Sequence[str] = ()
    cors_origins: Sequence[str] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n_choices_max: int = 128
    body_bytes_max: int = BODY_BYTES_MAX
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    chat_template: str | None = None
    thinking: bool | None = None
    embeddings: bool = False
    rerank: bool = False
    pooling: str | None = None
    lora_paths: Mapping[str, str] = field(default_factory=dict)
    slots: bool = True
    metrics: bool = True
    page: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.api_keys, str) or not all(self.api_keys):
            raise ArgumentError("api_keys", self.api_keys, "must be a list of texts, none empty")
        integer("body_bytes_max", self.body_bytes_max, 1, 2**40)
        integer("n_choices_max", self.n_choices_max, 1, 2**16)
        number("drain_timeout", self.drain_timeout, 0)
        SamplingParams(**self.sampling)
        if self.request_timeout is not None:
            number("request_timeout", self.request_timeout, 0)
