"""What becomes of a process with an engine: it is interrupted, it ends with open streams, it forks.
Each in a process of its own, which must end by itself."""

import signal
import sys
from pathlib import Path

import pytest

from tests.support.child import Done, python
from tests.support.models_gguf import gguf_path
from tests.support.models_special import write_lora

LIMIT = 300  # seconds: far more than any needs on a busy machine

BEGIN = """
import os, signal, sys, threading, time
from pyllamabatch import Batch, Context, Engine, Model, SamplingParams
from pyllamabatch.errors import EngineClosed
model = Model.default()
engine = Engine(model, n_seq_max=2, n_ctx=4096, cost=None, n_threads=1, n_threads_batch=1)
long = SamplingParams(max_tokens=1500, ignore_eog=True)
def signal_when_running(number):
    def send():
        while not engine.stats().tokens:
            time.sleep(0.01)
        os.kill(os.getpid(), number)
    threading.Thread(target=send, daemon=True).start()
"""

INTERRUPTED = """
signal_when_running(signal.SIGINT)
try:
    engine.generate(["a", "b"], long)
    print("not interrupted")
except KeyboardInterrupt:
    print("interrupted")
(result,) = engine.generate(["a"], SamplingParams(max_tokens=3, ignore_eog=True))
print(len(result.tokens))
engine.close()
"""

OPEN_STREAMS = """
streams = [engine.submit("a", long) for _ in range(4)]
next(iter(streams[0]))
print("leaving")
"""

FORKED = """
context = Context(model, n_ctx=256, n_threads=2)
batch = Batch(1)
batch.add(5, 0, 0, logits=True)
context.decode(batch)
stream = engine.submit("a", long)
next(iter(stream))
sequence = engine.sequence()
sequence.prompt("a")
engine.embed(["a"])
embedder = engine._embedders.of("embed")
child = os.fork()
if child == 0:
    for call in (
        lambda: engine.generate(["a"]),
        stream.result,
        lambda: [token for token in stream],
        lambda: engine.sequence().prompt("a"),
        sequence.sample,
        engine.drain,
        engine.resume,
        engine.stats,
        engine.slots,
        engine.trace,
        stream.times,
        lambda: engine.embed(["a"]),
        lambda: embedder.embed(["a"]),
    ):
        try:
            call()
        except EngineClosed as error:
            print(error, flush=True)
    with Engine(model, n_seq_max=1, n_ctx=256, cost=None) as own:
        print(len(own.generate(["a"], SamplingParams(max_tokens=3, ignore_eog=True))[0].tokens))
    embedder.close()
    engine.close()
    sys.exit(7)  # as any program ends: what Python holds is freed
_, status = os.waitpid(child, 0)
stream.cancel()
sequence.sample()
(result,) = engine.generate(["a"], SamplingParams(max_tokens=3, ignore_eog=True))
print(os.waitstatus_to_exitcode(status), len(result.tokens))
engine.close()
"""
MODEL_CLOSED = """
import os, sys
from pyllamabatch import LoraAdapter, Model
def mapped():
    return any(sys.argv[1] in line for line in open("/proc/self/maps"))
model = Model(sys.argv[1], load_mode="mmap")
adapter = LoraAdapter(model, sys.argv[2])
child = os.fork()
if child == 0:
    adapter.close(), model.close()
    print(mapped(), flush=True)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), mapped())
adapter.close(), model.close()
print(mapped())
"""
IN_CHILD = "this process was forked from that of the engine or embedder: make one in it"


def run(code: str) -> Done:
    return python("-c", BEGIN + code, seconds=LIMIT)


@pytest.mark.skipif(sys.platform == "win32", reason="signals and fork are POSIX's")
@pytest.mark.parametrize(
    ("code", "said"),
    [
        (INTERRUPTED, ["interrupted", "3"]),
        (OPEN_STREAMS, ["leaving"]),
        (FORKED, [*[IN_CHILD] * 13, "3", "7 3"]),
    ],
    ids=["Ctrl-C", "open streams", "fork"],
)
def test_a_process_ends_by_itself(code: str, said: list[str]) -> None:
    done = run(code)
    assert done.stdout.splitlines() == said
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads what is mapped in /proc")
def test_a_forked_child_leaves_the_parents_models_alone(tmp_path: Path) -> None:
    """A device's memory is the parent's, and its library is no use in the child."""
    write_lora(tmp_path / "lora.gguf")
    files = gguf_path("llama"), tmp_path / "lora.gguf"
    done = python("-c", MODEL_CLOSED, *map(str, files), seconds=LIMIT)
    assert done.stdout.splitlines() == ["True", "7 True", "False"], done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_sigterm_ends_it() -> None:
    done = run("signal_when_running(signal.SIGTERM)\nengine.generate(['a'], long)\n")
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == ""
