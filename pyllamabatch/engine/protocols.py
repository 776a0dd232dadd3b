"""What an engine asks of its context, and what the core and the output processor run on: `Device`.

An engine's context is a `NativeContext` or a profile machine's. Its device is a stepper, the
context with its memory, and `Loras`; tests and benchmarks bring one in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ..cost.model import CostModel
from ..errors import ContextCreateError, SamplingError
from ..kv import Preemption, Slots, SwapChoice
from ..llama.lora import LoraNames, LoraSet
from ..llama.memory import Capabilities
from ..llama.model import Model
from ..scheduler import Invariance
from ..step.ring_reader import Page
from ..step.types import Run
from .draft_feeds import Feed
from .thread_watch import ThreadWatch

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..step.stepper_options import StepperOptions


class StepRunner(Protocol):
    """Computes steps, and holds the sampling states of sequences that have a slot."""

    @property
    def rows(self) -> Any: ...
    @property
    def n_recorded(self) -> int: ...
    @property
    def n_published(self) -> int: ...
    def compute(self, slots: Slots, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Run: ...
    def flush(self) -> None: ...
    def interrupt(self) -> None: ...
    def clear_slot(self, seq_id: int) -> None: ...
    def take_slot(self, seq_id: int) -> Any: ...
    def put_slot(
        self,
        seq_id: int,
        slot: Any,
        next_row: tuple[int, int] | None = None,
        *,
        report: bool = False,
    ) -> None: ...
    @property
    def last_error(self) -> str: ...

    def slot_error(self, seq_id: int) -> SamplingError: ...


class RingReader(Protocol):
    """Reads what was sampled, in another thread."""

    @property
    def n_recorded(self) -> int: ...
    @property
    def n_steps_max(self) -> int: ...
    @property
    def n_logprobs_max(self) -> int: ...
    def wait(self, n_wanted: int, timeout: float) -> int: ...
    def read(self, until: int, page: Page) -> int: ...
    def wake(self) -> None: ...
    def yield_to_compute(self) -> None: ...


class KvMemory(Protocol):
    """The cells of all sequences."""

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None: ...
    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None: ...
    def pos_max(self, seq_id: int) -> int: ...


class StateStore(Protocol):
    """Copies a sequence's cells to bytes and back; `renew` replaces a broken context, or one whose
    streams are to be a pool of so many cells, or streams again with 0, or why these can't be had:
    it has the pool then. `shrink`: by one with few cells, for as long as there is no sequence;
    False where that gives no memory back. `grow`: by one with all of them again, or why they can't
    be had: it has few then, as before."""

    def state_seq_get(self, seq_id: int, loras: LoraNames | None = None) -> bytes: ...
    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> object: ...
    def renew(self, pool: int | None = None) -> ContextCreateError | None: ...
    def shrink(self) -> bool: ...
    def grow(self) -> ContextCreateError | None: ...


class EngineContext(StateStore, Protocol):
    """Cells for sequences on a device, which says itself what an engine must know of it.

    gap_max: the most gaps that a step fills (`Stepper`). computes_behind: `Limits.behind`.
    asynchronous: as in `Device`. stepper: a `StepRunner` and `RingReader`. cost: what a step takes.
    rebuilds_for_others: a step in which other sequences decode than before makes a new graph,
    though they are as many. find_invariance: what keeps rows from depending on each other;
    UnsupportedOperation where nothing does. nearly: then what comes closest. thread_watch: None
    where the CPU computes nothing, or by one thread."""

    model: Model
    memory: Any
    params: dict[str, Any]
    capabilities: Capabilities
    n_ctx: int
    n_ctx_seq: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs_max: int

    @property
    def gap_max(self) -> int: ...
    @property
    def computes_behind(self) -> bool: ...
    @property
    def asynchronous(self) -> bool: ...
    def stepper(self, **options: Unpack[StepperOptions]) -> Any: ...
    def cost(self) -> CostModel: ...
    def rebuilds_for_others(self, device_sampling: bool | str) -> bool: ...
    def thread_watch(self) -> ThreadWatch | None: ...
    def swap_choice(self, mode: Preemption) -> SwapChoice: ...
    def find_invariance(
        self, n_seq_max: int, *, nearly: bool = False, drafts: bool = False
    ) -> Invariance: ...
    def set_loras(self, adapters: Any) -> None: ...
    def close(self) -> None: ...


class Adapters(Protocol):
    """The LoRA adapters that requests may name."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def applied(self) -> LoraSet: ...
    def apply(self, lora: LoraSet) -> None: ...
    def files(self, lora: LoraSet) -> LoraNames: ...


@dataclass(frozen=True, slots=True)
class Device:
    """`stepper` is a `StepRunner` and a `RingReader`. `close` frees all of it. `renewed`: is told
    when streams have become a pool, or a pool streams, and how many seconds that took.
    `asynchronous`: a call that samples nothing returns before its rows are computed. `feed`: where
    drafts come from. `threads`: how many of the CPU's compute."""

    stepper: Any
    memory: KvMemory
    states: StateStore
    loras: Adapters
    close: Callable[[], None]
    renewed: Callable[[float], None] = lambda seconds: None
    asynchronous: bool = False
    feed: Feed = field(default_factory=Feed)
    threads: ThreadWatch | None = None
