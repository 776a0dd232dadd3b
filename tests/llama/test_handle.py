"""A native object ends in C, after everything that it needs is let go by it alone."""

import sys
import weakref
from types import FrameType

from pyllamabatch import Model
from pyllamabatch.llama.chat import ChatTemplate
from pyllamabatch.llama.handle import owned
from pyllamabatch.raw import ffi
from tests.support.models_gguf import gguf_path


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


def test_a_vocabulary_in_use_keeps_its_model() -> None:
    """A thread may be inside a call of it when another one closes the model."""
    model = Model(gguf_path("llama"))
    alive, pointer = weakref.ref(model.ptr), model.vocab.ptr
    model.close()
    assert alive() is not None
    del pointer
    assert alive() is None
