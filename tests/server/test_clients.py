"""The real `openai` and `anthropic` clients, and what bodies become."""

from collections.abc import Iterator
from typing import Any

import anthropic
import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam
from pydantic import BaseModel

from pyllamabatch.llama.model import Model
from pyllamabatch.server.messages import MessagesBody, messages_of
from pyllamabatch.server.native import MixedPrompt, prompts_of
from pyllamabatch.server.options import ServerOptions
from tests.support.served import ANSWER, SUM, Served, serving

ASKED: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": SUM}]


class Sum(BaseModel):
    total: int
    sure: bool


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=ASKED, temperature=0, seed=-5)
    assert answer.choices[0].message.content == ANSWER
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2
    text = ""
    stream = client.chat.completions.create(
        model="m", messages=ASKED, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    for chunk in stream:
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert text == ANSWER
    assert usage is not None
    assert usage.completion_tokens == 2


def test_parse(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="m", messages=ASKED, response_format=Sum, temperature=0, max_completion_tokens=400
    )
    assert isinstance(parsed.choices[0].message.parsed, Sum)
    response = client.responses.parse(
        model="m", input=SUM, text_format=Sum, temperature=0, max_output_tokens=400
    )
    assert isinstance(response.output_parsed, Sum)


def test_completions_and_models(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="m", prompt=SUM, max_tokens=3, logprobs=1)
    assert answer.choices[0].logprobs is not None
    assert [model.id for model in client.models.list()] == ["default.gguf"]
    assert client.models.retrieve("default.gguf").id == "default.gguf"
    with pytest.raises(openai.NotFoundError, match="owner/none"):
        client.models.retrieve("owner/none")


def test_embeddings(embedded_model: Model) -> None:
    """The client asks for base64 unless told otherwise."""
    with (
        serving(embedded_model, ServerOptions(embeddings=True)) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        vocab, create = embedded_model.vocab, client.embeddings.create
        texts = [SUM, "zebras"]
        found = create(model="m", input=texts)
        assert [one.index for one in found.data] == [0, 1]
        vectors = np.array([one.embedding for one in found.data])
        assert vectors.shape == (2, embedded_model.n_embd)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        tokens = [vocab.tokenize(text).tolist() for text in texts]
        assert found.usage.prompt_tokens == sum(map(len, tokens))
        by_tokens = create(model="m", input=tokens, encoding_format="float")
        for one, vector in zip(by_tokens.data, vectors, strict=True):
            np.testing.assert_allclose(one.embedding, vector, atol=0.01)
        (alone,) = create(model="m", input=tokens[0]).data
        np.testing.assert_allclose(alone.embedding, vectors[0], atol=0.01)
        with pytest.raises(openai.BadRequestError, match="shortened") as caught:
            create(model="m", input=SUM, dimensions=8)
        assert caught.value.param == "dimensions"


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=ASKED, temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="nearest_field"):
        client.chat.completions.create(
            model="m", messages=ASKED, extra_body={"nearest_field": 1}
        )  # fmt: skip
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="m", input=SUM, previous_response_id="resp_1")
    assert caught.value.param == "previous_response_id"


