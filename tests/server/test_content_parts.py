"""A content of several parts gives the prompt that llama.cpp makes of them, in each interface."""

from typing import Any

import pytest

from pyllamabatch.llama.model import Model
from pyllamabatch.server.options import ServerOptions
from tests.support.served import serving

TEXTS = ("One.", "Two.", "Three.")
STRING = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PARTS = "{% for part in m.content %}[{{ part.text }}]{% endfor %}"
TYPED = "{% for m in messages %}<{{ m.role }}>" + PARTS + "{% endfor %}"
EITHER = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    + PARTS
    + "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        (STRING, "<user>One.\nTwo.\nThree."),
        (TYPED, "<user>[One.][Two.][Three.]"),
        (EITHER, "<user>[One.][Two.][Three.]"),
    ],
)
def test_parts_are_joined_as_by_llama_cpp(
    embedded_model: Model, template: str, prompt: str
) -> None:
    def asked(kind: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": kind, "text": text} for text in TEXTS]}

    vocab = embedded_model.vocab
    assert vocab.apply_chat_template([asked("text")], template=template) == prompt
    n = len(vocab.tokenize(prompt, parse_special=True))
    options = ServerOptions(chat_template=template, sampling={"max_tokens": 1})
    with serving(embedded_model, options) as served:
        chat = {"messages": [asked("text")]}
        assert served.ok("/apply-template", chat) == {"prompt": prompt}
        counted = served.ok("/v1/messages/count_tokens", chat)
        assert counted == {"input_tokens": n}
        response = served.ok("/v1/responses", {"input": [asked("input_text")]})
        assert response["usage"]["input_tokens"] == n
