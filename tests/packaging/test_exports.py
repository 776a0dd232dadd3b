"""What the compiled module shows to the dynamic linker."""

import sys

import pytest

from pyllamabatch import _native
from tests.support.child import ended


@pytest.mark.skipif(sys.platform != "linux", reason="the linker option is for ELF")
def test_the_compiled_module_exports_its_entry_alone() -> None:
    """A symbol of the C++ library that it had linked into itself would be found before the real
    one by some of the libraries, and by others not."""
    command = ["nm", "-D", "--defined-only", "--format=posix", str(_native.__file__)]
    listed = ended(command).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["PyInit__native"]
