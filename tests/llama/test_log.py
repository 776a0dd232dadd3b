"""llama.cpp's log: in order, from any thread, bounded, and with the call that failed."""

import logging
import threading
from pathlib import Path

import pytest

from pyllamabatch import Model
from pyllamabatch.errors import ModelLoadError
from pyllamabatch.llama import runtime
from pyllamabatch.raw import ffi, lib
from tests.support.child import python
from tests.support.models_gguf import gguf_path

LOGGER = "pyllamabatch.llama"


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == LOGGER]


def test_levels(tiny_llama_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = []
    for level in (logging.WARNING, logging.INFO, logging.DEBUG):
        with caplog.at_level(level, logger=LOGGER):
            runtime.drain_log()
            caplog.clear()
            Model(tiny_llama_path).close()
            counts.append(len(messages(caplog)))
    assert counts[0] < counts[1] < counts[2]
    assert not any("\n" in text for text in messages(caplog))


def test_what_a_program_that_knows_no_logging_hears() -> None:
    """What goes wrong in an engine, and nothing of llama.cpp's."""
    done = python(
        "-c",
        "import logging; from pyllamabatch.llama.runtime import logger\n"
        "logger.error('of llama.cpp'); log = logging.getLogger('pyllamabatch.engine.core')\n"
        "log.warning('of an engine'); log.info('more')",
    )
    assert done.stderr == "of an engine\n"


def test_a_full_ring_drops_the_oldest(
    tiny_llama_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tiny_llama_path).encode()
    with caplog.at_level(logging.DEBUG, logger=LOGGER):
        runtime.drain_log()
        caplog.clear()
        for _ in range(30):
            lib.llama_model_free(
                lib.llama_model_load_from_file(path, lib.llama_model_default_params())
            )
        runtime.drain_log()
    lines = messages(caplog)
    assert any("were lost" in text for text in lines)
    assert sum(map(len, lines)) < 2**18
    caplog.clear()
    runtime.drain_log()
    assert messages(caplog) == []


def test_errors_are_of_the_thread_that_failed(tmp_path: Path) -> None:
    whole = gguf_path("llama").read_bytes()
    found: dict[str, str] = {}

    def fail(name: str) -> None:
        path = tmp_path / name
        path.write_bytes(whole.replace(b"llama.block_count", name.encode()[:17]))
        with pytest.raises(ModelLoadError) as caught:
            Model(path)
        found[name] = caught.value.log

    names = [f"{i:017d}" for i in range(6)]
    threads = [threading.Thread(target=fail, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == names
    for name, log in found.items():
        assert "block_count" in log
        assert log.count("failed to load model") == 1
        assert not any(other in log for other in names if other != name)


def test_bad_arguments_of_the_ring() -> None:
    level, dropped = ffi.new("int32_t *"), ffi.new("int64_t *")
    assert lib.plb_log_drain(ffi.NULL, 10, level, dropped) == lib.PLB_E_ARGUMENT
    assert lib.plb_log_errors(ffi.NULL, 10) == lib.PLB_E_ARGUMENT
    assert lib.plb_log_errors(ffi.new("char[]", 1), 0) == lib.PLB_E_ARGUMENT
