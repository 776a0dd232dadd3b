"""The live batch page: its feed, recorded traces, and itself in a browser.

The browser's tests want `pip install -e '.[browser]'` and /usr/bin/chromium (Debian: `apt-get
install chromium`): `python -m pytest -m browser tests/server`.
"""

import gc
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch.cli import main
from pyllamabatch.errors import ArgumentError
from pyllamabatch.server import live
from pyllamabatch.step.trace import to_chrome, trace_dtype
from tests.support.decoding import loaded
from tests.support.engines import greedy, held
from tests.support.served import SUM, SUM_CHAT, Served, until
from tests.support.speculating import LOOP, PROMPTS, always, engine_of


def test_recorded_steps_are_the_live_ones(served: Served, tmp_path: Path) -> None:
    served.ok("/v1/completions", {"prompt": [SUM] * 6, "max_tokens": 12, "ignore_eos": True})
    trace = served.engine.trace()[-16:]
    expected = live.steps_of(trace)
    to_chrome(trace, tmp_path / "steps.json")
    found = live.recorded(tmp_path / "steps.json")
    begin = expected[0]["at"]
    for step, other in zip(expected, found, strict=True):
        assert other["at"] == pytest.approx(step["at"] - begin, abs=0.01)
        assert other["ms"] == pytest.approx(step["ms"], abs=0.01)
        assert other["phases"][:4] == pytest.approx(step["phases"][:4], abs=0.01)
        assert sorted(other["lanes"]) == sorted(step["lanes"].tolist())
        for name in step.keys() - {"at", "ms", "phases", "lanes"}:
            assert other[name] == step[name], name
    assert any(n > 0 for step in found for _, _, n in step["lanes"])

    assert main(["view", str(tmp_path / "steps.json"), "--out", str(tmp_path / "a.html")]) == 0
    html = (tmp_path / "a.html").read_text()
    data = re.search(r"const RECORDED = (.*?);</script>", html)
    assert data is not None
    assert json.loads(data[1])["steps"] == found
    for bad in (b"{}", b'{"traceEvents": []}', b"no JSON", b"GGUF" + bytes(range(256)) * 100):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(ArgumentError, match="generate --trace") as caught:
            live.recorded(tmp_path / "bad.json")
        assert len(str(caught.value)) < 1000


def test_drafts_padding_and_preemptions_are_there_live_and_recorded(tmp_path: Path) -> None:
    """The longest of three requests that speculate, in streams of their own, is preempted once."""
    options = {"speculate": "ngram", "policy": always(4, 8), "kv_unified": False}
    with engine_of(loaded("llama"), n_seq_max=4, **options) as engine:
        padding = engine._core.scheduler.padding
        padding.width = lambda decode, held, cost: 4 if len(decode) else 0  # type: ignore[method-assign]
        with held(engine, 12):
            params = [greedy(n, logit_bias=LOOP) for n in (60, 80, 90)]
            streams = [engine.submit(*pair) for pair in zip(PROMPTS, params, strict=False)]
            next(iter(streams[2]))
            core = engine._core
            core.commands.post(lambda: core.recovery._preempt(streams[2].id))
        results = [stream.result() for stream in streams]
        stats, trace = engine.stats(), engine.trace()
    steps = live.steps_of(trace)
    to_chrome(trace, tmp_path / "steps.json")
    for found in (steps, live.recorded(tmp_path / "steps.json")):
        total = {n: sum(step[n] for step in found) for n in ("sampled", "drafted", "accepted")}
        assert total == {
            "sampled": stats.tokens,
            "drafted": stats.drafted_tokens,
            "accepted": stats.accepted_tokens,
        }
        assert 0 < total["accepted"] < total["drafted"]
        assert [pair for step in found for pair in step["preempted"]] == [[2, results[2].id]]
        assert stats.preemptions == 1
        for step in found:
            decoding = [slot for slot, _, n in step["lanes"] if not n]
            assert sorted([*decoding, *step["padded"]]) == [0, 1, 2, 3] or step["prefill"]
        assert any(step["padded"] for step in found)


