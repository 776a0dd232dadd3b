"""sdist, wheel and editable install, each made and used as a user would. Minutes: `-m build`."""

import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.child import ended

pytestmark = [pytest.mark.build, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
SMOKE = """
from pathlib import Path
import pyllamabatch
from pyllamabatch.raw import ffi, lib
assert Path(pyllamabatch.__file__).is_relative_to({inside!r}), pyllamabatch.__file__
assert ffi.string(lib.llama_version())
with pyllamabatch.Model.default() as model, pyllamabatch.Engine(model, n_seq_max=2) as engine:
    params = pyllamabatch.SamplingParams(temperature=0, max_tokens=4)
    results = engine.generate(["Hello", "World"], params)
    assert [r.n_generated > 0 for r in results] == [True, True]
print("works")
"""


def call(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    done = ended(command, 1400, cwd, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """A virtual environment; returns its python."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    call(sys.executable, "-m", "build", "--sdist", "-o", out)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist with every index out of reach: it must need no download. Without
    optimisation, which takes a quarter of the time; the editable install has it."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as tar:
        tar.extractall(folder)
    (tree,) = folder.iterdir()
    call(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder,
        "-Ccmake.define.CMAKE_C_FLAGS_RELEASE=-O0 -DNDEBUG",
        "-Ccmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0 -DNDEBUG", "-Ccmake.define.PLB_UNITY=ON",
        cwd=tree, PIP_NO_INDEX="1", PIP_INDEX_URL="http://127.0.0.1:9/simple",
    )  # fmt: skip
    (path,) = folder.glob("*.whl")
    return path


def test_the_sdist_ships_the_source_it_builds(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"CMakeLists.txt", "vendor/llama.cpp.lock", "vendor/llama.cpp/include/llama.h"} <= names
    assert {"vendor/llama.cpp/LICENSE", "native/plb.h", "LICENSE"} <= names
    assert any(name.endswith(".gguf") and "models/" in name for name in names)
    assert any(name.endswith(".json") and "cost/profiles/" in name for name in names)
    assert not [name for name in names if name.endswith((".so", ".o", ".dylib", ".pyc"))]
    assert not [name for name in names if name.startswith(("build/", ".git/"))]


def test_the_wheel_holds_our_files_and_libraries_only(wheel: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pyllamabatch"}
    libraries = {Path(name).name for name in names if name.startswith("pyllamabatch/lib/")}
    needed = {f"lib{name}{SUFFIX}" for name in ("llama", "ggml", "ggml-base", "ggml-cpu")}
    assert needed <= libraries
    assert all(name.startswith("libggml-") for name in libraries - needed)
    compiled = [name for name in names if name.startswith("pyllamabatch/_native.")]
    assert sorted(compiled) == ["pyllamabatch/_native.abi3.so", "pyllamabatch/_native.pyi"]
    assert "pyllamabatch/py.typed" in names
    licences = [name for name in names if "/licenses/" in name]
    assert len(licences) == 2, licences
    assert any("llama.cpp/LICENSE" in name for name in licences)
    unwanted = (".h", ".hpp", ".cpp", ".c", ".cmake", ".pc", ".a", ".cdef")
    assert not [name for name in names if name.endswith(unwanted)]


@pytest.mark.skipif(sys.platform != "linux", reason="readelf is Linux's; delocate checks a Mac's")
def test_the_libraries_find_each_other_by_relative_paths(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path)
    for path in (tmp_path / "pyllamabatch").rglob(f"*{SUFFIX}"):
        lines = call("readelf", "-d", path, LC_ALL="C").splitlines()
        runpath = [line.partition("[")[2].rstrip("]") for line in lines if "PATH)" in line]
        assert runpath == (["$ORIGIN/lib"] if "_native" in path.name else ["$ORIGIN"]), path


def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    call(python, "-m", "pip", "install", "-q", wheel)
    code = SMOKE.format(inside=str(tmp_path)) + "assert not hasattr(lib, 'plb_fault_set')\n"
    out = call(python, "-c", code, cwd=tmp_path)
    assert out.strip() == "works"


def test_an_editable_install_works(tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv")
    call(python, "-m", "pip", "install", "-q", "-e", ROOT)
    out = call(python, "-c", SMOKE.format(inside=str(ROOT)), cwd=tmp_path)
    assert out.strip() == "works"
