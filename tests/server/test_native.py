"""llama-server's interface, embeddings, and what the server says of itself."""

import base64
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyllamabatch.llama.model import Model
from pyllamabatch.server import native
from pyllamabatch.server.app import create_app
from pyllamabatch.server.options import ServerOptions
from pyllamabatch.server.service import Service
from tests.support.engines import held
from tests.support.models_special import write_bert
from tests.support.served import ANSWER, ENDLESS, SUM, SUM_CHAT, Served, running, serving

GREEDY: dict[str, Any] = {"temperature": 0, "n_predict": 6, "ignore_eos": True}


def test_completion_whole_and_streamed(served: Served) -> None:
    body = {**GREEDY, "prompt": SUM, "return_tokens": True, "n_probs": 2}
    whole = served.ok("/completion", body)
    *chunks, last = served.events("/completion", body)
    assert "".join(chunk["content"] for chunk in chunks) == whole["content"]
    assert [t for chunk in chunks for t in chunk["tokens"]] == whole["tokens"]
    assert not any(chunk["stop"] for chunk in chunks)
    for answer in (whole, last):
        assert (answer["stop"], answer["stop_type"]) == (True, "limit")
        assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == 6
        assert answer["timings"]["prompt_n"] + answer["timings"]["cache_n"] == len(
            served.engine.model.vocab.tokenize(SUM)
        )
        assert answer["generation_settings"]["n_predict"] == 6
        assert answer["prompt"] == SUM
    assert last["content"] == ""
    probabilities = whole["completion_probabilities"]
    assert [p["id"] for p in probabilities] == whole["tokens"]
    assert all(len(p["top_logprobs"]) == 2 for p in probabilities)
    # several prompts, of tokens and texts
    tokens = served.engine.model.vocab.tokenize(SUM).tolist()
    many = served.ok("/completion", {**GREEDY, "prompt": [SUM, tokens, [*tokens[:4], SUM[4:]]]})
    assert [answer["content"] for answer in many[:2]] == [whole["content"]] * 2
    assert len(many) == 3
    stopped = served.ok("/completion", {**GREEDY, "prompt": SUM, "stop": [whole["content"][1]]})
    assert (stopped["stop_type"], stopped["stopping_word"]) == ("word", whole["content"][1])
    assert stopped["content"] == whole["content"][:1]


def test_how_to_draft_has_no_say_in_the_text(served: Served) -> None:
    names = ("n_max", "n_min", "p_min", "ngram_size_n", "ngram_size_m", "ngram_min_hits")
    drafts = {f"speculative.{name}": 1 for name in names} | {"speculative.type": "ngram_simple"}
    plain, with_drafts = (
        served.ok("/completion", {**GREEDY, "prompt": SUM, **more}) for more in ({}, drafts)
    )
    assert with_drafts["content"] == plain["content"]


def test_nothing_of_a_text_warms_the_prefix_cache(served: Served) -> None:
    tokens = [*range(40, 90), *range(60, 40, -1)]
    options = {"n_predict": 0, "stop": ["a"], "n_probs": 1}
    cold = served.ok("/completion", {**options, "prompt": tokens, "return_tokens": True})
    (last,) = served.events("/completion", {**options, "prompt": tokens})
    warm = served.ok("/completion", {**GREEDY, "prompt": tokens})
    for answer in (cold, last):
        assert (answer["content"], answer["tokens"], answer["stop_type"]) == ("", [], "limit")
        assert answer["tokens_predicted"] == answer["timings"]["predicted_n"] == 0
        assert answer["generation_settings"]["n_predict"] == 0
    assert [a["timings"]["cache_n"] for a in (cold, last, warm)] == [0] + [len(tokens) - 1] * 2


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/chat/completions", {"max_tokens": 0, "n": 2, "messages": SUM_CHAT["messages"]}),
        ("/v1/completions", {"max_tokens": 0, "prompt": SUM, "logprobs": 1}),
        ("/v1/messages", {"max_tokens": 0, "model": "m", "messages": SUM_CHAT["messages"]}),
        ("/v1/responses", {"max_output_tokens": 0, "input": SUM}),
    ],
)
def test_every_interface_can_ask_for_nothing(
    served: Served, path: str, more: dict[str, Any]
) -> None:
    answer = served.ok(path, more)
    usage = answer["usage"]
    assert usage.get("completion_tokens", usage.get("output_tokens")) == 0
    events = [e for e in served.events(path, more) if isinstance(e, dict)]
    choices = [choice for event in events for choice in event.get("choices", ())]
    assert not [c for c in choices if c.get("text") or c.get("delta", {}).get("content")]
    assert not [e for e in events if "delta" in e.get("type", "") and e["type"] != "message_delta"]


