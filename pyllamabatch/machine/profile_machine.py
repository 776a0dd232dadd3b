"""ProfileMachine: a device of which only a profile is there.

It computes nothing. A step takes, in real time, what the profile's cost model says of its rows,
prompts, cells and new graphs, on one GPU that all contexts and processes on this machine share. The
tokens are those of one sentence, which says that no model wrote it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pyllamabatch.cost.graphs import Graphs, NativeCall
from pyllamabatch.cost.model import CostModel
from pyllamabatch.cost.profile import Profile, load_profile
from pyllamabatch.errors import UnsupportedOperation, integer
from pyllamabatch.kv import KvAccounting, Slots
from pyllamabatch.llama.host import PathLike
from pyllamabatch.machine.device import FakeDevice, SampledRow, Times
from pyllamabatch.machine.gpu_queue import GpuQueue, sleep_until
from pyllamabatch.scheduler import Limits
from pyllamabatch.scheduler.step import spans
from pyllamabatch.step.sampling_params import SamplingParams
from pyllamabatch.step.types import Finish, Run

if TYPE_CHECKING:
    from pyllamabatch.llama.model import Model
    from pyllamabatch.llama.vocab import TokenArray

SENTENCE = " No model wrote this: a profile machine takes the time of a step and computes nothing."
NO_TOKENS = np.zeros(0, np.int32)


class ProfileMachine:
    """A profile and the GPU that it is of."""

    def __init__(self, profile: Profile, name: str, *, queue: GpuQueue | None = None) -> None:
        """`name`: machines of one name are one machine. `queue`: of its GPU."""
        self.profile = profile
        self.name = name
        self.queue = queue or GpuQueue(name)

    @classmethod
    def named(cls, name: PathLike) -> ProfileMachine:
        """By a profile's name (shipped, or saved by `pyllamabatch calibrate`) or its file. Its GPU
        is the one that CUDA_VISIBLE_DEVICES names: Ray gives a replica one of its own so.
        ArgumentError for what is none, ProfileError for a file that is damaged."""
        profile = load_profile(os.fspath(name), argument="machine")
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        digest = hashlib.sha256((profile.to_json() + gpu).encode()).hexdigest()
        return cls(profile, f"{Path(name).stem}-{digest[:12]}")

    @property
    def on_gpu(self) -> bool:
        return not self.profile.key.backend.startswith("CPU")

    def facts(self) -> dict[str, Any]:
        """The device's and the model's part of a record. Neither is here."""
        model = self.profile.about.get("model") or self.profile.key.model or "unknown"
        return {
            "gpu_info": f"no GPU, the profile of {self.profile.key.device}",
            "model_type": f"no model, the profile of {model}",
            "model_size": 0,
            "model_n_params": 0,
        }

    def has(self, *, unified: bool) -> bool:
        """The profile has steps of contexts with this layout."""
        return self.profile.has(unified=unified)

    def cost(self, *, unified: bool, n_ubatch: int) -> CostModel:
        """What a step takes. Where the profile has no steps of this layout, by the other one's."""
        return CostModel.fit(self.profile, unified=unified, n_ubatch=n_ubatch)


@dataclass
class SentenceSampler:
    """A sequence's sampling state: its tokens are `words`, again and again."""

    params: SamplingParams
    words: Sequence[int]
    generated: list[int] = field(default_factory=list)

    @property
    def logprobs(self) -> int | None:
        return self.params.logprobs

    def tokens(self) -> TokenArray:
        return np.array(self.generated, np.int32)

    def next(self) -> tuple[int, Finish]:
        params, n = self.params, len(self.generated)
        token = self.words[n % len(self.words)]
        self.generated.append(token)
        if token in params.stop_token_ids and n >= params.min_tokens:
            return token, Finish.STOP
        return token, Finish.LENGTH if n + 1 == params.max_tokens else Finish.NONE


