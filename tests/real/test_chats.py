"""Chats with real models: their own templates, tools, many at once."""

import json
from collections.abc import Iterator

import pytest

from pyllamabatch import Engine, Model, SamplingParams, models
from pyllamabatch.errors import ChatTemplateError
from tests.llama.test_chat import HERMES, WEATHER

pytestmark = pytest.mark.real

GREEDY = SamplingParams(temperature=0, max_tokens=24)
QUESTIONS = ("What is the capital of France?", "Name a colour.", "Is water wet?", "Count to three.")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Model]:
    with Model(models.fetch("smollm2-135m", progress=False)) as model:
        yield model


@pytest.fixture(scope="module")
def engine(smollm2: Model) -> Iterator[Engine]:
    with Engine(smollm2, n_seq_max=4, n_ctx=4096, cost=None) as engine:
        yield engine


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_the_models_own_system_turn(smollm2: Model) -> None:
    prompt = smollm2.vocab.apply_chat_template(user("Hi"))
    assert prompt == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    mine = [{"role": "system", "content": "Be brief."}, *user("Hi")]
    assert SYSTEM not in smollm2.vocab.apply_chat_template(mine)
    start = smollm2.vocab.tokenize("<|im_start|>", add_special=False, parse_special=True)
    assert smollm2.vocab.tokenize(prompt).tolist().count(start[0]) == 3


def test_an_answer(engine: Engine) -> None:
    answer = engine.chat(user(QUESTIONS[0]), GREEDY)
    prompt = engine.model.vocab.apply_chat_template(user(QUESTIONS[0]))
    assert answer.result.n_prompt == len(engine.model.vocab.tokenize(prompt))
    assert answer.message.content == answer.result.text != ""
    assert answer.message.tool_calls == ()


def test_many_at_once(engine: Engine) -> None:
    streams = [engine.chat.submit(user(text), GREEDY) for text in QUESTIONS]
    for stream in streams:
        said = "".join(delta.content for delta in stream)
        assert said == stream.result().message.content
        assert said


def test_a_tool_is_called_as_its_schema_says(engine: Engine) -> None:
    answer = engine.chat(
        # The answer has begun: a model this small would not come to a call by itself.
        [*user("What is the weather in Paris?"), {"role": "assistant", "content": "<tool_call>\n"}],
        SamplingParams(temperature=0, max_tokens=200),
        continue_final_message=True,
        template=HERMES,
        tools=[WEATHER],
        tool_choice="required",
    )
    assert answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    assert call.name == "weather"
    assert isinstance(json.loads(call.arguments)["city"], str)


def test_a_base_model_has_no_template() -> None:
    with (
        Model(models.fetch("gemma3-270m", progress=False), vocab_only=True) as model,
        pytest.raises(ChatTemplateError, match="no chat template"),
    ):
        model.vocab.apply_chat_template(user("Hi"))


def test_a_base_model_goes_on() -> None:
    with (
        Model(models.fetch("gemma3-270m", progress=False)) as model,
        Engine(model, n_seq_max=2, n_ctx=1024, cost=None) as engine,
    ):
        (result,) = engine.generate(["The capital of France is"], GREEDY)
        assert "France" in result.text
