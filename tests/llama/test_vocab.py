"""Vocab: text to tokens and back, special tokens, chat templates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Model, Vocab
from pyllamabatch.errors import ArgumentError, ChatTemplateError, PyllamabatchError, TokenizeError
from pyllamabatch.llama.vocab import chat_templates, pieces_of
from tests.support.models_gguf import BOS, CHAT_TEMPLATE, EOS, IM_END, IM_START, N_VOCAB, gguf_path
from tests.support.models_special import write_gpt2

TEXTS = [
    "hello", "two  spaces", "é €uro 漢字 🙂👩‍🚀", "line\nbreak\ttab", "nul\0inside", "<s> is text",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocab() -> Iterator[Vocab]:
    with Model(gguf_path("llama")) as model:
        yield model.vocab


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(vocab: Vocab, text: str) -> None:
    tokens = vocab.tokenize(text, add_special=False)
    assert tokens.dtype == np.int32
    assert tokens.ndim == 1
    assert vocab.detokenize(tokens).removeprefix(" ") == text
    assert (vocab.tokenize(text.encode(), add_special=False) == tokens).all()


def test_special_tokens(vocab: Vocab) -> None:
    assert (vocab.bos, vocab.eos, vocab.eot) == (BOS, EOS, IM_END)
    assert vocab.eog_tokens == {EOS, IM_END}
    assert vocab.is_eog(EOS)
    assert not vocab.is_eog(BOS)
    assert vocab.is_control(IM_START)
    assert not vocab.is_control(N_VOCAB - 1)
    assert len(vocab) == N_VOCAB
    assert vocab.type == "spm"
    assert vocab.mask is None


def test_add_and_parse_special(vocab: Vocab) -> None:
    assert vocab.add_bos
    assert vocab.tokenize("x")[0] == BOS
    assert BOS not in vocab.tokenize("x", add_special=False)
    assert IM_START not in vocab.tokenize("<|im_start|>")
    assert IM_START in vocab.tokenize("<|im_start|>", parse_special=True)


def test_empty_text(vocab: Vocab) -> None:
    assert vocab.tokenize("", add_special=False).shape == (0,)
    assert vocab.tokenize("").tolist() == [BOS]
    assert vocab.detokenize([]) == ""


def test_pieces(vocab: Vocab) -> None:
    tokens = vocab.tokenize("a €", add_special=False)
    assert b"".join(map(vocab.token_to_piece, tokens.tolist())).lstrip() == "a €".encode()
    assert vocab.token_to_piece(EOS) == b""
    assert vocab.token_to_piece(EOS, special=True) == b"</s>"


@pytest.mark.parametrize("text", TEXTS)
def test_decoder_gives_whole_characters(vocab: Vocab, text: str) -> None:
    decoder = vocab.decoder()
    parts = [decoder.feed(token) for token in vocab.tokenize(text, add_special=False).tolist()]
    assert "".join(parts).removeprefix(" ") == text
    assert not any("�" in part for part in parts)
    assert decoder.flush() == ""


def test_decoder_flushes_what_is_unfinished(vocab: Vocab) -> None:
    decoder = vocab.decoder()
    euro = vocab.tokenize("€", add_special=False)  # the space, then three bytes
    assert decoder.feed(euro[:-1]).strip() == ""
    assert decoder.flush() == "�"
    assert decoder.feed(euro).strip() == "€"  # as new


def test_decoder_special(vocab: Vocab) -> None:
    assert vocab.decoder().feed(EOS) == ""
    assert vocab.decoder(special=True).feed(EOS) == "</s>"


@pytest.mark.parametrize("text", ["\ud800", b"\xff", b"\xc3", "ok".encode("utf-16")])
def test_not_utf8(vocab: Vocab, text: str | bytes) -> None:
    with pytest.raises(TokenizeError):
        vocab.tokenize(text)


@pytest.mark.parametrize("text", [7, None, ["a"]])
def test_no_text(vocab: Vocab, text: Any) -> None:
    with pytest.raises(ArgumentError, match="must be str or bytes"):
        vocab.tokenize(text)


@pytest.mark.parametrize("tokens", [[-1], [N_VOCAB], [2**40], [2**80], [1.5], ["a"], [[1]], [None]])
def test_tokens_that_are_none(vocab: Vocab, tokens: list[int]) -> None:
    with pytest.raises(ArgumentError):
        vocab.detokenize(tokens)


@pytest.mark.parametrize("token", [-1, N_VOCAB, 2**31, "a", 1.0, True])
def test_one_token_that_is_none(vocab: Vocab, token: int) -> None:
    for use in (vocab.is_eog, vocab.is_control, vocab.token_to_piece, vocab.decoder().feed):
        with pytest.raises(ArgumentError):
            use(token)


def test_chat_template(vocab: Vocab) -> None:
    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "x" * 5000}]
    expected = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages
    )  # chatml
    assert vocab.apply_chat_template(messages, add_generation_prompt=False) == expected
    assert vocab.apply_chat_template(messages) == expected + "<|im_start|>assistant\n"
    assert vocab.apply_chat_template(messages, template="chatml") == (
        vocab.apply_chat_template(messages, template=CHAT_TEMPLATE)
    )
    assert "chatml" in chat_templates()


def test_unknown_chat_template(vocab: Vocab) -> None:
    with pytest.raises(ChatTemplateError, match="chatml"):
        vocab.apply_chat_template([{"role": "user", "content": "x"}], template="{{ no such }}")


def test_no_chat_template_says_how_to_give_one(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "gpt2.gguf")
    with Model(tmp_path / "gpt2.gguf") as model:
        assert model.chat_template() is None
        with pytest.raises(ChatTemplateError, match='template="chatml"') as caught:
            model.vocab.apply_chat_template([{"role": "user", "content": "x"}])
    assert len(str(caught.value)) < 200


def test_encode_and_decode_are_other_names(vocab: Vocab) -> None:
    tokens = vocab.encode("a b")
    assert tokens.tolist() == vocab.tokenize("a b").tolist()
    assert vocab.decode(tokens) == vocab.detokenize(tokens)


def test_pieces_of_many_tokens_in_one_call(vocab: Vocab) -> None:
    tokens = list(range(N_VOCAB)) * 3
    assert pieces_of(vocab.ptr, tokens) == [vocab.token_to_piece(token) for token in tokens]
    assert pieces_of(vocab.ptr, []) == []
    for bad in (-1, N_VOCAB):
        with pytest.raises(PyllamabatchError, match="outside the vocabulary"):
            pieces_of(vocab.ptr, [5, bad])


def test_pieces_that_need_more_room_than_was_guessed() -> None:
    with Model.default() as model:
        vocab = model.vocab
        longest = max(range(vocab.n_tokens), key=lambda token: len(vocab.token_to_piece(token)))
        assert pieces_of(vocab.ptr, [longest] * 9) == [vocab.token_to_piece(longest)] * 9
