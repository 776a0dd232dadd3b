"""What this installation is, what it runs on, and what a model can do.

Without -m, the embedded model is described.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from importlib import metadata
from typing import Any

from pyllamabatch.cli.options import add_model_arguments, load_model
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.runtime import text
from pyllamabatch.raw import ffi, lib

_DEVICE_TYPES = ("CPU", "GPU", "IGPU", "ACCEL", "META")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--no-model", action="store_true", help="load no model")


def run(args: argparse.Namespace) -> int:
    about: dict[str, Any] = installation()
    if not args.no_model:
        with load_model(args) as model:
            about["model"] = describe(model)
    print(json.dumps(about, ensure_ascii=False) if args.json else "\n".join(lines(about)))
    return 0


def installation() -> dict[str, Any]:
    """Versions, backends with their features, and devices with their memory in bytes."""
    runtime.ensure()
    return {
        "version": metadata.version("pyllamabatch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "llama_cpp": {
            "version": text(lib.llama_version()),
            "build": text(lib.plb_llama_cpp_build()),
            "ggml_version": text(lib.ggml_version()),
            "max_sequences": int(lib.llama_max_parallel_sequences()),
            "gpu_offload": bool(lib.llama_supports_gpu_offload()),
            "mmap": bool(lib.llama_supports_mmap()),
            "mlock": bool(lib.llama_supports_mlock()),
        },
        "backends": [
            _backend_info(lib.ggml_backend_reg_get(i)) for i in range(lib.ggml_backend_reg_count())
        ],
        "devices": [
            _device_info(lib.ggml_backend_dev_get(i)) for i in range(lib.ggml_backend_dev_count())
        ],
    }


def _backend_info(reg: Any) -> dict[str, Any]:
    """Name and features: what the backend was compiled with and finds on this machine."""
    features: dict[str, str] = {}
    getter = lib.ggml_backend_reg_get_proc_address(reg, b"ggml_backend_get_features")
    if getter != ffi.NULL:
        feature = ffi.cast("ggml_backend_get_features_t", getter)(reg)
        while feature.name != ffi.NULL:
            features[text(feature.name)] = text(feature.value)
            feature += 1
    return {"name": text(lib.ggml_backend_reg_name(reg)), "features": features}


def _device_info(device: Any) -> dict[str, Any]:
    props = ffi.new("struct ggml_backend_dev_props *")
    lib.ggml_backend_dev_get_props(device, props)
    return {
        "name": text(props.name),
        "description": text(props.description),
        "type": _DEVICE_TYPES[props.type],
        "backend": text(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(device))),
        "memory_free": int(props.memory_free),
        "memory_total": int(props.memory_total),
    }


def describe(model: Model) -> dict[str, Any]:
    """Size, shape, metadata and capabilities of `model`; sizes in bytes."""
    with Context(model, n_ctx=256, n_seq_max=2, n_batch=32, n_ubatch=32) as context:
        capabilities = dataclasses.asdict(context.capabilities)
    return {
        "path": str(model.path),
        "description": model.description,
        "architecture": model.architecture,
        "size_bytes": model.size_bytes,
        "n_params": model.n_params,
        "n_layer": model.n_layer,
        "n_embd": model.n_embd,
        "n_vocab": model.n_vocab,
        "n_ctx_train": model.n_ctx_train,
        "chat_template": model.chat_template() is not None,
        "capabilities": capabilities,
        "metadata": model.metadata,
    }


def lines(about: dict[str, Any]) -> list[str]:
    """`about` for people to read."""
    llama = about["llama_cpp"]
    out = [
        f"pyllamabatch {about['version']}, Python {about['python']}, {about['platform']}",
        f"llama.cpp {llama['build']} (version {llama['version']}, ggml {llama['ggml_version']}), "
        f"up to {llama['max_sequences']} sequences in a context",
    ]
    for backend in about["backends"]:
        features = " ".join(
            name if value == "1" else f"{name}={value}"
            for name, value in backend["features"].items()
            if value != "0"
        )
        out.append(f"backend {backend['name']}: {features or 'no feature list'}")
    out += map(_device_line, about["devices"])
    if "model" in about:
        out += ["", *_model_lines(about["model"])]
    return out


def _device_line(device: dict[str, Any]) -> str:
    return (
        f"device {device['name']} ({device['type']}, {device['backend']}): "
        f"{device['description']}, {gib(device['memory_free'])} free "
        f"of {gib(device['memory_total'])}"
    )


def _model_lines(model: dict[str, Any]) -> list[str]:
    out = [
        f"model {model['path']}",
        f"  {model['description']}: {model['n_params']:,} parameters, "
        f"{model['size_bytes'] / 2**20:,.1f} MiB",
        f"  {model['n_layer']} layers, width {model['n_embd']}, vocabulary {model['n_vocab']:,}, "
        f"trained on {model['n_ctx_train']:,} positions, "
        f"{'with' if model['chat_template'] else 'no'} chat template",
        "  of its memory, with cells shared by all sequences:",
    ]
    for name, value in model["capabilities"].items():
        shown = {True: "yes", False: "no"}.get(value, value) if type(value) is bool else value
        out.append(f"    {name.replace('_', ' ')}: {shown}")
    out.append("  metadata:")
    for key, value in sorted(model["metadata"].items()):
        shown = value if len(value) <= 100 else value[:97] + "..."
        out.append(f"    {key} = {shown!r}" if "\n" in shown else f"    {key} = {shown}")
    return out


def gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
