"""Context: a model at work, with its memory and its outputs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from pyllamabatch.errors import (
    ArgumentError,
    ContextCreateError,
    FatalDecodeError,
    StateError,
    UnsupportedOperation,
    decode_error,
    integer,
    number,
)
from pyllamabatch.llama import runtime, state
from pyllamabatch.llama.batch import Batch
from pyllamabatch.llama.handle import Exclusive, Owner, here, owned, view
from pyllamabatch.llama.host import MAX_THREADS, PathLike, usable_cores
from pyllamabatch.llama.limits import MAX_CTX, check_params, max_position, streams_of
from pyllamabatch.llama.lora import LoraAdapter, LoraNames
from pyllamabatch.llama.memory import Memory, probe
from pyllamabatch.llama.model import Model
from pyllamabatch.llama.params import fill, read
from pyllamabatch.llama.vocab import TokenArray, Tokens
from pyllamabatch.raw import ffi, lib

FloatArray = npt.NDArray[np.float32]


def device_computes_all(model: Model, params: Mapping[str, Any]) -> bool:
    """In a context with these `params`, devices other than the CPU."""
    return model.offloaded == 1 and params.get("offload_kqv") is not False


def default_threads(model: Model, params: Mapping[str, Any]) -> tuple[int, str]:
    """CPU threads of a context of `model` whose `params` name none, and why."""
    if device_computes_all(model, params):
        return 1, "a device computes all layers: others would wait for embeddings that one looks up"
    return usable_cores(), "cores that this process may use, by affinity and quota"


class Context(Owner):
    """A `llama_context`: cells for the tokens of its sequences, and the outputs of its last batch.

        with Context(model, n_ctx=4096, n_seq_max=4) as context:
            batch = context.batch()
            batch.extend(tokens, 0, seq_id=0)
            context.decode(batch)
            context.logits()                     # float32 (n_vocab,)

    One thread at a time: a second one gets `ContextBusy`. `params` are the parameters as they were
    given to libllama, which may choose other values: `n_ctx`, `n_ctx_seq` (cells that one sequence
    may have), `n_batch`, `n_ubatch`, `n_seq_max`, `n_rs_seq` and `pooling_type` are its choice.
    `capabilities` tells what `memory` can do.

    Embeddings are views on libllama's buffers, valid until the next decode or encode of this
    context: copy what must last. They keep the context's memory alive, so reading one after `close`
    is safe. Logits are copies."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        n_seq_max: int = 1,
        kv_unified: bool | None = None,
        **params: Any,
    ) -> None:
        """Make a context.

        - n_ctx: cells for all sequences together, 0 for what the model was trained with.
        - n_batch, n_ubatch: rows of one decode; rows that the device computes at once.
        - n_seq_max: sequences, up to 256.
        - kv_unified: sequences share the cells (default when there are several), or have n_ctx /
          n_seq_max each.
        - params: any other field of `llama_context_params` under its own name: `n_threads` (by
          default see `default_threads`), `n_threads_batch`, `type_k="q8_0"`,
          `flash_attn_type="enabled"`, `embeddings=True`, `pooling_type="mean"`, `swa_full`,
          `n_rs_seq`, `offload_kqv`, `rope_freq_base`, ...

        Raises `ArgumentError`, `NotEnoughMemory` or `ContextCreateError`, and
        `UnsupportedOperation` for a model that was loaded with `vocab_only`."""
        if not isinstance(model, Model):
            raise ArgumentError("model", model, "must be a Model: Model(path)")
        if model._vocab_only:
            raise UnsupportedOperation("the model was loaded with vocab_only: it can't run")
        most_seqs = int(lib.llama_max_parallel_sequences())
        threads = params.get("n_threads")
        threads = default_threads(model, params)[0] if threads is None else threads
        many = params.get("n_threads_batch") or threads
        given = params | {
            "n_ctx": integer("n_ctx", n_ctx, 0, MAX_CTX),
            "n_batch": integer("n_batch", n_batch, 1, 2**31 - 1),
            "n_ubatch": integer("n_ubatch", n_ubatch, 0, 2**31 - 1),
            "n_seq_max": integer("n_seq_max", n_seq_max, 1, most_seqs),
            "kv_unified": n_seq_max > 1 if kv_unified is None else kv_unified,
            "n_threads": integer("n_threads", threads, 1, MAX_THREADS),
            "n_threads_batch": integer("n_threads_batch", many, 1, MAX_THREADS),
        }
        native = lib.llama_context_default_params()
        fill(native, given, frozenset())
        self.n_outputs_max = check_params(model, native)

        self.model = model
        self._model_ptr = model.ptr  # the model may be closed before the context
        self._native = native
        self._n_ctx_streams = None if native.kv_unified else native.n_ctx  # None: made as a pool
        self._keep = params  # callbacks and samplers that libllama points to
        ptr = self._make()
        self._exclusive = Exclusive(ptr)
        super().__init__(self._exclusive)
        self._loras: list[tuple[Any, str, float]] = []  # a pointer, a file's name, a scale
        self._attached: list[Any] = []  # plb_engines, whose samplers libllama may point to
        self._outputs: npt.NDArray[np.int8] | None = None
        self._encoded = False

        self._read(ptr)
        self.memory = Memory(self._exclusive, self.capabilities, self.n_seq_max)

    def _read(self, ptr: Any) -> None:
        """What libllama made of the parameters."""
        self.params: dict[str, Any] = read(self._native)
        self.n_ctx: int = lib.llama_n_ctx(ptr)
        self.n_ctx_seq: int = lib.llama_n_ctx_seq(ptr)
        self.n_batch: int = lib.llama_n_batch(ptr)
        self.n_ubatch: int = lib.llama_n_ubatch(ptr)
        self.n_seq_max: int = lib.llama_n_seq_max(ptr)
        self.n_rs_seq: int = lib.llama_n_rs_seq(ptr)
        self.pooling_type: int = int(lib.llama_pooling_type(ptr))
        self.capabilities = probe(ptr, self.model, self.params)

    # -- life --

    def _make(self) -> Any:
        ptr, log = runtime.logged(lib.plb_context_new, self._model_ptr, self._native)
        if ptr == ffi.NULL:
            raise ContextCreateError(f"libllama could not make the context\n{log}")
        return owned(ptr, self._model_ptr, free=here(lib.plb_context_free))

    def close(self) -> None:
        """Free the context. Closing twice is fine; `ContextBusy` while another thread is inside."""
        if not self.closed:
            with self.exclusive():
                self._end()

    def _end(self) -> None:
        self._loras, self._model_ptr = [], None
        self._attached.clear()
        self._close()

    def renew(self, pool: int | None = None) -> ContextCreateError | None:
        """Make the native context again, with the same parameters, after it has failed. `pool`:
        with so many cells that all sequences share, in place of streams; 0: with those streams
        again. Returns why these can't be had: it has the pool then.

        Its memory is empty and its outputs are gone. Adapters, threads and steppers, with their
        slots, stay. Other threads may make slots meanwhile. Raises `ContextCreateError`, and the
        context is closed, when it can't be made. `ArgumentError` for 0 where the context was made
        with kv_unified=True."""
        problem: ContextCreateError | None = None
        with self.exclusive():
            native = self._native
            before = native.n_ctx, native.kv_unified
            if pool is not None:
                n_ctx = pool or streams_of(self._n_ctx_streams)
                native.n_ctx, native.kv_unified = n_ctx, bool(pool)

            def make() -> Any:
                nonlocal problem
                try:
                    return self._make()
                except ContextCreateError as error:
                    if native.kv_unified or not before[1]:
                        raise
                    problem = error
                native.n_ctx, native.kv_unified = before
                return self._make()

            self._replace(make)
        return problem

    def _replace(self, make: Callable[[], Any]) -> None:
        """By what `make` makes, once the native context that there is has been freed."""
        threads = self.n_threads, self.n_threads_batch
        self._exclusive.now = ffi.NULL  # freed, and not closed
        try:
            self._exclusive.now = ptr = make()
        except BaseException:
            self._end()
            raise
        self._outputs, self._encoded = None, False
        self._read(ptr)
        self.memory.renewed(self.capabilities)
        lib.llama_set_n_threads(ptr, *threads)
        self._apply_loras(self._loras)
        for engine in self._attached:
            if lib.plb_engine_rebind(engine, ptr):
                raise ContextCreateError("the fresh context is of another size")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_ctx} cells, {self.n_seq_max} sequences"
        return f"<Context {state}>"

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the context for this thread. Raises `ContextBusy` when another thread has it.

        Every method does this for its own time. A thread may enter again."""
        return self._exclusive

    # -- running --

    def batch(self, capacity: int | None = None) -> Batch:
        """A batch with room for `n_batch` rows (or `capacity`) in any sequence."""
        return Batch(capacity or self.n_batch, self.n_seq_max)

    def decode(self, batch: Batch) -> None:
        """Run the rows of a batch.

        Raises `ArgumentError` for rows that libllama would abort on, and `KvCacheFull`,
        `InvalidBatch`, `DecodeAborted` or `FatalDecodeError` for what it reports itself."""
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
        self._check(batch, encoder)
        self._outputs = None
        for engine in self._attached:  # a stepper's device sampling would cut the rows of logits
            lib.plb_engine_detach(engine)
        code, log = runtime.logged(call, self.ptr, batch.struct)
        if code != -1:
            self.memory.applied()
        if code != 0:
            raise decode_error(code, log)
        n = batch.n_tokens
        every = encoder or self.params["embeddings"]
        self._outputs = np.ones(n, np.int8) if every else batch.logits[:n].copy()

    def _check(self, batch: Batch, encoder: bool) -> None:
        """Refuse rows that libllama would abort on."""
        if self.model._no_alloc:
            raise UnsupportedOperation("the model was loaded with no_alloc: it has no weights")
        if self.params["ctx_type"] == lib.LLAMA_CONTEXT_TYPE_MTP:
            raise UnsupportedOperation("rows of a context of type mtp start from hidden states")
        n, embeddings, can = batch.n_tokens, self.params["embeddings"], self.capabilities
        if n == 0:
            raise ArgumentError("batch", batch, "has no rows")
        if n > self.n_batch:
            raise ArgumentError("batch.n_tokens", n, f"the context takes n_batch={self.n_batch}")
        causal = lib.llama_get_causal_attn(self.ptr)
        at_once = encoder or not causal or (embeddings and self.pooling_type > 0)
        if at_once and n > self.n_ubatch:
            limit = f"must be computed at once, n_ubatch={self.n_ubatch}"
            raise ArgumentError("batch.n_tokens", n, limit)
        batch.check(self.model.n_vocab, self.n_seq_max, max_position(self.model))
        n_outputs = n if embeddings else int(np.count_nonzero(batch.logits[:n]))
        if n_outputs > self.n_outputs_max:
            limit = f"rows with output, n_outputs_max={self.n_outputs_max}"
            raise ArgumentError("batch.logits", n_outputs, limit)
        if (can.recurrent or not can.unified) and (batch.n_seq_id[:n] > 1).any():
            raise UnsupportedOperation(
                "a row in several sequences needs kv_unified=True and a model that is not recurrent"
            )

    def synchronize(self) -> None:
        """Wait for the device. Reading an output does so by itself. Both raise `FatalDecodeError`
        when the device has failed meanwhile."""
        with self.exclusive():
            self._wait(lib.llama_synchronize)

    def _wait(self, call: Any, *arguments: Any) -> Any:
        """What `call` returns, which waits for the device. Metal says only in its log that it has
        failed, and what would be read is an earlier batch's."""
        value, log = runtime.logged(call, self.ptr, *arguments)
        if log and value != ffi.NULL:
            raise FatalDecodeError(-3, log)
        return value

    # -- outputs --

    def logits(self, row: int = -1) -> FloatArray:
        """The logits of a row of the last batch: float32 (n_vocab,), a copy.

        Negative rows count back from the last row with an output. Raises `ArgumentError` for a row
        without output."""
        with self.exclusive():
            self._check_output(row)
            pointer = self._wait(lib.llama_get_logits_ith, row)
            return np.array(self._view(pointer, (self.model.n_vocab,), f"row {row} has no logits"))

    def logits_all(self) -> FloatArray:
        """The logits of every row with output, in batch order: float32 (n_outputs, n_vocab), a
        copy."""
        with self.exclusive():
            shape = self._n_outputs(), self.model.n_vocab
            pointer = self._wait(lib.llama_get_logits)
            return np.array(self._view(pointer, shape, "the context has no logits"))

    def embeddings(self, row: int = -1) -> FloatArray:
        """The embedding of one token of the last batch: float32 (n_embd_out,), a view."""
        with self.exclusive():
            self._check_embeddings(pooled=False)
            self._check_output(row)
            pointer = self._wait(lib.llama_get_embeddings_ith, row)
            return self._view(pointer, (self.model.n_embd_out,), f"row {row} has no embedding")

    def embeddings_all(self) -> FloatArray:
        """The embeddings of every row with output: float32 (n_outputs, n_embd_out), a view."""
        with self.exclusive():
            self._check_embeddings(pooled=False)
            shape = self._n_outputs(), self.model.n_embd_out
            pointer = self._wait(lib.llama_get_embeddings)
            return self._view(pointer, shape, "the context has no embeddings")

    def embeddings_seq(self, seq_id: int = 0) -> FloatArray:
        """The pooled embedding of a sequence of the last batch: float32 (n_embd_out,), a view.

        With pooling_type "rank": the scores, (n_cls_out,)."""
        with self.exclusive():
            self._check_embeddings(pooled=True)
            seq = self._seq(seq_id)
            rank = self.pooling_type == lib.LLAMA_POOLING_TYPE_RANK
            size = self.model.n_cls_out if rank else self.model.n_embd_out
            pointer = self._wait(lib.llama_get_embeddings_seq, seq)
            return self._view(pointer, (size,), f"sequence {seq} was not in the last batch")

    def _n_outputs(self) -> int:
        if self._outputs is None or not self._outputs.size:
            raise UnsupportedOperation("the last batch was not run by decode or encode")
        return int(np.count_nonzero(self._outputs))

    def _check_output(self, row: int) -> None:
        row = integer("row", row, -(2**31), 2**31 - 1)
        if self._outputs is None:
            return  # a stepper ran it: libllama's own check is left
        n = np.count_nonzero(self._outputs)
        if row < -n or row >= len(self._outputs) or (row >= 0 and not self._outputs[row]):
            raise ArgumentError("row", row, "was not asked for its output in the last batch")

    def _check_embeddings(self, pooled: bool) -> None:
        if not self.params["embeddings"]:
            raise UnsupportedOperation("make the context with embeddings=True")
        if pooled != (self.pooling_type > 0):
            name = "embeddings_seq" if self.pooling_type > 0 else "embeddings"
            raise UnsupportedOperation(f"pooling_type is {self.pooling_type}: use {name}")

    def _view(self, pointer: Any, shape: tuple[int, ...], missing: str) -> FloatArray:
        if pointer == ffi.NULL:
            raise UnsupportedOperation(missing)
        array: FloatArray = view(pointer, np.float32, shape, self.ptr)
        return array

    # -- state --

    def state_seq_get(
        self,
        seq_id: int,
        loras: LoraNames | None = None,
        *,
        tokens: Tokens = (),
        note: Mapping[str, Any] | None = None,
    ) -> bytes:
        """The state of a sequence as bytes, with a header that tells whose it is and a checksum.

        - loras: file names and scales of the adapters that it was computed with, if not those of
          now.
        - tokens, note: what `state_seq_set` and `state.read_note` give back; note is anything JSON.

        Raises `StateError` when libllama can't save it, `UnsupportedOperation` when a shift or copy
        of it waits for the next decode."""
        seq = self._seq(seq_id)
        with self.exclusive():
            self._need_memory()
            if self.memory.is_stale(seq):
                raise UnsupportedOperation(
                    f"a shift or copy of sequence {seq} waits for the next decode: save it after it"
                )
            size = int(lib.llama_state_seq_get_size(self.ptr, seq))
            body = ffi.new("uint8_t[]", size)
            get = lib.llama_state_seq_get_data
            written, log = runtime.logged(get, self.ptr, body, size, seq)
            if not 0 < written <= size:
                raise StateError(f"libllama could not save sequence {seq}\n{log}")
            names = self.lora_names if loras is None else loras
            data = ffi.buffer(body, written)
            return state.pack(self.model, self.params, names, tokens, note, data)

    def state_seq_set(self, data: bytes, seq_id: int, loras: LoraNames | None = None) -> TokenArray:
        """Replace a sequence by a saved state. Returns the tokens that were saved with it.

        loras: the adapters that it will go on with, if not those of now. Raises `StateError`: the
        sequence is as it was when the data is damaged, of another model or computed with other
        parameters, and empty when it does not fit. `UnsupportedOperation`, and it is as it was,
        when a copy from or to its stream waits for the next decode."""
        seq = self._seq(seq_id)
        with self.exclusive():
            names = self.lora_names if loras is None else loras
            tokens, body = state.unpack(self.model, self.params, names, data)
            self._need_memory()
            if self.memory.is_copying(seq):
                raise UnsupportedOperation(
                    f"a copy from or to sequence {seq} waits for the next decode: load it after it"
                )
            self.memory.seq_rm(seq)  # libllama leaves it in place when the saved one is empty
            source = ffi.from_buffer("uint8_t[]", body)
            taken, log = runtime.logged(lib.plb_state_seq_set, self.ptr, source, len(body), seq)
            if taken != len(body):
                self.memory.seq_rm(seq)  # what came before the failure
                raise StateError(f"the state does not fit; sequence {seq} is empty now\n{log}")
            self.memory.restored(seq)
            return tokens

    def state_seq_save(self, path: PathLike, seq_id: int, tokens: Tokens = ()) -> None:
        """Write the state of a sequence to a file, and the tokens that made it, if given."""
        state.write(path, self.state_seq_get(seq_id, tokens=tokens))

    def state_seq_load(self, path: PathLike, seq_id: int) -> TokenArray:
        """Replace a sequence by the state in a file. Returns the tokens saved with it."""
        return self.state_seq_set(state.read(path), seq_id)

    def _need_memory(self) -> None:
        if not self.capabilities.has_memory:
            raise UnsupportedOperation("the model keeps nothing between batches")

    def _seq(self, seq_id: int) -> int:
        return integer("seq_id", seq_id, 0, self.n_seq_max - 1)

    # -- settings --

    def set_loras(self, adapters: Sequence[tuple[LoraAdapter, float]]) -> None:
        """Apply these adapters with these scales, and no others, from the next decode on.

        Raises `ArgumentError` for an adapter of another model or a scale that is not finite,
        `ClosedError` for a closed adapter."""
        for adapter, _ in adapters:
            if adapter.model is not self.model:
                raise ArgumentError("adapters", adapter, "was loaded for another model")
        loras = [(a.ptr, a.file_name, number("scale", scale)) for a, scale in adapters]
        with self.exclusive():
            self._apply_loras(loras)

    @property
    def lora_names(self) -> list[tuple[str, float]]:
        """File name and scale of each adapter that is applied."""
        return [(name, scale) for _, name, scale in self._loras]

    def _apply_loras(self, loras: list[tuple[Any, str, float]]) -> None:
        pointers = ffi.new("struct llama_adapter_lora *[]", [ptr for ptr, _, _ in loras] or 1)
        scales = ffi.new("float[]", [scale for _, _, scale in loras] or 1)
        lib.llama_set_adapters_lora(self.ptr, pointers, len(loras), scales)
        self._loras = loras  # those before may go now

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
