"""Records in their file, and tables as views of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.views import speed_table
from pyllamabatch.report.records import Record, append, read, speeds
from pyllamabatch.report.tables import Table
from tests.support.made_up_rows import row


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    records = [row("engine", 4, 90), row("raw", 4, 0, error="gone\nfor good")]
    path = tmp_path / "new" / "records.jsonl"
    append(path, records[:1])
    append(path, records[1:])
    assert list(read(path)) == records
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("change", "message"), [({"schema": 0}, "schema 0"), ({"speed": None, "extra": 1}, "extra")]
)
def test_records_of_another_form_are_refused(change: dict[str, Any], message: str) -> None:
    values = json.loads(row("engine", 1, 9).to_json()) | change
    with pytest.raises(ValueError, match=message):
        Record.from_json(json.dumps(values))


def test_speeds_follow_their_formulas() -> None:
    found = speeds(pp=32, tg=16, pl=4, t_pp=1.0, t_tg=2.0)
    assert (found["speed_pp"], found["speed_tg"]) == (128.0, 32.0)
    assert (found["t"], found["speed"]) == (3.0, 64.0)
    assert speeds(pp=1, tg=1, pl=1, t_pp=0.0, t_tg=0.0)["speed"] == 0.0


def test_a_table_for_a_file_a_terminal_and_a_page() -> None:
    table = Table(["arm", "tok/s"], [["a|b", "1.0"], ["<c>", "20.0"]])
    assert table.markdown().splitlines() == [
        "| arm | tok/s |", "|---|--:|", r"| a\|b | 1.0 |", "| <c> | 20.0 |",
    ]  # fmt: skip
    assert table.plain().splitlines() == ["arm  tok/s", "a|b    1.0", "<c>   20.0"]
    assert "<tr><td class=text>&lt;c&gt;</td><td>20.0</td></tr>" in table.html()


def test_a_table_of_speeds_has_medians_ratios_and_failures() -> None:
    records = [row("base", 4, 50), row("ours", 4, 100), row("ours", 4, 90, repeat=1)]
    records += [row("ours", 4, 80, repeat=2), row("lost", 4, 0, error="it\nbroke")]
    assert speed_table(records, "base").splitlines() == [
        "| B | base | ours | lost |", "|--:|--:|--:|--:|", "| 4 | 50.0 | 90.0 (2.000) | — |", "",
        "Largest spread of an arm, (max - min) / median: 22%", "",
        "- lost: no result: it broke",
    ]  # fmt: skip
