"""What a newcomer gets wrong: the error says what to do instead."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ArgumentError, unknown_keyword
from pyllamabatch.llama.model import Model
from pyllamabatch.scheduler import sarathi
from pyllamabatch.step.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4)
CHAT = [{"role": "user", "content": "Copy: lamp"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Model.default(n_gpu_layers=0) as model, Engine(model, n_ctx=2048, n_threads=1) as engine:
        yield engine


def test_a_path_in_place_of_a_model() -> None:
    with pytest.raises(ArgumentError, match=r"Engine\(Model\(path\)"):
        Engine("file.gguf")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("a", {"temperature": 0}, r"SamplingParams\(temperature=\.\.\.\)"),
        ("a", {"tenannt": "x"}, "did you mean tenant"),
        ("a", {"deadline": time.time() + 5}, "time.perf_counter"),
        (CHAT, {}, "apply_chat_template"),
    ],
)
def test_what_submit_refuses(engine: Engine, prompt: Any, options: Any, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        engine.submit(prompt, GREEDY, **options)
    assert engine.stats().running == engine.stats().waiting == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"gather": 0.1}, r"gather=0.1: as Window"),
        ({"cost": "x"}, r"cost='x': a CostModel"),
        ({"loras": {"a": "x.gguf"}}, r"loras\['a'\]='x.gguf': must be LoraAdapter"),
        ({"loras": ["x.gguf"]}, r"loras=\['x.gguf'\]: must be adapters by name"),
        ({"kv_unified": 1}, r"kv_unified=1: True \(a pool\)"),
        ({"prefix_cache": "off"}, "prefix_cache='off': must be True or False"),
        ({"swap_folder": "/not/there"}, "swap_folder='/not/there': must be a folder"),
        ({"n_ctx": 10**12}, r"n_ctx=1000000000000: must be in 0"),
        ({"type_k": "q4_k"}, r"type_k='q4_k': must be one of f32, .*iq4_nl"),
    ],
)
def test_what_an_engine_refuses(engine: Engine, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        Engine(engine.model, **{"n_ctx": 256, "n_threads": 1, **options})


def test_a_name_that_was_cut_short() -> None:
    error = unknown_keyword("temp", 0, ["stream", "temperature"])
    assert "did you mean temperature?" in str(error)


def test_a_chat_in_place_of_prompts(engine: Engine) -> None:
    with pytest.raises(ArgumentError, match="apply_chat_template"):
        engine.generate(CHAT, GREEDY)  # type: ignore[arg-type]


def test_a_policy_by_its_name(engine: Engine) -> None:
    with Engine(engine.model, n_ctx=256, n_threads=1, policy="sarathi:budget=64") as named:
        assert type(named._core.scheduler.policy) is type(sarathi())
        assert named.submit("a", GREEDY).result(60).tokens
    with pytest.raises(ArgumentError, match="sarathi"):
        Engine(engine.model, policy="sarati")


def test_a_chat_needs_its_template_and_nothing_else(engine: Engine) -> None:
    vocab = engine.model.vocab
    prompt = vocab.apply_chat_template(CHAT)
    tokens = vocab.tokenize(str(prompt), parse_special=True)
    assert vocab.tokenize(prompt).tolist() == tokens.tolist()
    assert len(vocab.tokenize(prompt, parse_special=False)) > len(tokens)
    stream = engine.submit(prompt, GREEDY)
    assert stream.result(60).tokens == engine.submit(tokens, GREEDY).result(60).tokens
    assert stream.n_prompt == len(tokens)
    with engine.sequence(GREEDY) as sequence:
        sequence.prompt(prompt)
        assert sequence.tokens == tokens.tolist()
