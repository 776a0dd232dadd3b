"""What all plots have in common. They need matplotlib: `pip install pyllamabatch[plots]`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedOperation

if TYPE_CHECKING:
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
    """matplotlib's `Figure`, for plots drawn and saved in the block. Raises UnsupportedOperation
    without matplotlib."""
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
