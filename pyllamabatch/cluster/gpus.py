"""GPUs of replicas: each has some, or a share of one."""

from math import ceil, floor

UNITS = 10_000  # of a share, as Ray counts them


def n_gpus(replicas: int, each: float) -> int:
    """As many as these replicas need. A share of one is not spread over two."""
    if 0 < each < 1:
        return ceil(replicas / floor(1 / each))
    return replicas * ceil(each)


def share(replicas: int, gpus: int) -> float:
    """GPUs for each of these replicas, one at most, so that all have room on `gpus`."""
    return floor(UNITS / ceil(replicas / gpus)) / UNITS if gpus else 0.0
