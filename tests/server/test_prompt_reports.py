"""llama-server's `return_progress` and `timings_per_token`, in every interface that has them."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from pyllamabatch.engine.results import PromptProgress
from pyllamabatch.llama.model import Model
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


@pytest.mark.parametrize("path", INTERFACES)
def test_a_stream_tells_how_far_its_prompt_is(narrow: Served, path: str) -> None:
    body = INTERFACES[path] | FEW | {"return_progress": True, "timings_per_token": True}
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


def test_each_choice_has_its_own(narrow: Served) -> None:
    body = {"prompt": [LONG + "a", LONG + "bc"], "return_progress": True} | FEW
    events = narrow.events("/completion", body)
    told = [event for event in events if "prompt_progress" in event]
    assert {event["index"] for event in told} == {0, 1}
    for i in range(2):
        mine = [event for event in events if event["index"] == i]
        assert mine[0]["prompt_progress"]["processed"] == mine[0]["prompt_progress"]["cache"]
        ends = [e for e in mine if e.get("prompt_progress", {}).get("processed") == len(LONG)]
        assert len(ends) <= 1
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
