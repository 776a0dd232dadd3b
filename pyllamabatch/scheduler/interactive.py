"""Sequences that their owners drive by hand: a prompt now and then, one token at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..errors import RequestTooLong
from .placement import Placement
from .running import Entry

PATIENCE_SECONDS = 0.5


class InteractiveSequences(Placement):
    """The part of the scheduler that their owners talk to."""

    _patience: float
    cost: Any

    def check_fits(self, n_prompt: int, max_tokens: int) -> None:
        """RequestTooLong when the request could not finish even with the cache to itself. The
        token that is sampled last is never computed, so it needs no cell."""
        limit = min(self.limits.n_cells_seq, self.limits.n_cells)
        if n_prompt + max_tokens - 1 > limit:
            raise RequestTooLong(
                "prompt",
                f"{n_prompt} tokens",
                f"with max_tokens={max_tokens} it needs {n_prompt + max_tokens - 1} KV cells, "
                f"a sequence of this engine can have {limit}",
            )

    def extend(self, id: int, n: int, now: float | None = None) -> None:
        """`n` more tokens are known, all but the last of them to be computed. `now`: when its owner
        wanted that, for who learns how long he takes. RequestTooLong when they can never fit."""
        entry = self._interactive(id)
        view = self._running.seen(entry)
        known = view.known + n
        self.check_fits(known, 1)
        self._learn(id, now)
        self._steer(entry, replace(view, n_prompt=view.n_prompt + n, goal=known - 1))

    def ask(self, id: int, now: float | None = None) -> None:
        """Compute all that is known and sample the next token. `now`: as in `extend`."""
        entry = self._interactive(id)
        view = self._running.seen(entry)
        self.check_fits(view.known, 1)
        self._learn(id, now)
        self._steer(entry, replace(view, goal=view.known))

    def relax(self, id: int) -> None:
        """Compute nothing more until `extend` or `ask`."""
        entry = self._interactive(id)
        view = self._running.seen(entry)
        self._steer(entry, replace(view, goal=view.computed))

    def trim(self, id: int, known: int) -> int:
        """Only the first `known` tokens are left, at least 1. Returns how many of them stay in the
        cache: all but the last at most, for only a token that is computed can be sampled from."""
        entry = self._interactive(id)
        view = self._running.seen(entry)
        if not 1 <= known <= view.known:
            raise ValueError(f"{known} tokens are to stay of {view.known}")
        n_prompt = min(view.n_prompt, known)
        computed = min(view.computed, known - 1)
        if entry.slot < 0:
            self.admission.trim_saved(id, known)
        elif computed < view.computed:
            self.admission.trim(id, entry.slot, computed, self._tokens(entry))
        left = replace(view, n_prompt=n_prompt, generated=known - n_prompt, computed=computed)
        self._steer(entry, replace(left, goal=computed))
        return computed

    def hold(self, now: float) -> float:
        """Seconds that the next `plan` had better wait, unless something is added or asked for
        meanwhile: for interactive sequences that are about to ask, because there is nothing to do
        before somebody has rested for too long, or because the policy wants to wait. 0: now."""
        if self._wake is not None:
            return max(0.0, self._wake - now)
        n_ready = len(self._running.decoding) + len(self._prefilling.ids)
        if self._stuck:
            longest = self._idle.longest
            return 0.0 if longest is None else max(0.0, longest[1] + self._patience - now)
        if self._ready_at is None:
            self._ready_at = now
        held = self.accounting.used
        return self._idle.wait(now, self._ready_at, n_ready, self.cost, held)

    @property
    def n_awaited(self) -> int:
        """How many interactive sequences have to ask before it is worth to ask `hold` again sooner
        than it has said."""
        return 0 if self._stuck or self._wake is not None else self._idle.n_awaited

    # -- inside

    def _learn(self, id: int, now: float | None) -> None:
        if now is not None:
            self._idle.learn(id, now)

    def _interactive(self, id: int) -> Entry:
        entry = self._entry(id)
        if entry.view.goal is None:
            raise ValueError(f"sequence {id} is not driven by hand")
        return entry

    def _preempt_idle(self) -> tuple[tuple[int, int], ...]:
        """Preempt the sequence that rests longest, if that is too long and others need its room."""
        n_free = self.limits.n_seq_max - len(self._running.ids)
        if not self._stuck and (n_free or not self._waiting.ids):
            return ()
        longest = self._idle.longest
        if longest is None or self._now - longest[1] < self._patience:
            return ()
        return ((longest[0], self.preempt(longest[0])),)
