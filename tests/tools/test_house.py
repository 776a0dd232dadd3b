"""tools.house: what it refuses."""

from pathlib import Path

import pytest

from tools import house


def constructor(n_arguments: int, name: str = "Long") -> str:
    arguments = ", ".join(f"a{i}" for i in range(n_arguments))
    return f"class {name}:\n    def __init__(self, {arguments}): ...\n"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (constructor(house.LONG_CONSTRUCTOR), []),
        (constructor(7), ["a.py: Long(7 arguments)"]),
        (constructor(7, "Engine"), []),
    ],
)
def test_long_constructors(
    source: str, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "a.py"
    path.write_text(source)
    assert list(house.long_constructors(path)) == found


def test_retired_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    path = tmp_path / "a.md"
    path.write_text("A sequence waits in the queue.\nNo" + "body waits.\n")
    (found,) = house.retired_words(path)
    assert found.startswith("a.md:2:")


def test_classes_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(house, "ROOT", tmp_path)
    paths = [tmp_path / name for name in ("a.py", "b.py")]
    paths[0].write_text("class Run: ...\nclass Ranked: ...\nclass Step: ...\n")
    paths[1].write_text("class Run: ...\nclass Ranked: ...\n")
    assert list(house.classes_of_one_name(paths)) == ["Run: a.py, b.py"]
