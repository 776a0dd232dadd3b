"""Memory: which tokens of which sequences a context holds. Capabilities: what it can do with them.

libllama aborts the process, or quietly does something else, when an operation does not suit the
kind of memory; here each such case is an exception before the call. The rules, in one place:

- sequence ids are 0..n_seq_max-1; positions are >= 0;
- a recurrent state is one lump for all positions: it can be removed or copied whole, or rolled
  back by up to `n_rs_seq` tokens of its last decode (not the first of them), nothing else;
- a sliding window forgets: what is left after a removal or a partial copy must still hold the
  window that the next token looks at;
- with one stream per sequence (`kv_unified=False`) a copy takes a whole sequence into an empty
  one; with shared cells the range that is copied must be free in the destination;
- positions are shifted only where all that is held can be: not a recurrent state (a copy shares
  it, and would move too), not M-RoPE, not BF16 keys. A shift moves every sequence that shares the
  cells."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyllamabatch.errors import ArgumentError, UnsupportedOperation, integer
from pyllamabatch.llama.handle import Exclusive
from pyllamabatch.llama.model import Model
from pyllamabatch.raw import ffi, lib

_MAX_POS = 2**31 - 1
_WHOLE = (-1, -1)
# Memories that copy whole sequences only, whatever the stream layout (their seq_cp asserts it), and
# what was rolled back as it was before.
_WHOLE_COPIES = frozenset({"deepseek4", "glm5-next", "qwen4exp"})


@dataclass(frozen=True)
class Capabilities:
    """What the memory of one context can do."""

    has_memory: bool
    """False for encoders and embedding models: nothing stays between decodes."""
    partial_removal: bool
    """`seq_rm` of a part of a sequence (`max_rollback` may still allow the last tokens)."""
    max_rollback: int
    """Tokens that can be removed at the end of a recurrent or hybrid sequence: at most these, and
    fewer than the sequence had rows in its last decode."""
    can_shift: bool
    """`seq_add` and `seq_div`."""
    unified: bool
    """Cells are shared by the sequences; else each has its own n_ctx_seq cells."""
    prefix_copy: bool
    """`seq_cp` of a part of a sequence."""
    copies_wait: bool
    """`seq_cp` copies data, with the next decode: no copy can be saved before."""
    recurrent: bool
    hybrid: bool
    swa_window: int
    """Tokens that the layers with a sliding window see; older ones may be forgotten. 0: none."""
    encoder: bool
    decoder: bool
    causal: bool


class Memory:
    """The memory of a context: positions of each sequence.

        context.memory.seq_cp(0, 1)              # sequence 1 begins with all that 0 holds
        context.memory.seq_rm(1, 100)            # and forgets the positions from 100 on

    Sequences are 0..n_seq_max-1, positions are counted in tokens. Ranges are [p0, p1): p0 < 0 is
    from the start, p1 < 0 to the end. An operation that this memory can't do raises
    `UnsupportedOperation` and changes nothing. Ids and positions out of their range raise
    `ArgumentError`, and every method raises `ContextBusy` while another thread is inside."""

    def __init__(self, context: Exclusive, capabilities: Capabilities, n_seq_max: int) -> None:
        self._context = context
        self._can = capabilities
        self._n_seq_max = n_seq_max
        self._stale: set[int] = set()  # shifted or copied; applied by the next decode
        self._copying: set[int] = set()  # whose data a copy reads or writes by then

    @property
    def ptr(self) -> Any:
        """`llama_memory_t`; NULL when the model keeps nothing."""
        return lib.llama_get_memory(self._context.ptr)

    @property
    def can_shift(self) -> bool:
        return self._can.can_shift

    def pos_min(self, seq_id: int) -> int:
        """The first position held of a sequence, -1 when it is empty."""
        seq = self._seq(seq_id)
        with self._context:
            return int(lib.llama_memory_seq_pos_min(self.ptr, seq))

    def pos_max(self, seq_id: int) -> int:
        """The last position held of a sequence, -1 when it is empty."""
        seq = self._seq(seq_id)
        with self._context:
            return int(lib.llama_memory_seq_pos_max(self.ptr, seq))

    def clear(self, data: bool = True) -> None:
        """Forget every sequence; `data` also zeroes the buffers."""
        with self._context:
            lib.llama_memory_clear(self.ptr, data)
            self._stale.clear()  # copies between streams are still made

    def seq_rm(self, seq_id: int, p0: int = -1, p1: int = -1) -> None:
        """Remove [p0, p1) of a sequence, -1 for every sequence."""
        p0, p1 = _range(p0, p1)
        with self._context:
            every = range(self._n_seq_max)
            seqs = every if seq_id == -1 else (self._seq(seq_id),)
            parts = {seq: part for seq in seqs if (part := self._held_in(seq, p0, p1))}
            cut = [seq for seq, part in parts.items() if part != _WHOLE]
            for seq in cut:
                self._check_removal(seq, p0, p1, alone=len(cut) == 1)
            for seq, part in sorted(parts.items(), key=lambda one: one[1] == _WHOLE):
                if not lib.llama_memory_seq_rm(self.ptr, seq, *part):
                    raise self._stays(seq, p0, p1)
                if part == _WHOLE:
                    self._stale.discard(seq)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        """Copy [p0, p1) of `src` to `dst`. With shared cells this costs no memory.

        The copy's range of `dst` must be empty; all of `dst` where only whole sequences can be
        copied (`capabilities.prefix_copy` is False)."""
        p0, p1 = _range(p0, p1)
        src, dst = self._seq(src, "src"), self._seq(dst, "dst")
        if src == dst:
            raise ArgumentError("dst", dst, "must not be the source")
        with self._context:
            can, part = self._can, self._held_in(src, p0, p1)
            if part is None:
                return
            if part != _WHOLE and not can.prefix_copy:
                why = "a recurrent state" if can.recurrent or can.hybrid else "a stream of its own"
                raise UnsupportedOperation(
                    f"only all of sequence {src} can be copied, not [{p0}, {p1}): it has {why}"
                )
            if part != _WHOLE:
                self._check_window(src, min(p1, self.pos_max(src) + 1), "copy")
            if self._held_in(dst, *((p0, p1) if can.prefix_copy else (0, _MAX_POS))):
                held = f"{self.pos_min(dst)}..{self.pos_max(dst)}"
                limit = f"it holds {held}: remove that first with seq_rm({dst})"
                raise ArgumentError("dst", dst, limit)
            lib.llama_memory_seq_cp(self.ptr, src, dst, *part)
            if src in self._stale or can.copies_wait:
                self._stale.add(dst)
            if can.copies_wait:
                self._copying |= {src, dst}

    def seq_keep(self, seq_id: int) -> None:
        """Remove every sequence but this one."""
        keep = self._seq(seq_id)
        with self._context:
            # libllama's own seq_keep sees only the stream of the sequence
            for seq in range(self._n_seq_max):
                if seq != keep:
                    self.seq_rm(seq)

    def seq_add(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Shift [p0, p1) of a sequence by `delta` positions. What falls below 0 is removed.

        The next decode rotates the keys. Cells that `seq_cp` shares with other sequences are
        shifted for these too."""
        seq = self._seq(seq_id)
        delta = integer("delta", delta, -_MAX_POS, _MAX_POS)
        p0, p1 = _range(p0, p1)
        with self._context:
            if delta == 0 or not self._held_in(seq, p0, p1):
                return
            self._check_shift()
            last = min(p1 - 1, self.pos_max(seq))
            if last + delta > _MAX_POS - 1:
                raise ArgumentError("delta", delta, f"shifts position {last} past {_MAX_POS - 1}")
            lib.llama_memory_seq_add(self.ptr, seq, p0, p1, delta)
            self._shifted(seq)

    def seq_div(self, seq_id: int, p0: int, p1: int, divisor: int) -> None:
        """Divide the positions [p0, p1) of a sequence by `divisor` >= 1 (self-extend)."""
        seq = self._seq(seq_id)
        divisor = integer("divisor", divisor, 1, _MAX_POS)
        p0, p1 = _range(p0, p1)
        with self._context:
            if divisor == 1 or not self._held_in(seq, p0, p1):
                return
            self._check_shift()
            lib.llama_memory_seq_div(self.ptr, seq, p0, p1, divisor)
            self._shifted(seq)

    def is_stale(self, seq_id: int) -> bool:
        """A shift or copy of this sequence waits for the next decode; it can't be saved yet."""
        return self._seq(seq_id) in self._stale

    def is_copying(self, seq_id: int) -> bool:
        """A copy from or to this sequence's cells waits for the next decode, even when the sequence
        is gone: a state that is loaded there before would be copied, or overwritten."""
        return self._seq(seq_id) in self._copying

    def applied(self) -> None:
        """A decode went through: shifts and copies are done. Call it after a raw decode."""
        self._stale.clear()
        self._copying.clear()

    def renewed(self, capabilities: Capabilities) -> None:
        """The context was made again, and its memory is empty."""
        self._can = capabilities
        self.applied()

    def restored(self, seq_id: int) -> None:
        """A saved state took the place of a sequence."""
        self._stale.discard(seq_id)

    # -- the rules --

    def _seq(self, seq_id: int, name: str = "seq_id") -> int:
        return integer(name, seq_id, 0, self._n_seq_max - 1)

    def _held_in(self, seq: int, p0: int, p1: int) -> tuple[int, int] | None:
        """[p0, p1) of a sequence as libllama takes it, -1 for an end past all that is held; None
        where nothing is held.

        A recurrent state stands for all positions up to its own; of a sliding window model only
        some layers forget, and pos_min speaks of these."""
        one_state = self._can.recurrent or self._can.hybrid or self._can.swa_window
        first, last = 0 if one_state else self.pos_min(seq), self.pos_max(seq)
        if last < 0 or p0 > last or p1 <= max(p0, first):
            return None
        return -1 if p0 <= first else p0, -1 if p1 > last else p1

    def _check_removal(self, seq: int, p0: int, p1: int, *, alone: bool) -> None:
        """What libllama would not refuse by itself. alone: no other sequence loses a part."""
        last = self.pos_max(seq)
        if not self._can.partial_removal:
            if p1 <= last or not self._can.max_rollback or not alone:
                raise self._stays(seq, p0, p1)
        elif p1 > last:
            self._check_window(seq, p0, "trim")

    def _stays(self, seq: int, p0: int, p1: int) -> UnsupportedOperation:
        return UnsupportedOperation(
            f"can't remove [{p0}, {p1}) of sequence {seq} (0..{self.pos_max(seq)}): its state goes "
            f"back at most {self._can.max_rollback} tokens (n_rs_seq), fewer than its rows in the "
            "last decode, and not behind a decode that has moved it, or twice; remove all of it "
            "with seq_rm and decode the tokens again, or restore a saved state"
        )

    def _check_window(self, seq: int, end: int, what: str) -> None:
        """The next token at `end` must find its sliding window in memory."""
        window = self._can.swa_window
        if window and self.pos_min(seq) > max(0, end - window + 1):
            raise UnsupportedOperation(
                f"can't {what} sequence {seq} at {end}: of the sliding window of {window} tokens "
                f"those before {self.pos_min(seq)} are forgotten; remove the sequence and decode "
                "the tokens again, or make the context with swa_full=True"
            )

    def _check_shift(self) -> None:
        if not self.can_shift:
            raise UnsupportedOperation("this memory can't shift positions (capabilities.can_shift)")

    def _shifted(self, seq: int) -> None:
        # shared cells may belong to any sequence
        unified = self._can.unified
        self._stale.update(range(self._n_seq_max) if unified else (seq,))


