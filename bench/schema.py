"""One row per measured run, written as JSONL: the only form in which results are kept.

Key names are llama-bench's and llama-batched-bench's where these have the thing; tables and plots
are views of the rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from functools import cache
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


@cache
def machine() -> Mapping[str, Any]:
    """The machine's part of a row.  No host name: a result says what it ran on, not whose it is."""
    return {
        "cpu_info": _cpu_name(),
        "n_cores": _usable_cores(),
        "memory_bytes": _memory_bytes(),
        "os": _system_name(),
    }


@cache
def commit() -> str:
    """Our commit, with "-dirty" when tracked files other than results differ from it; "unknown"
    outside a checkout.  `PYLLAMABATCH_BENCH_COMMIT` says it for sources copied without history."""
    named = os.environ.get("PYLLAMABATCH_BENCH_COMMIT")
    if named:
        return named
    known = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)bench/results")
    return (known or "unknown") + ("-dirty" if known and changed else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def now() -> dict[str, Any]:
    """The moment's part of a row."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"test_time": time, "load_average": round(load, 2)}


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    if sys.platform == "linux":
        seen: dict[str, str] = {}
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            seen.setdefault(key.strip().lower(), value.strip())
        if "model name" in seen:  # a virtual machine's name may be vague: family and model are not
            family, model = seen.get("cpu family", "?"), seen.get("model", "?")
            return f"{seen['model name']} (family {family} model {model})"
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _system_name() -> str:
    if sys.platform == "linux":
        try:
            name = platform.freedesktop_os_release()["PRETTY_NAME"]
        except (OSError, KeyError):
            name = "Linux"
        kernel = ".".join(platform.release().split(".")[:2])
        return f"{name}, Linux {kernel} {platform.machine()}"
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"
