"""NativeContext: a context of libllama that answers what an engine asks of one."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from ..cost.choose import cost_of
from ..cost.model import CostModel
from ..errors import ContextCreateError
from ..kv import Preemption, SwapChoice
from ..llama import runtime
from ..llama.context import Context, device_computes_all
from ..llama.limits import cell_bytes, check_params, memory_parts
from ..llama.model import Model
from ..raw import lib
from ..scheduler import Invariance
from ..step.native import gap_max_of
from ..step.ring_reader import StreamStepper
from . import invariance
from .thread_watch import ThreadWatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..step.stepper_options import StepperOptions

_PAD = 256  # cells that a stream has at least
RING_STEPS = 256  # steps that are computed at most before their tokens are read


class NativeContext(Context):
    """As `EngineContext`."""

    def __init__(self, model: Model, **params: Any) -> None:
        super().__init__(model, **params)
        self._costs: dict[bool, CostModel] = {}  # by layout: a fit takes a while

    @property
    def gap_max(self) -> int:
        return gap_max_of(self)

    @property
    def computes_behind(self) -> bool:
        return bool(lib.plb_computes_behind(self.ptr))

    @property
    def asynchronous(self) -> bool:
        """Also where a device computes some of the layers: they are the last ones."""
        return bool(self.model.offloaded)

    def stepper(self, **options: Unpack[StepperOptions]) -> StreamStepper:
        options.setdefault("n_steps_max", RING_STEPS)
        return StreamStepper(self, **options)

    def cost(self) -> CostModel:
        return self.cost_of(self.capabilities.unified)

    def cost_of(self, unified: bool) -> CostModel:
        """What a step would take with this layout of the cells."""
        if unified not in self._costs:
            self._costs[unified] = cost_of(self, unified=unified)
        return copy.deepcopy(self._costs[unified])  # an engine refines it

    def rebuilds_for_others(self, device_sampling: bool | str) -> bool:
        pool = self.capabilities.unified and not self.capabilities.recurrent
        return not pool or (device_sampling is not False and bool(self.model.offloaded))

    def shrink(self) -> bool:
        """Make the native context again with as few cells as it can have, until `grow`. False:
        they are not in the host's memory, or half of what it holds would stay."""
        states_only = self.capabilities.recurrent and not self.capabilities.hybrid
        if states_only or 2 * self._n_least > self.n_ctx or not self._has_cells_in_host_memory():
            return False
        with self.exclusive():
            self._replace(self._make_small)
        return True

    def grow(self) -> ContextCreateError | None:
        """Make it with all of its cells again. Returns why they can't be had: it has few then, as
        before. Raises that, and is closed, where not even these can be had."""
        problem: ContextCreateError | None = None

        def make() -> Any:
            nonlocal problem
            try:
                check_params(self.model, self._native)
                return self._make()
            except ContextCreateError as error:
                problem = error
            return self._make_small()

        with self.exclusive():
            self._replace(make)
        return problem

    @property
    def _n_least(self) -> int:
        """Cells. The context's n_batch is never above them."""
        n_streams = 1 if self.capabilities.unified else self.n_seq_max
        return max(self.n_batch, _PAD * n_streams)

    def _make_small(self) -> Any:
        wanted, self._native.n_ctx = self._native.n_ctx, self._n_least
        try:
            return self._make()
        finally:
            self._native.n_ctx = wanted

    def _has_cells_in_host_memory(self) -> bool:
        """A Mac's GPU has no other, though its buffers are no host's to ggml."""
        devices = runtime.devices()
        held = [part for part in memory_parts(self) if part.context]
        return all(part.host or devices[part.device].on_mac for part in held)

    def find_invariance(
        self, n_seq_max: int, *, nearly: bool = False, drafts: bool = False
    ) -> Invariance:
        return invariance.find(self, n_seq_max, nearly=nearly, drafts=drafts)

    def thread_watch(self) -> ThreadWatch | None:
        threads = self.n_threads, self.n_threads_batch
        if device_computes_all(self.model, self.params) or max(threads) == 1:
            return None
        return ThreadWatch(self.set_threads, *threads)

    def swap_choice(self, mode: Preemption) -> SwapChoice:
        per_token = cell_bytes(self.model, self.params)
        on_gpu = bool(self.model.offloaded)
        return SwapChoice.of_cells(mode, per_token, self.n_ctx_seq, on_gpu=on_gpu)
