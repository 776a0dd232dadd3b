"""The one form in which results are stored: a `Record` per run, a line of JSON each.

`pyllamabatch compare` and the benches write records. Names are those of llama-bench and
llama-batched-bench where these have the thing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Record:
    """One run of one arm. Times in s, speeds in tokens/s, sizes in bytes."""

    bench: str  # which comparison: "decode", …
    arm: str  # what did the work: "engine", "raw", "llama-batched-bench", …
    includes: str  # what the time and the work of this arm contain
    run_id: str  # the same for all records of one invocation
    repeat: int  # counts from 0; those of one repeat ran next to each other
    sampling: str  # "none", "greedy" or "default"
    # the machine
    test_time: str  # UTC, ISO 8601
    cpu_info: str
    n_cores: int
    memory_bytes: int
    os: str
    load_average: float  # of the last minute, when the run began (-1 if unknown)
    backends: str
    gpu_info: str
    # the build
    build_number: int  # llama.cpp's
    build_commit: str
    build_options: str  # CMake's for a tool, the compiled-in CPU features for our own arms
    versions: dict[str, str]  # "commit" is ours, with "-dirty" when files had changed
    # the model
    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    model_seed: int | None  # of random weights
    seed: int  # of prompts and sampling
    # settings
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
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """ValueError for another schema, and for a missing or unknown key. `error` may be
        missing: the first files have none."""
        values = {"error": ""} | json.loads(line)
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema {values.get('schema')!r}, this code reads {SCHEMA}")
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"keys differ: {sorted(set(values) ^ names)}")
        return cls(**values)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add the records to the file in one write, so that a kill leaves whole lines. The file and
    its folder are made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(record.to_json() + "\n" for record in records)
    with path.open("ab", buffering=0) as file:
        file.write(lines.encode())


def read(path: Path) -> Iterator[Record]:
    """The records of a file. ValueError as `Record.from_json`."""
    with path.open(encoding="utf-8") as file:
        yield from (Record.from_json(line) for line in file if line.strip())


def speeds(*, pp: int, tg: int, pl: int, t_pp: float, t_tg: float) -> dict[str, Any]:
    """The fields that follow from work and times, by the formulas beside them; 0 without a time."""
    t = t_pp + t_tg
    return {
        "t_pp": t_pp,
        "speed_pp": pp * pl / t_pp if t_pp > 0 else 0.0,
        "t_tg": t_tg,
        "speed_tg": tg * pl / t_tg if t_tg > 0 else 0.0,
        "t": t,
        "speed": (pp + tg) * pl / t if t > 0 else 0.0,
    }
