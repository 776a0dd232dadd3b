"""OpenAI's completions and chats: whole, streamed, refused."""

import json
import logging
import math
from typing import Any

import pytest

from pyllamabatch.llama.model import Model
from pyllamabatch.server.options import ServerOptions
from pyllamabatch.step.sampling_params import SamplingParams
from tests.support.served import ANSWER, ENDLESS, SUM, SUM_CHAT, Served, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat_text(events: list[Any], choice: int = 0) -> str:
    choices = [c for e in events if e != "[DONE]" for c in e["choices"] if c["index"] == choice]
    return "".join(c["delta"].get("content") or "" for c in choices)


def test_models_and_health(served: Served) -> None:
    assert served.client.get("/health").json() == {"status": "ok"}
    (model,) = served.client.get("/v1/models").json()["data"]
    assert served.client.get("/v1/models/").json()["data"] == [model]
    assert model["id"] == "default.gguf"
    assert model["meta"]["n_ctx_train"] == served.engine.model.n_ctx_train


def test_chat(served: Served) -> None:
    answer = served.ok(CHAT, {**SUM_CHAT, "model": "any"})
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert answer["usage"]["completion_tokens"] == 2
    prompt = served.engine.model.vocab.apply_chat_template(SUM_CHAT["messages"])
    assert answer["usage"]["prompt_tokens"] == len(served.engine.model.vocab.tokenize(prompt))
    assert answer["timings"]["predicted_n"] == 2
    assert answer["model"] == "any"
    counted = served.ok(f"{CHAT}/input_tokens", SUM_CHAT)["input_tokens"]
    assert counted == answer["usage"]["prompt_tokens"]


def test_chat_streamed(served: Served) -> None:
    body = {**SUM_CHAT, "stream_options": {"include_usage": True}}
    *events, last, done = served.events(CHAT, body)
    assert done == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert chat_text(events) == ANSWER
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + [
        "stop"
    ]
    assert all(e["usage"] is None for e in events)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == last["timings"]["predicted_n"] == 2
    assert len({e["id"] for e in [*events, last]}) == 1


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_usage_so_far_in_each_event(served: Served, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**ENDLESS, **SUM_CHAT, "max_tokens": 6, "stream_options": options}
    body.pop("messages" if path == TEXT else "prompt")
    *events, last, _ = served.events(path, body)
    counts = [e["usage"]["completion_tokens"] for e in events]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"] == 6
    assert {e["usage"]["prompt_tokens"] for e in [*events, last]} == {
        last["usage"]["prompt_tokens"]
    }


def test_the_text_is_the_engines(served: Served) -> None:
    """Whole and streamed, with stop strings, seeds, penalties and a bias."""
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"temperature": 0}, {"temperature": 0}),
        ({"seed": 3, "temperature": 1.5, "top_k": 0}, {"seed": 3, "temperature": 1.5, "top_k": 0}),
        ({"seed": 3, "temperature": 1.5, "samplers": ["top_k", "xtc"], "top_k": 90},
         {"seed": 3, "temperature": 1.0, "top_k": 90, "top_p": 1.0, "min_p": 0.0}),
        ({"temperature": 0, "stop": "2"}, {"temperature": 0, "stop": ("2",)}),
        ({"temperature": 0, "logit_bias": {"52": -100}}, {"logit_bias": {52: -math.inf}}),
        ({"temperature": 0, "logit_bias": [["4", False]]}, {"logit_bias": {52: -math.inf}}),
        ({"temperature": 0, "logit_bias": {"52": False}}, {"logit_bias": {52: -math.inf}}),
        ({"temperature": 0, "presence_penalty": 2.0, "repeat_last_n": -1},
         {"presence_penalty": 2.0, "penalty_last_n": -1}),
    ]  # fmt: skip
    prompt = served.engine.model.vocab.apply_chat_template(SUM_CHAT["messages"])
    texts = set()
    for wire, fields in cases:
        params = SamplingParams(
            **{"temperature": 0, **fields, "max_tokens": 24, "ignore_eog": True}
        )
        expected = served.engine.submit(prompt, params, parse_special=True).result(60)
        body = {"prompt": prompt, "max_tokens": 24, "ignore_eos": True, **wire}
        (choice,) = served.ok(TEXT, body)["choices"]
        assert choice["text"] == expected.text, wire
        assert choice["finish_reason"] == expected.finish_reason
        events = served.events(TEXT, body)
        assert "".join(e["choices"][0]["text"] for e in events[:-1]) == expected.text
        texts.add(expected.text)
    assert len(texts) == len(cases) - 2  # three have the same bias: each case says something


