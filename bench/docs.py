"""Parts of the documentation that are made from result rows."""

from __future__ import annotations

from pathlib import Path


def replace_part(path: Path, name: str, text: str) -> None:
    """What is between the lines `<!-- NAME -->` and `<!-- end of NAME -->` of a page, by `text`.
    Raises ValueError where they are not there once each."""
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = path.read_text(encoding="utf-8")
    if page.count(first) != 1 or page.count(last) != 1:
        raise ValueError(f"{path} must have {first.strip()} and {last.strip()}, once each")
    before, rest = page.split(first)
    after = rest.split(last)[1]
    path.write_text(f"{before}{first}\n{text.strip()}\n\n{last}{after}", encoding="utf-8")
