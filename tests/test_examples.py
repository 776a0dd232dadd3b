"""Every file of `examples/` runs with the embedded model and prints what it is about."""

import json
from pathlib import Path

import pytest

from tests.support.child import python

EXAMPLES = {path.name: path for path in Path(__file__).parent.parent.glob("examples/*.py")}
PRINTS = {
    "chat.py": "Reverse: drawer -> reward",
    "draft_model.py": " steps: every good draft saves a step.",
    "embeddings.py": "What is 17 + 25?",
    "interactive_game.py": "the merchant says '42'",
    "json_schema.py": "'colour': ",
    "own_drafter.py": "drafts were right: good drafts are good drafts.",
    "own_policy.py": "live: 0 preemptions",
    "raw_two_sequences.py": "hello\n42\n",
    "stream_asyncio.py": "Cem: 1 3 7 9",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str) -> None:
    assert len(EXAMPLES[name].read_text(encoding="utf-8").splitlines()) <= 60
    done = python(str(EXAMPLES[name]))
    assert (done.returncode, done.stderr) == (0, "")
    assert PRINTS.get(name, "") in done.stdout


def test_all_are_there() -> None:
    assert EXAMPLES.keys() >= PRINTS.keys()


@pytest.mark.parametrize(
    ("flag", "name"),
    [("--speculate", "own_drafter.py:Again"), ("--policy", "own_policy.py:memory_aware")],
)
def test_what_the_command_line_takes_of_one_runs_nothing_else(
    flag: str, name: str, tmp_path: Path
) -> None:
    asked = tmp_path / "in.jsonl"
    asked.write_text('{"prompt": "Copy: hello"}\n')
    words = ["generate", "-np", "1", "-n", "4", "--ignore-eog", "--prompts", str(asked), flag]
    done = python("-m", "pyllamabatch", *words, str(EXAMPLES["own_policy.py"].parent / name))
    assert done.returncode == 0, done.stderr
    (row,) = done.stdout.splitlines()
    assert json.loads(row)["n_generated"] == 4
