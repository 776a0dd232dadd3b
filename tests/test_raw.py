"""The raw layer is all of libllama and ggml: read from the same headers that were compiled."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import cffi
import pytest

from pyllamabatch.raw import ffi, lib
from vendor import declarations

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "vendor" / "llama.cpp"
INCLUDE = [SOURCE / "include", SOURCE / "ggml" / "include", ROOT / "native"]
PUBLIC = ["llama.h", "ggml.h", "ggml-backend.h", "ggml-cpu.h", "gguf.h"]


@pytest.fixture(scope="module")
def found() -> declarations.Declarations:
    return declarations.read(["llama.h", "plb.h", "tests/plb_testing.h"], INCLUDE)


def test_every_public_function_is_on_lib(found: declarations.Declarations) -> None:
    missing = {name for name in found.functions if not hasattr(lib, name)}
    assert missing == set(declarations.NOT_EXPOSED)
    assert all(declarations.NOT_EXPOSED.values()), "an exception needs its reason"
    for header in PUBLIC:
        assert header in found.function_headers.values()


def test_no_inline_function_is_left_out(found: declarations.Declarations) -> None:
    assert found.inline == {}


@pytest.mark.parametrize(
    ("header", "mark"), [("llama.h", "LLAMA_API"), ("ggml.h", "GGML_API"), ("gguf.h", "GGML_API")]
)
def test_the_reader_drops_no_declaration(
    found: declarations.Declarations, header: str, mark: str
) -> None:
    """Independent of the AST: every export mark outside comments and directives is a function."""
    path = next(folder / header for folder in INCLUDE if (folder / header).exists())
    code = [
        line.partition("//")[0]
        for line in path.read_text().splitlines()
        if not line.lstrip().startswith("#")
    ]
    marks = sum(line.replace("(", " ").split().count(mark) for line in code)
    assert marks == list(found.function_headers.values()).count(header)


def test_every_constant_is_on_lib(found: declarations.Declarations) -> None:
    assert "LLAMA_DEFAULT_SEED" in found.constants
    assert "GGUF_MAGIC" in found.constants
    for name in found.constants:
        assert hasattr(lib, name), name
    assert lib.LLAMA_DEFAULT_SEED == 0xFFFFFFFF
    assert ffi.string(lib.GGUF_MAGIC) == b"GGUF"


def test_enumerators_have_the_compilers_values(found: declarations.Declarations) -> None:
    enums = [text for text in found.types if "= ...," in text]
    names = [line.partition("=")[0].strip() for text in enums for line in text.splitlines()]
    names = [name for name in names if name.isidentifier() and name != "enum"]
    assert len(names) > 300
    for name in names:
        assert isinstance(getattr(lib, name), int), name
    # One that another one defines, and one that is negative.
    assert lib.LLAMA_ROPE_TYPE_NEOX == lib.GGML_ROPE_TYPE_NEOX == 2
    assert lib.LLAMA_POOLING_TYPE_UNSPECIFIED == -1


def test_every_struct_has_the_compiled_layout(found: declarations.Declarations) -> None:
    """cffi compares size and offsets with the compiler's when a struct is first used."""
    heads = [text.partition("{")[0].split() for text in found.types if "{" in text]
    exact = {head[-1] for head in heads if len(head) > 1 and head[-2] == "struct"}
    for name in exact:
        assert ffi.sizeof(f"struct {name}") > 0, name
    assert {"llama_batch", "llama_model_params", "llama_context_params", "ggml_tensor"} <= exact
    assert {"plb_result", "plb_step_info", "plb_views"} <= exact
    _, structs, _ = ffi.list_types()
    assert exact <= set(structs)
    for opaque in set(structs) - exact:
        with pytest.raises((ffi.error, ValueError)):
            ffi.sizeof(f"struct {opaque}")
    # Structs without a tag are checked through their typedef.
    for text in found.types:
        if text.startswith("typedef struct\n{"):
            assert ffi.sizeof(text.rpartition("}")[2].strip(" ;")) > 0


def test_a_layout_that_moved_is_an_error(tmp_path: Path) -> None:
    """The check that the test above relies on can fail: a field that is wider than declared."""
    moved = cffi.FFI()
    moved.cdef("struct moved { int32_t a; int32_t b; };")
    moved.set_source("_moved", "#include <stdint.h>\nstruct moved { int32_t a; int64_t b; };")
    spec = importlib.util.spec_from_file_location("_moved", moved.compile(tmpdir=str(tmp_path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(module.ffi.error, match="moved: wrong"):
        module.ffi.sizeof("struct moved")


def test_wrappers_for_a_backend_that_is_loaded_at_run_time_compile(
    found: declarations.Declarations, tmp_path: Path
) -> None:
    text = declarations.trampolines(found, "ggml-cpu.h")
    for name, header in found.function_headers.items():
        wrapped = header == "ggml-cpu.h" and name not in declarations.NOT_EXPOSED
        assert (f"#define {name} plb_dynamic_{name}\n" in text) is wrapped, name
    source = tmp_path / "wrappers.c"
    source.write_text(f'#include "llama.h"\n#include "device/cpu_symbol.h"\n{text}')
    include = [f"-I{folder}" for folder in INCLUDE]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    options = ["-fsyntax-only", "-Wall", "-Werror", "-Wno-unused-function"]
    subprocess.run([*compiler, *options, *include, str(source)], check=True, timeout=60)


def test_a_call_releases_the_gil_and_returns() -> None:
    assert lib.llama_time_us() > 0
    assert lib.llama_max_parallel_sequences() == 256
