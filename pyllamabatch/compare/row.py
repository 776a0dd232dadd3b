"""One row per measured run, written as JSONL: the only form in which results are kept, by
`pyllamabatch compare` and by the benches.

Key names are llama-bench's and llama-batched-bench's where these have the thing; tables and plots
are views of the rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Row:
    """One run of one arm.  Times in s, speeds in tokens per s, sizes in bytes."""

    bench: str  # which comparison: "decode", …
    arm: str  # who did the work: "engine", "raw", "llama-batched-bench", …
    includes: str  # what the time and the work of this arm contain
    run_id: str  # the same for all rows of one invocation
    repeat: int  # counts from 0; rows of the same repeat ran next to each other
    sampling: str  # "none", "greedy" or "default"
    # who and where
    test_time: str  # UTC, ISO 8601
    cpu_info: str
    n_cores: int
    memory_bytes: int
    os: str
    load_average: float  # of the last minute, when the run began (-1 if unknown)
    backends: str
    gpu_info: str
    # build and versions
    build_number: int  # llama.cpp's
    build_commit: str
    build_options: str  # CMake's for a tool, the compiled-in CPU features for our own arms
    versions: dict[str, str]  # "commit" is ours, "-dirty" after it when files had changed
    # model
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    model_seed: int | None  # of random weights
    seed: int  # of prompts and sampling
    # settings, as both upstream tools name them
    n_kv_max: int
    n_batch: int
    n_ubatch: int
    flash_attn: int  # -1 automatic, 0 off, 1 on
    kv_unified: bool
    type_k: str
    type_v: str
    n_gpu_layers: int
    n_threads: int
    n_threads_batch: int
    # work and result
    pp: int  # prompt tokens per sequence
    tg: int  # timed tokens per sequence
    pl: int  # sequences
    n_kv: int
    t_pp: float
    speed_pp: float  # pp * pl / t_pp
    t_tg: float
    speed_tg: float  # tg * pl / t_tg
    t: float
    speed: float  # (pp + tg) * pl / t
    detail: dict[str, float] = field(default_factory=dict)  # per-phase times and the like
    schema: int = SCHEMA
    error: str = ""  # why there is no result; times and speeds are 0 then

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, sort_keys=False)

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError when a key is missing or unknown, or the schema is another one.
        `error` may be missing: rows that older code wrote have none."""
        values = {"error": ""} | json.loads(line)
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}, this code reads {SCHEMA}")
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"keys differ: {sorted(set(values) ^ names)}")
        return cls(**values)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds the rows to the file, which is complete and closed when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(row.to_json() + "\n")


def read(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield Row.from_json(line)


def speeds(*, pp: int, tg: int, pl: int, t_pp: float, t_tg: float) -> dict[str, Any]:
    """The derived values of a row, by the formulas beside the fields."""
    t = t_pp + t_tg
    return {
        "t_pp": t_pp,
        "speed_pp": pp * pl / t_pp if t_pp > 0 else 0.0,
        "t_tg": t_tg,
        "speed_tg": tg * pl / t_tg if t_tg > 0 else 0.0,
        "t": t,
        "speed": (pp + tg) * pl / t if t > 0 else 0.0,
    }
