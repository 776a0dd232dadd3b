"""The compiled module. Its names are made from the headers at build time: see docs/raw.md."""

from typing import Any

ffi: Any
lib: Any
