"""Records of runs that other programs disturbed: they say nothing about speed.

A record's `other_cpu` is what others used of the cores meanwhile, on average (`meters`); below 0
where that is not known."""

from collections.abc import Sequence

from .meters import BUSY
from .records import Record


def is_disturbed(record: Record) -> bool:
    """As far as it is known."""
    return record.detail.get("other_cpu", 0.0) > BUSY * record.n_cores


def undisturbed(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if not is_disturbed(record)]


UNWATCHED = (
    "Whether other programs used the CPU is not known: that needs psutil "
    "(pip install 'pyllamabatch[cli]')."
)


def unwatched(records: Sequence[Record]) -> str:
    """That no one has looked what others used, if that is so of a run; else ""."""
    unknown = any(record.detail.get("other_cpu", 0.0) < 0 for record in records)
    return UNWATCHED if unknown else ""


def warning(records: Sequence[Record]) -> str:
    """How much of the machine others used, if that was enough to disturb a run; else ""."""
    known = [record for record in records if record.detail.get("other_cpu", -1.0) >= 0]
    disturbed = [record for record in known if is_disturbed(record)]
    if not disturbed:
        return ""
    most = max(record.detail["other_cpu"] for record in disturbed)
    return (
        f"The machine was busy: in {len(disturbed)} of {len(known)} runs other programs used "
        f"CPU, up to {most:.1f} of {disturbed[0].n_cores} cores."
    )