def test_several_prompts_and_samples(served: Served) -> None:
    tokens = served.engine.model.vocab.tokenize(SUM).tolist()
    drawn = {"seed": 7, "temperature": 2.0, "top_k": 0, "max_tokens": 8, "ignore_eos": True}
    body = {**drawn, "prompt": [SUM, SUM], "n": 2}
    answer = served.ok(TEXT, body)
    texts = [choice["text"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert texts[:2] == texts[2:]  # the seeds of a prompt's samples are seed, seed + 1
    assert texts[0] != texts[1]
    by_id = served.ok(TEXT, {**body, "prompt": [tokens, tokens]})
    assert [choice["text"] for choice in by_id["choices"]] == texts
    assert served.ok(TEXT, {**body, "prompt": tokens, "n": 1})["choices"][0]["text"] == texts[0]
    chat = {**SUM_CHAT, **drawn, "n": 3}
    whole = [c["message"]["content"] for c in served.ok(CHAT, chat)["choices"]]
    events = served.events(CHAT, chat)
    assert [chat_text(events, i) for i in range(3)] == whole


def test_logprobs_in_both_forms(served: Served) -> None:
    chat = {**SUM_CHAT, "logprobs": True, "top_logprobs": 2}
    content = served.ok(CHAT, chat)["choices"][0]["logprobs"]["content"]
    assert "".join(one["token"] for one in content) == ANSWER
    assert [len(one["top_logprobs"]) for one in content] == [2, 2]
    assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"] <= 0
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    streamed = [
        one
        for event in served.events(CHAT, chat)[:-1]
        for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [one["token"] for one in streamed] == [one["token"] for one in content]

    text = {"prompt": SUM, "temperature": 0, "max_tokens": 4, "logprobs": 2, "ignore_eos": True}
    columns = served.ok(TEXT, text)["choices"][0]["logprobs"]
    assert columns["text_offset"] == [0, 1, 2, 3]
    assert [len(top) for top in columns["top_logprobs"]] == [2] * 4
    hot = {**text, "temperature": 3, "top_k": 0, "seed": 1, "max_tokens": 20, "logprobs": 1}
    found = served.ok(TEXT, hot)["choices"][0]["logprobs"]
    sampled = zip(found["top_logprobs"], found["tokens"], found["token_logprobs"], strict=True)
    assert all(top[token] == logprob for top, token, logprob in sampled)
    assert max(map(len, found["top_logprobs"])) == 2  # the likeliest, and the sampled one
    streamed = [e["choices"][0]["logprobs"] for e in served.events(TEXT, text)[:-1]]
    for name in ("tokens", "text_offset"):
        assert [value for s in streamed if s for value in s[name]] == columns[name]


def test_offsets_are_the_texts(served: Served) -> None:
    """Also behind characters of several tokens, whole and streamed."""
    chat = [{"role": "user", "content": "Copy: ñ€ x"}]
    prompt = served.engine.model.vocab.apply_chat_template(chat)
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 20, "logprobs": 1}
    (choice,) = served.ok(TEXT, body)["choices"]
    found, text = choice["logprobs"], choice["text"]
    assert len(text.encode()) > len(text) > 3
    whole = list(zip(found["tokens"], found["text_offset"], strict=True))
    assert [(token, text[at]) for token, at in whole if token.isascii()] == [
        (one, one) for one in text if one.isascii()
    ]
    streamed = [e["choices"][0]["logprobs"] for e in served.events(TEXT, body)[:-1]]
    assert [at for one in streamed if one for at in one["text_offset"]] == [at for _, at in whole]


def test_json(served: Served) -> None:
    schema = {
        "type": "object",
        "properties": {"sum": {"type": "integer"}, "right": {"type": "boolean"}},
        "required": ["sum", "right"],
        "additionalProperties": False,
    }
    formats = [
        {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        {"type": "json_object", "schema": schema},
    ]
    for response_format in formats:
        chat = {**SUM_CHAT, "response_format": response_format, "max_tokens": 200}
        value = json.loads(served.ok(CHAT, chat)["choices"][0]["message"]["content"])
        assert value.keys() == {"sum", "right"}
    any_object: list[dict[str, Any]] = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "any"}},
        {"type": "json_schema", "json_schema": {"name": "any", "schema": None}},
    ]
    for response_format in any_object:
        chat = {**SUM_CHAT, "response_format": response_format, "max_tokens": 12}
        assert served.ok(CHAT, chat)["choices"][0]["message"]["content"].startswith("{")


