"""What plots have in common. They need matplotlib: `pip install 'pyllamabatch[plots]'`."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from pyllamabatch.errors import UnsupportedOperation
from pyllamabatch.report.medians import speeds_of
from pyllamabatch.report.records import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {  # some of matplotlib's versions type every key
    "svg.hashsalt": "pyllamabatch",  # the same bytes for the same figures
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def styled() -> Iterator[type[Figure]]:
    """matplotlib's `Figure`, for plots that are drawn and saved in the block.
    UnsupportedOperation without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedOperation(
            "plots need matplotlib: pip install 'pyllamabatch[plots]'"
        ) from None
    with matplotlib.rc_context(STYLE):
        yield Figure


def svg(figure: Figure) -> str:
    """The same text for the same figure."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def draw_speeds(
    records: Sequence[Record], at: Axes, colours: Mapping[str, str] | None = None
) -> None:
    """A line per arm: medians over the number of sequences, the smallest and the largest speed as
    bars. `colours`: of the arms' lines; matplotlib's own without."""
    speeds = speeds_of(record for record in records if not record.error)
    for arm in dict.fromkeys(record.arm for record in records):
        points = sorted(pl for name, pl in speeds if name == arm)
        if not points:
            continue
        sides = [sorted(speeds[arm, pl]) for pl in points]
        middle = [median(side) for side in sides]
        below = [m - side[0] for m, side in zip(middle, sides, strict=True)]
        above = [side[-1] - m for m, side in zip(middle, sides, strict=True)]
        colour = (colours or {}).get(arm)
        at.errorbar(
            points, middle, (below, above), label=arm, color=colour, marker="o", ms=4, capsize=2
        )


def over_counts(at: Axes, counts: Sequence[int], across: str, up: str) -> None:
    """Axes whose numbers of sequences double, and whose values begin at 0."""
    at.set_xscale("log", base=2)
    at.set_xticks(counts, [str(count) for count in counts])
    at.minorticks_off()
    at.set_ylim(bottom=0)
    at.set_xlabel(across)
    at.set_ylabel(up)
    at.grid(alpha=0.3)
