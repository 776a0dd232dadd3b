"""A checkout that was never built says in one line what to run."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pyllamabatch
from tests.support.child import ended


def test_an_unbuilt_checkout_says_what_to_run(tmp_path: Path) -> None:
    package = Path(pyllamabatch.__file__).parent
    compiled = shutil.ignore_patterns("_native.*", "lib", "__pycache__")
    shutil.copytree(package, tmp_path / "pyllamabatch", ignore=compiled)
    # -S: of this environment the packages, not the .pth files, which may lead to a compiled module
    folders = [tmp_path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    command = [sys.executable, "-S", "-c", "import pyllamabatch; pyllamabatch.Engine"]
    done = ended(command, cwd=tmp_path, PYTHONPATH=os.pathsep.join(map(str, folders)))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(f"run python3 -m pip install -e . in {tmp_path}")
