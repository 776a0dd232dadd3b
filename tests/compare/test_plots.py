"""Pictures and pages of made-up rows."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pyllamabatch.compare import plots
from pyllamabatch.errors import ArgumentError, UnsupportedOperation
from pyllamabatch.report.plots import styled
from pyllamabatch.report.records import Record
from tests.support.made_up_rows import GIB, row

SCALE = {"processes": 1.0, "contexts": 1.05, "shared": 1.7, "engine": 1.8}


def made_up() -> list[Record]:
    rows = []
    for repeat in range(3):
        drift = 1 - 0.05 * repeat
        rows.append(row("single", 1, 50 * drift, repeat=repeat, pss_bytes=0.5 * GIB))
        for n in (1, 2, 4, 8):
            for arm, factor in SCALE.items():
                speed = 50 * drift * (1 + 0.3 * factor * (n - 1) ** 0.5)
                detail: dict[str, Any] = {
                    "per_sequence_tokens_per_second": speed / n,
                    "pss_bytes": (0.5 + 0.1 * n * (3 - factor)) * GIB,
                    "ttft_p99_s": 0.1 * n / factor,
                    "itl_p99_s": 0.02 * n / factor,
                }
                error = "no memory" if arm == "processes" and n == 8 else ""
                rows.append(row(arm, n, speed, repeat=repeat, error=error, **detail))
                poisson = row(arm, n, 10, bench="compare-poisson", repeat=repeat, **detail)
                rows.append(poisson)
    return rows


def test_a_picture_by_its_suffix(tmp_path: Path) -> None:
    plots.save(made_up(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for name in ("a.svg", "b.svg"):
        plots.save(made_up(), tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    for words in ("together, tokens/s", "memory (PSS), GiB", "TTFT, p99, ms"):
        assert words in text
    with pytest.raises(ArgumentError, match=r"must end in \.png, \.svg, \.html"):
        plots.save(made_up(), tmp_path / "a.pdf")
    with pytest.raises(ArgumentError, match="records"):
        plots.save([], tmp_path / "c.svg")


def test_the_panels_show_medians_and_failures() -> None:
    with styled() as new:
        figure: Any = plots.draw(made_up(), new)
    burst, poisson = figure.subfigs
    together, each, memory = burst.axes
    lines = {line.get_label(): line for line in together.get_lines()}
    assert "no result" in lines
    assert list(lines["no result"].get_xdata()) == [8]
    (bars,) = [c for c in together.containers if c.get_label() == "engine"]
    assert list(bars.lines[0].get_xdata()) == [1, 2, 4, 8]
    assert bars.lines[0].get_ydata()[0] == pytest.approx(47.5)  # the median of the repeats
    (line,) = [x for x in each.get_lines() if x.get_label() == "engine"]
    assert line.get_ydata()[0] == pytest.approx(47.5)
    (line,) = [x for x in memory.get_lines() if x.get_label() == "processes"]
    assert list(line.get_xdata()) == [1, 2, 4]
    assert line.get_ydata()[0] == pytest.approx(0.7)
    assert [at.get_ylabel() for at in poisson.axes][:2] == ["TTFT, p99, ms", "ITL, p99, ms"]


def test_without_memory_the_panel_says_so() -> None:
    with styled() as new:
        figure: Any = plots.draw([row("engine", 1, 5), row("engine", 2, 6)], new)
    assert figure.subfigs[0].axes[2].get_ylabel() == "memory: not known here"


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    plots.save(made_up(), tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 1
    assert "<?xml" not in text
    assert not re.search(r"(src|href)=\"(?!#)", text)
    assert "Overall, with m-Q4_K_M" in text
    assert "<td class=text>engine</td>" in text
    assert "<p>processes, N = 8, has no result: no memory</p>" in text


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hidden: dict[str, Any] = {"matplotlib": None, "matplotlib.figure": None}
    for name, value in hidden.items():
        monkeypatch.setitem(sys.modules, name, value)
    with pytest.raises(UnsupportedOperation, match="pip install"):
        plots.save(made_up(), tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []
