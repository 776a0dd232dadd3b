"""`pyllamabatch info` and `--version`."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch import Engine, Model
from pyllamabatch.cli import main
from pyllamabatch.models import default_model_path
from tests.support.child import ended


def test_json(capsys: Any) -> None:
    assert main(["info", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["version"] == metadata.version("pyllamabatch")
    assert about["llama_cpp"]["build"].startswith("b")
    assert about["llama_cpp"]["max_sequences"] == 256
    cpu = next(backend for backend in about["backends"] if backend["name"] == "CPU")
    assert cpu["features"]
    device = next(device for device in about["devices"] if device["type"] == "CPU")
    assert 0 < device["memory_free"] <= device["memory_total"]
    model = about["model"]
    assert model["path"] == str(default_model_path())
    assert model["architecture"] == "llama"
    assert model["chat_template"] is True
    assert model["metadata"]["general.architecture"] == "llama"
    assert model["capabilities"]["partial_removal"] is True
    with Engine(Model.default()) as engine:
        assert about["engine"]["layout"] == str(engine.layout)
        assert about["engine"]["sequences"] == engine.n_seq_max
        assert about["engine"]["most_cells_of_a_sequence"] == engine.n_ctx_seq
        assert about["engine"]["threads"] == engine._context.n_threads
        assert about["engine"]["n_ubatch"] == engine.n_ubatch


def test_json_is_written_in_every_locale(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("platform.platform", lambda: "Größe")
    assert main(["info", "--json", "--no-model"]) == 0
    said = capsys.readouterr().out
    assert said.isascii()
    assert json.loads(said)["platform"] == "Größe"


def test_text_names_what_matters(capsys: Any) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for words in ("build: b", "  CPU: ", "GiB free", "default.gguf", "partial removal: yes"):
        assert words in text
    assert "layout: a stream of cells each" in text


def test_without_a_model(capsys: Any) -> None:
    assert main(["info", "--json", "--no-model"]) == 0
    assert "model" not in json.loads(capsys.readouterr().out)


def test_a_file_that_is_no_model(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(b"not a model")
    assert main(["info", "-m", str(path)]) == 1
    assert "no.gguf" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["generate", "--help"]])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_help(args: list[str], encoding: str) -> None:
    """Also where the output can't be written in all characters: Windows' pipes, old locales."""
    command = [sys.executable, "-m", "pyllamabatch", *args]
    done = ended(command, PYTHONIOENCODING=encoding)
    assert done.returncode == 0
    assert "pyllamabatch" in done.stdout
    assert done.stderr == ""


def test_ctrl_c_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def import_module(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyllamabatch.cli.command.import_module", import_module)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "pyllamabatch: interrupted\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "pyllamabatch: .*COMMAND"),
        ("gen", "pyllamabatch: .*generate"),
        ("serve --port 99999", "pyllamabatch serve: .*--port: 99999 is not 0 to 65535"),
        ("serve --n_ctx=5", "pyllamabatch serve: unknown: --n_ctx=5, did you mean --n-ctx?"),
        ("--verbose info", "pyllamabatch info: --verbose goes behind pyllamabatch info"),
        ("info nonsense", "pyllamabatch info: unknown: nonsense"),
    ],
)
def test_what_is_wrong_with_a_command_line_is_one_line(words: str, says: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(says, said)
