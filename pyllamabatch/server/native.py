"""llama-server's own interface: completions, tokens, templates, and what the server says of itself.

Names and forms are llama-server's. What this engine has not is left out of `generation_settings`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import Request
from pydantic import Field
from starlette.responses import Response

from ..engine.results import Chunk, PromptProgress, Result, Token
from ..engine.stream import Stream
from ..errors import UnsupportedOperation
from ..step.sampling_params import SamplingParams
from . import bodies, tokens
from .answer import Answer, event, respond
from .bodies import Body, SamplingBody
from .chat import ChatBody, read_turn
from .conversation import text_of
from .errors import invalid, json_response, no_slot
from .service import Prepared, Prompt, Service

MixedPrompt = str | dict[str, Any] | list[int | str | dict[str, Any] | list[int | str]]


class NativeBody(SamplingBody):
    """`prompt`: a text, a list of token ids and texts, or a list of such prompts. `n_probs`: so
    many of the most likely tokens beside each. `response_fields`: only these of an answer, as
    "timings/prompt_n"."""

    NAMES: ClassVar = {"logprobs": "n_probs"}

    prompt: MixedPrompt
    n_probs: Annotated[int, Field(ge=0)] = 0
    n_cmpl: Annotated[int, Field(ge=1)] | None = None
    return_tokens: bool = False
    post_sampling_probs: bool = False
    response_fields: list[str] | None = None


class TokenizeBody(Body):
    content: str | list[int | str]
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeBody(Body):
    tokens: list[int]


class LoraScale(Body):
    id: int
    scale: bodies.Number


def prompts_of(given: MixedPrompt, name: str) -> list[Prompt]:
    """Each prompt of what may be one or a list of them. `name`: for errors."""
    if not isinstance(given, list):
        return [_one(given, name)]
    if any(isinstance(part, int) for part in given):
        return [_one(given, name)]  # one prompt, in which texts may be, too
    if not given:
        raise invalid(name, given, "must not be empty")
    return [_one(part, name) for part in given]


def _one(given: Any, name: str) -> Prompt:
    if isinstance(given, dict):
        if given.get("multimodal_data"):
            raise UnsupportedOperation("multimodal prompts are not supported")
        if isinstance(given.get("content"), list):
            return text_of(f"{name}.content", given["content"])
        text = given.get("prompt_string")
        if not isinstance(text, str):
            raise invalid(name, given, 'an object needs "prompt_string" or "content"')
        return text
    prompt: Prompt = given
    return prompt


async def completion(service: Service, request: Request) -> Response:
    """llama-server's `/completion`. A list of prompts gives a list of answers."""
    body = await bodies.read(request, NativeBody)
    if body.n_cmpl is not None:
        body.n = body.n_cmpl
    if body.post_sampling_probs:
        raise invalid("post_sampling_probs", True, "log-probabilities are those before sampling")
    prompts = prompts_of(body.prompt, "prompt")
    prepared = await service.submit(body, prompts, body.n_probs or None)
    make = partial(NativeAnswer, service, body, prepared)
    return await respond(service, request, make, prepared.streams, stream=body.stream)


