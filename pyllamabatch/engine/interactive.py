"""InteractiveSink: a request that stays until its owner closes it, and is told each thing to do.

One call at a time, `Call`, says what the owner waits for. A call that raises has changed nothing.
"""

import threading
from math import isnan
from time import perf_counter
from types import TracebackType
from typing import Any

import numpy as np

from ..errors import Cancelled, EngineClosed, SamplingError
from ..step.types import Finish
from . import snapshot
from .kv_executor import KvExecutor
from .request import Request, Sink, Tokens
from .results import FinishReason
from .slot_table import SlotTable
from .snapshot import Saved

NONE = int(Finish.NONE)
Token = tuple[int, float | None, int]
"""What was sampled: token, log-probability if it was asked for, `Finish`."""


class Call:
    """What an owner waits for: `value`, unless it raises `error`."""

    __slots__ = ("_done", "error", "value")

    def __init__(self) -> None:
        self._done = threading.Lock()
        self._done.acquire()
        self.value: Any = None
        self.error: Exception | None = None

    def finish(self, value: Any = None, error: Exception | None = None) -> None:
        self.value, self.error = value, error
        self._done.release()

    @property
    def pending(self) -> bool:
        return self._done.locked()

    def wait(self) -> Any:
        self._done.acquire()
        if self.error is not None:
            raise self.error
        return self.value


