"""What a record says of the machine, the build, the model and the moment."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllamabatch.llama.host import host_memory, usable_cores

if TYPE_CHECKING:
    from pyllamabatch.llama.model import Model

RESULTS = ":(exclude,top)bench/results"


@cache
def machine() -> Mapping[str, Any]:
    """The machine's part of a record. The host's name is not in it."""
    return {
        "cpu_info": _cpu_name(),
        "n_cores": usable_cores(),
        "memory_bytes": host_memory(),
        "os": _system_name(),
    }


def commit(file: Path = Path(__file__)) -> str:
    """The commit of the checkout that `file` belongs to, with "-dirty" when tracked files other
    than the benches' results differ from it; "unknown" outside a checkout.
    `PYLLAMABATCH_BENCH_COMMIT` says it for sources copied without history."""
    named = os.environ.get("PYLLAMABATCH_BENCH_COMMIT")
    if named:
        return named
    folder = file.resolve().parent
    if not _git(folder, "ls-files", "--", file.name):  # an environment inside a checkout is not it
        return "unknown"
    known = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "-uno", "--", ":/", RESULTS)
    return (known or "unknown") + ("-dirty" if known and changed else "")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def build(commit: str) -> dict[str, Any]:
    """The build's and the versions' part of a record; `commit` is ours."""
    import numpy as np

    from pyllamabatch import __version__
    from pyllamabatch.llama import runtime
    from pyllamabatch.raw import ffi, lib

    devices = runtime.devices()
    build = ffi.string(lib.plb_llama_cpp_build()).decode()
    versions = {
        "pyllamabatch": __version__,
        "commit": commit,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    return {
        "backends": ",".join(devices),
        "gpu_info": ", ".join(d.description for d in devices.values() if d.kind != "cpu"),
        "build_number": int(build.removeprefix("b")) if build[1:].isdigit() else 0,
        "build_commit": build,
        "build_options": ffi.string(lib.llama_print_system_info()).decode().strip(" |"),
        "versions": versions,
    }


def about(model: Model) -> dict[str, Any]:
    """The model's part of a record."""
    return {
        "model_type": model.description,
        "model_size": model.size_bytes,
        "model_n_params": model.n_params,
    }


def now() -> dict[str, Any]:
    """The moment's part of a record."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"test_time": time, "load_average": round(load, 2)}


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
