"""Every chat template of the pinned llama.cpp gives the prompts that llama-server makes with it:
tools/chat_templates.py asked it, and recorded their hashes."""

import json
from pathlib import Path

import pytest

from pyllamabatch import Model
from tools.chat_templates import RECORDED, hashes, prompts_of, templates

pytestmark = pytest.mark.real


def test_prompts_are_llama_servers(tmp_path: Path) -> None:
    with Model.default(vocab_only=True) as model:
        made = {path.name: hashes(prompts_of(model, path)) for path in templates(tmp_path)}
    assert made == json.loads(RECORDED.read_text())
