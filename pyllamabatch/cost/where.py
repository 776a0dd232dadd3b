"""What a profile is matched by: the device that a context runs on, and what its model weighs."""

import hashlib
import platform
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pyllamabatch.cost.kernels import kernels
from pyllamabatch.cost.profile import Key, Profile
from pyllamabatch.cost.terms import DENSE, Experts
from pyllamabatch.llama import runtime
from pyllamabatch.llama.context import Context
from pyllamabatch.llama.limits import cell_bytes, memory_parts
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.tensors import tensors
from pyllamabatch.raw import ffi, lib

WHOLE = 0.98  # of the weights on one device: it computes all layers


@dataclass(frozen=True, slots=True)
class Weights:
    """What the tensors of a file weigh. `kind`: the type of most matrix bytes ("Q4_K").
    `output_share`: the output matrix's part of the bytes that a sampled row passes; a mixture of
    experts counts those experts that a row uses. `kinds`: types that have a twentieth of them or
    more. `input_bytes`: tables that rows are only looked up in; they stay with the CPU.
    `experts`: of all."""

    kind: str
    output_share: float
    input_bytes: int
    kinds: tuple[str, ...] = ()
    experts: Experts = DENSE


def weigh(model: Model) -> Weights:
    """Read from the GGUF header(s) of the model's file(s)."""
    n_expert = _count(model, "expert_count")
    n_used = _count(model, "expert_used_count")
    by_kind: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    tied = ""
    inputs = expert_bytes = expert_weights = 0
    output = embedding = total = 0.0
    for name, kind, size, n_values in tensors(model):
        if "token_embd." in name:
            inputs += size
            if name == "token_embd.weight":
                embedding, tied = size, kind
            continue
        share = 1.0
        if n_expert and "_exps" in name:
            share = n_used / n_expert
            expert_bytes += size
            expert_weights += n_values
        by_kind[kind] += size
        passed[kind] += round(size * share)
        total += size * share
        if name == "output.weight":
            output = size
    if not output:  # tied: the embedding is the output matrix, too
        output = embedding
        total += embedding
        passed[tied] += round(embedding)
    ((kind, _),) = by_kind.most_common(1) or [("F16", 0)]
    share = output / total if total else 0.0
    kinds = tuple(sorted(k for k, n in passed.items() if n >= 0.05 * total))
    experts = Experts(expert_bytes, n_expert, n_used, expert_weights)
    return Weights(kind, round(share, 4), inputs, kinds, experts)


def experts_of(model: Model) -> Experts:
    """The file's header is read only where there are some."""
    return weigh(model).experts if _count(model, "expert_count") else DENSE


def _count(model: Model, name: str) -> int:
    text = model.metadata.get(f"{model.architecture}.{name}", "")
    return int(text) if text.isdigit() else 0


def fingerprint(model: Model) -> str:
    """16 hex digits for everything that the time of a step depends on: shape and types, not the
    weights' values."""
    facts = (
        model.architecture, model.n_params, model.size_bytes, model.n_layer, model.n_embd,
        model.n_vocab, model.n_head_kv, model.head_dims, model.n_swa,
        _count(model, "expert_count"), _count(model, "expert_used_count"),
        model.metadata.get("general.file_type"),
    )  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


class Shares(NamedTuple):
    """Where a context computes. device: the one that holds most of the weights, and its share of
    those that rows pass. on_cpu: the CPU's share."""

    device: runtime.BackendDevice
    share: float
    on_cpu: float

    @property
    def with_cpu(self) -> bool:
        """The CPU computes some of the layers, or all."""
        return self.on_cpu > 1 - WHOLE


def shares_of(context: Context) -> Shares:
    """Reads the header of the model's file where the CPU holds some of it, and not all."""
    devices = runtime.devices()
    held: Counter[str] = Counter()  # by the name of the device; "" is the CPU
    for part in memory_parts(context):
        kind = devices[part.device].kind if part.device in devices else "cpu"
        held["" if part.host or kind == "cpu" else part.device] += part.model
    if held[""] and len(held) > 1:
        held[""] = max(0, held[""] - weigh(context.model).input_bytes)
    if not (total := sum(held.values())):
        held[""] = total = 1
    name = max(held, key=lambda n: held[n])
    device = devices[name] if name else next(d for d in devices.values() if d.kind == "cpu")
    return Shares(device, held[name] / total, held[""] / total)


def file_type(model: Model) -> str:
    """The type of most weights, as the file itself says it: "Q4_K", "F16" where it does not."""
    numbers = ffi.typeof("enum llama_ftype").relements
    wanted = model.metadata.get("general.file_type", "")
    names = [name for name, number in numbers.items() if str(number) == wanted]
    kind = re.sub(r"LLAMA_FTYPE_(ALL_|MOSTLY_)", "", names[0]) if names else "F16"
    return re.sub(r"(_K)_[SML]$|_MOE$", r"\1", kind)


def key_of(context: Context) -> Key:
    """What a profile for this context must match."""
    device, share, _ = shares = shares_of(context)
    params = context.params
    settings: dict[str, int | str] = {
        name: runtime.text(lib.ggml_type_name(params[name])) for name in ("type_k", "type_v")
    }
    settings |= {"n_ubatch": context.n_ubatch, "flash_attn": int(params["flash_attn_type"])}
    if shares.with_cpu:
        settings["n_threads"] = context.n_threads
    if share < WHOLE:
        settings["on_device"] = f"{share:.2f}"
    return Key(device.description, device.backend, fingerprint(context.model), settings)


def cpu_features() -> str:
    """Instruction sets that the CPU backend uses here, by ggml's names."""
    has = runtime.features().get("CPU", {})
    return " ".join(name for name, value in has.items() if value not in ("", "0"))


def driver() -> str:
    """The driver's or system's version, where it says one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        mac = platform.mac_ver()[0]
        return f"macOS {mac}" if mac else platform.release().split("-")[0]
    found = re.search(r"Kernel Module.*?(\d+\.\d+(?:\.\d+)?)", text)
    return f"NVIDIA {found.group(1)}" if found else text.splitlines()[0]


def unmeasured(context: Context) -> Profile:
    """The profile of this context, without samples."""
    model, weights, key = context.model, weigh(context.model), key_of(context)
    known = kernels(
        key.backend,
        weights.kind,
        moe=weights.experts.n > 0,
        features=cpu_features(),
        others=weights.kinds,
        device=key.device,
    )
    return Profile(
        key,
        known,
        (),
        context.n_ubatch,
        weights.output_share,
        weights.experts.n,
        weights.experts.n_used,
        model.n_swa,
        cell_bytes(model, context.params),
        about={
            "model": model.description,
            "file": Path(model.path).name,
            "architecture": model.architecture,
            "n_params": model.n_params,
            "size_bytes": model.size_bytes,
            "llama_cpp": runtime.text(lib.plb_llama_cpp_build()),
            "driver": driver(),
            "n_batch": context.n_batch,
        },
    )
