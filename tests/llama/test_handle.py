"""A native object ends in C, after everything that it needs is let go by it alone."""

import sys
import weakref
from types import FrameType

from pyllamabatch import Model
from pyllamabatch.llama.chat import ChatTemplate
from pyllamabatch.llama.handle import owned
from pyllamabatch.raw import ffi


class Needed:
    pass


def test_no_line_of_python_runs_at_its_end(model: Model) -> None:
    """An interrupt is raised in whatever line of Python runs: there it would be lost."""
    prompt = ChatTemplate(model).render([{"role": "user", "content": "Hello"}])
    lines: list[str] = []

    def note(frame: FrameType, event: str, what: object) -> None:
        if event == "call":
            lines.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        del prompt
    finally:
        sys.setprofile(None)
    assert lines == []


def test_what_it_needs_lives_as_long() -> None:
    needed, memory = Needed(), ffi.new("int *")
    alive = weakref.ref(needed)
    ptr = owned(memory, needed)
    del needed
    assert alive() is not None
    del ptr
    assert alive() is None