def test_slots_of_padding() -> None:
    lanes = [[slot, 1 + slot, 0] for slot in (1, 3, 7)]
    assert live.padded(lanes, 3, 0) == live.padded([[0, 1, 8]], 0, 0) == []
    assert live.padded(lanes, 3, 4) == [2, 4, 5, 6]
    assert live.padded(lanes, 9, 12) == [2, 4, 5, 6]  # three rows of each slot
    assert live.padded(lanes, 3, 1) == [2]  # too wide a gap is left open
    assert live.padded(lanes, 3, 6) == [0, 2, 4, 5, 6, 8]
    prompts = [[slot, 1 + slot, 1] for slot in (1, 3)]  # their rows fill up as those that decode
    assert live.padded(prompts, 0, 2) == [0, 2]
    assert live.padded([[0, 1, 0], [1, 2, 1], [3, 4, 0]], 2, 2) == [1, 2]  # computed behind them


def test_many_steps_of_many_slots_are_told_quickly() -> None:
    """No object is made for each lane: collecting them would hold up the server."""
    trace = np.zeros(64, trace_dtype(64))
    trace["ids"], trace["rows"], trace["decode_rows"] = np.arange(1, 65), 64, 64
    for name in ("reasons", "preempted"):
        trace[name] = [{} for _ in trace]
    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        steps = live.steps_of(trace)
        made = gc.get_count()[0] - before
    finally:
        gc.enable()
    assert len(steps) == 64
    assert made < 64 * 16


def test_the_feed_goes_on_where_it_was(served: Served) -> None:
    served.ok("/v1/completions", {"prompt": SUM, "max_tokens": 1})
    core: Any = served.engine._core
    until(lambda: core.output_processor._n_read == core._stepper.n_recorded)
    first = served.client.get("/steps").json()
    assert first["server"] == served.client.get("/steps").json()["server"]
    assert first["n_slots"] == 4
    last = first["steps"][-1]["at"]
    assert served.client.get("/steps", params={"since": last}).json()["steps"] == []
    served.ok("/v1/completions", {"prompt": SUM, "max_tokens": 5, "ignore_eos": True})
    until(lambda: core.output_processor._n_read == core._stepper.n_recorded)
    new = served.client.get("/steps", params={"since": last}).json()["steps"]
    assert [step["at"] for step in new] == sorted(step["at"] for step in new)
    assert min(step["at"] for step in new) > last
    assert sum(step["decode"] for step in new) == 5
    assert served.client.get("/steps", params={"since": "soon"}).status_code == 400


def test_the_page_names_no_other_address(served: Served) -> None:
    response = served.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|@import|<link", response.text)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """Each test has its own: another one's would go on asking for steps."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


@pytest.mark.browser
def test_live_in_a_browser(served: Served, page: Any) -> None:
    page.goto(served.url)
    page.fill("#question", SUM_CHAT["messages"][0]["content"])
    page.click("#chat button")
    until(lambda: page.inner_text("#answer"))
    until(lambda: served.engine.stats().running == 0)
    (last,) = live.steps_of(served.engine.trace(1))
    until(lambda: page.evaluate("window.batch.steps.at(-1)?.at") == last["at"])  # none comes now
    assert "tokens/s" in page.inner_text("#figures")
    assert "cached cells" in page.inner_text("#figures")
    # a click on a lane of the last step, which is at the right end of what is drawn
    at = page.evaluate(
        """() => { const [start, end] = shown(), step = state.steps[end - 1];
        return [GUTTER + (end - 1 - start) * state.zoom + 1,
                TOP + step.lanes[0][0] * laneHeight() + 2, step.lanes[0][1]]; }"""
    )
    page.click("#canvas", position={"x": at[0], "y": at[1]})
    about = page.inner_text("#about")
    assert f"request {at[2]}: slot" in about
    asked, decoded = page.evaluate(
        """id => { const one = window.batch.requests.get(id);
        return [one.chunks, one.times.length]; }""",
        at[2],
    )
    assert f"{sum(asked) + decoded} cells of its own" in about
    assert page.evaluate("window.batch.paused")
    page.keyboard.press("Space")
    assert not page.evaluate("window.batch.paused")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("window.batch.back") == 1


