"""Sequence: one sequence of an engine that its owner drives call by call."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

from ..errors import ArgumentError, ClosedError, EngineClosed, StateError, integer
from ..llama import state
from ..llama.host import PathLike
from ..llama.vocab import Utf8Decoder
from ..step.sampling_params import SamplingParams
from .core import EngineCore
from .input_processor import InputProcessor, Prompt
from .interactive import NONE, Call, InteractiveSink, Token
from .request import Tokens
from .snapshot import read


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token.

    `piece`: its bytes. `text`: what it adds to the text, "" where a character is only partly there.
    `logprob`: None unless asked for. `end`: it is an end-of-generation or a stop token."""

    token: int
    piece: bytes
    text: str
    logprob: float | None
    end: bool


class Sequence:
    """One sequence of an engine that its owner drives call by call: `Engine.sequence` makes it.

        with engine.sequence(SamplingParams(temperature=0)) as seq:
            seq.prompt("Once upon a time")
            while not (sampled := seq.sample()).end:
                print(sampled.text, end="")

    It runs in the engine's own batches, beside its requests. `sample` calls of several threads
    become one decode; long prompts are computed in chunks beside the others' tokens. Between two
    calls it keeps its cells, but when others wait for room it may be computed again.

    Every method may be called from any thread, but in a callback of the engine only `cancel` and
    `close`: UnsupportedOperation. Two calls on the same sequence wait for each other, except for
    `cancel`. Whatever a call raises, the sequence is as it was before the call, and usable."""

    def __init__(
        self, sink: InteractiveSink, core: EngineCore, inputs: InputProcessor, engine: object
    ) -> None:
        self._sink = sink
        self._request = sink.request
        self._core = core
        self._inputs = inputs
        self._engine = engine  # lives as long as this
        self._lock = threading.RLock()
        self._closed = False
        self._pieces = inputs.pieces(self.params)
        self._n_begun = 0  # sampling states
        self._reset_text()
        # Also when it is forgotten.
        self._finalizer = weakref.finalize(self, _forget, core, sink)
        self._finalizer.atexit = False

    # -- what it is

    @property
    def params(self) -> SamplingParams:
        return self._request.params

    @property
    def position(self) -> int:
        """How many tokens it knows: prompts and what was sampled."""
        return len(self._request.tokens)

    @property
    def tokens(self) -> list[int]:
        """All tokens that it knows, oldest first."""
        tokens: list[int] = self._request.tokens.tolist()
        return tokens

    @property
    def closed(self) -> bool:
        return self._closed

    # -- what it does

    def prompt(
        self, prompt: Prompt, *, add_special: bool | None = None, parse_special: bool | None = None
    ) -> None:
        """Add a text or token ids, and compute all but the last token of it (`sample` needs that
        one's row). `add_special`, `parse_special`: as in `Vocab.tokenize`; by default special
        tokens are added where the sequence is empty, and parsed in what `apply_chat_template` made.

        A new sampling state begins behind it: penalties look back at all tokens, a grammar starts
        at its root, and a seed is moved on by one.

        Raises ArgumentError for an empty prompt and for tokens that are not in the vocabulary,
        RequestTooLong when it can never fit, Cancelled, EngineDraining, EngineClosed, and
        DecodeError when llama_decode fails."""
        now = perf_counter()
        with self._turn():
            self._check_open()
            special = self.position == 0 if add_special is None else add_special
            with self._core.commands.keep_alive():
                tokens = self._inputs.tokens(prompt, special, parse_special)
                sampler = self._sampler(np.concatenate((self._request.tokens, tokens)))
            self._call(
                partial(self._sink.prompt, tokens, sampler, now),
                partial(self._core.call, more=True),
            )
            self._begun()

    def sample(self) -> Sampled:
        """Compute what is not computed yet, and sample the next token, which the sequence knows
        from then on (one that is an `end` too).

        Raises ArgumentError when nothing is known yet, RequestTooLong when there is no cell for
        another token, SamplingError when no token can be chosen, Cancelled, EngineDraining,
        EngineClosed, and DecodeError when llama_decode fails."""
        with self._turn():
            sink, sampled = self._sink, None
            if not (self._closed or sink.spent):
                sampled = self._core.next_token(sink)
            token, logprob, finish = sampled or self._sample()
            (piece,) = self._pieces.of([token])
            return Sampled(
                token=token,
                piece=piece,
                text=self._text(piece),
                logprob=logprob,
                end=finish != NONE,
            )

    def trim(self, n: int) -> None:
        """Forget all but the first `n` tokens; 0 empties the sequence. A new sampling state begins,
        as behind a prompt. Where the memory can't remove a part (recurrent states, sliding
        windows), the sequence is computed again. Raises ArgumentError for more tokens than there
        are."""
        with self._turn():
            self._check_open()
            if integer("n", n, 0, self.position) == self.position:
                return
            with self._core.commands.keep_alive():
                sampler = self._sampler(self._request.tokens[:n]) if n else None
            self._call(partial(self._sink.trim, n, sampler))
            self._begun(sampler is not None)

    def fork(self, params: SamplingParams | None = None) -> Sequence:
        """Another sequence that knows the same tokens, and shares its cells where the memory can.
        `params`: default this one's, with random draws of its own. Raises as `prompt` does."""
        with self._turn():
            self._check_open()
            if params is None:
                params = replace(self.params, seed=None)
            options = self._request.options
            with self._core.commands.keep_alive():
                sink = self._inputs.interactive(
                    params, options.priority, options.tenant, dict(options.lora)
                )
                child = Sequence(sink, self._core, self._inputs, self._engine)
            if self.position:
                try:
                    child.prompt(self._request.tokens)
                except BaseException:
                    child.close()
                    raise
            return child

    def snapshot(self) -> bytes:
        """It as bytes: cells, tokens, and where its sampling is, for `restore` in any engine of the
        same model. Raises ArgumentError for less than two tokens, StateError, UnsupportedOperation
        (see `pyllamabatch.engine.snapshot`), and what `prompt` raises."""
        with self._turn():
            self._check_open()
            if self.position < 2:
                raise ArgumentError("position", self.position, "a snapshot has two tokens or more")
            while True:
                self._call(self._sink.compute)
                data = self._call(self._sink.save)
                if data is not None:
                    saved: bytes = data
                    return saved

    def restore(self, data: bytes) -> None:
        """Be what was saved, in place of all that it knows, its sampling parameters included. Where
        the state does not suit this engine's context, its tokens are computed again. Raises
        StateError when the data are damaged, of another model, or computed with other adapters than
        this sequence has; RequestTooLong."""
        request, inputs = self._request, self._inputs
        with self._turn():
            self._check_open()
            with self._core.commands.keep_alive():
                saved = read(inputs.model, data)
                adapters = inputs.loras.files(request.options.lora)
                if list(saved.loras) != adapters:
                    raise StateError(f"saved with adapters {saved.loras}, these are {adapters}")
                self._core.scheduler.check_fits(len(saved.tokens), 1)
                if saved.params is None:
                    sampler, pieces = self._sampler(saved.tokens), self._pieces
                else:
                    sampler, pieces = inputs.saved_sampler(saved), inputs.pieces(saved.params)
            self._call(partial(self._sink.restore, saved, data, sampler))
            self._pieces = pieces
            if saved.params is not None:
                self._n_begun = 0  # its seed is the one in use
            self._begun()

    def save(self, path: PathLike) -> None:
        """`snapshot` to a file, which is written whole or not at all. StateError when it can't."""
        state.write(path, self.snapshot())

    def load(self, path: PathLike) -> None:
        """`restore` from a file. StateError when it can't be read."""
        self.restore(state.read(path))

    def cancel(self) -> None:
        """The call that another thread is in, if any, ends within a step: it raises Cancelled, and
        the sequence is as it was before. One that is over by then is not undone."""
        with suppress(EngineClosed):
            self._core.cancel(self._request.id)

    def close(self) -> None:
        """Give its cells back. A call that another thread is in is cancelled. Closing twice is
        fine, also after the engine."""
        self.cancel()
        callback = self._core.is_own_thread()
        if not self._lock.acquire(blocking=not callback):  # for a call that needs this thread
            threading.Thread(target=self.close, daemon=True).start()
            return
        try:
            if self._closed:
                return
            self._closed = True
            if callback:
                self._finalizer()  # which waits for nothing
                return
            self._finalizer.detach()
            with suppress(ClosedError):  # the engine has done it
                self._call(self._sink.close_for, self._core.call_without_cells)
        finally:
            self._lock.release()

    def __enter__(self) -> Sequence:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.position} tokens"
        return f"<Sequence {self._request.id}: {state}>"

    # -- inside

    def _turn(self) -> AbstractContextManager[Any]:
        """Held during a call. UnsupportedOperation in a callback, whose thread other calls need."""
        self._core.may_wait()
        return self._lock

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"sequence {self._request.id} is closed")

    def _reset_text(self) -> None:
        self._decoder = Utf8Decoder("replace")
        self._cut = False  # in the middle of a character

    def _text(self, piece: bytes) -> str:
        """What it adds to the text."""
        if not self._cut:
            try:
                return piece.decode()
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(piece)
        self._cut = bool(self._decoder.getstate()[0])
        return text

    def _sample(self) -> Token:
        """The next token, by a plan of its own."""
        now = perf_counter()
        self._check_open()
        if not self.position:
            raise ArgumentError("prompt", None, "a sequence needs a token to start from")
        sampler = None
        if self._sink.spent:
            with self._core.commands.keep_alive():
                sampler = self._sampler(self._request.tokens)
        ask = partial(self._sink.sample, sampler, now)
        sampled: Token = self._call(ask, self._core.call_for_token)
        if sampler is not None:
            self._begun()
        return sampled

    def _sampler(self, tokens: Tokens) -> Any:
        """A sampling state that begins behind `tokens`."""
        params = self.params
        if params.seed is not None:
            params = params.with_seed(params.seed + self._n_begun)
        return self._inputs.sampler(params, tokens)

    def _begun(self, anew: bool = True) -> None:
        """Its text begins; `anew`: a sampling state, too."""
        self._n_begun += anew
        self._reset_text()

    def _call(
        self,
        act: Callable[[Call], None],
        ask: Callable[[Callable[[Call], None], Call], None] | None = None,
    ) -> Any:
        """`ask`: default `EngineCore.call`."""
        call = Call()
        try:
            (ask or self._core.call)(act, call)
            return call.wait()
        except BaseException:
            if call.pending:  # interrupted: its value is not wanted any more
                self.cancel()
            raise


def _forget(core: EngineCore, sink: InteractiveSink) -> None:
    with suppress(EngineClosed):
        core.call_without_cells(sink.close_for, Call())
