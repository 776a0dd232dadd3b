"""What a context will take up, against what it then takes, and how many fit a machine."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyllamabatch import Engine, Model, SamplingParams
from pyllamabatch.cli import main
from pyllamabatch.errors import ArgumentError, NotEnoughMemory
from pyllamabatch.llama import limits, runtime
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.host import host_available
from pyllamabatch.llama.limits import memory_parts
from pyllamabatch.planner import residency
from pyllamabatch.planner.machines import GIB, MACHINES, Machine, here, machine
from pyllamabatch.planner.residency import (
    Footprint,
    MemoryPool,
    Projector,
    device_free,
    fitting_n_ctx,
    most,
)
from pyllamabatch.step.stepper import Stepper
from tests.support.decoding import begin
from tests.support.models_gguf import Architecture, write_gguf


@pytest.mark.parametrize("unified", [True, False])
def test_projection_is_what_is_allocated(arch_path: Path, unified: bool) -> None:
    """Within 2%, part by part: weights, cells, graphs (the CPU's share of them)."""
    params: dict[str, Any] = {"n_ctx": 2048, "n_seq_max": 4, "kv_unified": unified, "n_ubatch": 64}
    with Projector(arch_path) as projector:
        planned = projector.footprint(**params)
    with Model(arch_path) as model, Context(model, n_outputs_max=4, **params) as context:
        real = memory_parts(context)
        n_vocab = model.n_vocab
    host = planned.host
    assert planned.device == MemoryPool()
    weights = sum(part.model for part in real)
    assert host.mapped + host.copied == pytest.approx(weights, rel=0.02)
    assert host.kv == pytest.approx(sum(part.context for part in real), rel=0.02)
    assert host.compute == pytest.approx(sum(part.compute for part in real), rel=0.02)
    assert host.logits == 4 * 4 * n_vocab


@pytest.mark.parametrize("n_seq_max", [4, 16])
def test_graphs_of_decoding_are_projected(tiny_llama_path: Path, n_seq_max: int) -> None:
    """They get their memory with the first step that decodes, beside those of prompts."""
    params: dict[str, Any] = {"n_ctx": 4096, "n_seq_max": n_seq_max, "kv_unified": False}
    with Projector(tiny_llama_path) as projector:
        planned = projector.footprint(**params).host
    with (
        Model(tiny_llama_path) as model,
        Context(model, n_outputs_max=n_seq_max, **params) as context,
    ):
        before = sum(part.compute for part in memory_parts(context))
        batch = Batch(n_seq_max)
        for seq_id in range(n_seq_max):
            batch.add(1, 0, [seq_id], logits=True)
        context.decode(batch)
        after = sum(part.compute for part in memory_parts(context))
    assert before == pytest.approx(planned.compute, rel=0.02)
    assert 0 < after - before <= planned.decode < 1.5 * (after - before)


def test_what_a_device_takes_to_sample_is_projected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU is the device here: its graphs grow by that once it samples, steps with drafts
    included."""
    path = tmp_path / "wide.gguf"
    write_gguf(path, Architecture("llama", ("attention",) * 3, n_spare=20000))
    n_seq_max, n_drafted = 4, 3
    n_outputs = n_seq_max * (1 + n_drafted)
    params: dict[str, Any] = {"n_ctx": 1024, "n_seq_max": n_seq_max, "n_ubatch": 64}
    outputs: dict[str, Any] = {"n_outputs_max": n_outputs, "n_outputs_max_per_seq": 1 + n_drafted}
    with (
        Model(path) as model,
        Context(model, n_threads=1, **outputs, **params) as context,
        Stepper(context, device_sampling=True, n_draft_max=n_drafted) as stepper,
    ):
        row = 4 * model.n_vocab
        before = sum(part.compute for part in memory_parts(context))
        for seq in range(n_seq_max):
            begin(stepper, SamplingParams(max_tokens=9), [5, 6, 7], seq=seq)
        slots = np.arange(n_seq_max, dtype=np.int32)
        stepper.run(slots, 1)
        drafts: Any = stepper.drafts
        drafts.n_most[:] = drafts.n_given[:] = n_drafted
        drafts.token[:] = 7
        stepper.run(slots, 1)
        after = sum(part.compute for part in memory_parts(context))
    plain = planned(path, n_outputs, params)
    assert plain.device == MemoryPool()
    for backend, copies in ("CUDA", 1), ("MTL", 3):  # Metal sorts in two more
        gpu = runtime.BackendDevice("GPU0", "", "gpu", backend, 2**40, 2**40)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "devices", lambda gpu=gpu: {"GPU0": gpu})
            found = planned(path, n_outputs, params)
        assert found.host.logits == n_outputs * row
        graphs = (found.device.compute + found.device.decode) / copies + plain.host.decode
        assert after - before == pytest.approx(graphs, rel=0.05)


def planned(path: Path, n_outputs: int, params: dict[str, Any]) -> Footprint:
    with Projector(path) as projector:
        return projector.footprint(n_outputs=n_outputs, **params)


def test_projection_allocates_nothing_and_grows_with_sequences(tiny_llama_path: Path) -> None:
    """A context that no machine has room for is projected all the same."""
    with Projector(tiny_llama_path) as projector:
        small, large = (projector.footprint(n_ctx=n) for n in (2**20, 2**30))
        one = projector.footprint(n_ctx=512)
        four = projector.footprint(n_ctx=2048, n_seq_max=4)
    assert large.host.kv == 2**10 * small.host.kv > 64 * GIB
    assert (four.host.kv, four.host.logits) == (4 * one.host.kv, 4 * one.host.logits)
    assert four.host.mapped == one.host.mapped


def test_use_of_a_mac() -> None:
    """Mapped weights are in memory once, and wired for every active process."""
    mac = Machine("mac", "metal", 100, 75)
    found = Footprint(MemoryPool(mapped=20, kv=3, compute=2), MemoryPool(compute=1))
    assert found.use(mac, 3) == [(75, 75), (20 + 3 * 6, 100)]
    assert found.check(mac, 3)
    assert not found.check(mac, 4)
    assert found.use(mac, 1, 4) == [(20 + 4 * 5, 75), (20 + 4 * 6, 100)]


def test_use_of_a_gpu_and_a_cpu() -> None:
    found = Footprint(MemoryPool(copied=20, kv=3, compute=2), MemoryPool(mapped=5, compute=1))
    gpu = Machine("gpu", "cuda", 100, 60, 4)
    assert found.use(gpu, 2) == [(58, 60), (7, 100)]
    assert not found.check(gpu, 3)
    cpu = Machine("cpu", "cpu", 40, 0)
    plain = Footprint(MemoryPool(), MemoryPool(mapped=20, copied=1, kv=3, compute=2, logits=1))
    assert plain.use(cpu, 2) == [(34, 40)]
    assert most(lambda n: plain.check(cpu, n)) == 2
    assert most(lambda n: plain.check(cpu, 1, n)) == 3


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 9, 50, 100])
def test_most(answer: int) -> None:
    assert most(lambda n: n <= answer, 50) == min(answer, 50)


def plan(capsys: pytest.CaptureFixture[str], *args: object) -> dict[str, Any]:
    assert main(["plan", "--json", *map(str, args)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("limit", [None, "192Gi", "206G", "239G"])
def test_measured_processes_of_an_m3_ultra(
    limit: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """ds4's issue 314: 2 active processes of 80.8 GB, or 1 of 153 GB, on 256 GB, for every limit
    that macOS is known to set."""
    options = ["--machine", "m3-ultra-256", *(["--limit", limit] if limit else [])]
    for weights, processes in (("80.8G", 2), ("153G", 1), ("239G", 0)):
        found = plan(capsys, *options, "--weights", weights)
        assert found["max_active_processes"] == processes


def test_plan_of_a_file(tiny_llama_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["-m", str(tiny_llama_path), "-n", "3", "-c", "512"]
    found = plan(capsys, *common)
    assert found["max_active_processes"] > 3
    assert found["shared_context"]["fits"]
    # on a CPU, where nothing is copied, processes share as much as contexts do
    assert found["shared_context"]["use"] < found["contexts"]["use"] == found["processes"]["use"]
    assert main(["plan", *common, "--machine", "m2-ultra-192"]) == 0
    assert "3 active processes" in capsys.readouterr().out
    there = plan(capsys, *common, "--machine", "h200")["one_process"]["device"]
    assert there["mapped"] == 0 < there["copied"]


def test_plan_has_as_many_rows_at_once_as_an_engine_there(
    tiny_llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "-m", tiny_llama_path, "-c", 2048, "--machine"
    for name, rows in ("h200", 2048), ("m2-ultra-192", 512):
        default, few, many = (
            plan(capsys, *common, name, *more)["one_process"]["device"]
            for more in ((), ("-ub", 512), ("-ub", 2048))
        )
        assert few != many
        assert default == (few if rows == 512 else many)


def test_largest_context_fits_and_the_next_does_not(
    tiny_llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(capsys, "-m", tiny_llama_path, "-n", 4, "--memory", "8M")
    n_ctx = found["max_n_ctx"]
    assert found["bound"] == "host memory is full then"
    assert 0 < n_ctx < 4 * 2048
    small = replace(here(), memory=8 * 10**6)
    with Projector(tiny_llama_path) as projector:
        sizes = [projector.footprint(n_ctx=n, n_seq_max=4) for n in (n_ctx, n_ctx + 256)]
    assert [size.check(small) for size in sizes] == [True, False]


@pytest.mark.parametrize("n", [1, 4])
def test_small_cells_have_a_largest_context(n: int, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--weights", "1G", "--kv-per-cell", "1K", "--machine", "m3-ultra-512", "-n", n]
    found = plan(capsys, *many, "-c", 256)
    limit = found["limits"][0] - 2 * 10**9
    assert found["max_n_ctx"] == limit // 256_000 * 256
    assert found["bound"] == "device is full then"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--machine nowhere", "machine"),
        ("--weights 1G --measure", "--weights"),
        ("--weights 1G -m x.gguf", "--weights"),
        ("--kv-per-cell 1K", "--kv-per-cell=1000: goes with --weights"),
        ("--limit 1G", "--limit=1000000000: a device's"),
    ],
)
def test_plan_refuses(
    args: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "nowhere" not in args:
        monkeypatch.setattr("pyllamabatch.cli.plan.machine", lambda _: Machine("a", "cpu", GIB, 0))
    assert main(["plan", *args.split()]) == 2
    assert capsys.readouterr().err.startswith(f"pyllamabatch: {says}")


@pytest.mark.parametrize("size", ["x", "-1G", "1X", "nan"])
def test_sizes_are_checked(size: str) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--weights", size])


def test_machines() -> None:
    assert machine("here") == here()
    assert 0 < host_available() <= here().memory
    assert all(m.source and m.device_limit > 0 and m.memory > 0 for m in MACHINES.values())
    assert machine("m1-16").device_limit == pytest.approx(10922.67 * 2**20)  # as llama.cpp logs it
    assert machine("m2-max-96").device_limit == 73728 * 2**20
    assert "macOS 26" in machine("m5-max-128").source
    with pytest.raises(ArgumentError, match="m3-ultra-256"):
        machine("abacus")


def test_measured_processes(tiny_llama_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes share the file's pages: the sum of PSS is less than that of RSS."""
    found = plan(capsys, "-m", tiny_llama_path, "-n", 2, "-c", 256, "--measure")
    idle, active = found["measured"]
    assert (idle["state"], active["state"]) == ("idle", "active")
    for found in (idle, active):
        assert 0 < found["pss"] < found["rss"]
        assert 0 < found["shared"] < found["rss"]
        assert found["planned"] > found["base"] > 0


def test_what_is_free_is_what_the_models_own_devices_have(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two GPUs and of one that shares the host's memory, which libllama takes where there are no
    others."""
    gpu = runtime.BackendDevice("CUDA0", "", "gpu", "CUDA", 2**10, 80 * GIB)
    other = gpu._replace(name="CUDA1", free=60 * GIB)
    shared = gpu._replace(name="CUDA2", kind="igpu", free=30 * GIB)
    devices = {one.name: one for one in (gpu, other, shared)}
    monkeypatch.setattr(runtime, "devices", lambda: devices)
    for params, free in (
        ({}, gpu.free + other.free),
        ({"devices": ["CUDA0"]}, gpu.free),
        ({"devices": ["CUDA0", "CUDA2"]}, gpu.free + shared.free),
        ({"split_mode": "none"}, gpu.free),
        ({"split_mode": "none", "main_gpu": 1}, other.free),
        ({"split_mode": "none", "main_gpu": -1}, 0),
        ({"n_gpu_layers": 0}, 0),
    ):
        with Model(tiny_llama_path, **params) as model:
            assert device_free(model) == free, params
            assert bool(model.offloaded) == bool(free)
    assert here().device_limit == 160 * GIB
    monkeypatch.setattr("pyllamabatch.llama.limits.host_available", lambda: 0)
    with (
        Model(tiny_llama_path, devices=["CUDA0"]) as model,
        pytest.raises(NotEnoughMemory, match="available"),
    ):
        Context(model, n_ctx=4096)
    del devices["CUDA0"], devices["CUDA1"]
    with Model(tiny_llama_path) as model:
        assert device_free(model) == shared.free


def test_what_others_hold_of_a_macs_memory_is_not_free(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metal counts the buffers of its own process. So a second engine, and one that wants cells
    again which it gave up under pressure, would take what is not there."""
    gpu = runtime.BackendDevice("MTL0", "Apple M2", "gpu", "MTL", 11 * GIB, 11 * GIB)
    devices = {**runtime.devices(), "MTL0": gpu}
    monkeypatch.setattr(runtime, "devices", lambda: devices)
    free = {"host": 14 * GIB}
    for module in (residency, limits):
        monkeypatch.setattr(module, "host_available", lambda: free["host"])
    with Model(tiny_llama_path) as model:
        assert device_free(model) == 11 * GIB
        free["host"] = 2**20
        assert device_free(model) == 2**20
        with pytest.raises(NotEnoughMemory) as caught:
            Context(model, n_ctx=4096)
    assert caught.value.available == 2**20


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "host_available", lambda: 3 * 2**20)


def test_an_engine_shrinks_what_it_chooses(tiny_llama_path: Path, little: None) -> None:
    with Model(tiny_llama_path) as model:
        wanted = min(model.n_ctx_train * 4, 16384)
        with Engine(model, n_seq_max=4, n_ubatch=64, n_threads=1) as engine:
            assert 256 <= engine.n_ctx < wanted
            assert len(engine.generate([[5, 6, 7]])[0].tokens) > 0


@pytest.mark.parametrize(
    ("load", "params"), [({"n_gpu_layers": 1}, {}), ({}, {"offload_kqv": False})]
)
def test_cells_of_the_cpus_layers_fit_the_hosts_memory(
    tiny_llama_path: Path,
    little: None,
    monkeypatch: pytest.MonkeyPatch,
    load: dict[str, Any],
    params: dict[str, Any],
) -> None:
    """However much a GPU has that computes the others."""
    gpu = runtime.BackendDevice("CUDA0", "", "gpu", "CUDA", 2**40, 2**40)
    devices = {**runtime.devices(), "CUDA0": gpu}
    monkeypatch.setattr(runtime, "devices", lambda: devices)
    with Model(tiny_llama_path, **load) as model:
        n_ctx = fitting_n_ctx(model, 2**20, shrink=True, n_seq_max=1, n_ubatch=64, **params)
        assert 256 <= n_ctx < 2**20
    with Model(tiny_llama_path) as model:
        assert fitting_n_ctx(model, 2**20, shrink=True, n_seq_max=1, n_ubatch=64) == 2**20


@pytest.mark.parametrize(("mode", "maps"), [("mmap", True), ("none", False)])
def test_mapped_weights_stay_where_n_ctx_is_chosen(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, maps: bool
) -> None:
    """They count as free memory, and would be read from the file again in each step. A file may be
    larger than what is free."""
    params: dict[str, Any] = {"n_seq_max": 1, "n_ubatch": 64}

    def context(n_ctx: int) -> int:
        return projector.footprint(n_ctx=n_ctx, **params).host.context

    with Projector(tiny_llama_path) as projector, Model(tiny_llama_path, load_mode=mode) as model:
        host = projector.footprint(n_ctx=256, **params).host
        pages = host.mapped - host.copied
        for free, stays in (context(8192) + 2 * pages, pages), (context(2048), context(2048)):
            monkeypatch.setattr(residency, "host_available", lambda free=free: free)
            room = 15 * free // 16
            room -= min(stays, room // 2) if maps else 0
            chosen = fitting_n_ctx(model, 2**20, shrink=True, **params)
            assert context(chosen) <= room < context(chosen + 256)
        assert fitting_n_ctx(model, 2048, shrink=False, **params) == 2048  # as was asked for


def test_an_engine_refuses_what_it_is_given(tiny_llama_path: Path, little: None) -> None:
    with Model(tiny_llama_path) as model:
        with pytest.raises(NotEnoughMemory, match=r"n_ctx=\d+ would fit") as caught:
            Engine(model, n_seq_max=4, n_ctx=2**20, n_ubatch=64)
        assert caught.value.needed > caught.value.available == 3 * 2**20


def test_an_engine_loads_no_twin_where_there_is_plenty(
    tiny_llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> Projector:
        raise AssertionError("projected")

    monkeypatch.setattr(residency, "Projector", refuse)
    monkeypatch.setattr(residency, "host_available", lambda: 2**40)
    with Model(tiny_llama_path) as model, Engine(model, n_seq_max=4, n_threads=1) as engine:
        assert engine.n_ctx == min(model.n_ctx_train * 4, 16384)
