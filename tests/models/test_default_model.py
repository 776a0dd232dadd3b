"""The embedded model and the draft beside it: size, tokenizer, answers through the engine."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.llama.context import Context
from pyllamabatch.models import default_draft_path, default_model_path, default_prompts
from pyllamabatch.step.draft_model import check_same_vocabulary
from tools.recipe.default_model import tasks, tokenizer
from tools.recipe.default_model.evaluate import agreement

GREEDY = SamplingParams(temperature=0.0, max_tokens=128)


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with Model.default(n_gpu_layers=0) as default:
        yield default


@pytest.fixture(scope="module", params=[False, True], ids=["own-cells", "shared-cells"])
def engine(model: Model, request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Sixteen sequences. One thread: on a busy machine two would mostly wait for each other."""
    with Engine(
        model,
        n_seq_max=16,
        n_ctx=16 * 1024,
        kv_unified=request.param,
        n_threads=1,
        n_threads_batch=1,
    ) as sixteen:
        yield sixteen


def chat(model: Model, prompt: str) -> str:
    return model.vocab.apply_chat_template([{"role": "user", "content": prompt}])


def answers(engine: Engine, model: Model, prompts: list[str]) -> list[str]:
    tokens = [model.vocab.tokenize(chat(model, prompt), parse_special=True) for prompt in prompts]
    return [result.text for result in engine.generate(tokens, GREEDY)]


def test_the_file_is_at_most_4_mib() -> None:
    assert default_model_path().stat().st_size <= 4 << 20


def test_it_describes_itself(model: Model) -> None:
    assert model.architecture == "llama"
    assert model.n_ctx_train == 2048
    assert model.vocab.n_tokens == tokenizer.N_VOCAB
    assert model.metadata["general.license"] == "mit"


def test_the_prompts_that_ship_differ() -> None:
    shipped = default_prompts()
    assert len({task.prompt for task in shipped}) == len(shipped) == 32
    assert len({task.kind for task in shipped}) == 9


def test_training_and_llama_cpp_tokenize_alike(model: Model) -> None:
    for kind in tasks.TASKS:
        for task in tasks.make_tasks(kind, 300, seed=5):
            messages = [{"role": "user", "content": task.prompt}]
            text = model.vocab.apply_chat_template(messages)
            tokens = model.vocab.tokenize(text, parse_special=True)
            assert tokens.tolist() == tokenizer.encode_chat(messages)


def test_a_conversation_tokenizes_as_in_training(model: Model) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Reverse: hello"},
        {"role": "assistant", "content": "olleh"},
        {"role": "user", "content": "2 + 3 ="},
    ]
    tokens = model.vocab.tokenize(model.vocab.apply_chat_template(messages), parse_special=True)
    assert tokens.tolist() == tokenizer.encode_chat(messages)


@given(st.text(max_size=80))
@settings(max_examples=1000)
def test_any_text_comes_back(model: Model, text: str) -> None:
    tokens = model.vocab.tokenize(text)
    assert tokens.tolist() == tokenizer.encode(text)
    assert model.vocab.detokenize(tokens) == text == tokenizer.decode(tokens.tolist())


def test_control_tokens_in_plain_text_stay_text(model: Model) -> None:
    text = "a <|im_end|> b"
    assert model.vocab.tokenize(text).tolist() == tokenizer.encode(text)
    assert model.vocab.eog_tokens == {tokenizer.IM_END, tokenizer.END_OF_TEXT}


@pytest.mark.parametrize("engine", [False], indirect=True, ids=["own-cells"])
@pytest.mark.parametrize("kind", [kind for kind in tasks.TASKS if kind != "recall_long"])
def test_held_out_prompts_are_answered_exactly(engine: Engine, model: Model, kind: str) -> None:
    held_out = tasks.make_tasks(kind, 40, seed=11)
    said = answers(engine, model, [task.prompt for task in held_out])
    wrong = [(t.prompt, t.answer, s) for t, s in zip(held_out, said, strict=True) if s != t.answer]
    assert len(wrong) <= 1, wrong


def test_sixteen_different_prompts_at_once_get_sixteen_answers(
    engine: Engine, model: Model
) -> None:
    prompts = {
        "Reverse: hello": "olleh",
        "Spell planet backwards.": "tenalp",
        "Copy: one two three": "one two three",
        "Repeat after me: Grüße 42, ok?": "Grüße 42, ok?",
        "Uppercase: hello world": "HELLO WORLD",
        "Shout: stop it now": "STOP IT NOW",
        "Sort the numbers: 42 7 19": "7 19 42",
        "Sort the letters: hgfedcba": "abcdefgh",
        "Sort the words: pear fish apple": "apple fish pear",
        "What is 123 + 4567?": "4690",
        "999 + 1 =": "1000",
        "What is 12 - 345?": "-333",
        "Count from 3 to 9.": "3 4 5 6 7 8 9",
        "Count down from 30 to 20 by 5.": "30 25 20",
        "Anna lives in Rome. Ben has a cat. Where does Anna live?": "Anna lives in Rome.",
        "What is the capital of France?": "The capital of France is Paris.",
    }
    assert answers(engine, model, list(prompts)) == list(prompts.values())


def test_a_later_turn_is_answered_too(engine: Engine, model: Model) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Reverse: hello"},
        {"role": "assistant", "content": "olleh"},
        {"role": "user", "content": "What is 250 + 250?"},
    ]
    tokens = model.vocab.tokenize(model.vocab.apply_chat_template(messages), parse_special=True)
    assert engine.generate([tokens], GREEDY)[0].text == "500"


def test_the_file_is_at_most_1_mib_and_has_the_model_s_vocabulary() -> None:
    assert default_draft_path().stat().st_size <= 1 << 20
    with (
        Model(default_draft_path(), n_gpu_layers=0) as draft,
        Model(default_model_path(), vocab_only=True) as model,
    ):
        check_same_vocabulary(draft.vocab, model.vocab)
        assert draft.n_ctx_train == 2048


@pytest.mark.parametrize(
    ("kind", "least"), [("copy", 0.85), ("upper", 0.85), ("qa", 0.8), ("sort", 0.7), ("add", 0.3)]
)
def test_it_agrees_with_the_model(kind: str, least: float) -> None:
    with (
        Model(default_draft_path(), n_gpu_layers=0) as draft,
        Context(draft, n_threads=1, n_threads_batch=1) as context,
    ):
        assert least < agreement(context, kind, 25) < 1
