"""/metrics of a server with one slot, with and without drafts."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyllamabatch.llama.model import Model
from tests.support.served import serving
from tests.support.speculating import always

N = 60
DRAFTS = ("drafts", "draft_tokens", "accepted_tokens")


def figures(text: str) -> dict[str, float]:
    """The last bucket of a histogram, a draft's place and such are not among these."""
    samples = [s for f in text_string_to_metric_families(text) for s in f.samples]
    return {s.name: s.value for s in samples if not s.labels}


@pytest.mark.parametrize("drafts", [True, False])
def test_one_slot(embedded_model: Model, drafts: bool) -> None:
    how: dict[str, Any] = {"speculate": None}
    if drafts:
        how = {"speculate": "ngram", "policy": always(8, 16)}
    prompt = [5, 6, 7, 8] * 5
    body = {"temperature": 0, "ignore_eos": True, "n_predict": N, "prompt": prompt}
    body["logit_bias"] = [[97, 25.0], [98, 25.0]]  # a loop: drafts are often right
    with serving(embedded_model, n_seq_max=1, **how) as served:
        answer = served.ok("/completion", body)
        (slot,) = served.client.get("/slots").json()
        text, stats = served.client.get("/metrics").text, served.engine.stats()
    found = figures(text)
    assert answer["tokens_predicted"] == N == stats.tokens
    assert slot["speculative"] is drafts
    assert (stats.steps < stats.decode_rows) is drafts
    assert found["llamacpp:n_busy_slots_per_decode"] == 1
    assert found["vllm:iteration_tokens_total_count"] == stats.steps
    assert found["vllm:iteration_tokens_total_sum"] == stats.prefill_rows + stats.tokens
    assert found["vllm:inter_token_latency_seconds_count"] == N - 1  # in one piece
    timings = answer["timings"]
    itl = pytest.approx(1e-3 * timings["predicted_ms"])
    assert found["vllm:inter_token_latency_seconds_sum"] == itl
    name = "llamacpp:n_tokens_max"
    assert f"# TYPE {name} counter\n{name} {len(prompt) + N}\n" in text
    counts = [stats.drafts, stats.drafted_tokens, stats.accepted_tokens]
    for name in ("vllm", "llamacpp"):
        assert [found[f"{name}:spec_decode_num_{one}_total"] for one in DRAFTS] == counts
    assert (stats.accepted_tokens > 0) is drafts
