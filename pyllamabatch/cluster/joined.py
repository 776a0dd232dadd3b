"""What is asked of all replicas: their answers as one."""

from collections.abc import Callable, Mapping, Sequence
from urllib.parse import parse_qs

import orjson

from ..server.errors import no_slot
from .call import REPLICA, Whole


def summed(texts: list[bytes]) -> bytes:
    """Metrics in Prometheus' text format as those of one server: each value is the sum; of what is
    a share, or counted in a decode, it is the mean, and of a maximum the largest."""
    metrics: dict[str, dict[str, float | None]] = {}  # the lines of each, a comment's without value
    for text in texts:
        lines = metrics.setdefault("", {})
        for line in text.decode().splitlines():
            if line.startswith("#"):
                lines = metrics.setdefault(line.split()[2], {})
                lines[line] = None
                continue
            name, _, value = line.rpartition(" ")
            one, so_far = float(value), lines.get(name) or 0.0
            if name.endswith("_max"):
                lines[name] = max(so_far, one)
            else:
                is_mean = name.endswith(("_perc", "_ratio", "_per_decode"))
                lines[name] = so_far + one / (len(texts) if is_mean else 1)
    written = (
        line if value is None else f"{line} {value!r}"
        for lines in metrics.values()
        for line, value in lines.items()
    )
    return "".join(f"{line}\n" for line in written).encode()


def _all_slots(answers: Sequence[Whole], query: bytes) -> bytes:
    """The slots of each, with its name. ApiError where none is free and the query asks for that."""
    slots = [
        {**slot, "replica": dict(headers)[REPLICA].decode()}
        for (_, headers), body in answers
        for slot in orjson.loads(body)
    ]
    if b"fail_on_no_slot" in parse_qs(query) and all(slot["is_processing"] for slot in slots):
        raise no_slot()
    return orjson.dumps(slots)


JOINED: Mapping[str, Callable[[Sequence[Whole], bytes], bytes]] = {
    "/metrics": lambda answers, _: summed([body for _, body in answers]),
    "/slots": _all_slots,
}
"""By path, from the answers and the query, which no replica gets, to the body of the one answer."""
