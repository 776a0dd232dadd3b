"""A server on a profile machine: HTTP, streams and counters as always, and no model."""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx

from pyllamabatch.cli import serve
from tests.support.machines import fast_profile
from tests.support.served import running


def test_it_answers_that_no_model_wrote_this(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    args = parser.parse_args(["--machine", str(fast_profile(tmp_path)), "-np", "2", "-q"])
    with (
        serve.opened(args) as app,
        running(app) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
        answer = client.post("/v1/chat/completions", json=chat).raise_for_status().json()
        assert "No model wrote this" in answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] == 30
        both = client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 5})
        texts = [choice["text"] for choice in both.raise_for_status().json()["choices"]]
        assert texts == [texts[0]] * 2
        slots = client.get("/slots").raise_for_status().json()
        assert len(slots) == 2
