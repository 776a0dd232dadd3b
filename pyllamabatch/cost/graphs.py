"""What new graphs cost the steps of a simulated engine, and of a profile machine."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pyllamabatch.cost.step_cost import NewGraph

F64 = npt.NDArray[np.float64]

_N_KV = 256  # cells that a graph's attention grows by (src/llama-kv-cache.cpp: `get_n_kv`)


class NativeCall(NamedTuple):
    """A native call. decode: its slots that decode, or have a row for padding, ascending. chunks:
    (slot, rows) of each prompt. n_graphs: ubatches of each step. cells: those that a step's
    attention goes over, one number for each step, before they are padded. n_behind: ubatches that
    are prompts' behind those that decode (`scheduler.Step.behind`)."""

    decode: npt.NDArray[np.int32]
    chunks: tuple[tuple[int, int], ...]
    n_graphs: int
    cells: npt.NDArray[np.int64]
    n_behind: int = 0


@dataclass(slots=True)
class _Graph:
    """The last graph of a kind. rows, n_cells: that it was made for. decoding: the slots of its
    last step. unsettled: that was its first one."""

    rows: tuple[object, ...] = ()
    n_cells: int = 0
    decoding: bytes = b""
    unsettled: bool = False


class Graphs:
    """The graphs that libllama has, and which steps can reuse one (src/llama-graph.h:
    `allow_reuse`).

    A step needs a new graph when its rows differ from those before, and when it attends to other
    cells than the graph was made for. Of a step in several ubatches libllama keeps the last graph
    only, so each ubatch needs a new one. The last graph of decoding stays while prompts are
    computed (vendor/patches/graph-of-decoding.patch)."""

    def __init__(self, new_graph: NewGraph, switch: float, *, unified: bool) -> None:
        self._new_graph = new_graph
        self._switch = switch
        self._unified = unified
        self._decoding, self._prompts = _Graph(), _Graph()
        self._last = self._decoding
        self._grown = np.zeros(0, dtype=np.int64)  # cells of the graph at each step of the call
        self._new = list[int]()  # steps of the call with new graphs

    def add_to(self, seconds: F64, call: NativeCall) -> int:
        """Add what new graphs take to the `seconds` of each step of the call. Returns the number of
        new ones."""
        if not call.n_behind:
            return self._add_to(seconds, call)
        # The prompts' graph is built while the device computes what decodes.
        prompts = call._replace(decode=call.decode[:0], n_graphs=call.n_behind)
        n_new = self._add_to(np.zeros_like(seconds), prompts)
        self.computed(len(seconds))
        n_graphs = call.n_graphs - call.n_behind
        return n_new + self._add_to(seconds, call._replace(chunks=(), n_graphs=n_graphs))

    def _add_to(self, seconds: F64, call: NativeCall) -> int:
        new, settle = self._new_graph
        graph = self._last = self._prompts if call.chunks else self._decoding
        n, decoding, n_graphs = len(seconds), call.decode.tobytes(), call.n_graphs
        # In a pool it does not matter whose rows they are.
        if self._unified:
            rows: tuple[object, ...] = (len(call.decode), *(n for _, n in call.chunks))
        else:
            rows = (decoding, *call.chunks)
        at = [0] if rows != graph.rows else []
        if not at and n_graphs == 1 and not call.chunks and decoding != graph.decoding:
            seconds[0] += self._switch
        graph.decoding = decoding
        if n_graphs > 1:
            at = list(range(n))
            new, settle = new * n_graphs, 0.0
        graph.rows = rows if n_graphs == 1 else ()
        self._grown = -(-call.cells // _N_KV) * _N_KV
        before = np.concatenate(([graph.n_cells], self._grown[:-1]))
        at += [i for i in np.flatnonzero(self._grown != before).tolist() if i not in at]
        if graph.unsettled and 0 not in at:
            seconds[0] += settle
        self._new = at
        for i in at:
            seconds[i] += new
            if i + 1 < n and i + 1 not in at:
                seconds[i + 1] += settle
        return len(at) * n_graphs

    def replaced(self) -> None:
        """The call that comes has steps with other rows than its slots have without drafts."""
        self._decoding.rows = ()
        self._grown = self._grown[:0]

    def computed(self, n: int) -> None:
        """The call has ended after n of its steps."""
        if len(self._grown):
            self._last.n_cells = int(self._grown[n - 1])
            self._last.unsettled = n - 1 in self._new
