"""Turn libllama's and ggml's public headers into one cffi module's C source.

The headers that are being compiled are preprocessed (pcpp), parsed (pycparser) and written out
again as cffi declarations. Nothing is guessed: structs are exact, so a layout that moved is an
error at import; enum values, array bounds in structs and numeric macros are left to the compiler
(`...`).

    python vendor/declarations.py --include DIR… --header llama.h… [--cdef FILE] \\
        [--dynamic ggml-cpu.h] --output _native.c
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cffi
import pcpp
from pycparser import c_ast, c_generator, c_parser

# Declared in a public header, but not on `lib`, each with its reason.
NOT_EXPOSED: dict[str, str] = {
    "ggml_threadpool_get_n_threads": "declared in ggml-cpu.h, defined nowhere in b11549",
}

# The types that system headers would bring; declarations from this text are not written out.
_PRELUDE = """
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long uint64_t; typedef unsigned long size_t; typedef long ssize_t;
typedef long intptr_t; typedef unsigned long uintptr_t; typedef long ptrdiff_t;
typedef _Bool bool; typedef struct FILE FILE;
"""


@dataclass
class Declarations:
    """What the headers declare, by name; the values are cffi declarations (C text)."""

    types: dict[str, None] = field(default_factory=dict)  # in order, each once
    functions: dict[str, c_ast.Decl] = field(default_factory=dict)
    function_headers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, str] = field(default_factory=dict)
    inline: dict[str, str] = field(default_factory=dict)

    def cdef(self) -> str:
        """The text for `ffi.cdef`."""
        functions = [
            f"{c_text(decl)};" for name, decl in self.functions.items() if name not in NOT_EXPOSED
        ]
        return "\n".join([*self.types, *functions, *self.constants.values()])


class _Preprocessor(pcpp.Preprocessor):  # type: ignore[misc]
    """pcpp without system headers, that remembers in which file each macro was defined."""

    def __init__(self, include: list[Path]) -> None:
        super().__init__()
        self.errors: list[str] = []
        for folder in include:
            self.add_path(str(folder))

    def on_include_not_found(
        self, is_malformed: bool, is_system_include: bool, curdir: str, includepath: str
    ) -> None:
        if not is_system_include:
            self.errors.append(f"{curdir}: #include not found: {includepath}")
        raise pcpp.OutputDirective(pcpp.Action.IgnoreAndRemove)

    def on_error(self, file: str, line: int, msg: str) -> None:
        self.errors.append(f"{file}:{line}: {msg}")


class _CdefWriter(c_generator.CGenerator):  # type: ignore[misc]
    """C text in the form that cffi reads."""

    def visit_Enumerator(self, n: c_ast.Enumerator) -> str:
        return f"{self._make_indent()}{n.name} = ...,\n"


class _OpenBounds(c_ast.NodeVisitor):  # type: ignore[misc]
    """Replace array bounds inside structs by `...`: the compiler knows them."""

    def visit_Struct(self, node: c_ast.Struct) -> None:
        for decl in node.decls or ():
            inner = decl.type
            while isinstance(inner, c_ast.ArrayDecl):
                inner.dim = c_ast.ID("...")
                inner = inner.type
            self.visit(decl)


def c_text(node: c_ast.Node) -> str:
    return str(_CdefWriter().visit(node))


def read(headers: list[str], include: list[Path]) -> Declarations:
    """Parse `headers` (names found in `include`) and everything they include from there."""
    pre = _Preprocessor(include)
    pre.parse("".join(f'#include "{name}"\n' for name in headers), "pyllamabatch")
    expanded = io.StringIO()
    pre.write(expanded)
    if pre.errors:
        raise SystemExit("pyllamabatch: cannot preprocess the headers:\n" + "\n".join(pre.errors))
    tree = c_parser.CParser().parse(f'#line 1 "prelude"\n{_PRELUDE}\n{expanded.getvalue()}')

    found = Declarations()
    for node in tree.ext:
        if node.coord.file in ("prelude", "pyllamabatch"):
            continue
        if isinstance(node, c_ast.FuncDef):
            found.inline[node.decl.name] = node.coord.file
            continue
        _OpenBounds().visit(node)
        if isinstance(node, c_ast.Decl) and isinstance(node.type, c_ast.FuncDecl):
            node.storage, node.funcspec = [], []
            found.functions.setdefault(node.name, node)
            found.function_headers.setdefault(node.name, Path(node.coord.file).name)
        elif isinstance(node, c_ast.Typedef | c_ast.Decl):
            found.types[f"{c_text(node)};"] = None
    found.constants = dict(_constants(pre, tree))
    return found


def _constants(pre: _Preprocessor, tree: c_ast.FileAST) -> Iterator[tuple[str, str]]:
    """Object-like macros whose value is a number or a string, as cffi declarations."""
    for name, macro in pre.macros.items():
        source = getattr(macro, "source", None)
        if macro.arglist is not None or not macro.value or not source:
            continue
        if source in ("", "pyllamabatch") or name.startswith("__"):
            continue
        tokens = pre.expand_macros(list(macro.value))
        text = "".join(tok.value for tok in tokens).strip()
        kind = _kind(text)
        if kind == "int":
            yield name, f"#define {name} ..."
        elif kind == "float":
            yield name, f"static const double {name};"
        elif kind == "string":
            yield name, f"static char *const {name};"


def _kind(text: str) -> str | None:
    """'int', 'float' or 'string' for a constant expression, None for anything else."""
    try:
        tree = c_parser.CParser().parse(f"{_PRELUDE}\nlong value = {text};")
    except Exception:  # pycparser's ParseError has moved between its versions
        return None
    kinds: set[str] = set()
    pending = [tree.ext[-1].init]
    while pending:
        node = pending.pop()
        if isinstance(node, c_ast.Constant):
            word = "string" if node.type == "string" else node.type
            kinds.add("float" if word in ("float", "double") else word)
        elif not isinstance(node, c_ast.UnaryOp | c_ast.BinaryOp | c_ast.Cast):
            return None
        pending += [
            child for child in (getattr(node, k, None) for k in ("expr", "left", "right")) if child
        ]
    if "string" in kinds:
        return "string" if kinds == {"string"} else None
    return "float" if "float" in kinds else "int"


def trampolines(found: Declarations, header: str) -> str:
    """C wrappers for the functions of `header`, looked up when first called.

    With dynamic backends the functions of ggml-cpu.h live in a library that is chosen at run
    time, so nothing can link to them: `plb_cpu_symbol` finds them in the one that was loaded.
    """
    wrappers = []
    for name, decl in found.functions.items():
        if found.function_headers[name] != header or name in NOT_EXPOSED:
            continue
        function = copy.deepcopy(decl.type)
        params = function.args.params if function.args else []
        if len(params) == 1 and params[0].name is None and c_text(params[0]).strip() == "void":
            params = []
        for i, param in enumerate(params):
            param.name = f"a{i}"  # it may have had none
            _rename(param.type, param.name)
        declared = ", ".join(c_text(p) for p in params) or "void"
        passed = ", ".join(f"a{i}" for i in range(len(params)))
        _rename(function.type, None)
        result = c_text(c_ast.Typename(None, [], None, function.type)).strip()
        back = "" if result == "void" else "return "
        wrappers.append(
            f"static {result} plb_dynamic_{name}({declared}) {{\n"
            f"    static {result} (*found)({declared});\n"
            f'    if (!found) found = ({result} (*)({declared})) plb_cpu_symbol("{name}");\n'
            f"    {back}found({passed});\n}}\n"
            f"#define {name} plb_dynamic_{name}\n"
        )
    return "\n".join(wrappers)


def _rename(node: c_ast.Node, name: str | None) -> None:
    """Give what a type declares a name: pycparser keeps it at the type's innermost node."""
    while not isinstance(node, c_ast.TypeDecl):
        node = node.type
    node.declname = name


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--include", type=Path, action="append", required=True)
    parser.add_argument("--header", action="append", required=True)
    parser.add_argument("--cdef", type=Path, help="declarations to add as they are")
    parser.add_argument("--dynamic", help="the header whose functions are looked up at run time")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    found = read(options.header, options.include)
    prelude = "".join(f'#include "{name}"\n' for name in options.header)
    if options.dynamic:
        prelude += '#include "device/cpu_symbol.h"\n'
        prelude += trampolines(found, options.dynamic)
    ffi = cffi.FFI()
    ffi.cdef(found.cdef())
    if options.cdef:
        ffi.cdef(options.cdef.read_text())
    ffi.set_source("pyllamabatch._native", prelude)
    scratch = options.output.with_suffix(".new.c")
    ffi.emit_c_code(str(scratch))
    if not options.output.exists() or scratch.read_bytes() != options.output.read_bytes():
        scratch.replace(options.output)  # an unchanged file keeps its date: no rebuild
    else:
        scratch.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