class ProfileDevice(FakeDevice[int, SentenceSampler]):
    """`machine` behind an engine's protocols, with the sizes of `limits`. `model`: of which only
    the vocabulary is used."""

    def __init__(
        self, machine: ProfileMachine, model: Model, limits: Limits, *, n_logprobs_max: int = 20
    ) -> None:
        super().__init__(limits, n_logprobs_max=n_logprobs_max)
        self._machine = machine
        words = model.vocab.tokenize(SENTENCE, add_special=False)
        self._end_ns = 0  # of the step before
        self._late_ns = 0  # the call before returned so long after its last step's end
        self._words: list[int] = words.tolist()
        self.set_layout(limits)

    def set_layout(self, limits: Limits) -> None:
        """No sequence holds anything, and a step takes what it takes in this layout."""
        self.limits = limits
        self.cells.clear()
        self._accounting = KvAccounting(
            limits.n_cells, limits.n_seq_max, unified=limits.unified,
            n_cells_seq=limits.n_cells_seq,
        )  # fmt: skip
        self._cost = self._machine.cost(unified=limits.unified, n_ubatch=limits.n_ubatch)
        new, self._graphs = self._cost.new_graph, None
        if any(new):
            # libllama makes no other graph for other sequences in a pool.
            switch = 0.0 if limits.unified else new.step
            self._graphs = Graphs(new, switch, unified=limits.unified)

    def new_slot(self, params: SamplingParams, prompt: TokenArray) -> SentenceSampler:
        """A sampling state. UnsupportedOperation for a grammar: there are no logits."""
        for name in ("grammar", "json_schema"):
            if getattr(params, name) is not None:
                raise UnsupportedOperation(f"a profile machine has no logits for a {name}")
        if params.logprobs is not None:
            integer("logprobs", params.logprobs, 0, self.n_logprobs_max)
        return SentenceSampler(params, self._words)

    def slot(self, seq_id: int) -> NoReturn:
        """UnsupportedOperation: it can't be saved."""
        raise UnsupportedOperation("a profile machine has no state that a file could hold")

    def close(self) -> None:
        """Nothing is to be freed."""

    def compute(self, slots: Slots, n_steps: int, n_before: int = 0, n_pad: int = 0) -> Run:
        run = super().compute(slots, n_steps, n_before, n_pad)
        if run.n_steps:
            self._late_ns = perf_counter_ns() - self._end_ns
        return run

    # -- KvMemory

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        super().seq_rm(seq_id, p0, p1)
        self._accounting.trim(seq_id, self.pos_max(seq_id) + 1)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        super().seq_cp(src, dst, p0, p1)
        self._accounting.share(src, dst, self.pos_max(dst) + 1)

    def state_seq_set(self, data: bytes, seq_id: int, loras: Any = None) -> None:
        super().state_seq_set(data, seq_id, loras)
        self._accounting.take(seq_id, self.pos_max(seq_id) + 1)

    # -- FakeDevice

    def _cell(self, token: int) -> int:
        return token

    def _token(self, cell: int) -> int:
        return cell

    def _sample(self, slot: int) -> SampledRow:
        token, finish = self.slots[slot].next()
        return SampledRow(slot, token, finish)

    def _compute(self, slots: Slots, n_before: int, n_pad: int) -> tuple[int, int, Times]:
        # The native loop has a step ready when it is called, and the next one when that ends; it
        # returns when the last one ends. What Python takes here is none of the machine's time.
        began = self._end_ns if self.n_in_run else self.called_ns - self._late_ns
        seconds, n_reused = self._seconds(slots, n_before, n_pad)
        start, self._end_ns = self._machine.queue.reserve(seconds, began)
        return 0, self.n_now, Times(began, self._end_ns - start, n_reused)

    def _hold(self, n_rows: int, *, sample: bool) -> list[SampledRow]:
        slots, counts = np.unique(self.rows.seq[:n_rows], return_counts=True)
        self._accounting.take_each(slots, counts)
        return super()._hold(n_rows, sample=sample)

    def _wait(self) -> None:
        sleep_until(self._end_ns)

    # -- inside

    def _seconds(self, slots: Slots, n_before: int, n_pad: int) -> tuple[float, int]:
        """Of a step, new graphs included; and how many graphs it reuses."""
        limits = self.limits
        n_each = np.bincount(self.rows.seq[:n_before], minlength=limits.n_seq_max)
        (seqs,) = n_each.nonzero()
        n_rows, at = len(slots) + n_before, list({*slots.tolist(), *seqs.tolist()})
        accounting, held = self._accounting, self._accounting.held_by_slot
        if limits.unified:
            kv = float(accounting.reach if self._cost.computes_masked else accounting.used)
        else:
            kv = float(held[at].sum())
        apart = not limits.unified and len(at) == len(slots) + len(seqs)
        deeper = 0.0
        if limits.unified:
            n_seqs = len(slots) + len(seqs)
            shapes = [(n_rows, n_before, kv, n_seqs)]
            if n_before:
                depth = float(n_each[seqs] @ held[seqs]) / n_before
                deeper = self._cost.deeper(n_before, kv / n_seqs, depth)
        elif not (apart and len(slots)):
            shapes = [(n_rows, n_rows, kv, len(at))]
        else:
            mine = float(held[slots].sum())
            if n_pad:
                shapes = [(n_pad, 0, mine, n_pad)]
                slots = np.arange(n_pad, dtype=np.int32)
            else:
                found = spans(slots, held, limits.gap_max)
                shapes = [(n, 0, mine * k / len(slots), n) for n, k in found]
            if n_before:
                shapes.append((n_before, n_before, kv - mine, len(seqs)))
        seconds = np.array([sum(self._cost.predict(*shape) for shape in shapes) + deeper])
        each = [-(-rows // limits.n_ubatch) for rows, *_ in shapes]
        n_graphs = sum(each)
        if self._graphs is None:
            return float(seconds[0]), n_graphs
        chunks = tuple(zip(seqs.tolist(), n_each[seqs].tolist(), strict=True))
        cells = n_rows + held[at].max()
        if limits.unified:
            cells = max(accounting.reach, accounting.used + n_rows)
        n_behind = each[-1] if apart and len(slots) and n_before else 0
        call = NativeCall(slots, chunks, n_graphs, np.array([cells]), n_behind)
        n_new = self._graphs.add_to(seconds, call)
        self._graphs.computed(1)
        return float(seconds[0]), n_graphs - n_new
