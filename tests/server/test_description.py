"""Bodies that schemathesis makes up from the OpenAPI description: no crash, no answer of 500 and
over, and every refusal in OpenAI's form.

    pip install -e '.[test,described]' && python -m pytest -m described tests/server
"""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pyllamabatch.llama.model import Model
from pyllamabatch.server.options import ServerOptions
from tests.support.served import Served, serving

pytestmark = [pytest.mark.described, pytest.mark.timeout(1200)]
EXAMPLES = 60  # of each operation, and as many that break its schema
TOKENS_MAX = 8
NOT_STARTED = 501  # the server was not started for this: reranking, here


def test_every_operation(embedded_model: Model) -> None:
    with serving(embedded_model, ServerOptions(embeddings=True)) as served:
        ask_all(served)


def ask_all(served: Served) -> None:
    import schemathesis
    from schemathesis import GenerationMode

    description = served.client.get("/openapi.json").json()
    described: Any = schemathesis.openapi.from_dict(description)
    both: Any = GenerationMode
    counts: Counter[int] = Counter()
    n_operations = 0
    for found in described.get_all_operations():
        operation = found.ok()
        n_operations += 1
        for mode in both if operation.body else [GenerationMode.POSITIVE]:

            @settings(
                max_examples=EXAMPLES,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                if isinstance(case.body, dict):
                    for name in ("max_tokens", "max_output_tokens", "n_predict"):
                        if isinstance(case.body.get(name), int):
                            case.body[name] = min(case.body[name], TOKENS_MAX)
                response = case.call(base_url=served.url, timeout=60)
                counts[response.status_code] += 1
                refused = (response.text, case.as_curl_command())
                assert response.status_code < 500 or response.status_code == NOT_STARTED, refused
                if response.status_code >= 400:
                    assert json.loads(response.text)["error"]["message"], refused

            ask()
    assert n_operations >= 20
    print(f"{n_operations} operations, answers by status: {dict(sorted(counts.items()))}")
    stats = served.engine.stats()
    assert served.client.get("/health").status_code == 200
    assert (stats.waiting, stats.running) == (0, 0)
