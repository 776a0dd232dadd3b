"""Interactive sequences: a prompt now and then, one token each time that its owner asks."""

from collections.abc import Callable
from dataclasses import replace

from .admission import Admission
from .idle import IdleSequences
from .invariance import Computed
from .running import Entry
from .sequences import Sequences
from .view import SequenceView


class Interactive:
    """What their owners ask for. `claim(id, n_cells)`: how many cells it fills is to be known.
    KeyError when there is no such sequence, ValueError when it is a request."""

    def __init__(
        self,
        sequences: Sequences,
        admission: Admission,
        idle: IdleSequences,
        claim: Callable[[int, int], None],
    ) -> None:
        self._sequences = sequences
        self._admission = admission
        self._idle = idle
        self._claim = claim

    def extend(self, id: int, n: int, now: float | None = None) -> None:
        """`n` more tokens are known, all but the last of them to be computed. `now`: when its owner
        wanted that, to learn how long it takes. RequestTooLong when they can never fit."""
        entry = self._entry(id)
        view = self._sequences.running.seen(entry)
        known = view.known + n
        self._claim(id, known)
        arrival = self._asked(view, now)
        more = view._replace(n_prompt=view.n_prompt + n, goal=known - 1, arrival=arrival)
        self._sequences.update(entry, more)

    def ask(self, id: int, now: float | None = None) -> None:
        """Compute all that is known and sample the next token. `now`: as in `extend`."""
        entry = self._entry(id)
        view = self._sequences.running.seen(entry)
        self._claim(id, view.known)
        arrival = self._asked(view, now)
        self._sequences.update(entry, view._replace(goal=view.known, arrival=arrival))

    def trim(self, id: int, known: int) -> int:
        """Only the first `known` tokens are left, at least 1. Returns how many of them stay in the
        cache: all but the last at most, for only a token that is computed can be sampled from, and
        with an `Invariance` whole chunks only."""
        entry = self._entry(id)
        view = self._sequences.running.seen(entry)
        if not 1 <= known <= view.known:
            raise ValueError(f"{known} tokens are to stay of {view.known}")
        n_prompt = min(view.n_prompt, known)
        computed = min(view.computed, known - 1)
        if entry.computed is not None:
            n_before = min(max(entry.computed.high, view.computed), known - 1)
            computed = min(view.computed, entry.computed.trim(known, n_before))
        self._claim(id, computed)
        if entry.slot < 0:
            self._admission.trim_saved(id, known)
        else:
            self._admission.trim(id, entry.slot, computed, entry.known_tokens())
        n_left = known - n_prompt
        left = view._replace(n_prompt=n_prompt, generated=n_left, computed=computed, goal=computed)
        self._sequences.update(entry, left)
        return computed

    def how_computed(self, id: int) -> Computed | None:
        """How its tokens were computed, in an object of its own; None where that does not
        matter."""
        entry = self._entry(id)
        how = entry.computed
        if how is None:
            return None
        high = max(how.high, self._sequences.running.seen(entry).computed)
        return replace(how, high=high, chunks=[*how.chunks])

    def _asked(self, view: SequenceView, now: float | None) -> float:
        """Its arrival from now on: when its owner asked, which tells how long it was idle."""
        if now is None:
            return view.arrival
        self._idle.learn(view.id, now)
        return now

    def _entry(self, id: int) -> Entry:
        entry = self._sequences[id]
        if entry.view.goal is None:
            raise ValueError(f"sequence {id} is not interactive")
        return entry