def test_budget_ends_with_length(served: Served) -> None:
    chat = {**SUM_CHAT, "max_completion_tokens": 1}
    assert served.ok(CHAT, chat)["choices"][0]["finish_reason"] == "length"
    # without a budget it goes on to the end of its cells
    body = {"prompt": SUM, "ignore_eos": True, "temperature": 0}
    answer = served.ok(TEXT, body)
    limits = served.engine.limits
    assert answer["usage"]["total_tokens"] == limits.n_cells_seq + 1
    assert served.ok(TEXT, {**body, "timeout": 0})["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT, {"temprature": 1}, "temprature", "temperature"),
        (CHAT, {"temperature": -1}, "temperature", "-1"),
        (CHAT, {"temperature": "hot"}, "temperature", "hot"),
        (CHAT, {"top_p": 1.5}, "top_p", "0..1"),
        (CHAT, {"n": 0}, "n", "greater than or equal to 1"),
        (CHAT, {"n": 1000}, "n", "at most 128"),
        (CHAT, {"messages": []}, "messages", "at least 1"),
        (CHAT, {"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", "human"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "3"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content", "image_url"),
        (CHAT, {"chat_template_kwargs": {"mood": 1, "messages": []}}, "chat_template_kwargs",
         "messages"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 50}, "top_logprobs", "20"),
        (TEXT, {"prompt": SUM, "logprobs": 50}, "logprobs", "20"),
        ("/completion", {"prompt": SUM, "n_probs": 50}, "n_probs", "20"),
        ("/v1/responses", {"input": SUM, "include": ["message.output_text.logprobs"],
         "top_logprobs": 50}, "top_logprobs", "20"),
        (CHAT, {"repeat_last_n": -7}, "repeat_last_n", "-7"),
        (CHAT, {"penalty_last_n": -7}, "penalty_last_n", "-7"),
        (CHAT, {"repetition_penalty": -1}, "repetition_penalty", "-1"),
        ("/tokenize", {"content": [2**40]}, "content[0]", str(2**40)),
        ("/v1/messages", {"messages": [{"role": "user", "content": []}], "max_tokens": 3},
         "messages[0].content", "at least one"),
        (CHAT, {"logit_bias": {"9999": 1}}, "logit_bias[0]", "9999"),
        (CHAT, {"logit_bias": [[52, True]]}, "logit_bias", "a number or false"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        (CHAT, {"response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "string", "format": "email"}}}},
         "json_schema: format", "email"),
        (CHAT, {"grammar": "root ::= ("}, "grammar", "column"),
        (CHAT, {"mirostat": 2}, "mirostat", "no such sampler"),
        (CHAT, {"samplers": ["top_k", "infill"]}, "samplers", "must be some of penalties, top_k"),
        (CHAT, {"samplers": ["temperature", "top_k"]}, "samplers", "in this order"),
        (CHAT, {"ttft_target": -1}, "ttft_target", "-1"),
        (CHAT, {"itl_target": -1}, "itl_target", "-1"),
        (CHAT, {"min_keep": 2}, "min_keep", "2"),
        (CHAT, {"n_indent": 4}, "n_indent", "4"),
        (CHAT, {"t_max_prompt_ms": 50}, "t_max_prompt_ms", "50"),
        (CHAT, {"t_max_predict_ms": 50}, "t_max_predict_ms", "50"),
        (CHAT, {"grammar_lazy": True}, "grammar_lazy", "True"),
        (CHAT, {"grammar_triggers": [{"type": 1, "value": "a"}]}, "grammar_triggers", "value"),
        (CHAT, {"preserved_tokens": ["</s>"]}, "preserved_tokens", "</s>"),
        (CHAT, {"top_k": 2**31}, "top_k", "-1..2147483647"),
        (CHAT, {"max_tokens": 0, "grammar": "root ::= ("}, "grammar", "column"),
        (TEXT, {"prompt": SUM, "n": 2, "best_of": 3}, "best_of", "3"),
        ("/v1/responses", {"input": SUM, "include": ["all"]}, "include.0", "logprobs"),
        ("/v1/responses", {"input": SUM, "top_logprobs": 2}, "top_logprobs", "include"),
        (TEXT, {"prompt": ""}, "prompt", "empty"),
        (TEXT, {"prompt": [SUM, ""]}, "prompt", "prompt='': has no tokens"),
        ("/completion", {"prompt": ""}, "prompt", "prompt='': has no tokens"),
        (TEXT, {"prompt": [99999]}, "prompt[0]", "99999"),
        (TEXT, {"prompt": SUM, "suffix": "end"}, "suffix", "end"),
        (TEXT, {}, "prompt", "missing"),
        (TEXT, {"prompt": SUM, "lora": "style"}, "lora", "style"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(
    served: Served, path: str, change: Any, param: str | None, words: str
) -> None:
    error = served.refused(path, {**(SUM_CHAT if path == CHAT else {}), **change})
    assert error["param"] == param, error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_a_clients_mistake_is_told_to_the_client_alone(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    schema = {"type": "nonsense"}
    for path, body in (
        (TEXT, {"prompt": SUM, "json_schema": schema}),
        (CHAT, {**SUM_CHAT, "response_format": {"type": "json_object", "schema": schema}}),
    ):
        assert "unrecognized type nonsense" in served.refused(path, body)["message"]
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


def test_values_that_change_nothing_pass(served: Served) -> None:
    off: dict[str, Any] = {
        "min_keep": 0, "n_indent": 0, "t_max_prompt_ms": -1, "grammar_lazy": False,
        "grammar_triggers": [], "preserved_tokens": [], "best_of": 1, "timings_per_token": True,
        "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc",
                     "temperature"],
    }  # fmt: skip
    none = {
        "t_max_prompt_ms": 0, "t_max_predict_ms": 0, "grammar": "",
        "stream_options": {"include_usage": None},
    }  # fmt: skip
    body = {"prompt": SUM, "seed": 5, "temperature": 1.2, "max_tokens": 8, "ignore_eos": True}
    assert served.ok(TEXT, body | none)["choices"] == served.ok(TEXT, body)["choices"]
    assert served.ok(TEXT, body | off)["choices"] == served.ok(TEXT, body)["choices"]
    two = body | {"n": 2}
    assert served.ok(TEXT, two | {"best_of": 2})["choices"] == served.ok(TEXT, two)["choices"]


def test_samplers_have_llama_servers_spellings(served: Served) -> None:
    """Unknown ones are left out."""
    body = {"prompt": SUM, "seed": 5, "temperature": 1.7, "max_tokens": 9, "ignore_eos": True}
    names, others = ["top_k", "typ_p", "top_p", "temperature"], ["topk", "typ", "nucleus", "temp"]
    more = ["Top-K", "TYP-P", "tfs_z", "top-n-sigma", "topp", "Temperature"]
    one, two, three = (
        served.ok(TEXT, {**body, "samplers": some})["choices"] for some in (names, others, more)
    )
    assert one == two == three
    assert one != served.ok(TEXT, {**body, "samplers": names[:-1]})["choices"]


def test_too_long_says_the_numbers(served: Served) -> None:
    n_ctx = served.engine.n_ctx_seq
    for path, body in (
        (TEXT, {"prompt": "a" * (n_ctx + 50)}),
        (CHAT, {"messages": [{"role": "user", "content": "a" * (n_ctx + 50)}], "stream": True}),
    ):
        error = served.refused(path, body)
        assert error["code"] == "context_length_exceeded"
        assert error["n_prompt_tokens"] > error["n_ctx"] == n_ctx
        assert str(error["n_prompt_tokens"]) in error["message"]


def test_what_a_request_says_is_before_the_servers_own(embedded_model: Model) -> None:
    """A schema, no grammar and a random seed, too, where the server has others for who says
    nothing."""
    defaults = {"grammar": "root ::= [a-c]+", "seed": 5, "max_tokens": 8, "logprobs": 3}
    with serving(embedded_model, ServerOptions(sampling=defaults)) as served:

        def text(**more: Any) -> str:
            body = {"prompt": SUM, "temperature": 2, "ignore_eos": True, **more}
            return str(served.ok(TEXT, body)["choices"][0]["text"])

        own = text()
        assert own == text()
        assert set(own) <= set("abc")
        assert {text(seed=-1) for _ in range(20)} != {own}
        assert not set(text(grammar="", temperature=0)) <= set("abc")
        assert text(json_schema={"const": "A"}, ignore_eos=False) == '"A"'
        said = served.ok("/completion", {"prompt": SUM})["generation_settings"]
        assert (said["n_probs"], said["seed"]) == (0, 5)  # no answer would show them


def test_a_method_that_is_not_there_names_those_that_are(served: Served) -> None:
    response = served.client.get("/tokenize")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "Method Not Allowed"


def test_bodies_that_are_none(served: Served) -> None:
    for content in (b"", b"{", b"[]", b'"a"', b'{"prompt": "\xff"}', b"[" * 100_000,
                    b'{"prompt": "\\ud800"}'):  # fmt: skip
        response = served.client.post(TEXT, content=content)
        assert response.status_code == 400, content[:20]
        assert response.json()["error"]["code"] == "invalid_json"
    deep = '{"prompt": "a", "json_schema": ' + '{"not": ' * 900 + "{}" + "}" * 901
    assert served.client.post(TEXT, content=deep).status_code == 400
    assert served.client.get(TEXT).json()["error"]["message"] == "Method Not Allowed"
    assert served.client.get("/nothing").status_code == 404
    assert "error" in served.client.get("/nothing").json()


def test_the_description_has_every_body(served: Served) -> None:
    description = served.client.get("/openapi.json").json()
    body = description["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]
    schemas = description["components"]["schemas"]
    chat = schemas[body["schema"]["$ref"].rpartition("/")[2]]
    assert {"messages", "temperature", "max_completion_tokens", "priority"} <= chat[
        "properties"
    ].keys()
    assert "ResponseFormat" in schemas
    (named,) = description["paths"]["/v1/models/{id}"]["get"]["parameters"]
    assert (named["name"], named["in"]) == ("id", "path")
