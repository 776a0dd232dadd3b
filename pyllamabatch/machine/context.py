"""MachineContext: what an engine asks of a context, on a profile machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyllamabatch.cost.model import CostModel
from pyllamabatch.errors import ArgumentError, UnsupportedOperation, integer
from pyllamabatch.kv import Preemption, SwapChoice
from pyllamabatch.llama.limits import streams_of
from pyllamabatch.llama.lora import LoraNames
from pyllamabatch.llama.memory import Capabilities
from pyllamabatch.llama.model import Model
from pyllamabatch.machine.profile_machine import ProfileDevice, ProfileMachine
from pyllamabatch.scheduler import Invariance, Limits
from pyllamabatch.step.native import default_gap_max

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pyllamabatch.step.stepper_options import StepperOptions

IGNORED = {
    "n_threads", "n_threads_batch", "type_k", "type_v", "flash_attn_type", "offload_kqv",
    "swa_full", "no_perf", "op_offload",
}  # fmt: skip
"""Parameters of a context that say nothing to a profile."""


class MachineContext:
    """Cells for `n_seq_max` sequences on `machine`; `device` is its stepper, ring and memory. As
    `pyllamabatch.engine.protocols.EngineContext`.

    n_ctx: cells of all sequences together; kv_unified: in one pool, or in a stream for each. Other
    parameters of a context are part of the profile, or mean nothing to it: ArgumentError for those
    that can't be had."""

    def __init__(
        self,
        machine: ProfileMachine,
        model: Model,
        *,
        n_ctx: int,
        n_seq_max: int,
        kv_unified: bool,
        **sizes: int,
    ) -> None:
        """`sizes`: n_batch (2048) and n_ubatch (512)."""
        n_batch, n_ubatch = sizes.pop("n_batch", 2048), sizes.pop("n_ubatch", 512)
        for name in sizes.keys() - IGNORED:
            raise ArgumentError(name, sizes[name], "a profile machine has no such parameter")
        self.machine = machine
        self.model = model
        self.n_seq_max = self.n_outputs_max = integer("n_seq_max", n_seq_max, 1, 256)
        self.n_batch = min(integer("n_batch", n_batch, n_seq_max, 2**31 - 1), n_ctx)
        self.n_ubatch = min(integer("n_ubatch", n_ubatch, 1, 2**31 - 1), self.n_batch)
        self.params: dict[str, Any] = {"swa_full": True}
        self._n_ctx_streams = None if kv_unified else n_ctx  # None: made as a pool
        self._set_layout(n_ctx, kv_unified)
        self.device = ProfileDevice(machine, model, self._limits())
        self.memory = self.device

    def _set_layout(self, n_ctx: int, unified: bool) -> None:
        self.n_ctx = n_ctx
        self.n_ctx_seq = n_ctx if unified else n_ctx // self.n_seq_max
        self.params["kv_unified"] = unified
        self.gap_max = default_gap_max(streams=not unified, on_gpu=self.machine.on_gpu)
        self.capabilities = Capabilities(
            has_memory=True,
            partial_removal=True,
            max_rollback=0,
            can_shift=False,
            unified=unified,
            prefix_copy=unified,
            copies_wait=not unified,
            recurrent=False,
            hybrid=False,
            swa_window=0,
            encoder=False,
            decoder=True,
            causal=True,
        )

    def _limits(self) -> Limits:
        return Limits(
            self.n_batch,
            self.n_ubatch,
            self.n_seq_max,
            self.n_ctx,
            self.n_ctx_seq,
            self.capabilities.unified,
            self.gap_max,
        )

    # -- EngineContext

    computes_behind = True
    asynchronous = False  # a call returns when it is computed

    def stepper(self, **options: Unpack[StepperOptions]) -> ProfileDevice:
        if options.get("n_draft_max"):
            raise UnsupportedOperation("a profile machine has no logits to check drafts with")
        self.device.n_logprobs_max = options["n_logprobs_max"]
        return self.device

    def cost(self) -> CostModel:
        """The cost model of a user who has calibrated this machine: no step is unknown to it."""
        return self.machine.cost(unified=self.capabilities.unified, n_ubatch=self.n_ubatch)

    def rebuilds_for_others(self, device_sampling: bool | str) -> bool:
        return not self.capabilities.unified

    def thread_watch(self) -> None:
        """It computes nothing."""

    def swap_choice(self, mode: Preemption) -> SwapChoice:
        """Nothing is in a state here: a copy of one takes no time, which would be the cheaper."""
        return SwapChoice("swap" if mode == "swap" else "recompute")

    def find_invariance(
        self, n_seq_max: int, *, nearly: bool = False, drafts: bool = False
    ) -> Invariance:
        return Invariance.assumed(self.n_ubatch, n_seq_max)

    def state_seq_get(
        self, seq_id: int, loras: LoraNames | None = None, *, tokens: Any = None, note: Any = None
    ) -> bytes:
        if tokens is not None:
            self.device.slot(seq_id)
        return self.device.state_seq_get(seq_id)

    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> None:
        self.device.state_seq_set(data, seq_id)

    def renew(self, pool: int | None = None) -> None:
        """As `Context.renew`."""
        if pool is not None:
            self._set_layout(pool or streams_of(self._n_ctx_streams), bool(pool))
        self.device.set_layout(self._limits())

    def shrink(self) -> bool:
        """Its cells take no memory."""
        return False

    def grow(self) -> None:
        """They were not given up."""

    def set_loras(self, adapters: Any) -> None:
        """There are none."""

    def close(self) -> None:
        self.machine.queue.close()
