"""The default model's vocabulary: the 256 bytes and three control tokens.

The id of a byte is the byte, so tokenization is UTF-8 and every text round-trips. In the GGUF file
this is a byte-level BPE ("gpt2") vocabulary whose merges never apply.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

END_OF_TEXT = 256
IM_START = 257
IM_END = 258
N_VOCAB = 259

CONTROL_TOKENS = {END_OF_TEXT: "<|endoftext|>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A merge list may not be empty. These two bytes never follow each other in UTF-8, and what they
# merge into is no token, so this merge is never taken.
MERGES = ("ÿ ÿ",)


def encode(text: str) -> list[int]:
    """Token ids of plain text; control tokens spelled out in it stay text."""
    return list(text.encode())


def decode(tokens: Iterable[int]) -> str:
    """The text of ``tokens``, control tokens left out, bad UTF-8 replaced."""
    return bytes(token for token in tokens if token < 256).decode(errors="replace")


def encode_turn(role: str, content: str) -> list[int]:
    """Token ids of one whole message as the chat template writes it."""
    return [IM_START, *encode(f"{role}\n{content}"), IM_END, *encode("\n")]


def encode_chat(
    messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
) -> list[int]:
    """Token ids of a conversation of ``{"role": ..., "content": ...}`` messages."""
    tokens = [t for m in messages for t in encode_turn(m["role"], m["content"])]
    if add_generation_prompt:
        tokens += [IM_START, *encode("assistant\n")]
    return tokens


def token_texts() -> list[str]:
    """The text of every token as a byte-level BPE vocabulary writes it.

    Bytes that are printable in Latin-1 stand for themselves, the others for the code points from
    256 upwards in their order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unprintable = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: 256 + i for i, byte in enumerate(unprintable)}
    return [chr(stand_in.get(byte, byte)) for byte in range(256)] + list(CONTROL_TOKENS.values())
