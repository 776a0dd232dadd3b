"""The Python of README.md and of every page of docs/ runs as it is printed.

The blocks of a page run one after the other in one process, as a reader would type them. A `text`
block that follows a `python` block, with at most a line of words between, is exactly its output.
"""

import re
import shutil
from pathlib import Path

import pytest

from pyllamabatch.cost.profile import SHIPPED
from pyllamabatch.models import default_model_path
from tests.support.child import python
from tests.support.models_special import write_lora

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/**/*.md")))]
BLOCK = re.compile(
    r"^```python\n(.*?)^```$(?:\n+(?:[^\n`#]+\n+)?^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
END = "\0"  # of a block's output


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the blocks run: files by the names that the pages use."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("law", "tone"):
        write_lora(folder / f"{name}.gguf", width=256)
    shutil.copy(default_model_path(), folder / "FILE.gguf")
    shutil.copy(next(SHIPPED.glob("x86-2-core-avx512*.json")), folder / "profile.json")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(text(page))])
def test_a_page(page: str, folder: Path) -> None:
    blocks = BLOCK.findall(text(page))
    program = "".join(f"{code}\nprint({END!r}, end='', flush=True)\n" for code, _ in blocks)
    done = python("-c", program, cwd=folder)
    assert done.returncode == 0, done.stderr
    for (code, expected), printed in zip(blocks, done.stdout.split(END), strict=False):
        assert not expected or printed == expected, code


def test_the_two_commands_are_there() -> None:
    assert "python3 -m pip install -e '.[cli]' && pyllamabatch demo\n" in text("README.md")
    assert "python3 -m pip install -e '.[test]' && python3 -m pytest\n" in text("README.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text(page))
    here = (ROOT / page).parent
    assert [link for link in links if "://" not in link and not (here / link).exists()] == []