@pytest.mark.browser
def test_64_slots_at_100_steps_a_second(served: Served, page: Any) -> None:
    began, sent = time.monotonic(), 0

    def answer(route: Any) -> None:
        nonlocal sent
        until = int((time.monotonic() - began) * 100)
        steps = [made_up_step(i) for i in range(sent, until)]
        sent = until
        stats = {"running": 64, "waiting": 3, "preemptions": 0, "prefix_hit_rate": 0.5}
        stats["kv_cached"] = 512
        feed = {"steps": steps, "n_slots": 64, "n_cells": 65536, "stats": {**stats, "itl_ms": 9}}
        route.fulfill(json=feed)

    page.route("**/steps*", answer)
    page.goto(served.url)
    until(lambda: page.evaluate("window.batch.steps.length > 200"))
    n_steps, frames = page.evaluate("[window.batch.steps.length, window.batch.frames]")
    start = time.monotonic()
    page.wait_for_timeout(3000)
    later, drawn = page.evaluate("[window.batch.steps.length, window.batch.frames]")
    seconds = time.monotonic() - start
    assert (later - n_steps) / seconds > 80
    assert (drawn - frames) / seconds >= 20


@pytest.mark.browser
def test_a_preempted_request_that_ends_is_not_preempted_any_more(served: Served, page: Any) -> None:
    """One step an answer: request 2 is preempted before step 1, waits, and is cancelled."""
    sent = 0

    def answer(route: Any) -> None:
        nonlocal sent
        step = {**made_up_step(sent), "lanes": [[0, 1, 0], [2, 2, 0]][: 1 + (sent == 0)]}
        step |= {"preempted": [[2, 2]] * (sent == 1), "reasons": {}}
        stats = {"running": 1, "waiting": int(sent in (1, 2)), "preemptions": 1}
        stats |= {"prefix_hit_rate": 0, "kv_cached": 0, "itl_ms": 9}
        sent += 1
        route.fulfill(json={"steps": [step], "n_slots": 4, "n_cells": 65536, "stats": stats})

    page.route("**/steps*", answer)
    page.goto(served.url)
    until(lambda: page.evaluate("window.batch.steps.length > 5"))
    out = page.evaluate("window.batch.steps.slice(0, 6).map((step) => step.out)")
    assert out == [[], [[2, 2]], [[2, 2]], [[2, 2]], [], []]


@pytest.mark.browser
def test_another_server_at_the_same_address_is_told_from_the_first(
    served: Served,
    page: Any,
) -> None:
    """It numbers its requests from the first one on, and its clock may be behind."""
    since: list[str] = []

    def answer(route: Any) -> None:
        since.append(route.request.url.partition("since=")[2])
        i, server = len(since), "first" if len(since) < 4 else "other"
        step = {**made_up_step(i), "reasons": {}, "lanes": [[0, 1, 7]]}
        step["at"] = 10.0 * i + (1000 if server == "first" else 0)
        stats = {"running": 1, "waiting": 0, "preemptions": 0}
        stats |= {"prefix_hit_rate": 0, "kv_cached": 0, "itl_ms": 9}
        feed = {"server": server, "steps": [step], "n_slots": 4, "n_cells": 65536, "stats": stats}
        route.fulfill(json=feed)

    page.route("**/steps*", answer)
    page.goto(served.url)
    until(lambda: page.evaluate("1") and len(since) > 8)
    assert since[:7] == ["-1", "1010", "1020", "1030", "-1", "50", "60"]
    steps, chunks = page.evaluate(
        "[batch.steps.map((step) => step.at), batch.requests.get(1).chunks]"
    )
    assert steps[0] == 50
    assert len(chunks) == len(steps)