def test_responses(client: openai.OpenAI) -> None:
    response = client.responses.create(model="m", input=SUM, temperature=0, store=False)
    assert (response.output_text, response.status) == (ANSWER, "completed")
    assert response.usage is not None
    counted = client.responses.input_tokens.count(model="m", input=SUM)
    assert counted.input_tokens == response.usage.input_tokens
    again = client.responses.create(
        model="m",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Copy: hello"}]},
            *[item.model_dump() for item in response.output],  # type: ignore[list-item]
            {"role": "user", "content": SUM},
        ],
        temperature=0,
        max_output_tokens=1,
    )
    assert again.status == "incomplete"
    assert again.incomplete_details is not None
    assert again.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(model="m", input=SUM, temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    assert list(dict.fromkeys(kinds)) == [  # a step or two may be in one delta
        "response.created", "response.in_progress", "response.output_item.added",
        "response.content_part.added", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.completed",
    ]  # fmt: skip


def test_log_probabilities_of_responses(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "m", "input": SUM, "temperature": 0, "top_logprobs": 2,
        "include": ["message.output_text.logprobs", "reasoning.encrypted_content"],
    }  # fmt: skip
    response: Any = client.responses.create(**asked)
    (part,) = response.output[0].content
    assert "".join(one.token for one in part.logprobs) == ANSWER
    assert [len(one.top_logprobs) for one in part.logprobs] == [2, 2]
    with client.responses.stream(**asked) as stream:
        events: list[Any] = list(stream)
        final: Any = stream.get_final_response()
    (whole,) = final.output[0].content
    new = [one for e in events if e.type == "response.output_text.delta" for one in e.logprobs]
    (done,) = (e.logprobs for e in events if e.type == "response.output_text.done")
    for found in (whole.logprobs, new, done):
        assert [one.token for one in found] == list(ANSWER)
        assert [one.logprob for one in found] == pytest.approx(
            [one.logprob for one in part.logprobs], abs=1e-3
        )
    plain: Any = client.responses.create(**{**asked, "top_logprobs": 0, "include": []})
    assert plain.output[0].content[0].logprobs == []


def test_messages(claude: anthropic.Anthropic) -> None:
    message = claude.messages.create(
        model="m", max_tokens=20, messages=[{"role": "user", "content": SUM}],
        extra_body={"temperature": 0},
        system=[{"type": "text", "text": ""}],
    )  # fmt: skip
    assert [block.text for block in message.content if block.type == "text"] == [ANSWER]
    assert message.stop_reason == "end_turn"
    with claude.messages.stream(
        model="m", max_tokens=20, messages=[{"role": "user", "content": SUM}],
        extra_body={"temperature": 0},
        stop_sequences=["2"],
    ) as stream:  # fmt: skip
        assert "".join(stream.text_stream) == ANSWER[:1]
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", "2")
    assert final.usage.output_tokens >= 1
    count = claude.messages.count_tokens(model="m", messages=[{"role": "user", "content": SUM}])
    assert count.input_tokens > 20
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(
            model="m", max_tokens=5,
            messages=[{"role": "user", "content": [{"type": "image", "source": {
                "type": "url", "url": "http://nothing.example/a.png"}}]}],
        )  # fmt: skip


def test_thoughts_of_former_answers_go_to_the_template() -> None:
    content = [
        {"type": "thinking", "thinking": "I add them.", "signature": ""},
        {"type": "text", "text": ANSWER},
    ]
    body = MessagesBody(max_tokens=1, messages=[{"role": "assistant", "content": content}])
    (message,) = messages_of(body)
    assert message["content"] == [{"type": "text", "text": ANSWER}]
    assert message["reasoning_content"] == "I add them."


def test_an_object_is_a_prompt_too() -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "17 + 25?"}]
    given: MixedPrompt = [{"prompt_string": SUM}, {"content": parts}, SUM]
    assert prompts_of(given, "prompt") == [SUM] * 3


def test_what_claude_code_sends_hinders_nothing(served: Served) -> None:
    """A field for its own server; a stamp that is another one in each request, before all else."""

    def tokens_of(stamp: str) -> int:
        header = f"x-anthropic-billing-header: cc_version=2.1.1; cc_entrypoint=cli; cch={stamp};"
        blocks = [{"type": "text", "text": header}, {"type": "text", "text": "Be short. cch=1;"}]
        edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
        body: dict[str, Any] = {"system": blocks, "messages": ASKED, "max_tokens": 1}
        (system, _) = messages_of(MessagesBody(**body))
        assert system["content"] == header.replace(stamp, "fffff") + "Be short. cch=1;"
        usage = served.ok("/v1/messages", {**body, "context_management": edits})["usage"]
        return int(usage["cache_read_input_tokens"])

    assert tokens_of("a5145") < 80 < tokens_of("0b7e1")
