"""Where a lazy grammar begins: libllama's search for its trigger, which looks at what is new only
(`vendor/patches/lazy-grammar-reach.patch`)."""

import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyllamabatch import Model
from pyllamabatch.raw import ffi, lib
from tests.support.decoding import loaded

PATTERNS = (
    "ab", "aab|b", "a.b", "[ab]c?c", "c(ab)?ca", "(a)(b)c", "ba(?=cc)", "a(?!b)c", r"\.a",
    "b+c", "a*cb", "c{2}a", "^ab", "^[a-c]*(cab)[a-c]*$", r"\bab", r"(a|b)\1c",
)  # fmt: skip


class Lazy:
    """A grammar of the letters a, b and c behind a trigger."""

    def __init__(self, model: Model, pattern: str) -> None:
        text = ffi.new("char[]", pattern.encode())
        self._patterns = ffi.new("const char *[]", [text])
        self._keep = text
        ptr = model.vocab.ptr
        self.sampler = lib.llama_sampler_init_grammar_lazy_patterns(
            ptr, b"root ::= [a-c.]*", b"root", self._patterns, 1, ffi.NULL, 0
        )
        self._other = int(model.vocab.tokenize("z", add_special=False)[-1])

    def accept(self, token: int) -> None:
        lib.llama_sampler_accept(self.sampler, token)

    @property
    def has_begun(self) -> bool:
        """Whether it refuses another letter."""
        data = ffi.new("llama_token_data *", [self._other, 0.0, 0.0])
        candidates = ffi.new("llama_token_data_array *", [data, 1, -1, False])
        lib.llama_sampler_apply(self.sampler, candidates)
        return bool(data.logit == float("-inf"))

    def free(self) -> None:
        lib.llama_sampler_free(self.sampler)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_trigger_is_found_where_a_search_of_the_whole_text_finds_it(
    embedded_model: Model, pattern: str
) -> None:
    tokens = {letter: letter_token(embedded_model, letter) for letter in "abc."}

    @settings(max_examples=30)
    @given(st.lists(st.sampled_from("abc."), max_size=24))
    def check(letters: list[str]) -> None:
        lazy, text = Lazy(embedded_model, pattern), ""
        try:
            for letter in letters:
                text += letter
                lazy.accept(tokens[letter])
                found = re.search(pattern, text) is not None
                assert lazy.has_begun == found
                if found:
                    return
        finally:
            lazy.free()

    check()


def test_a_long_wait_costs_little(embedded_model: Model) -> None:
    """A search of the whole text at each token takes minutes."""
    lazy, letter = Lazy(embedded_model, "<tool_call>"), letter_token(embedded_model, "a")
    began = time.thread_time()
    for _ in range(40_000):
        lazy.accept(letter)
    assert time.thread_time() - began < 20
    assert not lazy.has_begun
    lazy.free()


@pytest.mark.parametrize(
    ("pattern", "found"), [("c+b", True), ("a{1}cb", True), (r"^[\s\S]*?(cb)", False)]
)
def test_behind_a_long_answer_a_pattern_is_searched_in_its_last_bytes(
    pattern: str, found: bool
) -> None:
    """std::regex calls itself for each byte of a repetition, until the stack is at its end."""
    model = loaded("llama")
    lazy, word = Lazy(model, pattern), letter_token(model, " hello")
    for _ in range(20_000):
        lazy.accept(word)
    assert not lazy.has_begun
    for letter in "acb":
        lazy.accept(letter_token(model, letter))
    assert lazy.has_begun == found
    lazy.free()


def letter_token(model: Model, letter: str) -> int:
    return next(i for i in range(model.n_vocab) if piece(model, i) == letter.encode())


def piece(model: Model, token: int) -> Any:
    return model.vocab.token_to_piece(token)
