"""The compiled module. Its names are made from the headers at build time: see
docs/reference/raw.md."""

from typing import Any

ffi: Any
lib: Any
