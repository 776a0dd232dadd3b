"""Vocab: text to tokens and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import (
    ArgumentError,
    PyllamabatchError,
    TokenizeError,
    UnsupportedOperation,
    integer,
)
from pyllamabatch.llama.chat import ChatPrompt as ChatPrompt
from pyllamabatch.llama.chat import ChatTemplate
from pyllamabatch.llama.chat import chat_templates as chat_templates
from pyllamabatch.llama.handle import Owner, owned
from pyllamabatch.llama.params import check_range, flat_integers
from pyllamabatch.llama.runtime import filled
from pyllamabatch.llama.runtime import text as c_text
from pyllamabatch.raw import ffi, lib

TokenArray = npt.NDArray[np.int32]
Tokens = Sequence[int] | TokenArray

_MAX_TEXT = 2**31 - 1
Utf8Decoder = codecs.getincrementaldecoder("utf-8")
TEMPLATES_MAX = 16  # that a vocabulary remembers


class Vocab:
    """The vocabulary of a model: text to tokens and back. Any thread may call its methods.

        tokens = model.vocab.tokenize("Hello")          # int32 (n,)
        model.vocab.detokenize(tokens, remove_special=True)

    `type` is the kind of tokenizer: "spm", "bpe", "wpm", "ugm", "rwkv", ... or "none". `bos`,
    `eos`, `eot`, `sep`, `nl`, `pad` and `mask` are token ids, None where the vocabulary has none.
    `add_bos`, `add_eos` and `add_sep` tell what `tokenize(add_special=True)` adds.

    Methods raise `ClosedError` once the model is closed, and `ArgumentError` for token ids outside
    of 0..n_tokens-1."""

    def __init__(self, model: Owner) -> None:
        self._model = model
        self._templates: dict[str | None, ChatTemplate] = {}
        ptr = self.ptr
        self.n_tokens: int = lib.llama_vocab_n_tokens(ptr)
        kind: str = ffi.typeof("enum llama_vocab_type").elements[int(lib.llama_vocab_type(ptr))]
        self.type = kind.removeprefix("LLAMA_VOCAB_TYPE_").lower()
        self.bos = _token(lib.llama_vocab_bos(ptr))
        self.eos = _token(lib.llama_vocab_eos(ptr))
        self.eot = _token(lib.llama_vocab_eot(ptr))
        self.sep = _token(lib.llama_vocab_sep(ptr))
        self.nl = _token(lib.llama_vocab_nl(ptr))
        self.pad = _token(lib.llama_vocab_pad(ptr))
        self.mask = _token(lib.llama_vocab_mask(ptr))
        self.add_bos: bool = lib.llama_vocab_get_add_bos(ptr)
        self.add_eos: bool = lib.llama_vocab_get_add_eos(ptr)
        self.add_sep: bool = lib.llama_vocab_get_add_sep(ptr)

    @property
    def ptr(self) -> Any:
        """`const struct llama_vocab *`, which keeps the model's memory."""
        model = self._model.ptr
        return owned(lib.llama_model_get_vocab(model), model)

    def __len__(self) -> int:
        return self.n_tokens

    def __repr__(self) -> str:
        return f"<Vocab {self.type} with {self.n_tokens} tokens>"

    @cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Every token that ends a generation (EOS, EOT and the like)."""
        ptr = self.ptr
        return frozenset(t for t in range(self.n_tokens) if lib.llama_vocab_is_eog(ptr, t))

    def is_eog(self, token: int) -> bool:
        return bool(lib.llama_vocab_is_eog(self.ptr, self._check(token)))

    def is_control(self, token: int) -> bool:
        self._need_text()
        return bool(lib.llama_vocab_is_control(self.ptr, self._check(token)))

    # -- text to tokens --

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool | None = None
    ) -> TokenArray:
        """The tokens of a text: int32, shape (n,).

        - add_special: add BOS and the like as the model wants them.
        - parse_special: read special tokens that are written out in the text. By default only in
          what `apply_chat_template` made. Leave it off for text that a user typed.

        Raises `TokenizeError` for text that is not UTF-8, `UnsupportedOperation` for a model
        without a tokenizer."""
        self._need_text()
        data, chat = _utf8(text), isinstance(text, ChatPrompt)
        parse_special = chat if parse_special is None else parse_special
        if add_special:
            self._need_special()
        ptr = self.ptr
        tokens = np.empty(len(data) + 16, np.int32)  # enough but for unusual normalizers
        for _ in range(2):
            out = ffi.from_buffer("llama_token[]", tokens)
            n = lib.llama_tokenize(
                ptr, data, len(data), out, len(tokens), add_special, parse_special
            )
            if n >= 0:
                twice = chat and add_special and n > 1 and tokens[0] == tokens[1] == self.bos
                found: TokenArray = tokens[int(twice) : n].copy()
                return found
            if n == -(2**31):
                break
            tokens = np.empty(-n, np.int32)
        raise TokenizeError(f"a text of {len(data)} bytes gives more tokens than fit an int32")

    encode = tokenize
    """The name that other libraries have for `tokenize`."""

    # -- tokens to text --

    def token_to_piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that a token stands for; may be a part of a UTF-8 character.

        Special tokens give b"" unless `special`."""
        self._need_text()
        return self._piece(self.ptr, self._check(token), special)

    def detokenize(
        self, tokens: Tokens, *, remove_special: bool = False, unparse_special: bool = False
    ) -> str:
        """The text of tokens; bytes that are not UTF-8 become U+FFFD.

        - remove_special: leave out the BOS and EOS that `tokenize` added.
        - unparse_special: write special tokens out."""
        self._need_text()
        ids = self.check_tokens(tokens)
        ptr, pointer = self.ptr, ffi.from_buffer("llama_token[]", ids)

        def write(*out: Any) -> int:
            flags = remove_special, unparse_special
            n: int = lib.llama_detokenize(ptr, pointer, len(ids), *out, *flags)
            return abs(n)

        return filled(write, 8 * len(ids) + 64).decode("utf-8", "replace")

    decode = detokenize
    """The name that other libraries have for `detokenize`."""

    def decoder(self, *, special: bool = False) -> PieceDecoder:
        """A decoder for tokens that arrive one by one."""
        return PieceDecoder(self, special=special)

    # -- chat --

    def chat_template(self, template: str | None = None) -> ChatTemplate:
        """The model's chat template, or `template` (Jinja, or one of `chat_templates()`), read
        once. Raises `ChatTemplateError` when there is none or llama.cpp can't read it."""
        self._need_text()
        found = self._templates.get(template)
        if found is None:
            found = ChatTemplate(self._model, template)
            if len(self._templates) < TEMPLATES_MAX:
                self._templates[template] = found
        return found

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> ChatPrompt:
        """A conversation as the model's prompt, as llama-server makes it.

            prompt = vocab.apply_chat_template([{"role": "user", "content": "Hello"}])
            engine.submit(prompt)  # or vocab.tokenize(prompt)

        - messages: {"role": ..., "content": ...} each.
        - add_generation_prompt: end where the answer of the assistant begins.
        - template: a template (Jinja), or the name of one of `chat_templates()`. Default: the
          model's.

        `ChatTemplate.render` has tools, schemas and reasoning besides. Raises `ChatTemplateError`
        when there is no template, llama.cpp can't read it, or it refuses the messages."""
        chat = self.chat_template(template)
        return chat.render(messages, add_generation_prompt=add_generation_prompt)

    # -- checks --

    def check_tokens(self, tokens: Iterable[int] | TokenArray, name: str = "tokens") -> TokenArray:
        """Tokens as a contiguous int32 array. Raises `ArgumentError`, with the index, for an id
        that is not of this vocabulary."""
        array = flat_integers(name, tokens)
        check_range(name, array, 0, self.n_tokens - 1)
        return np.ascontiguousarray(array, np.int32)

    def _check(self, token: int) -> int:
        return integer("token", token, 0, self.n_tokens - 1)

    def _need_text(self) -> None:
        if self.type == "none":
            raise UnsupportedOperation("the model has no tokenizer: it takes token ids only")

    def _need_special(self) -> None:
        wanted = ("bos", self.add_bos), ("eos", self.add_eos), ("sep", self.add_sep)
        for name, add in wanted:
            if add and getattr(self, name) is None and not (name == "sep" and self.type != "wpm"):
                raise TokenizeError(
                    f"the model asks for a {name} token but has none; use add_special=False"
                )

    @staticmethod
    def _piece(ptr: Any, token: int, special: bool) -> bytes:
        return filled(lambda *out: abs(lib.llama_token_to_piece(ptr, token, *out, 0, special)), 64)


