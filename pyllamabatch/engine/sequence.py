"""Sequence: one sequence of an engine, driven by hand."""

from __future__ import annotations

import codecs
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ..errors import ArgumentError, ClosedError, EngineClosed, StateError
from ..llama import state
from ..step.sampling_params import INT32_MAX, SEED_MAX, SamplingParams
from ..step.types import Finish
from .hand import Call, Draw, Hand
from .snapshot import read, slot_of

if TYPE_CHECKING:
    from ..llama.host import PathLike
    from .core import EngineCore
    from .detokenizer import Pieces
    from .engine import Engine
    from .input_processor import Prompt


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token. `piece`: its bytes; `text`: what it adds to the text, "" where a character
    is only partly there. `logprob`: None unless asked for. `end`: it is an end-of-generation token
    or one of the stop tokens."""

    token: int
    piece: bytes
    text: str
    logprob: float | None
    end: bool


class Sequence:
    """One sequence of an engine, driven by hand: `Engine.sequence` makes it.

        with engine.sequence(SamplingParams(temperature=0)) as seq:
            seq.prompt("Once upon a time")
            while not (sampled := seq.sample()).end:
                print(sampled.text, end="")

    It runs in the engine's own batches, beside its requests. `sample` calls of several threads
    become one decode; long prompts are computed in chunks beside the others' tokens. Between two
    calls it keeps its cells, but when others wait for room it may be computed again.

    Every method may be called from any thread; two calls on the same sequence wait for each other,
    except for `cancel`. Whatever a call raises, the sequence is as it was before the call, and
    usable.
    """

    def __init__(self, engine: Engine, hand: Hand, pieces: Pieces) -> None:
        self._engine = engine
        self._core = engine._core
        self._hand = hand
        self._pieces = pieces
        self._lock = threading.RLock()
        self._closed = False
        self._n_renewed = 0
        self._reset_text()
        # Also when it is forgotten.
        self._finalizer = weakref.finalize(self, _forget, self._core, hand)
        self._finalizer.atexit = False

    # -- what it is

    @property
    def params(self) -> SamplingParams:
        return self._hand.params

    @property
    def position(self) -> int:
        """How many tokens it knows: prompts and what was sampled."""
        return len(self._hand.tokens)

    @property
    def tokens(self) -> list[int]:
        """All that it knows, oldest first."""
        return self._hand.tokens.copy()

    @property
    def closed(self) -> bool:
        return self._closed

    # -- what it does

    def prompt(
        self, prompt: Prompt, *, add_special: bool | None = None, parse_special: bool = False
    ) -> None:
        """Add a text or token ids, and compute all but the last token of it (`sample` needs that
        one's row). `add_special`: as in `Vocab.tokenize`; None: at the beginning of the sequence.

        Sampling begins anew behind it: penalties look back at all tokens, a grammar starts at its
        root, and a seed is moved on by one.

        Raises ArgumentError for an empty prompt and for tokens that are not in the vocabulary,
        RequestTooLong when it can never fit, Cancelled, EngineDraining, EngineClosed, and
        DecodeError when llama_decode fails.
        """
        now = perf_counter()
        with self._lock:
            self._check_open()
            special = self.position == 0 if add_special is None else add_special
            with self._core.commands.visit():
                tokens = self._engine._input_processor.tokens(
                    prompt, special, parse_special
                ).tolist()
                sampler = self._sampler(self._hand.tokens + tokens)
            self._call(
                lambda hands, call: hands.extend(self._hand, tokens, sampler, call, now), more=True
            )
            self._reset_text()

    def sample(self) -> Sampled:
        """Compute what is not computed yet, and sample the next token, which the sequence knows
        from then on (one that is an `end` too).

        Raises ArgumentError when nothing is known yet, RequestTooLong when there is no cell for
        another token, SamplingError when no token can be chosen, Cancelled, EngineDraining,
        EngineClosed, and DecodeError when llama_decode fails.
        """
        hand, now = self._hand, perf_counter()
        with self._lock:
            self._check_open()
            if not hand.tokens:
                raise ArgumentError("prompt", None, "a sequence needs a token to start from")
            sampler = None
            if hand.spent:
                with self._core.commands.visit():
                    sampler = self._sampler(hand.tokens)
                self._reset_text()
            draw: Draw = self._call(
                lambda hands, call: hands.ask(hand, sampler, call, now), more=True, ask=True
            )
            (piece,) = self._pieces.of([draw.token])
            return Sampled(
                token=draw.token,
                piece=piece,
                text=self._decode(piece),
                logprob=draw.logprob,
                end=draw.finish != Finish.NONE,
            )

    def trim(self, n: int) -> None:
        """Forget all but the first `n` tokens; 0 empties the sequence. Sampling begins anew, as
        behind a prompt. Where the memory can't remove a part (recurrent states, sliding windows),
        the sequence is computed again. Raises ArgumentError for more tokens than there are."""
        with self._lock:
            self._check_open()
            if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.position:
                raise ArgumentError("n", n, f"an integer from 0 to {self.position}")
            if n == self.position:
                return
            with self._core.commands.visit():
                sampler = self._sampler(self._hand.tokens[:n]) if n else None
            self._call(lambda hands, call: hands.trim(self._hand, n, sampler, call))
            self._reset_text()

    def fork(self, params: SamplingParams | None = None) -> Sequence:
        """Another sequence that knows the same tokens, and shares its cells where the memory can.
        `params`: default this one's, with draws of
        its own. Raises as `prompt` does."""
        with self._lock:
            self._check_open()
            if params is None:
                params = replace(self.params, seed=None)
            hand = self._hand
            child = self._engine.sequence(
                params, priority=hand.priority, tenant=hand.tenant, lora=dict(hand.lora)
            )
            if self._hand.tokens:
                try:
                    child.prompt(self._hand.tokens)
                except BaseException:
                    child.close()
                    raise
            return child

    def snapshot(self) -> bytes:
        """It as bytes: cells, tokens, and where its sampling is, for `restore` in any engine of the
        same model. Raises ArgumentError for less than two tokens, StateError, UnsupportedOperation
        (see `pyllamabatch.engine.snapshot`), and what `prompt` raises."""
        with self._lock:
            self._check_open()
            if self.position < 2:
                raise ArgumentError("position", self.position, "a snapshot has two tokens or more")
            while True:
                self._call(lambda hands, call: hands.compute(self._hand, call))
                data = self._call(lambda hands, call: hands.save(self._hand, call))
                if data is not None:
                    saved: bytes = data
                    return saved

    def restore(self, data: bytes) -> None:
        """Be what was saved, in place of all that it knows, its sampling parameters included. Where
        the state does not suit this engine's context, its tokens are computed again. Raises
        StateError when the data are damaged, of another model, or computed with other adapters than
        this sequence has; RequestTooLong."""
        hand = self._hand
        with self._lock:
            self._check_open()
            with self._core.commands.visit():
                saved = read(self._engine.model, data)
                adapters = self._engine._input_processor.loras.files(hand.lora)
                if list(saved.loras) != adapters:
                    raise StateError(f"saved with adapters {saved.loras}, these are {adapters}")
                self._core.scheduler.check_fits(len(saved.tokens), 1)
                sampler = slot_of(self._engine._stepper, saved)
                if sampler is None:
                    sampler = self._sampler(saved.tokens.tolist())
            if saved.params is not None:
                hand.params = saved.params
            self._call(lambda hands, call: hands.restore(hand, saved, data, sampler, call))
            self._reset_text()

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
            self._core.call_hands(lambda hands: hands.cancel(self._hand))

    def close(self) -> None:
        """Give its cells back. A call that another thread is in is cancelled. Closing twice is
        fine, also after the engine."""
        self.cancel()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._finalizer.detach()
            with suppress(ClosedError):  # the engine has done it
                self._call(lambda hands, call: hands.close(self._hand, call))

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.position} tokens"
        return f"<Sequence {self._hand.id}: {state}>"

    # -- inside

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"sequence {self._hand.id} is closed")

    def _reset_text(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def _sampler(self, tokens: list[int]) -> Any:
        """A sampling state that begins behind `tokens`."""
        params = self.params
        if params.seed is not None:
            params = replace(params, seed=(params.seed + self._n_renewed) % (SEED_MAX + 1))
        sampler = self._engine._stepper.make_slot(params, tokens)
        self._n_renewed += 1
        return sampler

    def _call(
        self, act: Callable[[Any, Call], None], *, more: bool = False, ask: bool = False
    ) -> Any:
        call = Call()
        self._core.call_hands(lambda hands: act(hands, call), call, more=more, ask=ask)
        try:
            return call.wait()
        except BaseException:
            if call.pending:  # interrupted: nobody waits for it any more
                self.cancel()
            raise


def _forget(core: EngineCore, hand: Hand) -> None:
    with suppress(EngineClosed):
        core.call_hands(lambda hands: hands.close(hand, Call()))


def interactive(params: SamplingParams | None) -> SamplingParams:
    """The parameters of a interactive sequence, which has no budget and no stop strings."""
    params = SamplingParams() if params is None else params
    if not isinstance(params, SamplingParams):
        raise ArgumentError("params", params, "must be SamplingParams")
    if params.stop:
        raise ArgumentError("stop", params.stop, "of a interactive sequence the owner looks")
    return replace(params, max_tokens=INT32_MAX)
