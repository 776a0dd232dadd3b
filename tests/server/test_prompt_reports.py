"""llama-server's `return_progress` and `timings_per_token`, in every interface that has them."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.engine.results import Chunk, PromptProgress, TimesSoFar
from pyllamabatch.engine.stream import Stream
from pyllamabatch.llama.model import Model
from pyllamabatch.server.prompt_reports import PromptReports
from tests.support.engines import held, stopped_clock
from tests.support.served import Served, serving

N_BATCH = 32
LONG = "the quick brown fox jumps over the lazy dog " * 8
INTERFACES: dict[str, dict[str, Any]] = {
    "/completion": {"prompt": "A" + LONG},
    "/v1/completions": {"prompt": "B" + LONG},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "C" + LONG}]},
    "/v1/responses": {"input": "D" + LONG},
}
FEW = {"max_tokens": 4, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def narrow(embedded_model: Model) -> Iterator[Served]:
    """A prompt of `LONG` takes many steps."""
    with serving(embedded_model, n_batch=N_BATCH) as served:
        yield served


@contextmanager
def heard(engine: Engine) -> Iterator[None]:
    """Nothing is computed before the server listens."""
    listen = Stream.on_prompt
    with held(engine, 0) as go_on, pytest.MonkeyPatch.context() as patch:

        def on_prompt(stream: Stream, callback: Callable[[PromptProgress], None]) -> None:
            listen(stream, callback)
            go_on.set()

        patch.setattr(Stream, "on_prompt", on_prompt)
        yield


@pytest.mark.parametrize("path", INTERFACES)
def test_a_stream_tells_how_far_its_prompt_is(narrow: Served, path: str) -> None:
    body = INTERFACES[path] | FEW | {"return_progress": True, "timings_per_token": True}
    with heard(narrow.engine):
        events = [event for event in narrow.events(path, body) if event != "[DONE]"]
    told = [event for event in events if "prompt_progress" in event]
    seen = [event["prompt_progress"] for event in told]
    assert len(seen) > 2
    first, last = seen[0], seen[-1]
    assert {one["total"] for one in seen} == {last["processed"]}
    assert {one["cache"] for one in seen} == {first["processed"]}
    assert all(a["processed"] < b["processed"] <= a["processed"] + N_BATCH
               for a, b in pairwise(seen))  # fmt: skip
    assert all(a["time_ms"] <= b["time_ms"] for a, b in pairwise(seen))
    timed = [event["timings"] for event in events if "timings" in event]
    assert timed[0]["prompt_n"] == timed[0]["prompt_ms"] == timed[0]["predicted_n"] == 0
    assert all(a["prompt_ms"] <= b["prompt_ms"] for a, b in pairwise(timed[: len(told)]))
    counts = [one["predicted_n"] for one in timed[len(told) :]]
    assert counts == sorted(counts)
    assert 1 <= counts[0] <= counts[-1] == 4


@pytest.mark.parametrize("path", INTERFACES)
def test_nothing_is_told_that_was_not_asked_for(narrow: Served, path: str) -> None:
    events = [e for e in narrow.events(path, INTERFACES[path] | FEW) if e != "[DONE]"]
    assert not any("prompt_progress" in event for event in events)
    assert sum("timings" in event for event in events) == 1  # the last one
    whole = narrow.ok(path, INTERFACES[path] | FEW | {"return_progress": True})
    assert "prompt_progress" not in whole


def test_an_empty_answer_ends_with_the_whole_prompt(narrow: Served) -> None:
    """And what was cached counts as computed before."""
    body = {"prompt": LONG + "once more", "n_predict": 0, "return_progress": True}
    for _ in range(2):
        events = narrow.events("/completion", body)
        seen = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert seen[-1]["processed"] == seen[-1]["total"] == events[-1]["tokens_evaluated"]
    assert seen[0]["cache"] > N_BATCH


def test_a_prompt_whose_time_is_over_is_not_told_as_computed(
    narrow: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    over, listen = stopped_clock(monkeypatch), Stream.on_prompt

    def on_prompt(stream: Stream, callback: Callable[[PromptProgress], None]) -> None:
        def tell(progress: PromptProgress) -> None:
            callback(progress)
            if progress.n_computed > progress.n_cached:
                over.set()

        listen(stream, tell)

    monkeypatch.setattr(Stream, "on_prompt", on_prompt)
    body = {"prompt": "E" + LONG, "timeout": 0.05, "return_progress": True} | FEW
    with held(narrow.engine, 1):
        events = narrow.events("/completion", body)
    seen = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert all(one["processed"] < one["total"] for one in seen)
    assert seen[0]["processed"] == seen[0]["cache"] < seen[-1]["processed"]
    assert events[-1]["tokens_predicted"] == events[-1]["timings"]["prompt_n"] == 0
    assert events[-1]["timings"]["prompt_ms"] > 0


def test_a_prompt_whose_time_is_over_in_the_queue_took_none(narrow: Served) -> None:
    body = {"prompt": "F" + LONG, "timeout": 1e-6, "return_progress": True} | FEW
    last = narrow.events("/completion", body)[-1]
    timings = last["timings"]
    assert last["tokens_evaluated"] > timings["prompt_n"] == timings["prompt_per_second"] == 0
    assert timings["prompt_ms"] == 0 < timings["queue_ms"]


@pytest.mark.parametrize("path", [*INTERFACES, "/v1/messages"])
def test_a_prompt_that_was_not_computed_counts_in_no_usage(narrow: Served, path: str) -> None:
    chat = INTERFACES["/v1/chat/completions"]
    body = INTERFACES.get(path, chat) | FEW | {"timeout": 1e-6}
    body |= {"stream_options": {"include_usage": True}}
    events = [event for event in narrow.events(path, body) if event != "[DONE]"]
    counts = [n for said in (narrow.ok(path, body), *events) for n in _counts(said)]
    assert bool(counts) == (path != "/completion")
    assert not any(counts)


def _counts(said: Any) -> list[int]:
    """All numbers of what is called usage."""
    if not isinstance(said, dict):
        return []
    inside = [n for value in said.values() for n in _counts(value)]
    return inside + [n for n in (said.get("usage") or {}).values() if isinstance(n, int)]


def test_each_choice_has_its_own(narrow: Served) -> None:
    body = {"prompt": [LONG + "a", LONG + "bc"], "return_progress": True} | FEW
    events = narrow.events("/completion", body)
    told = [event for event in events if "prompt_progress" in event]
    assert {event["index"] for event in told} == {0, 1}
    for i in range(2):
        mine = [event for event in events if event["index"] == i]
        assert mine[0]["prompt_progress"]["processed"] == mine[0]["prompt_progress"]["cache"]
        seen = [event["prompt_progress"] for event in mine if "prompt_progress" in event]
        assert sum(one["processed"] == one["total"] for one in seen) == 1
        assert "prompt_progress" not in mine[-1]


def test_who_asks_late_hears_nothing_behind_the_first_token(narrow: Served) -> None:
    seen = list[PromptProgress]()
    stream = narrow.engine.submit(LONG)
    next(iter(stream))
    stream.on_prompt(seen.append)
    stream.cancel()
    stream.wait()
    assert not seen
    times = stream.times()
    assert times.n_generated >= 1
    assert times.ttft_s is not None
    assert times.ttft_s <= times.e2el_s


def test_a_prompt_that_was_computed_before_is_told_from_its_first_row(narrow: Served) -> None:
    stream, told = narrow.engine.submit(LONG), list[PromptProgress]()
    next(iter(stream))

    async def late() -> None:
        assert PromptReports(stream, told.append).end() is None

    asyncio.run(late())
    stream.cancel()
    n = stream.n_prompt
    assert [(one.n_prompt, one.n_computed) for one in told] == [(n, stream.n_cached), (n, n)]
    assert told[0].seconds == 0 < told[1].seconds


class Prompt:
    """Of ten tokens, none of which was cached."""

    def on_prompt(self, callback: Callable[[PromptProgress], None]) -> None:
        self.callback = callback

    def tell(self, n: int) -> None:
        self.callback(PromptProgress(10, 0, n, n / 100))

    def times(self) -> TimesSoFar:
        return TimesSoFar(10, 0, 1, 1.0, 1.25, 9.0)


def test_a_slow_reader_gets_the_newest_and_the_last_one_before_the_first_token() -> None:
    written: list[Any] = []

    async def read() -> None:
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def write(progress: PromptProgress) -> asyncio.Future[None] | None:
            written.append(progress.n_computed)
            return free if len(written) == 2 else None

        prompt = Prompt()
        reports = PromptReports(prompt, write)  # type: ignore[arg-type]
        take = reports.before(lambda chunk: written.append(chunk.text))
        for n in (0, 2, 4, 6, 3):
            prompt.tell(n)
            await asyncio.sleep(0)
        blocked = take(Chunk("first", 0, 1))
        assert blocked is not None
        waits = asyncio.ensure_future(blocked)
        await asyncio.sleep(0)
        assert written == [0, 2]
        free.set_result(None)
        await waits
        assert take(Chunk("next", 1, 2)) is None
        prompt.tell(8)
        await asyncio.sleep(0)
        assert reports.end() is None

    asyncio.run(read())
    assert written == [0, 2, 10, "first", "next"]


def test_what_a_slow_reader_still_gets_comes_before_an_early_end() -> None:
    written: list[int] = []

    async def read() -> None:
        free: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def write(progress: PromptProgress) -> asyncio.Future[None]:
            written.append(progress.n_computed)
            return free

        prompt = Prompt()
        reports = PromptReports(prompt, write)  # type: ignore[arg-type]
        prompt.tell(4)
        await asyncio.sleep(0)
        blocked = reports.close()
        assert blocked is not None
        prompt.tell(6)
        await asyncio.sleep(0)
        free.set_result(None)
        await blocked
        assert reports.end() is None

    asyncio.run(read())
    assert written == [4]
