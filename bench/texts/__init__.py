"""Prompts for speculative decoding: answers that repeat their prompt, and such that do not."""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
QUOTE = "Summarise the text in three sentences. Behind each, quote the sentence that it comes from."
REPEATING = ("rewrite", "extract", "quote")
FREE = "chat"
KINDS = (*REPEATING, FREE)


class Text(NamedTuple):
    """`kind`: one of KINDS. `prompt`: the user's message."""

    kind: str
    prompt: str


@cache
def texts() -> tuple[Text, ...]:
    """24 prompts whose answers repeat them, eight of each kind of REPEATING, and 24 free chats."""
    code, articles = _rows("code"), _rows("articles")
    return (
        *(Text("rewrite", f"{row['ask']}\n\n{row['text']}") for row in code),
        *(Text("extract", f"{row['extract']}\n\n{row['text']}") for row in articles),
        *(Text("quote", f"{QUOTE}\n\n{row['text']}") for row in articles),
        *(Text(FREE, row["prompt"]) for row in _rows("chats")),
    )


def _rows(name: str) -> list[dict[str, str]]:
    lines = (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]
