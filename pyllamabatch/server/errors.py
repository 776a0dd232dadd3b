"""Errors as HTTP: the one place where an exception becomes a status and an OpenAI-form body."""

import logging
import re
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..errors import (
    ArgumentError,
    CellsUnavailable,
    ChatParseError,
    ChatTemplateError,
    ClosedError,
    EngineDraining,
    GrammarError,
    NoCandidate,
    NotEnoughMemory,
    PyllamabatchError,
    QueueFull,
    RequestTooLong,
    TokenizeError,
    UnsupportedOperation,
)

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
RETRY_SECONDS = "1"
ANTHROPIC = "/v1/messages"
N_ERRORS_MAX = 1000  # of a body that are looked at: a list may have one for each element
PART_MAX = 100  # characters of a part of a place
TYPE = re.compile(r"str|int|float|bool|[\w-]+\[.*")


class ApiError(Exception):
    """An answer that is an error: `{"error": {"message", "type", "param", "code", ...more}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = INVALID,
        *,
        param: str | None = None,
        code: str | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.headers: Mapping[str, str] = {}
        self.status = status
        self.type = type
        self.error = {"message": message, "type": type, "param": param, "code": code}
        self.error |= more or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}

    def response(self, path: str) -> Response:
        """In the form of the interface that the path belongs to."""
        again = self.status in (429, 503) and self.error["code"] != "closed"
        headers = {**self.headers, "Retry-After": RETRY_SECONDS} if again else self.headers
        outer = {"type": "error"} if path.startswith(ANTHROPIC) else {}
        return json_response(outer | self.body, self.status, headers)


def json_response(
    values: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    content = orjson.dumps(values, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, headers, media_type="application/json")


def invalid(param: str, value: object, limit: str) -> ApiError:
    """A value that is not allowed: as `ArgumentError`, for what has no Python argument."""
    return of(ArgumentError(param, value, limit))


def no_slot() -> ApiError:
    return ApiError(503, "no slot is free", "unavailable_error", code="no_slot")


def of(error: BaseException) -> ApiError:
    """What a client is told of an exception. One that is a bug of ours is logged."""
    message = str(error)
    match error:
        case ApiError():
            return error
        case RequestTooLong():
            return ApiError(400, message, param="max_tokens", code="context_length_exceeded")
        case ArgumentError():
            return ApiError(400, message, param=error.argument, code="invalid_value")
        case GrammarError():
            return ApiError(400, f"grammar: {message}", param="grammar", code="invalid_value")
        case TokenizeError() | ChatTemplateError() | NoCandidate():
            return ApiError(400, message, code="invalid_value")
        case ValidationError():
            return of_validation(error)
        case ChatParseError():
            return ApiError(500, message, "server_error", code="answer_not_parsed")
        case QueueFull():
            return ApiError(429, message, "rate_limit_error", code="queue_full")
        case EngineDraining():
            return ApiError(503, message, "unavailable_error", code="draining")
        case ClosedError():
            return ApiError(503, message, "unavailable_error", code="closed")
        case CellsUnavailable() | NotEnoughMemory():  # now: others may free some
            return ApiError(503, message, "unavailable_error", code="out_of_memory")
        case UnsupportedOperation():
            return ApiError(501, message, "not_supported_error")
        case ClientDisconnect():
            return ApiError(499, "the client has left")
        case HTTPException():
            answer = ApiError(error.status_code, str(error.detail))
            answer.headers = error.headers or {}
            return answer
    log.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}", "server_error")


def of_validation(error: ValidationError) -> ApiError:
    """The first thing that pydantic did not like, with its place, value and limit. Of a field of
    several types what came furthest."""
    if (n := error.error_count()) > N_ERRORS_MAX:
        return ApiError(400, f"the body has {n} values that are not allowed", code="invalid_value")
    errors = error.errors(include_url=False, include_context=False)
    of_each: dict[tuple[int | str, ...], ErrorDetails] = {}  # the first one of each type
    for one in errors:
        if one["loc"][0] == errors[0]["loc"][0]:
            of_each.setdefault(tuple(part for part in one["loc"] if _is_type(part)), one)
    first = max(of_each.values(), key=_how_far)
    where = ".".join(str(part)[:PART_MAX] for part in _place(first))
    if first["type"] == "missing":
        return ApiError(400, f"{where}: missing", param=where, code="missing_required_parameter")
    here = dict.fromkeys(one["msg"] for one in of_each.values() if _place(one) == _place(first))
    return invalid(where, first["input"], " or ".join(here).replace(" or Input ", " or "))


def _is_type(part: int | str) -> bool:
    """Of pydantic's place, which has the type that was tried, too."""
    return isinstance(part, str) and TYPE.fullmatch(part) is not None


def _place(error: ErrorDetails) -> tuple[int | str, ...]:
    return tuple(part for part in error["loc"] if not _is_type(part))


def _how_far(error: ErrorDetails) -> tuple[int, list[int]]:
    place = _place(error)
    return len(place), [part for part in place if isinstance(part, int)]


def install(app: Starlette) -> None:
    """Every failure of a request is answered in the one form."""

    async def answer(request: Request, error: Exception) -> Response:
        return of(error).response(request.url.path)

    kinds = ApiError, PyllamabatchError, ValidationError, ClientDisconnect, HTTPException, Exception
    for kind in kinds:
        app.add_exception_handler(kind, answer)
