"""Engine: many requests at once on one shared context."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from ..cost.model import CostModel
from ..errors import integer, number
from ..kv import Preemption, SwapSpace
from ..llama.host import PathLike
from ..llama.limits import MAX_CTX
from ..llama.lora import LoraAdapter
from ..llama.memory import Capabilities
from ..llama.model import Model
from ..scheduler import Gather, Invariance, Limits, Policy
from ..scheduler.idle import PATIENCE_SECONDS
from ..step.sampling_params import SamplingParams
from ..step.trace import StepTrace, Trace, trace_dtype
from . import relays
from .assembly import assemble
from .chat import Chat
from .core import CoreOptions, EngineCore
from .drafters import AnyDrafter
from .embedder import Embedders, Ranked
from .embedding_core import Vectors
from .followers import Followers
from .input_processor import InputProcessor, Prompt
from .memory_watch import MemoryWatch
from .options import BatchInvariant, EngineOptions, Options, policy_of
from .results import Chunk, Result, Token
from .sequence import Sequence as InteractiveSequence
from .stats import EngineStats, SlotState, slots_of, stats_of
from .stream import Stream

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Engine:
    """Runs requests together on one context of `model`, in a thread of its own.

        with Engine(model, n_seq_max=8) as engine:
            stream = engine.submit("Once upon a time", SamplingParams(max_tokens=50))
            for token in stream: print(token.text, end="")
            results = engine.generate(["one", "two", "three"])

    - n_seq_max: requests that run at once; others wait.
    - n_ctx: KV cells of all of them together. 0 chooses by the model and the memory that is free.
    - kv_unified: False gives each its own cells (a stream), True one pool to all of them. "auto"
      begins with streams, which are exact, where n_ctx / n_seq_max cells are of use, and by the
      cost model a pool is not faster; when a request needs more, they become a pool of n_ctx cells,
      and what runs is computed again. `engine.layout` says what there is, and why.
    - n_batch: rows of a step at most. n_ubatch: rows that the device computes at once, and by
      default the rows of a step while a sequence waits for its next token. None: by the device.
    - swa_full: layers with a sliding window keep all cells, as the prefix cache needs. Default:
      where that fits.
    - policy: which sequence runs when: an object or a name, see `pyllamabatch.scheduler`. Default
      `device_aware()`. One policy object serves one engine.
    - n_logprobs_max: the largest `SamplingParams.logprobs` that a request may ask for.
    - device_sampling: the device chooses candidates, so that whole rows of logits need not travel.
      "auto": where that is cheaper; see `Stepper`.
    - n_trace: how many of the last steps `trace` remembers; 0 for none.
    - max_waiting: requests that wait for their first slot at most; None: any number. `submit` says
      what happens to more. More than these come in together (`submit_n`) when no other waits.
    - gather: how long a step waits for interactive sequences that are about to ask: default
      `CostWindow()`, a fixed time `Window(200e-6)`, never `Window(0)`. patience: seconds that one
      of these may be idle while others wait for its room.
    - cost: what a step costs on this device, for policies that ask: a `CostModel`, None, or "auto",
      from a stored profile (`pyllamabatch calibrate`) or a prior. The engine's own steps refine it.
    - prefix_cache: what requests leave stays cached until its cells are needed, so that one with
      the same prefix (a system prompt, the next turn of a conversation) starts from there. Streams
      are copied for that to some beside those that run: a quarter more cells.
    - preemption: what happens to a request that has to give up its cells: "recompute" later,
      "swap" its state to the host and back, "auto" for what is cheaper by the rates measured so far
      (`pyllamabatch.kv.swap`). swap_bytes: host memory for swapped states. More of them go to files
      in swap_folder (default: the system's for temporary files).
    - max_restarts: fresh contexts that a request, or a call of an interactive sequence, may cost.
      When llama_decode fails twice in a row for a reason of the backend's, a fresh context takes
      the place of the one that failed, and what ran is computed again. A request that was in such
      steps more often ends with the error. 0: at once, and the context stays.
    - batch_invariant: tokens and logits of a request are the same to the last bit, whatever runs
      beside it, and whenever: see "Batch invariance" in the documentation. On a CPU, with streams,
      for models without a recurrent state, else UnsupportedOperation. `invariance` says how it is
      done. What it costs is in there, too. "nearly": on a GPU what its kernels allow, without the
      promise; on a CPU the same as True.
    - loras: adapters by the names that requests give them (`Options.lora`). Rows with different
      ones can't be in one decode: a step is as many native calls as it has sets of adapters.
    - machine: a profile's name or file. The engine then runs on a machine of which only that
      profile is there (`pyllamabatch.machine`): it computes nothing, and takes the time that the
      profile says, on one GPU for all engines on that machine. Answers say that no model wrote
      them. Of `model` only the vocabulary is used; by default the embedded one's.
    - speculate: lets a step check several tokens of a sequence, where by what they were worth so
      far and by the cost model that gives more tokens a second; answers are the same. "ngram": what
      followed the same tokens earlier in a request's text. "draft:FILE" or a `Model`: what a
      smaller model with the same vocabulary drafts; "draft": the one that ships with the embedded
      model. "mtp": what a layer of the model itself predicts. Or a drafter of your own
      (`pyllamabatch.engine.drafters`). Models with a recurrent state keep n_rs_seq snapshots of it
      then, 4 by default, for as many drafted tokens; UnsupportedOperation for those of which
      libllama has none. "auto": "ngram", but for such models, as snapshots take memory and time,
      with `batch_invariant`, on a `machine`, and where no policy decides by a cost model whether
      that pays. None: never.
    - context_params: any other parameter of `Context`.

    A request that fails ends alone. Raises UnsupportedOperation for models with an encoder and for
    embedding models, and NotEnoughMemory, before anything is allocated, for an n_ctx that does not
    fit."""

    def __init__(
        self,
        model: Model | None = None,
        *,
        n_seq_max: int = 16,
        n_ctx: int = 0,
        kv_unified: bool | Literal["auto"] = "auto",
        n_batch: int = 2048,
        n_ubatch: int | None = None,
        policy: Policy | str | None = None,
        n_logprobs_max: int = 20,
        device_sampling: bool | str = "auto",
        n_trace: int = 4096,
        max_waiting: int | None = None,
        gather: Gather | None = None,
        patience: float = PATIENCE_SECONDS,
        cost: CostModel | Literal["auto"] | None = "auto",
        prefix_cache: bool = True,
        preemption: Preemption = "auto",
        swap_bytes: int = 2**30,
        swap_folder: PathLike | None = None,
        max_restarts: int = 2,
        loras: Mapping[str, LoraAdapter] | None = None,
        batch_invariant: BatchInvariant = False,
        machine: PathLike | None = None,
        speculate: AnyDrafter | Model | str | None = "auto",
        **context_params: Any,
    ) -> None:
        options = EngineOptions(
            n_seq_max=n_seq_max,
            policy=policy_of(policy),
            n_logprobs_max=n_logprobs_max,
            device_sampling=device_sampling,
            n_trace=n_trace,
            max_waiting=max_waiting,
            gather=gather,
            patience=patience,
            cost=cost,
            prefix_cache=prefix_cache,
            preemption=preemption,
            swap_bytes=swap_bytes,
            swap_folder=swap_folder,
            max_restarts=max_restarts,
            loras={} if loras is None else loras,
            batch_invariant=batch_invariant,
            speculate=speculate,
        )
        context_params |= {
            "n_ctx": integer("n_ctx", n_ctx, 0, MAX_CTX),
            "n_batch": n_batch,
            "n_ubatch": n_ubatch,
        }
        context_params["kv_unified"] = kv_unified
        parts = assemble(model, options, context_params, machine)
        context = parts.context
        self.model = context.model
        self.machine = None if machine is None else Path(machine).stem
        """The profile of the machine that it runs on; None for this one."""
        self.n_batch: int = context.n_batch
        self.n_ubatch: int = context.n_ubatch
        self.n_seq_max: int = options.n_seq_max
        self.n_logprobs_max: int = options.n_logprobs_max
        self._layout = parts.layout
        self._context: Any = context
        self._stepper = parts.device.stepper
        self._relays = relays.Relays()
        self._embedders = Embedders(context)
        space = SwapSpace(options.swap_bytes, options.swap_folder)
        trace = StepTrace(options.n_trace, context.n_seq_max) if options.n_trace else None
        limits = CoreOptions(trace, space, options.max_waiting, options.max_restarts)
        self._core = EngineCore(parts.scheduler, parts.device, limits)
        self._inputs = InputProcessor(
            self.model, self._core, self._stepper, parts.adapters, options.prefix_cache
        )
        # Also when the engine is forgotten, and before the interpreter exits.
        self._finalizer = weakref.finalize(self, self._core.close, wait=False, timeout=None)
        self._core.start()
        MemoryWatch(space, self._core.commands.post, self._core.shrink).start(self._core.thread)

    # -- what there is

    @property
    def n_ctx(self) -> int:
        """KV cells of the sequences that run, all together."""
        return self.limits.n_cells

    @property
    def n_ctx_seq(self) -> int:
        """KV cells that one sequence can have at most: where streams may become a pool, all."""
        return self._core.scheduler.most_cells

    @property
    def limits(self) -> Limits:
        """What a step may not exceed, and how the cells are divided."""
        return self._core.scheduler.limits

    @property
    def layout(self) -> str:
        """How the KV cells are divided, and why."""
        became = self.limits.unified and not self._layout.unified
        return "one pool of cells: a sequence needed it" if became else str(self._layout)

    @property
    def reasons(self) -> dict[str, str]:
        """Why the context has the sizes that it has, by the name of the option."""
        return {"layout": self.layout, **self._layout.reasons}

    @property
    def invariance(self) -> Invariance | None:
        """What `batch_invariant` does here; None without it."""
        return self._core.scheduler.invariance

    @property
    def capabilities(self) -> Capabilities:
        """What the memory of the context can do."""
        return cast("Capabilities", self._context.capabilities)

    @property
    def cost(self) -> CostModel | None:
        """The cost model that policies ask."""
        return cast("CostModel | None", self._core.scheduler.cost)

    # -- requests

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        queue_timeout: float | None = None,
        **options: Unpack[Options],
    ) -> Stream:
        """Add a request and return at once, or as soon as there is room.

        `prompt`: text, or token ids as they are. `options`: see `Options`. `queue_timeout`: seconds
        to wait for room while `max_waiting` requests wait for a slot, before QueueFull; None: as
        long as it takes; in a callback of a stream always 0. The request's deadline ends the wait,
        too, and the request.

        Raises before anything has started: ArgumentError for an empty prompt, tokens that are not
        in the vocabulary and parameters that do not suit the model, RequestTooLong when prompt and
        max_tokens can never fit, GrammarError, TokenizeError, QueueFull, EngineDraining,
        EngineClosed."""
        seconds = _seconds("queue_timeout", queue_timeout)
        with self._core.commands.keep_alive():
            sink = self._inputs.request(prompt, params, options, self)
            self._core.submit([sink], seconds)
        return sink.stream

    def submit_n(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        n: int = 1,
        *,
        queue_timeout: float | None = None,
        **options: Unpack[Options],
    ) -> list[Stream]:
        """`n` samples of one prompt, which is computed once: each a request of its own, with the
        seeds `seed`, `seed + 1`, ... (as vLLM's), or random ones without. Otherwise as `submit`.

        Prompts of up to 16 tokens are computed n times, and so are those of recurrent and hybrid
        models in an engine with prefix_cache=False."""
        params = params or SamplingParams()
        return self.submit_all([prompt], [params], n, queue_timeout=queue_timeout, **options)

    def submit_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        n: int = 1,
        *,
        queue_timeout: float | None = None,
        **options: Unpack[Options],
    ) -> list[Stream]:
        """All prompts together or none: `n` samples of each, in their order. `params`: one for all,
        or one each. Otherwise as `submit` and `submit_n`."""
        n, seconds = integer("n", n, 1, 2**16), _seconds("queue_timeout", queue_timeout)
        with self._core.commands.keep_alive():
            sinks = self._inputs.requests(prompts, params, options, self, n)
            self._core.submit(sinks, seconds)
        return [sink.stream for sink in sinks]

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[Options],
    ) -> list[Result]:
        """Run all prompts together and wait for them: the results in the same order.

        `params`: one for all, or one each. `options`: of all, see `Options`. A prompt that `submit`
        would refuse raises, and nothing is started. One that fails later has `finish_reason`
        "error" and an `error`. Where `max_waiting` is less than they are, it waits for room."""
        commands = self._core.commands
        with commands.keep_alive():
            sinks = self._inputs.requests(prompts, params, options, self)
        streams = [sink.stream for sink in sinks]
        try:
            with commands.keep_alive():
                for group in self._core.groups(sinks):
                    self._core.submit(group)
            return [stream.wait() for stream in streams]
        except BaseException:  # interrupted: they are not wanted any more
            for stream in streams:
                stream.cancel()
            raise

    async def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncGenerator[Token, None]:
        """`submit` for asyncio: `async for token in engine.stream(prompt)`. The request is made at
        the first step of the loop, which waits while there is no room. Leaving the loop, or
        cancelling its task, cancels the request (where it matters when, use
        `contextlib.aclosing`). Raises what `submit` raises, and the request's error at the end."""
        stream = await self.asubmit(prompt, params, **options)
        async with aclosing(self.chunks(stream)) as chunks:
            async for chunk in chunks:
                for token in stream.between(chunk.start, chunk.stop):
                    yield token

    async def asubmit(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Stream:
        """`submit` for asyncio: waits while there is no room. Then `chunks` reads it."""
        relay = self._relays.here()
        with self._core.commands.keep_alive():
            sink = self._inputs.request(prompt, params, options, self)
        await relays.submit(self._core, [sink], relay)
        return sink.stream

    def chunks(self, stream: Stream) -> AsyncGenerator[Chunk, None]:
        """A submitted request for asyncio, as `stream`, but all that is new comes at once. A step's
        news of all streams wake the event loop once, in which this is called."""
        return relays.chunks(stream, self._relays.here())

    def followers(
        self, observe: Callable[[float, int], None] = lambda seconds, n: None
    ) -> Followers:
        """As `chunks`, but for many streams of the running event loop: what is new of all of them
        comes in one pass, which costs less. `observe`: see `Followers`."""
        return Followers(self._relays.here(), observe)

    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[Options],
    ) -> list[Result]:
        """`generate` for asyncio. Cancelling the task cancels the requests."""
        relay = self._relays.here()
        with self._core.commands.keep_alive():
            sinks = self._inputs.requests(prompts, params, options, self)
        return await relays.generate(self._core, sinks, relay)

    def sequence(
        self,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        lora: str | Mapping[str, float] | None = None,
    ) -> InteractiveSequence:
        """A sequence that its owner drives call by call, empty at first.

        `params`: how its tokens are chosen. It has no budget: `max_tokens` has no say. Stop strings
        are an ArgumentError: its owner looks for them. `lora`: see `Options`. EngineClosed."""
        with self._core.commands.keep_alive():
            sink = self._inputs.interactive(params, priority, tenant, lora)
            return InteractiveSequence(sink, self._core, self._inputs, self)

    @property
    def chat(self) -> Chat:
        """Conversations: `engine.chat(messages)` gives the answer, see `Chat`."""
        return Chat(self)

    # -- vectors of texts

    def embed(self, texts: Sequence[Prompt], *, normalize: bool = True) -> Vectors:
        """A vector for each text: `Embedder.embed`, with the pooling of the model, else the mean.
        The first call makes an `Embedder` on the engine's weights, which is closed with it; for
        another pooling, and for a model that only makes vectors, make one of your own."""
        return self._embedders.of("embed").embed(texts, normalize=normalize)

    async def aembed(self, texts: Sequence[Prompt], *, normalize: bool = True) -> Vectors:
        """`embed` for asyncio."""
        embedder = await asyncio.to_thread(self._embedders.of, "embed")
        return await embedder.aembed(texts, normalize=normalize)

    def rerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None
    ) -> list[Ranked]:
        """Documents by their relevance, the best first: `Embedder.rerank`."""
        return self._embedders.of("rank").rerank(query, documents, top_n=top_n)

    async def arerank(
        self, query: str, documents: Sequence[str], *, top_n: int | None = None
    ) -> list[Ranked]:
        """`rerank` for asyncio."""
        embedder = await asyncio.to_thread(self._embedders.of, "rank")
        return await embedder.arerank(query, documents, top_n=top_n)

    # -- the engine itself

    def stats(self) -> EngineStats:
        """What it has done until now."""
        return replace(stats_of(self._core), reasons=self.reasons)

    def slots(self) -> list[SlotState]:
        """What runs in each slot."""
        return slots_of(self._core)

    def trace(self, n: int | None = None) -> Trace:
        """The last `n` steps (`n_trace` at most), oldest first, as a structured array:
        `pyllamabatch.step.trace.trace_dtype`. `pyllamabatch.step.trace.to_chrome` draws it."""
        core = self._core
        n = None if n is None else integer("n", n, 0, 2**63 - 1)
        if core.trace is None:
            return np.zeros(0, dtype=trace_dtype(core.scheduler.n_slots))
        with core.seen():
            table = core.trace.snapshot(n)
        return table()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests until `resume`, and wait until those that are open have ended: for
        `timeout` seconds at most (None: however long it takes), whereupon they go on. Whether all
        have ended, and nothing is being computed.

        Until `resume`, `submit` and its kin raise EngineDraining, also where they wait for room
        already, and so do `Sequence.prompt`, `sample` and `fork`. Calls of sequences that are under
        way are waited for."""
        seconds = _seconds("timeout", timeout)
        return self._wait_drained(self._core.drain(), seconds)

    def stop(self) -> None:
        """As `drain`, but what is open is cancelled, which takes no longer than one step."""
        self._wait_drained(self._core.drain(cancel=True), None)

    def resume(self) -> None:
        """Take requests again. Fine when it was not drained. EngineClosed."""
        self._core.commands.resume()

    async def adrain(self, timeout: float | None = None) -> bool:
        """`drain` for asyncio. Cancelling the task resumes nothing."""
        seconds = _seconds("timeout", timeout)
        return await relays.outcome(self._core.drain(), seconds)

    async def astop(self) -> None:
        """`stop` for asyncio."""
        await relays.outcome(self._core.drain(cancel=True), None)

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
        return self._inputs.loras.names

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
        self._core.close(wait=wait, timeout=_seconds("timeout", timeout))
        self._embedders.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(wait=error[0] is None)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.n_seq_max} sequences, {self.n_ctx} cells"
        return f"<Engine {state}>"


def _seconds(name: str, given: float | None) -> float | None:
    """That a lock can wait for. None: no limit."""
    return None if given is None else min(number(name, given, 0), TIMEOUT_MAX)
