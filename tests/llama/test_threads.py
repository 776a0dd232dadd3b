"""Threads of the CPU backend: one that waits for others sleeps, and all end with their context."""

import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pyllamabatch import Model
from pyllamabatch.llama import context, runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.raw import ffi, lib
from tests.support.child import run_itself

N_BARRIERS = 30
BLOCKED_SECONDS = 0.01
AWAKE_SECONDS = BLOCKED_SECONDS / 2
"""Of a wait, of the whole process: far more than a thread spins before it sleeps."""


def test_threads_sleep_and_stay_with_their_context() -> None:
    """In a process of its own, where no thread of another test works or ends meanwhile."""
    run_itself(__file__)


def check_waits(backend: Any, blocked: int) -> None:
    """Thread `blocked` of two keeps the other one waiting; then both wait for a graph."""

    def block(result: Any, source: Any, thread: int, n_threads: int, data: Any) -> None:
        if thread == blocked and n_threads == 2:
            time.sleep(BLOCKED_SECONDS)

    operation = ffi.callback("ggml_custom1_op_t", block)
    memory = lib.ggml_init(ffi.new("struct ggml_init_params *", {"mem_size": 2**20})[0])
    try:
        node = lib.ggml_new_tensor_1d(memory, lib.GGML_TYPE_F32, 64)
        for _ in range(N_BARRIERS):
            node = lib.ggml_map_custom1(memory, node, operation, 2, ffi.NULL)
        graph = lib.ggml_new_graph(memory)
        lib.ggml_build_forward_expand(graph, node)
        begin, awake = time.perf_counter(), time.process_time()
        assert lib.ggml_backend_graph_compute(backend, graph) == lib.GGML_STATUS_SUCCESS
        assert time.perf_counter() - begin > N_BARRIERS * BLOCKED_SECONDS
        assert time.process_time() - awake < N_BARRIERS * AWAKE_SECONDS
        awake = time.process_time()
        time.sleep(N_BARRIERS * BLOCKED_SECONDS)
        assert time.process_time() - awake < N_BARRIERS * AWAKE_SECONDS
    finally:
        lib.ggml_free(memory)


def check_threads() -> None:
    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    with Model.default() as model:
        before = threads()
        with Context(model, n_ctx=256, n_threads=3) as context:
            batch = context.batch()
            batch.extend([1, 2, 3], 0, 0)
            context.decode(batch)
            made = threads()
            assert len(made - before) == 2
            context.memory.clear()
            context.decode(batch)
            assert threads() == made  # no thread a graph
            context.set_threads(2)
            context.memory.clear()
            context.decode(batch)
            assert len(threads() - before) == 1
        assert threads() == before


if __name__ == "__main__":
    runtime.ensure()
    made = lib.ggml_backend_cpu_init()
    lib.ggml_backend_cpu_set_n_threads(made, 2)
    check_waits(made, blocked=0)
    check_waits(made, blocked=1)
    lib.ggml_backend_free(made)
    if sys.platform == "linux":  # it has /proc
        check_threads()


@pytest.mark.parametrize(
    ("offloaded", "params", "threads"),
    [(1, {}, 1), (1, {"offload_kqv": False}, 7), (5 / 6, {}, 7), (0, {}, 7)],
)
def test_a_model_that_a_device_computes_wholly_has_one_thread(
    offloaded: float, params: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = SimpleNamespace(offloaded=offloaded)
    monkeypatch.setattr(context, "usable_cores", lambda: 7)
    assert context.default_threads(model, params)[0] == threads
