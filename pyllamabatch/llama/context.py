"""Context: a model at work, with its memory and its outputs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import (
    ArgumentError,
    ClosedError,
    ContextBusy,
    ContextCreateError,
    UnsupportedOperation,
    decode_error,
    integer,
)
from pyllamabatch.llama import runtime, state
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.handle import Handle, Owner
from pyllamabatch.llama.host import MAX_THREADS, PathLike, usable_cores
from pyllamabatch.llama.limits import MAX_CTX, check_batch, check_params
from pyllamabatch.llama.lora import LoraAdapter, LoraNames
from pyllamabatch.llama.memory import Memory, probe
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.params import fill, read
from pyllamabatch.llama.vocab import TokenArray, Tokens
from pyllamabatch.raw import ffi, lib

FloatArray = npt.NDArray[np.float32]


class Context(Owner):
    """A `llama_context`. One thread at a time: a second one gets `ContextBusy`.

    Arrays that it returns are views on libllama's buffers, valid until the next decode or encode
    of this context; copy what you keep longer. They keep the context's memory alive, so reading
    one after `close` is safe.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        kv_unified: bool | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        **params: object,
    ) -> None:
        """Make a context.

        n_ctx: cells for all sequences together, 0 for what the model was trained with.
        n_batch, n_ubatch: rows of one decode; rows that the device computes at once.
        n_seq_max: sequences, up to 256.
        kv_unified: sequences share the cells (default when there are several), or have
            n_ctx / n_seq_max each.
        n_threads: default, the cores that this process may use.
        params: any other field of `llama_context_params` under its own name: `type_k="q8_0"`,
            `flash_attn_type="enabled"`, `embeddings=True`, `pooling_type="mean"`, `swa_full`,
            `n_rs_seq`, `offload_kqv`, `rope_freq_base`, ...

        libllama may choose other values than these: read the properties afterwards. Raises
        `ArgumentError`, `NotEnoughMemory` or `ContextCreateError`.
        """
        if model._vocab_only:
            raise UnsupportedOperation("the model was loaded with vocab_only: it can't run")
        threads = n_threads if n_threads is not None else usable_cores()
        given: dict[str, Any] = dict(
            params,
            n_ctx=integer("n_ctx", n_ctx, 0, MAX_CTX),
            n_batch=integer("n_batch", n_batch, 1, 2**31 - 1),
            n_ubatch=integer("n_ubatch", n_ubatch, 0, 2**31 - 1),
            n_seq_max=integer("n_seq_max", n_seq_max, 1, int(lib.llama_max_parallel_sequences())),
            kv_unified=n_seq_max > 1 if kv_unified is None else kv_unified,
            n_threads=integer("n_threads", threads, 1, MAX_THREADS),
            n_threads_batch=integer("n_threads_batch", n_threads_batch or threads, 1, MAX_THREADS),
        )
        native = lib.llama_context_default_params()
        fill(native, given, frozenset())
        self.n_outputs_max = check_params(model, native)

        self.model = model
        ptr, log = runtime.logged(lib.plb_context_new, model.ptr, native)
        if ptr == ffi.NULL:
            raise ContextCreateError(f"libllama could not make the context\n{log}")
        self._native = native
        self._keep = params  # callbacks and samplers that libllama points to
        self._held = [Handle(ptr, lib.llama_free, model._handle)]  # the one of now
        self._close = weakref.finalize(self, _release, self._held)
        self._exclusive = _Exclusive(self._close)
        self._lock = self._exclusive.lock
        self._loras: list[tuple[Handle, str, float]] = []  # a file's name, a scale
        self._attached: list[Any] = []  # plb_engines, whose samplers libllama may point to
        self._outputs: npt.NDArray[np.int8] | None = None
        self._encoded = False

        self.params: dict[str, Any] = read(native)
        """The parameters as they were given to libllama."""
        self.n_ctx: int = lib.llama_n_ctx(ptr)
        self.n_ctx_seq: int = lib.llama_n_ctx_seq(ptr)
        self.n_batch: int = lib.llama_n_batch(ptr)
        self.n_ubatch: int = lib.llama_n_ubatch(ptr)
        self.n_seq_max: int = lib.llama_n_seq_max(ptr)
        self.n_rs_seq: int = lib.llama_n_rs_seq(ptr)
        self.pooling_type: int = int(lib.llama_pooling_type(ptr))
        self.capabilities = probe(self)
        self.memory = Memory(self)

    # -- life --

    @property
    def ptr(self) -> Any:
        """`struct llama_context *`; `ClosedError` when closed."""
        if not self._close.alive:
            raise ClosedError("the context is closed")
        return self._handle.ptr

    @property
    def closed(self) -> bool:
        return not self._close.alive

    @property
    def _handle(self) -> Handle:
        return self._held[0]

    def close(self) -> None:
        """Free the context. Closing twice is fine; `ContextBusy` while another thread is inside."""
        if self.closed:
            return
        with self.exclusive():
            self._drop_loras()
            self._close()
            self._attached.clear()

    def renew(self) -> None:
        """A fresh llama_context, made with the same parameters, in place of this one that has
        failed: its memory is empty, its outputs are gone; adapters, threads and steppers, with
        their slots, stay, and other threads may make slots meanwhile. ContextCreateError, and this
        one is closed, when it can't be made."""
        with self.exclusive():
            threads = self.n_threads, self.n_threads_batch
            model = self.model._handle.retain()  # which may be closed by now
            try:
                self._handle.release()
                ptr, log = runtime.logged(lib.plb_context_new, model.ptr, self._native)
                if ptr == ffi.NULL:
                    self._close.detach()
                    self._drop_loras()
                    self._attached.clear()
                    raise ContextCreateError(f"libllama could not make the context again\n{log}")
                self._held[0] = Handle(ptr, lib.llama_free, model)
            finally:
                model.release()
            self._outputs, self._encoded = None, False
            self.memory.renewed()
            lib.llama_set_n_threads(ptr, *threads)
            self._apply_loras()
            for engine in self._attached:
                if lib.plb_engine_rebind(engine, ptr):
                    raise ContextCreateError("the fresh context is of another size")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_ctx} cells, {self.n_seq_max} sequences"
        return f"<Context {state}>"

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the context for this thread; `ContextBusy` when another thread has it.

        Every method does this for its own time. A thread may enter again.
        """
        return self._exclusive

    # -- running --

    def batch(self, capacity: int | None = None) -> Batch:
        """A batch with room for `n_batch` rows (or `capacity`) in any sequence."""
        return Batch(capacity or self.n_batch, self.n_seq_max)

    def decode(self, batch: Batch) -> None:
        """Run the rows of a batch.

        Raises `ArgumentError` for rows that libllama would abort on, and `KvCacheFull`,
        `InvalidBatch`, `DecodeAborted` or `FatalDecodeError` for what it reports itself.
        """
        with self.exclusive():
            if self.model.has_encoder and self.capabilities.decoder and not self._encoded:
                raise UnsupportedOperation("this model's decoder needs `encode` first")
            self._run(lib.llama_decode, batch, encoder=not self.capabilities.has_memory)

    def encode(self, batch: Batch) -> None:
        """Run the rows through the encoder of an encoder-decoder or embedding model."""
        with self.exclusive():
            if self.capabilities.has_memory and not self.model.has_encoder:
                raise UnsupportedOperation("this model has no encoder: use decode")
            self._run(lib.llama_encode, batch, encoder=True)
            self._encoded = True

    def _run(self, call: Any, batch: Batch, encoder: bool) -> None:
        check_batch(self, batch, encoder)
        self._outputs = None
        for engine in self._attached:  # whoever decodes here wants whole rows of logits
            lib.plb_engine_detach(engine)
        code, log = runtime.logged(call, self.ptr, batch.struct)
        if code != -1:
            self.memory.applied()
        if code != 0:
            raise decode_error(code, log)
        n = batch.n_tokens
        self.memory.decoded(batch.seq_id[:n, 0])
        every = encoder or self.params["embeddings"]
        self._outputs = np.ones(n, np.int8) if every else batch.logits[:n].copy()

    def synchronize(self) -> None:
        """Wait for the device. Reading an output does so by itself."""
        with self.exclusive():
            lib.llama_synchronize(self.ptr)

    # -- outputs --

    def logits(self, row: int = -1) -> FloatArray:
        """The logits of a row of the last batch: float32 (n_vocab,), a view.

        Negative rows count back from the last row with an output. Raises `ArgumentError` for a row
        without output.
        """
        with self.exclusive():
            self._check_output(row)
            pointer = lib.llama_get_logits_ith(self.ptr, row)
            return self._view(pointer, self.model.n_vocab, f"row {row} has no logits")

    def logits_all(self) -> FloatArray:
        """The logits of every row with output, in batch order: float32 (n_outputs, n_vocab)."""
        with self.exclusive():
            n = self._n_outputs()
            pointer = lib.llama_get_logits(self.ptr)
            flat = self._view(pointer, n * self.model.n_vocab, "the context has no logits")
            return flat.reshape(n, self.model.n_vocab)

    def embeddings(self, row: int = -1) -> FloatArray:
        """The embedding of one token of the last batch: float32 (n_embd_out,), a view."""
        with self.exclusive():
            self._check_embeddings(pooled=False)
            self._check_output(row)
            pointer = lib.llama_get_embeddings_ith(self.ptr, row)
            return self._view(pointer, self.model.n_embd_out, f"row {row} has no embedding")

    def embeddings_all(self) -> FloatArray:
        """The embeddings of every row with output: float32 (n_outputs, n_embd_out), a view."""
        with self.exclusive():
            self._check_embeddings(pooled=False)
            n = self._n_outputs()
            pointer = lib.llama_get_embeddings(self.ptr)
            flat = self._view(pointer, n * self.model.n_embd_out, "the context has no embeddings")
            return flat.reshape(n, self.model.n_embd_out)

    def embeddings_seq(self, seq_id: int = 0) -> FloatArray:
        """The pooled embedding of a sequence of the last batch: float32 (n_embd_out,), a view.

        With pooling_type "rank": the scores, (n_cls_out,).
        """
        with self.exclusive():
            self._check_embeddings(pooled=True)
            seq = integer("seq_id", seq_id, 0, self.n_seq_max - 1)
            rank = self.pooling_type == lib.LLAMA_POOLING_TYPE_RANK
            size = self.model.n_cls_out if rank else self.model.n_embd_out
            pointer = lib.llama_get_embeddings_seq(self.ptr, seq)
            return self._view(pointer, size, f"sequence {seq} was not in the last batch")

    def _n_outputs(self) -> int:
        if self._outputs is None:
            raise UnsupportedOperation("the last batch was not run by decode or encode")
        return int(np.count_nonzero(self._outputs))

    def _check_output(self, row: int) -> None:
        row = integer("row", row, -(2**31), 2**31 - 1)
        if self._outputs is None:
            return  # run by someone else (a Stepper): libllama's own check is left
        n = np.count_nonzero(self._outputs)
        if row < -n or row >= len(self._outputs) or (row >= 0 and not self._outputs[row]):
            raise ArgumentError("row", row, "was not asked for its output in the last batch")

    def _check_embeddings(self, pooled: bool) -> None:
        if not self.params["embeddings"]:
            raise UnsupportedOperation("make the context with embeddings=True")
        if pooled != (self.pooling_type > 0):
            name = "embeddings_seq" if self.pooling_type > 0 else "embeddings"
            raise UnsupportedOperation(f"pooling_type is {self.pooling_type}: use {name}")

    def _view(self, pointer: Any, size: int, missing: str) -> FloatArray:
        if pointer == ffi.NULL:
            raise UnsupportedOperation(missing)
        handle = self._handle.retain()
        kept = ffi.gc(pointer, lambda _: handle.release())
        return np.frombuffer(ffi.buffer(kept, 4 * size), np.float32)

    # -- state --

    def state_seq_get(self, seq_id: int, loras: LoraNames | None = None) -> bytes:
        """The state of a sequence, with a header that tells whose it is and a checksum. `loras`:
        file names and scales of the adapters that it was computed with, if not those of now."""
        with self.exclusive():
            return state.save(self, seq_id, (), loras=loras)

    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> None:
        """Replace a sequence by a saved state. `StateError` leaves the sequence as it was when the
        data is damaged or of another model, and empty when it does not fit. `loras`: those that it
        will go on with, if not those of now."""
        with self.exclusive():
            state.restore(self, seq_id, data, loras)

    def state_seq_save(self, path: PathLike, seq_id: int, tokens: Tokens = ()) -> None:
        """Write the state of a sequence to a file, and the tokens that made it, if given."""
        with self.exclusive():
            state.write(path, state.save(self, seq_id, tokens))

    def state_seq_load(self, path: PathLike, seq_id: int) -> TokenArray:
        """Replace a sequence by the state in a file; returns the tokens saved with it."""
        with self.exclusive():
            return state.restore(self, seq_id, state.read(path))

    # -- settings --

    def set_loras(self, adapters: Sequence[tuple[LoraAdapter, float]]) -> None:
        """Apply these adapters with these scales, and no others, from the next decode on."""
        for adapter, scale in adapters:
            if adapter.model is not self.model:
                raise ArgumentError("adapters", adapter, "was loaded for another model")
            if not np.isfinite(scale):
                raise ArgumentError("adapters", scale, "a scale must be a finite number")
        for adapter, _ in adapters:
            adapter.ptr  # noqa: B018 (raises when closed)
        self._set_loras([(a._handle, Path(a.path).name, float(scale)) for a, scale in adapters])

    @property
    def lora_names(self) -> list[tuple[str, float]]:
        """File name and scale of each adapter that is applied."""
        return [(name, scale) for _, name, scale in self._loras]

    def _set_loras(self, loras: Sequence[tuple[Handle, str, float]]) -> None:
        with self.exclusive():
            before = self._loras
            self._loras = [(handle.retain(), name, scale) for handle, name, scale in loras]
            self._apply_loras()
            for handle, _, _ in before:
                handle.release()

    def _apply_loras(self) -> None:
        pointers = ffi.new("struct llama_adapter_lora *[]", [h.ptr for h, _, _ in self._loras] or 1)
        scales = ffi.new("float[]", [scale for _, _, scale in self._loras] or 1)
        lib.llama_set_adapters_lora(self.ptr, pointers, len(self._loras), scales)

    def _drop_loras(self) -> None:
        for handle, _, _ in self._loras:
            handle.release()
        self._loras = []

    def set_threads(self, n_threads: int, n_threads_batch: int | None = None) -> None:
        """Threads for one row, and for many rows."""
        one = integer("n_threads", n_threads, 1, MAX_THREADS)
        many = integer("n_threads_batch", n_threads_batch or one, 1, MAX_THREADS)
        with self.exclusive():
            lib.llama_set_n_threads(self.ptr, one, many)

    @property
    def n_threads(self) -> int:
        return int(lib.llama_n_threads(self.ptr))

    @property
    def n_threads_batch(self) -> int:
        return int(lib.llama_n_threads_batch(self.ptr))

    def perf(self) -> dict[str, float]:
        """libllama's counters (`llama_perf_context_data`): times in ms, `n_reused` graphs, ..."""
        with self.exclusive():
            return read(lib.llama_perf_context(self.ptr))


def _release(held: list[Handle]) -> None:
    held[0].release()


class _Exclusive(AbstractContextManager[None]):
    """A context's lock, one for all its methods: entering costs well under a microsecond."""

    def __init__(self, close: weakref.finalize[..., Context]) -> None:
        self._close = close
        self.lock = threading.RLock()

    def __enter__(self) -> None:
        if not self.lock.acquire(blocking=False):
            raise ContextBusy("another thread is inside this context; use one thread, or a lock")
        if not self._close.alive:
            self.lock.release()
            raise ClosedError("the context is closed")

    def __exit__(self, *error: object) -> None:
        self.lock.release()
