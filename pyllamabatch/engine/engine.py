"""Engine: many requests at once on one shared context."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import aclosing
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..cost.choose import cost_of
from ..cost.model import CostModel
from ..errors import ArgumentError, UnsupportedOperation, integer
from ..kv import Preemption, SwapSpace
from ..llama.context import Context
from ..llama.host import PathLike
from ..llama.limits import max_position
from ..llama.lora import LoraAdapter, Loras
from ..llama.model import Model
from ..planner.residency import fitting_n_ctx
from ..raw import lib
from ..scheduler import Gather, Limits, Policy, Scheduler
from ..scheduler.interactive import PATIENCE_SECONDS
from ..scheduler.policy import check_policy
from ..step.native import gap_max_of, offloaded
from ..step.ring_reader import StreamStepper
from ..step.sampling_params import SEED_MAX, SamplingParams
from ..step.trace import StepTrace, Trace, trace_dtype
from . import aio
from .core import EngineCore
from .input_processor import InputProcessor, Prompt
from .kv_config import n_cached, sharing_of, swap_choice
from .request import Options, seconds_of
from .sequence import Sequence as InteractiveSequences
from .stats import EngineStats, stats_of
from .stream import Result, Stream, Token

if TYPE_CHECKING:
    from typing_extensions import Unpack

RING_STEPS = 256  # steps that are computed at most before their tokens are read
N_CTX_AT_LEAST = 16384  # of the default n_ctx, for models that were trained with less


class Engine:
    """Runs requests together on one context of `model`, in a thread of its own.

        with Engine(model, n_seq_max=8) as engine:
            stream = engine.submit("Once upon a time", SamplingParams(max_tokens=50))
            for token in stream: print(token.text, end="")
            results = engine.generate(["one", "two", "three"])

    - n_seq_max: requests that run at once; others wait in line.
    - n_ctx: KV cells of all of them together; 0 chooses: what the model was trained with, and for
      small models up to 16384, but no more than `n_seq_max` requests can fill, nor than memory has
      room for. The value that libllama made of it is `engine.n_ctx`.
    - n_batch: rows of a step at most; n_ubatch: rows that the device computes at once, and by
      default the rows of a step while somebody waits for its next token.
    - policy: who runs when, see `pyllamabatch.scheduler`; default `device_aware()`. One policy
      object serves one engine.
    - n_logprobs_max: the largest `SamplingParams.logprobs` that a request may ask for.
    - device_sampling: the device chooses candidates, so that whole rows of logits need not travel:
      "auto" where that is cheaper; see `Stepper`.
    - n_trace: how many of the last steps `trace` remembers; 0 for none.
    - max_waiting: requests that wait in line for their first slot at most; None: any number. What
      happens to more is said in `submit`.
    - gather: how long a step waits for interactive sequences that are about to ask; default
      `CostWindow()`; `Window(200e-6)` waits for a fixed time, `Window(0)` never. patience: seconds
      that one of these may rest while others wait for its room.
    - cost: what a step costs on this device, for policies that ask: a `CostModel`, or None; "auto":
      of a stored profile (`pyllamabatch calibrate`), a prior where there is none. The engine's own
      steps refine it.
    - prefix_cache: keep what requests leave in the cache until its cells are needed, so that one
      that begins in the same way (a system prompt, the next turn of a conversation) starts from
      there. By default where all share one pool of cells: there it takes nothing from those who
      run, and a hit saves a prefill. What is kept does lie among the cells that every step looks
      over. With kv_unified=False it keeps a sequence's own place from others, and a step of places
      that do not follow each other takes several times as long (`Step.parts`).
    - preemption: what happens to a request that has to give up its cells: "recompute" later,
      "swap" its state to the host and back, "auto" for what is cheaper by the rates measured so far
      (`pyllamabatch.kv.swap`). swap_bytes: host memory for swapped states; more of them go to files
      in swap_folder (default: the system's for temporary files).
    - max_restarts: when llama_decode fails twice in a row for a reason of the backend's, a fresh
      context takes the place of the one that failed, and what ran is computed again: so often for
      a request (or a call of a interactive sequence) that was in the failed step. If that happens
      to it once more it ends with the error. 0: at once, and the context stays.
    - loras: adapters by the names that requests give them (`Options.lora`). Rows with different
      ones can't be in one decode: a step is as many native calls as it has sets of adapters.
    - context_params: any other parameter of `Context`. kv_unified=False gives every sequence
      n_ctx / n_seq_max cells of its own.

    A request's tokens do not depend on its neighbours. One that fails ends alone.
    Raises UnsupportedOperation for models with an encoder and for embedding models, and
    NotEnoughMemory, before anything is allocated, for an n_ctx that does not fit.
    """

    def __init__(
        self,
        model: Model,
        *,
        n_seq_max: int = 16,
        n_ctx: int = 0,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        policy: Policy | None = None,
        n_logprobs_max: int = 20,
        device_sampling: bool | str = "auto",
        n_trace: int = 4096,
        max_waiting: int | None = None,
        gather: Gather | None = None,
        patience: float = PATIENCE_SECONDS,
        cost: CostModel | Literal["auto"] | None = "auto",
        prefix_cache: bool | None = None,
        preemption: Preemption = "auto",
        swap_bytes: int = 2**30,
        swap_folder: PathLike | None = None,
        max_restarts: int = 2,
        loras: Mapping[str, LoraAdapter] | None = None,
        **context_params: Any,
    ) -> None:
        if model.has_encoder or not model.has_decoder:
            raise UnsupportedOperation(
                f"the engine runs decoder-only models, {model.architecture} has an encoder"
            )
        for name in ("embeddings", "n_outputs_max"):
            if context_params.get(name):
                raise ArgumentError(name, context_params[name], "the engine sets it itself")
        n_seq_max = integer("n_seq_max", n_seq_max, 1, 256)
        n_trace = integer("n_trace", n_trace, 0, 2**24)
        swap_bytes = integer("swap_bytes", swap_bytes, 0, 2**63 - 1)
        if preemption not in ("auto", "recompute", "swap"):
            raise ArgumentError("preemption", preemption, '"auto", "recompute" or "swap"')
        if max_waiting is not None:
            max_waiting = integer("max_waiting", max_waiting, 1, 2**31)
        max_restarts = integer("max_restarts", max_restarts, 0, 2**31)
        patience = seconds_of("patience", patience)
        if policy is not None:
            policy = check_policy(policy, policy)
        ours_to_choose = n_ctx == 0
        if ours_to_choose:
            n_ctx = min(model.n_ctx_train * n_seq_max, max(model.n_ctx_train, N_CTX_AT_LEAST))
        context_params.setdefault("kv_unified", True)
        n_slots = n_seq_max
        if prefix_cache is None:
            prefix_cache = bool(context_params["kv_unified"])
        if prefix_cache:
            n_slots += n_cached(model, n_seq_max, min(n_batch, n_ctx), context_params)
        context_params |= {"n_batch": n_batch, "n_ubatch": n_ubatch, "n_seq_max": n_slots}
        n_ctx = fitting_n_ctx(model, n_ctx, shrink=ours_to_choose, **context_params)
        context = Context(model, n_ctx=n_ctx, n_outputs_max=n_slots, **context_params)
        try:
            if not context.capabilities.has_memory or not context.capabilities.causal:
                raise UnsupportedOperation(f"{model.architecture} does not generate token by token")
            self.limits = limits_of(context, n_seq_max)
            self.cost = cost_of(context) if cost == "auto" else cost
            if self.cost is not None:
                if self.limits.unified and (device_sampling is False or not offloaded(context)):
                    self.cost.switch = 0.0  # libllama makes no graph for another set of sequences
                elif not self.cost.switch:
                    self.cost.switch = None  # it was not measured: it will show
            scheduler = Scheduler(
                self.limits,
                policy,
                gather=gather,
                patience=patience,
                cost=self.cost,
                sharing=sharing_of(context, n_seq_max),
                retain=bool(prefix_cache),
                swap=swap_choice(context, preemption),
            )
            stepper = StreamStepper(
                context,
                n_logprobs_max=n_logprobs_max,
                n_steps_max=RING_STEPS,
                device_sampling=device_sampling,
            )
            trace = StepTrace(n_trace, n_slots) if n_trace else None
            adapters = Loras(context.model, loras or {}, context.set_loras)
        except BaseException:
            context.close()
            raise
        self.model = model
        self.n_ctx: int = context.n_ctx
        self.n_batch: int = context.n_batch
        self.n_ubatch: int = context.n_ubatch
        self.n_seq_max: int = n_seq_max
        self.capabilities = context.capabilities
        self._prefix_cache = bool(prefix_cache)
        self._stepper = stepper
        self._relays = aio.Relays()

        def close() -> None:
            stepper.close()
            context.close()
            adapters.close()

        space = SwapSpace(swap_bytes, swap_folder)
        self._core = EngineCore(
            scheduler,
            stepper,
            context.memory,
            context,
            close,
            trace,
            space,
            max_waiting,
            max_restarts,
            adapters,
        )
        self._input_processor = InputProcessor(
            model, self._core, stepper, adapters, bool(prefix_cache)
        )
        # Also when the engine is forgotten, and before the interpreter exits.
        self._finalizer = weakref.finalize(self, self._core.close, wait=False, timeout=None)
        lib.plb_threads_rest()  # of this thread, which may have computed; the core's has its own
        self._core.start()

    # -- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        queue_timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Add a request and return at once, or as soon as there is room in the line.

        `prompt`: text, or token ids as they are. `options`: see `Options`. `queue_timeout`: seconds
        to wait for room where `max_waiting` requests wait in line already; None: as long as it
        takes.

        Raises before anything has started: ArgumentError for an empty prompt, tokens that are not
        in the vocabulary and parameters that do not suit the model, RequestTooLong when prompt and
        max_tokens can never fit, GrammarError, TokenizeError, QueueFull, EngineDraining,
        EngineClosed.
        """
        if queue_timeout is not None:
            queue_timeout = seconds_of("queue_timeout", queue_timeout)
        with self._core.commands.visit():
            request = self._input_processor.request(prompt, params, options, self)
            self._core.submit([request], queue_timeout)
        return request.stream

    def submit_n(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        n: int = 1,
        **options: Unpack[Options],
    ) -> list[Stream]:
        """`n` samples of one prompt, which is computed once: each a request of its own, with the
        seeds `seed`, `seed + 1`, ... (as vLLM's), or random ones without. Otherwise as `submit`.

        Prompts of up to 16 tokens are computed n times, and so are those of recurrent and hybrid
        models in an engine with prefix_cache=False.
        """
        n = integer("n", n, 1, 2**16)
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ArgumentError("params", params, "must be SamplingParams")
        each = [params] * n
        if params.seed is not None:
            each = [replace(params, seed=(params.seed + i) % (SEED_MAX + 1)) for i in range(n)]
        with self._core.commands.visit():
            requests = [self._input_processor.request(prompt, one, options, self) for one in each]
            for request in requests:
                if not self._prefix_cache:
                    request.space = "samples", requests[0].id
            self._core.submit(requests)
        return [request.stream for request in requests]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[Options],
    ) -> list[Result]:
        """Run all prompts together and wait for them: the results in the same order.

        `params`: one for all, or one each. `options`: of all, see `Options`. A prompt that `submit`
        would refuse raises, and nothing is started. One that fails later has `finish_reason`
        "error" and an `error`. Where `max_waiting` is less than they are, it waits for room.
        """
        with self._core.commands.visit():
            requests = self._input_processor.requests(prompts, params, options, self)
        streams = [request.stream for request in requests]
        try:
            with self._core.commands.visit():
                if self._core.commands.has_room(len(requests)):
                    self._core.submit(requests)
                else:
                    for request in requests:
                        self._core.submit([request])
            return [stream.wait() for stream in streams]
        except BaseException:  # interrupted: nobody wants them any more
            for stream in streams:
                stream.cancel()
            raise

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Token, None]:
        """`submit` for asyncio: `async for token in engine.stream(prompt)`. The request is made at
        the first step of the loop, which waits while the line is full. Leaving the loop, or
        cancelling its task, cancels the request (where it matters when, use
        `contextlib.aclosing`). Raises what `submit` raises, and the request's error at the end."""
        relay = self._relays.here()
        with self._core.commands.visit():
            request = self._input_processor.request(prompt, params, options, self)
            await aio.submit(self._core, request, relay)
        async with aclosing(aio.tokens(request.stream, relay)) as tokens:
            async for token in tokens:
                yield token

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[Options],
    ) -> list[Result]:
        """`generate` for asyncio. Cancelling the task cancels the requests."""
        relay = self._relays.here()
        with self._core.commands.visit():
            requests = self._input_processor.requests(prompts, params, options, self)
        return await aio.generate(self._core, requests, relay)

    def sequence(
        self,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        lora: str | Mapping[str, float] | None = None,
    ) -> InteractiveSequences:
        """A sequence to be driven by hand, empty at first. `params`: how its tokens are chosen; it
        has no budget (`max_tokens` has no say), and nobody looks for stop strings: ArgumentError if
        there are any. `lora`: see `Options`. EngineClosed."""
        hand = self._input_processor.hand(
            params, priority, tenant, self._input_processor.loras.choose(lora)
        )
        with self._core.commands.visit():
            return InteractiveSequences(self, hand, self._input_processor.pieces)

    # -- the engine itself

    def stats(self) -> EngineStats:
        return stats_of(self._core)

    def trace(self) -> Trace:
        """The last steps (`n_trace` at most), oldest first: `pyllamabatch.step.trace.trace_dtype`
        says
        what of each. `pyllamabatch.step.trace.to_chrome` draws it."""
        core = self._core
        if core.trace is None:
            return np.zeros(0, dtype=trace_dtype(core.scheduler.n_slots))
        with core.state:
            table = core.trace.snapshot()
        return table()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests until `resume`, and wait until those that are open have ended: for
        `timeout` seconds at most (None: however long it takes), whereupon they go on. Whether all
        have ended, and nothing is being computed.

        Until `resume`, `submit` and its kin raise EngineDraining, those that wait for room in the
        line now included, and so do `Sequence.prompt`, `sample` and `fork`; what else a sequence
        can do, it can. Calls of sequences that are under way are waited for."""
        if timeout is not None:
            timeout = seconds_of("timeout", timeout)
        return self._wait_drained(self._core.drain(), timeout)

    def stop(self) -> None:
        """As `drain`, but what is open is cancelled, which takes no longer than one step."""
        self._wait_drained(self._core.drain(cancel=True), None)

    def resume(self) -> None:
        """Take requests again. Fine when it was not drained. EngineClosed."""
        self._core.commands.resume()

    async def adrain(self, timeout: float | None = None) -> bool:
        """`drain` for asyncio. Cancelling the task resumes nothing."""
        if timeout is not None:
            timeout = seconds_of("timeout", timeout)
        return await aio.outcome(self._core.drain(), timeout)

    async def astop(self) -> None:
        """`stop` for asyncio."""
        await aio.outcome(self._core.drain(cancel=True), None)

    def _wait_drained(self, drained: Future[bool], timeout: float | None) -> bool:
        if self._core.is_own_thread():  # a callback of a stream: it can't wait for itself
            timeout = 0
        try:
            return drained.result(timeout)
        except FutureTimeout:
            return False

    @property
    def loras(self) -> tuple[str, ...]:
        """The names that `Options.lora` may use."""
        return self._input_processor.loras.names

    @property
    def draining(self) -> bool:
        """No requests are taken until `resume`."""
        return self._core.commands.draining

    @property
    def closed(self) -> bool:
        """No more requests are taken; those that are open may still be running."""
        return self._core.commands.closed

    def close(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Free the context. Open requests are finished first (for `timeout` seconds at most, then
        cancelled), or with wait=False cancelled at once, which takes no longer than one step.
        Closing twice is fine."""
        self._core.close(wait=wait, timeout=timeout)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(wait=error is None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_seq_max} sequences, {self.n_ctx} cells"
        return f"<Engine {state}>"


def limits_of(context: Context, n_seq_max: int) -> Limits:
    """What a step on this context may not exceed, of whose slots `n_seq_max` may run at once."""
    can = context.capabilities
    n_cells_seq = min(context.n_ctx_seq, max_position(context.model) + 1)
    # A recurrent state has one size, however long the text: nobody takes cells from a neighbour.
    unified = can.unified and not can.recurrent
    return Limits(
        n_batch=context.n_batch,
        n_ubatch=context.n_ubatch,
        n_seq_max=n_seq_max,
        n_cells=context.n_ctx if unified else n_cells_seq * context.n_seq_max,
        n_cells_seq=n_cells_seq,
        unified=unified,
        gap_max=gap_max_of(context),
    )
