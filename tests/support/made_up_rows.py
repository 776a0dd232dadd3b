"""Rows that are made up."""

from typing import Any

from pyllamabatch.report.records import Record, speeds

GIB = 2**30


def row(
    arm: str,
    pl: int,
    speed: float,
    *,
    bench: str = "compare",
    repeat: int = 0,
    error: str = "",
    gpu: str = "",
    **detail: float,
) -> Record:
    """A run of `pl` sequences at `speed` tokens per s together."""
    tg = 100
    fields: dict[str, Any] = {
        "includes": "", "run_id": "run", "sampling": "default",
        "test_time": "2026-01-01T00:00:00+00:00", "cpu_info": "A Processor (family 1 model 2)",
        "n_cores": 2, "memory_bytes": 8 * GIB, "os": "Linux", "load_average": 0.0,
        "backends": "CPU", "build_number": 11549, "build_commit": "b11549", "build_options": "",
        "versions": {"commit": "abc"}, "model_filename": "m-Q4_K_M.gguf", "model_type": "m",
        "model_size": 1, "model_n_params": 1, "model_seed": 7, "seed": 1, "n_kv_max": 512,
        "n_batch": 512, "n_ubatch": 512, "flash_attn": -1, "kv_unified": False, "type_k": "f16",
        "type_v": "f16", "n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "n_kv": 128,
    }  # fmt: skip
    times = speeds(pp=32, tg=tg, pl=pl, t_pp=0.0, t_tg=tg * pl / speed if speed else 0.0)
    found = {"completed": float(pl), "total_tokens_sampled": float(tg * pl)} | detail
    return Record(
        bench=bench, arm=arm, repeat=repeat, gpu_info=gpu, pp=32, tg=tg, pl=pl, error=error,
        detail={} if error else found, **fields, **times,
    )  # fmt: skip