@pytest.mark.browser
def test_another_server_begins_with_an_empty_page(served: Served, page: Any) -> None:
    """Not with the last one's batch, until it has steps itself."""
    others: list[str] = []

    def answer(route: Any) -> None:
        stats = {"running": 0, "waiting": 0, "preemptions": 0}
        stats |= {"prefix_hit_rate": 0, "kv_cached": 0, "itl_ms": 9}
        feed = {"server": "first", "steps": [], "n_slots": 64, "n_cells": 65536, "stats": stats}
        if others:
            feed["server"] = others[0]
        elif route.request.url.endswith("=-1"):
            feed["steps"] = [made_up_step(1)]
        route.fulfill(json=feed)

    def drawn() -> int:
        """How opaque the first step of the first lane is."""
        return int(page.evaluate("pen.getImageData(GUTTER + 1, TOP + 1, 1, 1).data[3]"))

    page.route("**/steps*", answer)
    page.goto(served.url)
    until(drawn)
    others.append("other")
    until(lambda: not drawn())


@pytest.mark.browser
def test_the_page_s_chat_shows_thoughts_and_failures(served: Served, page: Any) -> None:
    deltas: list[dict[str, Any]] = [{"reasoning_content": "Hm. "}, {"content": "42"}]
    events = [f"data: {json.dumps({'choices': [{'delta': delta}]})}\n\n" for delta in deltas]
    page.route("**/v1/chat/*", lambda route: route.fulfill(body="".join(events)))
    page.goto(served.url)
    page.fill("#question", "?")
    page.click("#chat button")
    until(lambda: page.inner_text("#answer") == "Hm. 42")
    page.unroute("**/v1/chat/*")
    page.route("**/v1/chat/*", lambda route: route.abort())
    page.click("#chat button")
    until(lambda: "[Failed to fetch]" in page.inner_text("#answer"))


@pytest.mark.browser
def test_recorded_in_a_browser(page: Any, tmp_path: Path) -> None:
    path = tmp_path / "steps.html"
    steps = [made_up_step(i) for i in range(300)]
    steps[0]["reasons"] = {"3": "</script> or <!--<script>"}  # a policy's own words
    steps += [{**steps[-1], "at": 3000.0 + i, "lanes": []} for i in range(20_000)]
    path.write_text(live.page(steps, "steps.json"))
    page.goto(path.as_uri())
    assert page.title() == "steps.json"
    assert page.evaluate("[window.batch.steps.length, window.batch.nSlots]") == [20_300, 64]
    assert not page.is_visible("#chat")


@pytest.mark.browser
def test_lanes_of_padding_and_preempted_ones(page: Any, tmp_path: Path) -> None:
    """Request 1 decodes in slot 0, 2 in slot 2 is preempted before step 1 and goes on in slot 1 at
    step 3; slot 3 fills up."""
    lanes = [[[0, 1, 0], [2, 2, 0]], [[0, 1, 0]], [[0, 1, 0]], [[0, 1, 0], [1, 2, 3]]]
    steps = [
        {
            **made_up_step(i), "lanes": its, "padded": [3], "preempted": [[2, 2]] * (i == 1),
            "rows": 8, "prefill": 0, "decode": 8, "sampled": 3, "drafted": 5, "accepted": 2,
            "filled": 1, "reasons": {},
        }
        for i, its in enumerate(lanes)
    ]  # fmt: skip
    path = tmp_path / "steps.html"
    path.write_text(live.page(steps, "steps.json"))
    page.goto(path.as_uri())
    until(lambda: page.evaluate("!window.batch.changed"))
    assert [[color_at(page, i, slot + 0.5) for slot in range(4)] for i in range(4)] == [
        ["decode", "", "decode", "filled"],
        ["decode", "", "preempted", "filled"],
        ["decode", "", "preempted", "filled"],
        ["decode", "prompt", "", "filled"],
    ]
    assert page.evaluate("rowsOf(state.steps[0])") == [
        ["decode", 1], ["accepted", 2], ["rejected", 3], ["prompt", 0], ["filled", 3],
    ]  # fmt: skip
    figures = page.inner_text("#figures").split("\n")
    seconds = (steps[3]["at"] + steps[3]["ms"] - steps[0]["at"]) / 1000
    assert f"tokens/s{12 / seconds:.0f}" in "".join(figures)
    x, y = page.evaluate("[GUTTER + 2 * state.zoom + 2, TOP + 2.5 * laneHeight()]")
    page.click("#canvas", position={"x": x, "y": y})
    about = page.inner_text("#about")
    assert "9 rows (1 decode, 5 drafted, of which 2 right, 0 of prompts, 3 padding)" in about
    assert "request 2: slot 2, 1" in about
    assert "preempted 1 times" in about


