"""What the answers of OpenAI's two interfaces for completions have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from ..engine.results import PromptProgress, Result
from ..engine.stream import Stream
from . import tokens
from .answer import DONE, Answer, event
from .bodies import SamplingBody
from .service import Prepared, Service


class OpenAIAnswer(Answer):
    """id, kind: how its "id" begins, and its "object". `_plain`: an event of new text has nothing
    else that is new."""

    _plain = False

    def __init__(
        self, service: Service, body: SamplingBody, prepared: Prepared, *, id: str, kind: str
    ) -> None:
        self._service = service
        self._options = body.stream_options
        self._timed = body.timings_per_token
        self.reports = body.return_progress
        self._n_samples = body.n
        self._n_prompt = prepared.n_prompt
        self._head = {
            "id": f"{id}-{uuid4().hex}",
            "object": kind,
            "created": service.now(),
            "model": body.model or service.model_name,
            "system_fingerprint": service.fingerprint,
        }

    def around(self, i: int) -> tuple[bytes, bytes] | None:
        if not self._plain or self._timed or self._options.continuous_usage_stats:
            return None
        before, _, after = self._event(i, self._text_choice("\0"), 0).rpartition(rb"\u0000")
        return before, after

    def progress(self, i: int, progress: PromptProgress) -> bytes:
        more = {"timings": tokens.prompt_timings(progress)} if self._timed else {}
        said = tokens.prompt_progress(progress)
        return self._event(i, self._no_choice(), 0, prompt_progress=said, **more)

    def _timings(self, stream: Stream) -> dict[str, Any]:
        """What an event says of them before the last one."""
        return {"timings": tokens.timings(stream.times())} if self._timed else {}

    @abstractmethod
    def _no_choice(self) -> dict[str, Any]:
        """A choice of an event before the first token, without its index."""

    @abstractmethod
    def _text_choice(self, text: str) -> dict[str, Any]:
        """A choice of an event with nothing but new text, without its index."""

    @abstractmethod
    def _choice(self, i: int, result: Result) -> dict[str, Any]:
        """A whole choice, without its index."""

    def whole(self, results: Sequence[Result]) -> Any:
        return {
            **self._head,
            "choices": [{"index": i, **self._choice(i, r)} for i, r in enumerate(results)],
            "usage": tokens.usage(results, self._n_samples),
            "timings": tokens.timings(results[0]),
        }

    def end(self, results: Sequence[Result]) -> bytes:
        if not self._options.include_usage:
            return DONE
        counts = tokens.usage(results, self._n_samples)
        timings = tokens.timings(results[0])
        return event({**self._head, "choices": [], "usage": counts, "timings": timings}) + DONE

    def _event(self, i: int, choice: dict[str, Any], n_generated: int, **more: Any) -> bytes:
        """`choice`, of which so many tokens have come."""
        usage = tokens.stream_usage(self._options, self._n_prompt, n_generated)
        return event({**self._head, "choices": [{"index": i, **choice}], **usage, **more})
