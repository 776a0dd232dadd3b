"""CMake's choices, also for platforms that this machine is not. Nothing is compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake") or "cmake"  # the test extra installs it

NAMES = (
    "BUILD_SHARED_LIBS",
    "GGML_BACKEND_DL",
    "GGML_CPU_ALL_VARIANTS",
    "GGML_CUDA",
    "GGML_METAL",
    "GGML_METAL_EMBED_LIBRARY",
    "GGML_NATIVE",
    "GGML_OPENMP",
    "LLAMA_BUILD_TOOLS",
)
SHOW = 'foreach(n ${NAMES})\n  message(STATUS "${n}=${${n}}")\nendforeach()\n'


def options(tmp_path: Path, **variables: str) -> dict[str, str]:
    """What cmake/BackendOptions.cmake chooses when CMake has these variables."""
    script = tmp_path / "show.cmake"
    script.write_text(
        "".join(f'set({k} "{v}")\n' for k, v in variables.items() if not k.startswith("GGML"))
        + f'include("{ROOT}/cmake/BackendOptions.cmake")\nset(NAMES {" ".join(NAMES)})\n{SHOW}'
    )
    defined = [f"-D{k}={v}" for k, v in variables.items() if k.startswith("GGML")]
    done = subprocess.run(
        [CMAKE, *defined, "-P", str(script)], capture_output=True, text=True, check=True, timeout=60
    )
    lines = [line.removeprefix("-- ") for line in done.stdout.splitlines()]
    return dict(line.split("=", 1) for line in lines)


def test_apple_gets_metal_with_its_library_embedded(tmp_path: Path) -> None:
    chosen = options(tmp_path, APPLE="1")
    assert chosen["GGML_METAL"] == "ON"
    assert chosen["GGML_METAL_EMBED_LIBRARY"] == "ON"
    assert chosen["GGML_NATIVE"] == "ON"


def test_apple_without_metal_when_asked(tmp_path: Path) -> None:
    assert options(tmp_path, APPLE="1", GGML_METAL="OFF")["GGML_METAL"] == "OFF"


def test_linux_gets_the_cpu_of_this_machine(tmp_path: Path) -> None:
    chosen = options(tmp_path, UNIX="1")
    assert chosen["GGML_METAL"] == ""
    assert chosen["GGML_CUDA"] == ""
    assert chosen["GGML_NATIVE"] == "ON"
    assert chosen["GGML_OPENMP"] == "OFF"
    assert chosen["BUILD_SHARED_LIBS"] == "ON"
    assert chosen["LLAMA_BUILD_TOOLS"] == "OFF"


def test_cuda_and_openmp_are_options(tmp_path: Path) -> None:
    for name in ("GGML_CUDA", "GGML_OPENMP"):
        assert options(tmp_path, UNIX="1", **{name: "ON"})[name] == "ON"


@pytest.mark.parametrize("platform", ["APPLE", "UNIX"])
def test_a_portable_build_has_all_cpu_variants(tmp_path: Path, platform: str) -> None:
    chosen = options(tmp_path, PLB_PORTABLE="ON", **{platform: "1"})
    assert chosen["GGML_BACKEND_DL"] == "ON"
    assert chosen["GGML_CPU_ALL_VARIANTS"] == "ON"
    assert chosen["GGML_NATIVE"] == "OFF"


def configure(
    tmp_path: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CMAKE, "-S", str(ROOT), "-B", str(tmp_path / "build"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_missing_compiler_is_one_clear_message(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no-such-compiler")
    done = configure(tmp_path, CC=nowhere, CXX=nowhere)
    assert done.returncode != 0
    assert "no C compiler found" in done.stderr
    assert "build-essential" in done.stderr


def test_a_folder_that_is_not_llama_cpp_is_refused(tmp_path: Path) -> None:
    done = configure(tmp_path, f"-DPLB_LLAMA_CPP_DIR={tmp_path}")
    assert done.returncode != 0
    assert "not a llama.cpp tree" in " ".join(done.stderr.split())  # CMake wraps its lines