@pytest.mark.browser
def test_a_prompt_that_is_filled_up(page: Any, tmp_path: Path) -> None:
    """Of slot 1, to three times as many rows: as many as that in slot 0 has."""
    counts = {"rows": 41, "prefill": 40, "decode": 1, "sampled": 1, "filled": 0, "reasons": {}}
    lanes = [[0, 1, 30], [1, 2, 10], [3, 3, 0]]
    step = {**made_up_step(0), **counts, "lanes": lanes, "prompt_filled": [[1, 20]]}
    path = tmp_path / "steps.html"
    path.write_text(live.page([step], "steps.json"))
    page.goto(path.as_uri())
    until(lambda: page.evaluate("!window.batch.changed"))
    found = [color_at(page, 0, lane) for lane in (0.1, 0.5, 1.1, 1.5, 1.85, 3.5)]
    assert found == ["prompt", "prompt", "filled", "filled", "prompt", "decode"]
    x, y = page.evaluate("[GUTTER + 2, TOP + 1.5 * laneHeight()]")
    page.click("#canvas", position={"x": x, "y": y})
    about = page.inner_text("#about")
    assert "61 rows (1 decode, 0 drafted, of which 0 right, 40 of prompts, 20 padding)" in about
    assert "request 2: slot 1; prompt rows 10;" in about


def color_at(page: Any, step: int, lane: float) -> str:
    """The name of the color of a step's column, so many lanes from the top; "" for none."""
    found: str = page.evaluate(
        """([step, lane]) => {
        const x = GUTTER + step * state.zoom + 2, y = TOP + lane * laneHeight();
        const at = [...pen.getImageData(x * devicePixelRatio, y * devicePixelRatio, 1, 1).data];
        const hex = "#" + at.slice(0, 3).map((v) => v.toString(16).padStart(2, "0")).join("");
        const names = ["decode", "prompt", "filled", "preempted"];
        return at[3] ? names.find((name) => color(name) === hex) : ""; }""",
        [step, lane],
    )
    return found


def made_up_step(i: int) -> live.Step:
    """64 sequences that come and go."""
    lanes = [
        [slot, 1 + slot + 64 * ((i + 7 * slot) // 100), 32 if (i + 7 * slot) % 100 < 4 else 0]
        for slot in range(64)
    ]
    n_prompt = sum(n for _, _, n in lanes)
    n_decode = sum(n == 0 for _, _, n in lanes)
    return {
        "at": 10.0 * i,
        "ms": 8 + (i % 7) / 2,
        "phases": [0.1, 5, 2, 0.9, 0.8],
        "rows": n_prompt + n_decode,
        "prefill": n_prompt,
        "decode": n_decode,
        "sampled": n_decode,
        "filled": 4,
        "drafted": 0,
        "accepted": 0,
        "kv_used": 20_000 + 40 * (i % 500),
        "reused": 1,
        "code": 0,
        "lanes": lanes,
        "prompt_filled": [],
        "preempted": [],
        "padded": [],
        "reasons": {"3": "it has waited for 2 s"} if i % 50 == 0 else {},
    }
