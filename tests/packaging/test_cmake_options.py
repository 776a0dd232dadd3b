"""CMake's choices, also for platforms that this machine is not. Nothing is compiled."""

import shutil
from pathlib import Path

import pytest

from tests.support.child import ended

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake") or "cmake"  # the test extra installs it

NAMES = (
    "BUILD_SHARED_LIBS", "GGML_BACKEND_DL", "GGML_BLAS", "GGML_CPU_ALL_VARIANTS", "GGML_CUDA",
    "GGML_METAL", "GGML_METAL_EMBED_LIBRARY", "GGML_NATIVE", "GGML_OPENMP", "LLAMA_BUILD_TOOLS",
)  # fmt: skip
SHOW = 'foreach(n ${NAMES})\n  message(STATUS "${n}=${${n}}")\nendforeach()\n'


def options(tmp_path: Path, **variables: str) -> dict[str, str]:
    """What cmake/BackendOptions.cmake chooses when CMake has these variables."""
    script = tmp_path / "show.cmake"
    script.write_text(
        "".join(f'set({k} "{v}")\n' for k, v in variables.items() if not k.startswith("GGML"))
        + f'include("{ROOT}/cmake/BackendOptions.cmake")\nset(NAMES {" ".join(NAMES)})\n{SHOW}'
    )
    defined = [f"-D{k}={v}" for k, v in variables.items() if k.startswith("GGML")]
    done = ended([CMAKE, *defined, "-P", script])
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("-- ") for line in done.stdout.splitlines()]
    return dict(line.split("=", 1) for line in lines)


PORTABLE = "GGML_BACKEND_DL=ON GGML_CPU_ALL_VARIANTS=ON GGML_NATIVE=OFF"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ("APPLE=1", "GGML_METAL=ON GGML_METAL_EMBED_LIBRARY=ON GGML_NATIVE=ON"),
        ("APPLE=1 GGML_METAL=OFF", "GGML_METAL=OFF"),
        ("APPLE=1", "GGML_BLAS=OFF"),
        ("APPLE=1 GGML_BLAS=ON", "GGML_BLAS=ON"),
        ("UNIX=1", "GGML_METAL= GGML_CUDA= GGML_NATIVE=ON BUILD_SHARED_LIBS=ON"),
        ("UNIX=1", "LLAMA_BUILD_TOOLS=OFF"),
        ("UNIX=1 GGML_CUDA=ON", "GGML_CUDA=ON"),
        ("APPLE=1 PLB_PORTABLE=ON", PORTABLE),
        ("UNIX=1 PLB_PORTABLE=ON", PORTABLE),
    ],
)
def test_what_is_chosen(tmp_path: Path, variables: str, expected: str) -> None:
    given, wanted = (
        dict(pair.split("=") for pair in pairs.split()) for pairs in (variables, expected)
    )
    assert wanted.items() <= options(tmp_path, **given).items()


def test_a_missing_compiler_is_one_clear_message(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no-such-compiler")
    done = ended([CMAKE, "-S", ROOT, "-B", tmp_path / "build"], CC=nowhere, CXX=nowhere)
    assert done.returncode != 0
    assert "no C compiler found" in done.stderr
    assert "build-essential" in done.stderr


def test_a_folder_that_is_not_llama_cpp_is_refused(tmp_path: Path) -> None:
    given = f"-DPLB_LLAMA_CPP_DIR={tmp_path}"
    done = ended([CMAKE, "-S", ROOT, "-B", tmp_path / "build", given])
    assert done.returncode != 0
    assert "not a llama.cpp tree" in " ".join(done.stderr.split())  # CMake wraps its lines
