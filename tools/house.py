"""The house's own check: `python -m tools.house`.

It prints the lines of every room, the files in the hall, import cycles, retired words, classes of
one name, long files and long constructors, and ends with 1 where a rule is broken. The layers are
import-linter's (`lint-imports`, pyproject.toml).
"""

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "pyllamabatch"
HALL = 7  # files in the root of the package, at most
TARGETS = {"package": 12_500, "native": 4_800, "tests": 16_000, "docs": 1_200, "README.md": 120}
LONG_FILE, LONG_CONSTRUCTOR = 450, 6
LONG_ALLOWED = ("Engine",)  # its keywords are the public interface
TWICE_ALLOWED = ("Ranked",)  # a result of `rerank`, and a policy's order: both are public names

# What the words of STYLE once were, for names (n_kept, KeptSlots) as well as for prose.
RETIRED = re.compile(
    r"(?<![A-Za-z])("
    r"hands?|hand[ -]driven|by[ -]hand|seats?|seated|guests?|mailbox|door|visits?|visitors?|"
    r"movers?|"
    r"waiting line|waits? in line|beginnings?|kept|resting|rests|gives? way|give_way|gave way|"
    r"way is made|"
    r"bells?|doorbell|made anew|in[ _]sight|nobody|somebody|anybody|everybody|whoever|whom|"
    r"he|his|him|she|her"
    r")(?![A-Za-z])",
    re.IGNORECASE,
)
# Lines in which such a word means what it means everywhere: path -> a part of the line.
ALLOWED: dict[str, tuple[str, ...]] = {
    "tools/house.py": ("",),
    "CHANGELOG.md": ("kv_kept", "kv_in_sight"),  # what names were
    "pyllamabatch/report/meters.py": ('"guest"',),  # psutil's name of a field
    "tools/recipe/default_model/world.py": ("",),  # words to spell
    "vendor/declarations.py": ("visit",),  # pycparser's visitors
}
WORDS_IN = (".py", ".pyi", ".md", ".cpp", ".hpp", ".h", ".inc", ".c", ".cmake", ".toml", ".cdef")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines()]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == PACKAGE:
        return "/".join(parts[:2]) if len(parts) > 2 else PACKAGE
    return parts[0]


def total_of(path: Path) -> str | None:
    """The target that a file's lines count for."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == PACKAGE and path.suffix in (".py", ".pyi"):
        return "package"
    if parts[0] == "native" and "tests" not in parts:
        return "native"
    if parts[0] in ("tests", "native") and path.suffix in (".py", ".cpp", ".hpp"):
        return "tests" if parts[0] == "tests" else None
    if parts[0] == "docs" and path.suffix == ".md":
        return "docs"
    return "README.md" if parts == ("README.md",) else None


def cycles() -> list[str]:
    graph = grimp.build_graph(PACKAGE, cache_dir=None, exclude_type_checking_imports=True)
    imports = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return [" -> ".join(error.args[1])]
    return []


def retired_words(path: Path) -> Iterator[str]:
    name = path.relative_to(ROOT).as_posix()
    allowed = ALLOWED.get(name, ())
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = RETIRED.search(line)
        if found and not any(part in line for part in allowed):
            yield f"{name}:{number}: {found[0]!r}: {line.strip()[:90]}"


def long_constructors(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ClassDef):
            continue
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                arguments = item.args.posonlyargs + item.args.args + item.args.kwonlyargs
                if len(arguments) - 1 > LONG_CONSTRUCTOR and node.name not in LONG_ALLOWED:
                    where = path.relative_to(ROOT).as_posix()
                    yield f"{where}: {node.name}({len(arguments) - 1} arguments)"


def classes_of_one_name(paths: Iterable[Path]) -> Iterator[str]:
    """Names that classes of several modules have: one word is to name one thing."""
    where: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                where[node.name].append(path.relative_to(ROOT).as_posix())
    for name, found in sorted(where.items()):
        if len(found) > 1 and name not in TWICE_ALLOWED:
            yield f"{name}: {', '.join(found)}"


def show(title: str, found: list[str], *, most: int = 40) -> int:
    print(f"\n{title}: {len(found) or 'none'}")
    for line in found[:most]:
        print(f"  {line}")
    if len(found) > most:
        print(f"  … and {len(found) - most} more")
    return len(found)


def main() -> int:
    files = [path for path in tracked() if path.is_file()]
    text = [path for path in files if path.suffix in WORDS_IN and "results" not in path.parts]
    sizes: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    for path in text:
        sizes[room(path)] += lines(path)
        if (name := total_of(path)) is not None:
            totals[name] += lines(path)
    print("lines by room")
    for name, n in sorted(sizes.items()):
        print(f"  {n:6,}  {name}")
    print("\nlines against the targets")
    for name, most in TARGETS.items():
        print(f"  {totals[name]:6,} of {most:6,}  {name}")

    package = [path for path in text if path.relative_to(ROOT).parts[0] == PACKAGE]
    python = [path for path in package if path.suffix == ".py"]
    hall = [path.name for path in files if path.parent == ROOT / PACKAGE]
    long = [f"{lines(p):4} {p.relative_to(ROOT)}" for p in text if lines(p) > LONG_FILE]
    constructors = [found for path in python for found in long_constructors(path)]
    words = [found for path in text for found in retired_words(path)]

    show(f"files over {LONG_FILE} lines (a sign, not a law)", sorted(long, reverse=True))
    allowed = ", ".join(LONG_ALLOWED)
    title = f"constructors of more than {LONG_CONSTRUCTOR} arguments, but for {allowed}"
    broken = show(title, constructors) > 0
    print(f"\nfiles in the hall: {len(hall)} of {HALL}: {', '.join(hall)}")
    broken |= len(hall) > HALL
    broken |= show("import cycles", cycles()) > 0
    broken |= show("classes of one name", [*classes_of_one_name(python)]) > 0
    broken |= show("retired words", words) > 0
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
