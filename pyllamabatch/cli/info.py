"""What this installation is, what it runs on, what a model can do, and how an engine runs it.

Without -m, the embedded model is described."""

import argparse
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from typing import Any

from pyllamabatch.cli.console import say
from pyllamabatch.cli.options import add_model_arguments, load_model
from pyllamabatch.engine.engine import Engine
from pyllamabatch.errors import ContextCreateError, NotEnoughMemory, UnsupportedOperation
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context, default_threads
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.runtime import text
from pyllamabatch.raw import lib

LONGEST = 100  # characters of a metadata value in the text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--json", action="store_true", help="one JSON object")
    add("--no-model", action="store_true", help="load no model")


def run(args: argparse.Namespace) -> int:
    about: dict[str, Any] = installation()
    if not args.no_model:
        with load_model(args) as model:
            about["model"] = describe(model)
            about["engine"] = engine_defaults(model)
    if args.json:
        print(json.dumps(about))
    else:
        say(in_words(about))
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
        "backends": [{"name": name, "features": has} for name, has in runtime.features().items()],
        "devices": [
            {
                "name": device.name,
                "description": device.description,
                "type": device.kind.upper(),
                "backend": device.backend,
                "memory_free": device.free,
                "memory_total": device.total,
            }
            for device in runtime.devices().values()
        ],
    }


def describe(model: Model) -> dict[str, Any]:
    """Size, shape, metadata and capabilities of `model`; sizes in bytes."""
    with Context(model, n_ctx=256, n_seq_max=2, n_batch=32, n_ubatch=32) as context:
        capabilities = asdict(context.capabilities)
    names = ("description", "architecture", "size_bytes", "n_params", "n_layer", "n_embd")
    return {
        "path": str(model.path),
        **{name: getattr(model, name) for name in (*names, "n_vocab", "n_ctx_train")},
        "chat_template": model.chat_template() is not None,
        "capabilities": capabilities,
        "metadata": dict(sorted(model.metadata.items())),
    }


def engine_defaults(model: Model) -> dict[str, Any]:
    """What an engine without options chooses for `model` on this machine, and why."""
    try:
        engine = Engine(model)
    except (UnsupportedOperation, NotEnoughMemory, ContextCreateError) as error:
        return {"none": str(error)}
    with engine:
        measured = engine.cost is not None and engine.cost.calibrated
        threads, why = default_threads(model, {})
        costs = "of a profile" if measured else "a guess; `pyllamabatch calibrate` measures them"
        return {
            "sequences": engine.n_seq_max,
            "layout": str(engine.layout),
            "cells": engine.n_ctx,
            "most_cells_of_a_sequence": engine.n_ctx_seq,
            "n_batch": engine.n_batch,
            "n_ubatch": engine.n_ubatch,
            "threads": threads,
            "step_costs": costs,
            "reasons": {
                "threads": why,
                **{name: why for name, why in engine.reasons.items() if name != "layout"},
            },
        }


def in_words(about: dict[str, Any]) -> str:
    """`about` for people to read."""
    devices = {
        device["name"]: f"{device['description']} ({device['type']}, {device['backend']}), "
        f"{device['memory_free'] / 2**30:.1f} of {device['memory_total'] / 2**30:.1f} GiB free"
        for device in about["devices"]
    }
    backends = {
        backend["name"]: " ".join(
            name if value == "1" else f"{name}={value}"
            for name, value in backend["features"].items()
            if value != "0"
        )
        for backend in about["backends"]
    }
    return "\n".join(_lines({**about, "backends": backends, "devices": devices}))


def _lines(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """A line for each value, its name in front. What is inside another is indented."""
    for name, value in values.items():
        label = indent + (name if "." in name else name.replace("_", " "))
        if isinstance(value, dict):
            yield f"{label}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, bool):
            yield f"{label}: {'yes' if value else 'no'}"
        elif isinstance(value, int):
            yield f"{label}: {value:,}"
        else:
            shown = repr(value) if "\n" in value else value
            yield f"{label}: {shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + '...'}"
