"""The Python in the README and two guides runs as it is printed, each block in a new process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.models_special import write_lora

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RAW = (ROOT / "docs" / "raw.md").read_text(encoding="utf-8")
ENGINE = (ROOT / "docs" / "engine.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def block_with(text: str, words: str) -> str:
    (found,) = [block for block in blocks(text, "python") if words in block]
    return found


def run(program: str, folder: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_engine_example() -> None:
    program = block_with(README, "Engine(")
    assert len(program.splitlines()) <= 16
    answers = dict(line.split(" -> ") for line in run(program).splitlines())
    assert answers == {
        "Copy: hello": "hello",
        "What is 17 + 25?": "42",
        "Write in capitals: batch": "BATCH",
        "Reverse: drawer": "reward",
    }


def test_raw_example() -> None:
    program = block_with(README, "llama_batch_get_one")
    assert len(program.splitlines()) <= 16
    version, code, logits = run(program).split(maxsplit=2)
    assert version
    assert code == "0"
    assert len(logits.split(",")) == 8


def test_two_sequence_loop() -> None:
    (expected,) = blocks(RAW, "text")
    assert run(block_with(RAW, "llama_batch_init")) == expected


def test_the_other_blocks_of_the_raw_guide() -> None:
    done = [block for block in blocks(RAW, "python") if "llama_batch_init" not in block]
    assert done, "the import line at its top"
    for block in done:
        run(block)


def test_the_two_commands_are_there() -> None:
    commands = "\n".join(blocks(README, "sh"))
    assert "python3 -m pip install '.[cli]' && pyllamabatch demo\n" in commands
    assert "python3 -m pip install '.[test]' && python3 -m pytest\n" in commands


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [link for link in links if "://" not in link and not (folder / link).exists()]
    assert missing == []


def test_the_layers_name_real_files() -> None:
    (table,) = re.findall(r"## Layers\n\n(.*?)\n\n", README + "\n\n", re.DOTALL)
    for cell in re.findall(r"^\| [a-z]+ \| (.*?) \|", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", cell):
            assert (ROOT / name).exists() or (ROOT / "src" / "pyllamabatch" / name).exists(), name


def test_the_guide_of_the_engine(tmp_path: Path) -> None:
    requests, schema, loras, tasks, interactive = blocks(ENGINE, "python")
    for name in ("law", "tone"):
        write_lora(tmp_path / f"{name}.gguf", width=256)
    assert run(loras, tmp_path).split() == ["8", "8", "8", "False"]
    assert run(requests).split() == ["hello", "stop", "reward", "stop", "4", "2", "stop"]
    assert run(schema) == "['n', 'word']\n"
    assert run(tasks) == "0 1 2 3 [4, 4, 4]\n"
    assert run(interactive) == "hello 4 True\n"
