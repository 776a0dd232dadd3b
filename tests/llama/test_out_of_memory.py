"""Out of memory inside of llama.cpp's converters, under a limit of the process. That any
allocation of such a call may fail is native/tests/test_memory.cpp's to show."""

import sys

import pytest

from tests.support.child import run_itself

SIZE = 2 << 20  # bytes of a message: more than Python's own copies need room in llama.cpp
STEP = SIZE // 2


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process by RLIMIT_AS")
def test_a_chat_without_memory_is_a_memory_error_and_the_next_one_goes_well() -> None:
    run_itself(__file__)


def render_with_more_and_more_memory() -> None:
    import resource
    from pathlib import Path

    from pyllamabatch import Model
    from pyllamabatch.llama.chat import ChatTemplate

    def room(size: int) -> None:
        """The process may have `size` bytes more than it has."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + size
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    with Model.default() as model:
        chat = ChatTemplate(model, "chatml")
        small, large = ([{"role": "user", "content": "a" * size}] for size in (64, SIZE))
        expected, reasons, prompt = str(chat.render(small)), [], None
        for size in range(STEP, 64 * SIZE, STEP):
            room(size)
            try:
                prompt = chat.render(large)
                break
            except MemoryError as error:
                reasons.append(str(error))
            finally:
                room(64 * SIZE)
            assert chat.render(small) == expected
        assert prompt is not None
        assert "a" * SIZE in prompt
        assert any("out of memory" in reason for reason in reasons), reasons  # llama.cpp's


if __name__ == "__main__":
    render_with_more_and_more_memory()
