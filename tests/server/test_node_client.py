"""OpenAI's client for Node: python -m pytest -m node tests/server. Wants node and npm, which brings
the client by its name."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.served import ANSWER, Served, until

FOLDER = Path(__file__).resolve().parents[1] / "peers" / "node"


@pytest.mark.node
def test_the_client_for_node(served: Served, tmp_path: Path) -> None:
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    subprocess.run(["npm", "install", "--silent"], cwd=tmp_path, check=True, timeout=300)
    command = ["node", "client.js", served.url]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert answer.returncode == 0, answer.stderr.decode()
    found = json.loads(answer.stdout)
    assert [found["whole"], found["streamed"], found["response"]] == [ANSWER] * 3
    assert found["completion_tokens"] == 2
    assert isinstance(json.loads(found["structured"])["sum"], int)
    assert found["logprobs"] > 0
    assert found["models"] == ["default.gguf"]
    assert found["refused"] == {"kind": "BadRequestError", "status": 400, "param": "temperature"}
    assert found["left"] in ("ended", "APIUserAbortError")
    until(lambda: served.engine.stats().running == 0)