def copies_whole_only(model: Model) -> bool:
    """Whether only all of a sequence can be copied or removed."""
    return model.is_recurrent or model.is_hybrid or model.architecture in _WHOLE_COPIES


def probe(ptr: Any, model: Model, params: Mapping[str, Any]) -> Capabilities:
    """What the memory of a native context can do, from its model and from what libllama reports."""
    memory = lib.llama_get_memory(ptr)
    has_memory = memory != ffi.NULL
    whole_only = copies_whole_only(model)
    one_state = model.is_recurrent or model.is_hybrid
    unified = bool(params["kv_unified"])
    shares = model.architecture != "deepseek4"  # its compressors have streams in a pool, too
    shifts = has_memory and not one_state and bool(lib.llama_memory_can_shift(memory))
    return Capabilities(
        has_memory=has_memory,
        partial_removal=has_memory and not whole_only,
        max_rollback=0 if model.architecture in _WHOLE_COPIES else lib.plb_max_rollback(ptr),
        can_shift=shifts and _can_rotate(model, params["type_k"]),
        unified=unified,
        prefix_copy=has_memory and unified and not whole_only,
        copies_wait=has_memory and not model.is_recurrent and not (unified and shares),
        recurrent=model.is_recurrent,
        hybrid=model.is_hybrid,
        swa_window=model.n_swa,
        encoder=model.has_encoder,
        decoder=model.has_decoder,
        causal=bool(lib.llama_get_causal_attn(ptr)),
    )


def _can_rotate(model: Model, type_k: int) -> bool:
    """Whether ggml can rotate keys of that type where they lie (it aborts where it can't), and the
    position is not in them otherwise."""
    if type_k == lib.GGML_TYPE_BF16 or model.has_position_table:
        return False
    rotated = model.metadata.get(f"{model.architecture}.rope.dimension_count")
    whole_head = rotated is None or int(rotated) == model.head_dims[0]
    return whole_head or not lib.ggml_is_quantized(type_k)


def _range(p0: int, p1: int) -> tuple[int, int]:
    """A range with its open ends closed."""
    p0 = integer("p0", p0, -1, _MAX_POS)
    p1 = integer("p1", p1, -1, _MAX_POS)
    return max(p0, 0), _MAX_POS if p1 < 0 else p1