class NativeAnswer(Answer):
    def __init__(self, service: Service, body: NativeBody, prepared: Prepared) -> None:
        self._service = service
        self._body = body
        self._prepared = prepared
        self._n_sent = [0] * len(prepared.streams)
        self.reports = body.return_progress

    def whole(self, results: Sequence[Result]) -> Any:
        answers = [self._last(i, result) for i, result in enumerate(results)]
        for answer, result in zip(answers, results, strict=True):
            answer["content"] = result.text
            answer["tokens"] = result.tokens if self._body.return_tokens else []
            if self._body.n_probs:
                probabilities = self._probabilities(tokens.tokens_of(result))
                answer["completion_probabilities"] = probabilities
        wanted = self._body.response_fields
        if wanted:
            answers = [_fields(answer, wanted) for answer in answers]
        return answers[0] if len(answers) == 1 else answers

    def progress(self, i: int, progress: PromptProgress) -> bytes:
        values = self._part(i, progress.n_prompt, "", [])
        values["prompt_progress"] = tokens.prompt_progress(progress)
        if self._body.timings_per_token:
            values["timings"] = tokens.prompt_timings(progress)
        return event(values)

    def chunk(self, i: int, stream: Stream, chunk: Chunk) -> bytes:
        new = stream.between(chunk.start, chunk.stop)
        if not self._body.n_probs:
            return self._chunk(i, stream, chunk.text, new)
        return b"".join(self._chunk(i, stream, token.text, [token]) for token in new)

    def _chunk(self, i: int, stream: Stream, text: str, new: Sequence[Token]) -> bytes:
        self._n_sent[i] += len(new)
        values = self._part(i, stream.n_prompt, text, new)
        if self._body.timings_per_token:
            values["timings"] = tokens.timings(stream.times())
        if self._body.n_probs:
            values["completion_probabilities"] = self._probabilities(new)
        return event(values)

    def _part(self, i: int, n_prompt: int, text: str, new: Sequence[Token]) -> dict[str, Any]:
        """What each event says before the last one."""
        return {
            "index": i,
            "content": text,
            "tokens": [token.token for token in new],
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": self._n_sent[i],
            "tokens_evaluated": n_prompt,
        }

    def finish(self, i: int, result: Result) -> bytes:
        return event(self._last(i, result))

    def _last(self, i: int, result: Result) -> dict[str, Any]:
        body, service = self._body, self._service
        of = i // body.n
        prompt = service.vocab.detokenize(self._prepared.prompts[of], unparse_special=True)
        word = result.stop if isinstance(result.stop, str) else ""
        stopped = "eos" if result.finish_reason == "stop" else "limit"
        return {
            "index": i,
            "content": "",
            "tokens": [],
            "id_slot": -1,
            "stop": True,
            "model": service.model_name,
            "tokens_predicted": result.n_generated,
            "tokens_evaluated": result.n_prompt,
            "generation_settings": settings(self._prepared.params[of], body.samplers),
            "prompt": prompt,
            "has_new_line": "\n" in result.text,
            "truncated": False,
            "stop_type": "word" if word else stopped,
            "stopping_word": word,
            "tokens_cached": result.n_prompt + result.n_generated,
            "timings": tokens.timings(result),
        }

    def _probabilities(self, of: Sequence[Token]) -> list[dict[str, Any]]:
        return tokens.chat_logprobs(of, self._service.piece)