def pieces_of(ptr: Any, tokens: Sequence[int]) -> list[bytes]:
    """The bytes of each token of a `llama_vocab *`, special ones b"", in one native call."""
    n = len(tokens)
    ids, offsets = ffi.new("llama_token[]", tokens), ffi.new("int64_t[]", n + 1)

    def write(*out: Any) -> int:
        needed: int = lib.plb_pieces(ptr, ids, n, *out, offsets)
        if needed < 0:
            raise PyllamabatchError(c_text(lib.plb_code_text(needed)))
        return needed

    data = filled(write, 16 * n)
    return [data[start:end] for start, end in pairwise(offsets)]


class PieceDecoder:
    """Tokens in, text out, as soon as it is whole: an unfinished UTF-8 character waits."""

    def __init__(self, vocab: Vocab, *, special: bool = False) -> None:
        vocab._need_text()
        self._vocab = vocab
        self._special = special
        self._core = Utf8Decoder("replace")

    def feed(self, tokens: int | Tokens) -> str:
        """The text that these tokens complete; may be ""."""
        vocab = self._vocab
        ids: Iterable[int]
        if isinstance(tokens, (Sequence, np.ndarray)):
            ids = vocab.check_tokens(tokens).tolist()
        else:
            ids = (vocab._check(tokens),)
        ptr = vocab.ptr
        return "".join(self._core.decode(vocab._piece(ptr, t, self._special)) for t in ids)

    def flush(self) -> str:
        """What is left, U+FFFD for an unfinished character. The decoder is as new afterwards."""
        last = self._core.decode(b"", final=True)
        self._core.reset()
        return last


def _token(token: int) -> int | None:
    return token if token >= 0 else None


def _utf8(text: str | bytes) -> bytes:
    if not isinstance(text, (str, bytes)):
        raise ArgumentError("text", text, "must be str or bytes")
    try:
        if isinstance(text, str):
            data = text.encode("utf-8")
        else:
            text.decode("utf-8")
            data = text
    except UnicodeError as error:
        raise TokenizeError(f"the text is not valid UTF-8: {error}") from error
    if len(data) > _MAX_TEXT:
        raise TokenizeError(f"the text has {len(data)} bytes, at most {_MAX_TEXT} are possible")
    return data