class InteractiveSink(Sink):
    """The core thread's, between two steps; `request` and `spent` are read by the owner, too.

    Each thing that the owner may ask for takes a `Call` and finishes it, now or after a step. It
    raises a PyllamabatchError instead where it is refused. `now`: when the owner asked.

    `spent`: the sampling state has come to its end, so the next `sample` brings another one."""

    def __init__(self, request: Request, table: SlotTable, kv: KvExecutor, context: Any) -> None:
        self.request = request
        self.spent = False
        self._table = table
        self._scheduler = table.scheduler
        self._stepper: Any = table.stepper
        self._kv = kv
        self._context = context
        self._call: Call | None = None
        self._back_to: int | None = None  # tokens before the call, where it adds some,
        self._aside: tuple[Any, int] | None = None  # and the sampling state that it replaces

    # -- what the owner asks for

    def prompt(self, tokens: Tokens, sampler: Any, now: float, call: Call) -> None:
        """These tokens come next. Finished when all but the last are computed."""
        request = self.request
        n = len(request.tokens)
        self._scheduler.check_fits(n + len(tokens), 1)
        aside = self._set_aside()
        self._begin(np.concatenate((request.tokens, tokens)), sampler)
        if n:
            self._scheduler.interactive.extend(request.id, len(tokens), now)
        else:
            request.arrival = now
            self._table.add(request)
        self._wait_for(call, n)
        self._aside = aside
        self.computed()

    def compute(self, call: Call) -> None:
        """All of its tokens but the last, as behind a prompt."""
        self._scheduler.interactive.extend(self.request.id, 0)
        self._wait_for(call, len(self.request.tokens))
        self.computed()

    def sample(self, sampler: Any, now: float, call: Call) -> None:
        """The next token: (token, logprob, finish). `sampler`: in place of one that is spent, else
        None."""
        self._scheduler.interactive.ask(self.request.id, now)
        if sampler is not None:
            self._begin(self.request.tokens, sampler)
        self._wait_for(call)

    def trim(self, n: int, sampler: Any, call: Call) -> None:
        """Only the first `n` tokens stay."""
        self._trim(n)
        if n:
            self._begin(self.request.tokens, sampler)
        call.finish()

    def save(self, call: Call) -> None:
        """It as bytes; None when it has given its cells up meanwhile."""
        self._kv.flush()
        request = self.request
        data = None
        if request.slot >= 0:
            data = snapshot.save(
                self._context,
                self._stepper,
                request.slot,
                request.tokens,
                None if self.spent else request.params,
                request.n_given,
                self._kv.adapters_of(request),
                self._scheduler.interactive.how_computed(request.id),
            )
        call.finish(data)

    def restore(self, saved: Saved, data: bytes, sampler: Any, call: Call) -> None:
        """It is what was saved."""
        request = self.request
        if len(request.tokens):
            self._trim(0)
            self._kv.flush()  # a state that was not loaded yet goes before this one is stored
        self._begin(saved.tokens, sampler)
        if saved.params is not None:
            request.params, request.n_given = saved.params, saved.n_prompt
        request.arrival, n_saved = perf_counter(), 0
        if self._scheduler.loads(saved.how):
            request.state, n_saved = data, saved.n_computed
        self._table.add(request, saved=n_saved, restored=saved.how)
        call.finish()

    def close_for(self, call: Call) -> None:
        """Its owner needs it no more."""
        self.close(EngineClosed("the sequence is closed"))
        call.finish()

    # -- what becomes of it

    def computed(self) -> None:
        if self._call is None or self._back_to is None:
            return
        if self._scheduler.sequence(self.request.id).remaining == 0:
            self._finish()

    def sampled(
        self, token: int, finish: Finish, logprob: float, error: SamplingError | None
    ) -> None:
        if error is not None:
            self.spent = True
            self._take_back(error)
            return
        tokens = np.concatenate((self.request.tokens, (token,)), dtype=np.int32)
        self._finish(self.given(tokens, token, finish, logprob))

    def refused(self) -> None:
        """None could be chosen, in a step that is accounted: it is as before."""
        self.spent = True
        self._trim(len(self.request.tokens))

    def given(self, tokens: Tokens, token: int, finish: int, logprob: float) -> Token:
        """Its tokens are these, the last of them the one that it was asked for."""
        self.request.tokens = tokens
        self.spent = finish != NONE
        return token, None if isnan(logprob) else logprob, finish

    def failed(self, error: Exception) -> None:
        self._take_back(error)

    def cancel(self, reason: FinishReason = "cancelled") -> None:
        self._take_back(Cancelled("the call was cancelled; the sequence is as it was before"))

    def close(self, error: Exception) -> None:
        if self.request.id in self._table.requests:
            self._table.end(self.request)
        self._finish(error=error)

    def abandon(self, error: Exception, lines: TracebackType | None) -> None:
        self._finish(error=error)

    # -- inside

    def _begin(self, tokens: Tokens, sampler: Any) -> None:
        """Sampling begins behind `tokens`."""
        self.request.tokens = tokens
        self._go_on(sampler, len(tokens))

    def _go_on(self, sampler: Any, n_given: int) -> None:
        """Sampling does, behind what is known: of these the first `n_given` were not sampled."""
        request = self.request
        request.n_given, request.sampler, self.spent = n_given, sampler, False
        if request.slot >= 0:
            self._stepper.put_slot(request.slot, sampler, request.next_row, report=True)

    def _wait_for(self, call: Call, back_to: int | None = None) -> None:
        self._call, self._back_to, self.request.n_restarts = call, back_to, 0

    def _set_aside(self) -> tuple[Any, int] | None:
        """Its sampling state, and how many tokens were given before that began; None: it has none
        that could go on."""
        request = self.request
        if self.spent or not len(request.tokens):
            return None
        if request.slot >= 0:
            self._stepper.take_slot(request.slot)
        return request.sampler, request.n_given

    def _finish(self, value: Any = None, error: Exception | None = None) -> None:
        call, self._call, self._aside = self._call, None, None
        if call is not None:
            call.finish(value, error)

    def _take_back(self, error: Exception) -> None:
        """The call has not happened."""
        if self._call is None:
            return
        n = len(self.request.tokens)
        before = n if self._back_to is None else self._back_to
        self.spent |= before < n
        self._trim(before)
        if self._aside is not None:
            self._go_on(*self._aside)
        self._finish(error=error)

    def _trim(self, n: int) -> None:
        request = self.request
        if n:
            self._scheduler.interactive.trim(request.id, n)
        else:
            self._table.end(request)
        request.tokens, request.n_given = request.tokens[:n], min(request.n_given, n)