def test_tokens_and_templates(served: Served) -> None:
    vocab = served.engine.model.vocab
    tokens = served.ok("/tokenize", {"content": "Añ!"})["tokens"]
    assert tokens == vocab.tokenize("Añ!", add_special=False, parse_special=True).tolist()
    assert served.ok("/detokenize", {"tokens": tokens}) == {"content": "Añ!"}
    special = served.ok("/tokenize", {"content": "a", "add_special": True})["tokens"]
    assert special == vocab.tokenize("a").tolist()
    for content in ("<|im_end|>", ["<|im_end|>"]):
        for parses in (True, False):
            body = {"content": content, "parse_special": parses}
            assert (len(served.ok("/tokenize", body)["tokens"]) == 1) is parses
    pieces = served.ok("/tokenize", {"content": "Añ", "with_pieces": True})["tokens"]
    assert pieces[0]["piece"] == "A"
    assert bytes(b for p in pieces[1:] for b in p["piece"]).decode() == "ñ"
    prompt = served.ok("/apply-template", {"messages": SUM_CHAT["messages"]})["prompt"]
    assert prompt == vocab.apply_chat_template(SUM_CHAT["messages"])
    assert served.refused("/detokenize", {"tokens": [9999]})["param"].startswith("tokens")


def test_each_piece_is_looked_up_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 700 kB took 45 seconds, and the streams beside it stood still for four of them."""
    looked_up: list[int] = []
    piece = native._piece

    def counted(service: Service, token: int) -> str | list[int]:
        looked_up.append(token)
        return piece(service, token)

    monkeypatch.setattr(native, "_piece", counted)
    found = served.ok("/tokenize", {"content": "Añ" * 50, "with_pieces": True})["tokens"]
    assert found[:3] * 50 == found
    assert len(looked_up) == 3


def test_settings_may_be_sent_back(served: Served) -> None:
    asked = {**GREEDY, "prompt": SUM, "samplers": ["Top-K", "temp"], "repeat_last_n": 9}
    settings = served.ok("/completion", asked)["generation_settings"]
    assert settings["samplers"] == ["top_k", "temperature"]
    again = served.ok("/completion", {**settings, "prompt": SUM})
    assert again["generation_settings"] == settings


def test_props_slots_and_metrics(served: Served) -> None:
    props = served.client.get("/props").json()
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == served.engine.limits.n_cells_seq
    params = props["default_generation_settings"]["params"]
    assert (params["top_k"], params["n_predict"], params["max_tokens"]) == (40, -1, -1)
    assert "assistant" in props["chat_template"]
    body = {**ENDLESS, "tenant": "anna", "stream": True}
    with (
        held(served.engine),
        served.client.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()  # the client leaves with it
        next(lines)
        slots = served.client.get("/slots").json()
        busy = [s for s in slots if s["is_processing"]]
        idle = {"has_next_token": False, "n_remain": -1, "n_decoded": 0}
        assert [s["next_token"] for s in slots if s not in busy] == [[idle]] * 3
        assert [(s["tenant"], s["n_ctx"]) for s in busy] == [("anna", 1024)]
        (following,) = busy[0]["next_token"]
        assert following["has_next_token"]
        assert following["n_decoded"] + following["n_remain"] == ENDLESS["max_tokens"]
    served.ok("/completion", {**GREEDY, "prompt": SUM})
    response = served.client.get("/metrics")
    families = {f.name: f for f in text_string_to_metric_families(response.text)}
    values = {s.name: s.value for f in families.values() for s in f.samples if not s.labels}
    stats = served.engine.stats()
    assert values["vllm:generation_tokens_total"] <= stats.tokens
    assert values["vllm:num_requests_waiting"] == 0
    assert 0 <= values["vllm:kv_cache_usage_perc"] <= 1
    assert values["llamacpp:n_decode_total"] > 0
    assert values["vllm:inter_token_latency_seconds_count"] > 0
    assert values["vllm:iteration_tokens_total_count"] <= stats.steps
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        family = families[f"vllm:{name}_seconds"]
        assert family.type == "histogram"
        (count,) = (s.value for s in family.samples if s.name.endswith("_count"))
        assert count == next(s.value for s in family.samples if s.labels.get("le") == "+Inf") > 0


def test_the_dashboard_asks_for_what_there_is(served: Served) -> None:
    served.ok("/completion", {**GREEDY, "prompt": SUM})
    there = served.client.get("/metrics").text
    board = json.loads((Path(__file__).parents[2] / "examples/grafana.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"(?:vllm|llamacpp):\w+", target["expr"])
    }
    assert len(asked) >= 15
    assert not [name for name in asked if f"\n{name}" not in there]


def test_an_encoder_makes_embeddings_only(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert.gguf")
    with (
        Model(tmp_path / "bert.gguf") as bert,
        running(create_app(bert, ServerOptions(embeddings=True, pooling="mean"))) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        texts = [[1, 2, 3], [4, 5], [1, 2, 3]]
        answer = client.post("/v1/embeddings", json={"input": texts}).json()
        first, other, again = (np.array(one["embedding"]) for one in answer["data"])
        np.testing.assert_allclose(first, again, atol=1e-5)
        assert abs(first - other).max() > 1e-3
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models").json()["data"][0]["id"] == "bert.gguf"
        assert client.post("/v1/completions", json={"prompt": [1]}).status_code == 501


@pytest.fixture(scope="module")
def embedding(embedded_model: Model) -> Iterator[Served]:
    options = ServerOptions(embeddings=True, slots=False, metrics=False, page=False)
    with serving(embedded_model, options) as served:
        yield served


def test_embeddings(embedding: Served, served: Served) -> None:
    texts = [f"text number {i}" for i in range(20)]  # more than a batch takes
    answer = embedding.ok("/v1/embeddings", {"input": texts, "model": "m"})
    vectors = np.array([one["embedding"] for one in answer["data"]])
    assert vectors.shape == (20, embedding.engine.model.n_embd)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    n = sum(len(embedding.engine.model.vocab.tokenize(text)) for text in texts)
    assert answer["usage"] == {"prompt_tokens": n, "total_tokens": n}
    one = embedding.ok("/v1/embeddings", {"input": texts[7], "encoding_format": "base64"})
    alone = np.frombuffer(base64.b64decode(one["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(alone, vectors[7], atol=0.01)
    whole = embedding.ok("/v1/embeddings", {"input": texts[7], "dimensions": vectors.shape[1]})
    assert len(whole["data"][0]["embedding"]) == vectors.shape[1]
    (raw,) = embedding.ok("/embedding", {"content": texts[7], "embd_normalize": -1})
    np.testing.assert_allclose(
        np.array(raw["embedding"][0]) / np.linalg.norm(raw["embedding"][0]), alone, atol=1e-4
    )
    assert embedding.ok("/v1/chat/completions", SUM_CHAT)["choices"][0]["message"][
        "content"
    ] == ANSWER  # fmt: skip
    assert "1 to 2048" in embedding.refused("/v1/embeddings", {"input": "a" * 3000})["message"]
    for given, param in (
        ({"input": ""}, "input[0]"), ({"input": []}, "input"), ({"content": [2**40]}, "content[0]"),
    ):  # fmt: skip
        assert embedding.refused("/v1/embeddings", given)["param"] == param
    many = embedding.refused("/v1/embeddings", {"input": ["a"] * 2049})
    assert "at most 2048" in many["message"]
    assert "--rerank" in embedding.refused(
        "/rerank", {"query": "a", "documents": ["b"]}, 501
    )["message"]  # fmt: skip
    for path in ("/slots", "/metrics"):
        assert embedding.client.get(path).status_code == 501
    assert "--embeddings" in served.refused("/v1/embeddings", {"input": "a"}, 501)["message"]


def test_documents_by_relevance(tmp_path: Path) -> None:
    """In Jina's form, or where they are texts in that of Text Embeddings Inference."""
    write_bert(tmp_path / "reranker.gguf", reranker=True)
    texts = ["a", "b", "abc"]
    with (
        Model(tmp_path / "reranker.gguf") as model,
        running(create_app(model, ServerOptions(rerank=True))) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def asked(**more: Any) -> Any:
            return client.post("/rerank", json={"query": "ab", **more}).json()

        whole = asked(documents=texts, return_documents=True)
        results = whole["results"]
        assert whole["usage"]["prompt_tokens"] > 0
        assert [one["document"]["text"] for one in results] == [texts[r["index"]] for r in results]
        scores = [one["relevance_score"] for one in results]
        assert scores == sorted(scores, reverse=True)
        first = {"index": results[0]["index"], "score": pytest.approx(scores[0], abs=1e-4)}
        assert asked(texts=texts, top_n=1) == [first]
        assert asked(texts=texts, return_text=True)[0]["text"] == texts[first["index"]]
        for one in asked(texts=texts, raw_scores=False, truncate=False):
            score = next(r["relevance_score"] for r in results if r["index"] == one["index"])
            assert one["score"] == pytest.approx(1 / (1 + math.exp(-score)), abs=1e-4)
        assert asked(texts=texts, truncate=True)["error"]["param"] == "truncate"
        assert asked(texts=["a" * 1000])["error"]["param"] == "texts[0]"
