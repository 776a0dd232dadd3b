"""How each position was computed, where all numbers are to be as if their sequence were alone."""

from pyllamabatch.kv import KvOperation
from pyllamabatch.kv.grid import next_end
from pyllamabatch.scheduler import Invariance
from pyllamabatch.scheduler.step import Step

How = tuple[int, int] | None
"""The chunk that a position was computed in; None for a row that decodes."""


class SameBits:
    """Checks that a position is computed in the same way whenever it is computed again, that what
    comes from another sequence was computed as it would have been, and that rows are as wide as
    they have to be. `by_id`: how the positions of each sequence were computed first."""

    def __init__(self, invariance: Invariance) -> None:
        self._invariance = invariance
        self.by_id: dict[int, list[How]] = {}
        self._by_slot: dict[int, list[How]] = {}
        self._saved: dict[int, list[How]] = {}

    def carry_out(self, operation: KvOperation) -> None:
        """Whatever the memory has done with cells."""
        id, slot, n = operation.id, operation.slot, operation.n
        held = self._by_slot.get(slot, [])
        match operation.kind:
            case "remove":
                self._by_slot.pop(slot, None)
            case "trim" | "cut":
                self._by_slot[slot] = held[:n]
            case "copy":
                self._by_slot[slot] = self._by_slot[operation.source][:n]
            case "save":
                self._saved[id] = held
            case "store":
                self._saved[id] = self.by_id[id][:n]
            case "load":
                self._by_slot[slot] = self._saved.pop(id)
            case "discard":
                self._saved.pop(id, None)

    def placed(self, id: int, slot: int) -> None:
        """A sequence starts from what is in `slot`."""
        how, held = self.by_id.setdefault(id, []), self._by_slot.setdefault(slot, [])
        start, grid = len(how), self._invariance.grid
        while start < len(held):
            end = next_end(start, grid)
            how += [_how(start, end)] * (end - start)
            start = end
        assert held == how[: len(held)]

    def computed(self, step: Step, owner: dict[int, int], known: dict[int, int]) -> None:
        """A call of a step was. known: tokens by id."""
        rows: list[tuple[int, int, How]] = []
        for chunk in step.chunks:
            assert chunk.decodes == (chunk.n == 1)
            one = _how(chunk.start, chunk.start + chunk.n)
            rows += [(chunk.slot, at, one) for at in range(chunk.start, chunk.start + chunk.n)]
        rows += [(slot, known[owner[slot]] - 1, None) for slot in step.decode.tolist()]
        for slot, at, one in rows:
            how, held = self.by_id[owner[slot]], self._by_slot.setdefault(slot, [])
            assert len(held) == at <= len(how)
            held.append(one)
            if at == len(how):
                how.append(one)
            assert how[at] == one
        decodes = [slot for slot, _, one in rows if one is None]
        assert not decodes or len(decodes) == len(rows)
        assert len(rows) == 0 or decodes or len(step.chunks) == 1
        assert step.n_pad == self._invariance.width(decodes)
        assert step.n_pad == 0 or step.n_pad > max(decodes)

    def trim(self, id: int, known: int) -> int:
        """Of a sequence so many tokens are left. How many positions may stay as they are."""
        how = self.by_id.setdefault(id, [])
        n = min(len(how), known - 1)
        if n < len(how):
            one = how[n]
            if one is not None and one[0] < n:
                n = one[0]
        del how[n:]
        return n

    def check_request(self, id: int, n_prompt: int) -> None:
        """It was computed as it would have been alone."""
        expected: list[How] = []
        while len(expected) < n_prompt - 1:
            start = len(expected)
            end = min(next_end(start, self._invariance.grid), n_prompt - 1)
            expected += [_how(start, end)] * (end - start)
        how = self.by_id[id]
        assert how == expected + [None] * (len(how) - len(expected))


def _how(start: int, end: int) -> How:
    """One row alone decodes."""
    return (start, end) if end > start + 1 else None