def _fields(answer: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Those that there are; a path is their new name."""
    found: dict[str, Any] = {}
    for path in wanted:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found[path] = value
    return found


def settings(params: SamplingParams, samplers: Sequence[str] | None = None) -> dict[str, Any]:
    """Sampling parameters by llama-server's names. samplers: those that were asked for."""
    return {
        "n_predict": params.max_tokens,
        "max_tokens": params.max_tokens,
        "seed": -1 if params.seed is None else params.seed,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "typical_p": params.typical_p,
        "repeat_last_n": params.penalty_last_n,
        "repeat_penalty": params.repeat_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eog,
        "logit_bias": [{"token": token, "bias": bias} for token, bias in params.logit_bias.items()],
        "n_probs": params.logprobs or 0,
        "grammar": params.grammar or "",
        "json_schema": params.json_schema,
        "samplers": bodies.samplers_named([*bodies.SAMPLERS] if samplers is None else samplers),
    }


# -- tokens and templates


async def tokenize(service: Service, request: Request) -> Response:
    """The tokens of a text; `with_pieces`: with the text of each."""
    body = await bodies.read(request, TokenizeBody)
    found = await service.run(lambda: _tokens(service, body), long=body.is_long)
    return json_response({"tokens": found})


def _tokens(service: Service, body: TokenizeBody) -> list[Any]:
    special = {"add_special": body.add_special, "parse_special": body.parse_special}
    ids: list[int] = service.tokens(body.content, **special, name="content").tolist()
    if not body.with_pieces:
        return ids
    pieces = {id: {"id": id, "piece": _piece(service, id)} for id in set(ids)}
    return [pieces[id] for id in ids]


def _piece(service: Service, token: int) -> str | list[int]:
    """Text, or bytes where they are none by themselves."""
    data = service.piece(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(service: Service, request: Request) -> Response:
    """The text of tokens."""
    body = await bodies.read(request, DetokenizeBody)
    write = partial(service.vocab.detokenize, body.tokens, unparse_special=True)
    return json_response({"content": await service.run(write, long=body.is_long)})


async def apply_template(service: Service, request: Request) -> Response:
    """The prompt that a chat becomes."""
    body = await bodies.read(request, ChatBody)
    turn = await read_turn(service, body)
    return json_response({"prompt": turn.prompt})


# -- the server itself


async def props(service: Service, request: Request) -> Response:
    """What the server runs with."""
    vocab, model, options = service.vocab, service.model, service.options
    params = settings(SamplingParams(**options.sampling))
    if "max_tokens" not in options.sampling:
        params["n_predict"] = params["max_tokens"] = -1
    defaults = {
        "id": 0,
        "n_ctx": service.n_ctx_slot,
        "is_processing": False,
        "params": params,
    }
    return json_response(
        {
            "default_generation_settings": defaults,
            "total_slots": service.engine.n_seq_max if service.has_engine else 0,
            "model_alias": service.model_name,
            "model_path": "" if service.machine else model.path,
            "modalities": {"vision": False, "video": False, "audio": False},
            "endpoint_slots": options.slots,
            "endpoint_props": False,
            "endpoint_metrics": options.metrics,
            "chat_template": options.chat_template or model.chat_template() or "",
            "bos_token": _special(service, vocab.bos),
            "eos_token": _special(service, vocab.eos),
            "build_info": service.fingerprint,
            "is_sleeping": False,
        }
    )


def _special(service: Service, token: int | None) -> str:
    return "" if token is None else service.piece(token).decode("utf-8", "replace")


async def slots(service: Service, request: Request) -> Response:
    """What runs in each slot. `?fail_on_no_slot=1`: 503 when none is free."""
    if not service.options.slots:
        raise UnsupportedOperation("this server does not show its slots")
    states, drafts = service.engine.slots(), service.engine.limits.n_draft_max > 0
    if request.query_params.get("fail_on_no_slot") and all(s.request is not None for s in states):
        raise no_slot()
    return json_response(
        [
            {
                "id": state.slot,
                "id_task": -1 if state.request is None else state.request,
                "n_ctx": service.n_ctx_slot,
                "speculative": drafts,
                "is_processing": state.request is not None,
                "n_prompt_tokens": state.n_prompt,
                "n_prompt_tokens_processed": min(state.computed, state.n_prompt),
                "n_decoded": state.generated,
                "next_token": [
                    {
                        "has_next_token": state.request is not None,
                        "n_remain": -1 if state.request is None else state.left,
                        "n_decoded": state.generated,
                    }
                ],
                "tenant": state.tenant,
                "priority": state.priority,
            }
            for state in states
        ]
    )


async def lora_adapters(service: Service, request: Request) -> Response:
    """The adapters and the scales that requests get which name none; a POST sets these."""
    names = service.engine.loras
    if request.method == "POST":
        given = await bodies.read_list(request, LoraScale)
        for one in given:
            if not 0 <= one.id < len(names):
                raise invalid("id", one.id, f"must be below {len(names)}, the number of adapters")
        service.default_lora = {names[one.id]: one.scale for one in given if one.scale}
        return json_response({"success": True})
    scales = service.default_lora
    paths = service.options.lora_paths
    return json_response(
        [
            {"id": i, "path": paths.get(name, name), "name": name, "scale": scales.get(name, 0.0)}
            for i, name in enumerate(names)
        ]
    )


async def metrics(service: Service, request: Request) -> Response:
    """Counters and histograms in Prometheus' text format."""
    if not service.options.metrics:
        raise UnsupportedOperation("this server does not show its metrics")
    headers = {"Process-Start-Time-Unix": str(service.created)}
    return Response(service.metrics.text(), 200, headers, media_type="text/plain; version=0.0.4")
